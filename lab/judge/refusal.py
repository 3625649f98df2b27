"""Why a kernel is not accepted."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """kind: in a few words, as "unwritten output". seen: what was seen, and where it helps what to do; one
    line."""

    kind: str
    seen: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.seen}"
