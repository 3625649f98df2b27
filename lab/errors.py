"""The errors a user can cause: one clear line each; the command line prints it and exits with 2."""
import sys


class LabError(ValueError):
    """Bad input or an impossible request. The message says what is wrong and what to do about it."""


class Unavailable(LabError):
    """A backend, package or device that this machine does not have. The message says what to install."""


def error_text(error: BaseException) -> str:
    """An exception as one short line for a record."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}"[:300]


def one_line(text: str) -> str:
    """`text` as one line in which nothing steers a terminal: a control character is shown as its escape (\\x1b)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def warn(message: str) -> None:
    """Says on standard error what was left out or will be slow, in one line."""
    print(f"lab: {one_line(message)}", file=sys.stderr, flush=True)
