"""The errors a user can cause: one clear line each; the command line prints it and exits with 2."""


class LabError(ValueError):
    """Bad input or an impossible request. The message says what is wrong and what to do about it."""


class Unavailable(LabError):
    """A backend, package or device that this machine does not have. The message says what to install."""


def one_line(error):
    """An exception as one short line for a record."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}"[:300]
