"""The one exception that means "the user must change something"."""


class InputError(ValueError):
    """Bad input. Its text is one line: what, where, what was expected, what to do next.

    The command line prints it without a traceback and exits with code 2.
    """
