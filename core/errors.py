"""InputError, the exception for everything that the user has to change."""


class InputError(ValueError):
    """Bad input. Its text is one line: what, where, what was expected, what to do next.

    The command line prints it without a traceback and exits with code 2.
    """


_MOST = 400
"""Characters of a library's message, which may quote whole files."""


def reason_of(error: Exception) -> str:
    """Return a library's error message in one line: the first line that is not a heading."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    told = next((line for line in lines if not line.endswith(":")), "")
    return told[:_MOST] + "..." * (len(told) > _MOST) or type(error).__name__
