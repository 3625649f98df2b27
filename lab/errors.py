"""The errors that a user can cause. The command line prints each as one line and exits with status 2."""

import sys

LONGEST = 10_000  # characters of an exception's text that are used


class LabError(ValueError):
    """Bad input or an impossible request. The message says what is wrong and what to do about it."""


class Unavailable(LabError):
    """A backend, package or device that this machine does not have. The message says what to install."""


def error_text(error: BaseException) -> str:
    """An exception as one short line for a record."""
    try:
        text = one_line(str(error)[:LONGEST]) or type(error).__name__
    except Exception:  # an exception class of a user may raise in __str__
        text = "(its text cannot be read)"
    return one_line(f"{type(error).__name__}: {text}")[:300]


def one_line(text: str) -> str:
    """`text` as one line without control characters: each is shown as its escape (\\x1b)."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """`text` with each character that would control a terminal or begin a line shown as its escape
    (\\x1b)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(message: str) -> None:
    """Prints a warning of one line to standard error, such as what was left out or will be slow."""
    print(f"lab: {one_line(message)}", file=sys.stderr, flush=True)


def named(name: str, longest: int = 80) -> str:
    """A name from a file, for a message: unchanged if it is short and printable."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= longest else text[:longest] + "..."


def shown(value, longest: int = 60, quotes: bool = True) -> str:
    """A value from a file as one short line for a message, with control characters escaped so that none
    reaches a terminal.

    longest: characters; longer text is cut off. quotes: whether a text is quoted, as Python writes it.
    """
    if isinstance(value, str):
        text = repr(value[: longest + 1])
        text = text if quotes else text[1:-1]
    else:
        try:
            text = ascii(value)
        except (ValueError, RecursionError):  # an integer of too many digits, a list nested too deep
            text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= longest else text[: longest - 3] + "..."
