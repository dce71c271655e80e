"""The one exception that means "the user must change something"."""


class InputError(ValueError):
    """Bad input. Its text is one line: what, where, what was expected, what to do next.

    The command line prints it without a traceback and exits with code 2.
    """


def reason_of(error: Exception) -> str:
    """What a library's error says, in one line: its first that says more than a heading."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    told = next((line for line in lines if not line.endswith(":")), "")
    return told or type(error).__name__
