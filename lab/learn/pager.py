"""Long text on a terminal goes through a pager: that of $PAGER, or else less, as git does it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys


def command() -> list[str] | None:
    """The pager to use; None where the output is no terminal, $PAGER is empty or cat, or there is none."""
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        return None
    words = shlex.split(os.environ.get("PAGER", "less"))
    if not words or words[0] == "cat" or shutil.which(words[0]) is None:
        return None
    return words


def show(text: str, words: list[str]) -> None:
    """Pipes text through a pager, which the user may leave at any time. less shows colours, and ends by
    itself if the text fits the screen, unless $LESS says otherwise."""
    environment = {"LESS": "FRX", **os.environ}
    with subprocess.Popen(words, stdin=subprocess.PIPE, text=True, env=environment) as pager:
        try:
            pager.communicate(text)
        except BrokenPipeError:  # the user has seen enough
            pass
        except KeyboardInterrupt:  # Ctrl-C is the pager's, which still runs
            pager.wait()
