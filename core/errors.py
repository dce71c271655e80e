"""InputError, the exception for everything that the user has to change."""


class InputError(ValueError):
    """Bad input. Its text is one line: what, where, what was expected, what to do next.

    The command line prints it without a traceback and exits with code 2. Characters that a terminal
    would not show, such as those of a name in a hostile file, are escaped.
    """

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """Escape line ends, control characters and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(name: str) -> str:
    """Shorten a name from a file to one line."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= 80 else f"{text[:80]}..."


_MOST = 240
"""Characters of a library's message, which may quote whole files."""


def is_panic(error: BaseException) -> bool:
    """Return whether a library in Rust has failed, which is no `Exception` in Python."""
    return type(error).__name__ == "PanicException"


def reason_of(error: Exception) -> str:
    """Return a library's error message in one line: the first line that is not a heading."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    told = next((line for line in lines if not line.endswith(":")), "")
    return told[:_MOST] + "..." * (len(told) > _MOST) or type(error).__name__
