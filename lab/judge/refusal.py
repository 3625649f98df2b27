"""Why a kernel is not accepted."""

from dataclasses import dataclass

from lab.errors import one_line

LONGEST = 500  # characters


@dataclass(frozen=True)
class Refusal:
    """kind: in a few words, as "unwritten output". seen: what was seen, and where it helps what to do; one
    line."""

    kind: str
    seen: str

    def __str__(self) -> str:
        return one_line(f"{self.kind}: {self.seen}")[:LONGEST]
