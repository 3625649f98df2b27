"""The errors a user can cause: one clear line each; the command line prints it and exits with 2."""


class LabError(ValueError):
    """Bad input or an impossible request. The message says what is wrong and what to do about it."""


class Unavailable(LabError):
    """A backend, package or device that this machine does not have. The message says what to install."""


def shown(value, longest: int = 60, quotes: bool = True) -> str:
    """A value from a file as one short line for a message: control characters escaped, so that none reaches a terminal.

    longest: characters, more are cut off. quotes: around a text, as Python writes it.
    """
    if isinstance(value, str):
        text = repr(value[:longest + 1])
        text = text if quotes else text[1:-1]
    else:
        try:
            text = ascii(value)
        except (ValueError, RecursionError):        # an integer of too many digits, a list nested too deep
            text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= longest else text[:longest - 3] + "..."
