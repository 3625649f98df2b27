"""What the ops that pass data between ranks share: the memory through which they do it.

A rank is one of the processes that run a model together, each with a GPU of its own (on a CPU: with a part of
a shared file). Each rank has an inbox, into which the others store 64-bit words: 32 bits of data and a 32-bit
tag. A word is written in one access, so a reader that finds the tag it expects has the data, too, and no
fence and no barrier is needed.

  inbox int64 [2, ranks, capacity]: a slot for the words of each sender, twice
  launches int32 [BLOCKS]: how often block b has exchanged words, on this rank

The tag of a block's words is the number of its launches, this one included, so a CUDA graph can be replayed:
the number is kept in memory. Odd and even tags take turns with the two halves of the inbox. A rank that
writes a slot for the second time after a launch has received words of the launch between, which its peers
sent after they had read the slot. Word i of a slot always belongs to the same block, whatever the sizes of a
launch: i // WORDS % BLOCKS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from lab.contract import Rand, refuse
from lab.errors import LabError

WORDS = 256  # words that a block exchanges at a time; kExchangeWords of cuda_src/core/exchange.cuh
BLOCKS = 128  # the most blocks of a launch; kExchangeBlocks there
TAG_BITS = 32


@dataclass
class Exchange:
    """One rank's view of the inboxes.

    inboxes: those of all ranks in their order, as tensors that this process can reach. A single one, with
    several ranks, is a loopback: what the rank sends to another arrives in its own inbox as if that one had
    sent the same (in all_reduce_add in one shot alone). table int64 [ranks]: their addresses. group: of
    torch.distributed, for the torch backend; None where the ranks are simulated by one process.
    two_shot_bytes: from how many bytes on all_reduce_add takes two shots, the same number on all ranks; None:
    as its contract says.
    """

    rank: int
    ranks: int
    inboxes: tuple[torch.Tensor, ...]
    table: torch.Tensor
    launches: torch.Tensor
    group: object = None
    two_shot_bytes: int | None = None

    @classmethod
    def of(cls, rank: int, inboxes: tuple[torch.Tensor, ...], ranks: int, group=None) -> Exchange:
        device = inboxes[0].device
        table = torch.zeros(ranks, dtype=torch.int64, device=device)
        launches = torch.zeros(BLOCKS, dtype=torch.int32, device=device)
        exchange = cls(rank, ranks, tuple(inboxes), table, launches, group)
        exchange.readdress()
        return exchange

    def readdress(self):
        """Writes the present addresses of the inboxes into `table`."""
        if self.loopback:
            first, slot = self.own.data_ptr(), self.capacity * self.own.itemsize
            addresses = [first + (peer - self.rank) * slot for peer in range(self.ranks)]
        else:
            addresses = [inbox.data_ptr() for inbox in self.inboxes]
        self.table.copy_(torch.tensor(addresses, dtype=torch.int64))

    @property
    def loopback(self) -> bool:
        return len(self.inboxes) < self.ranks

    @property
    def own(self) -> torch.Tensor:
        """This rank's inbox."""
        return self.inboxes[0 if self.loopback else self.rank]

    @property
    def capacity(self) -> int:
        """Words of a slot."""
        return self.own.shape[2]

    @property
    def pointers(self) -> tuple[int, int, int, int, int]:
        """What the CUDA launchers take: struct PeerWords of cuda_src/launchers/arguments.h."""
        return self.table.data_ptr(), self.launches.data_ptr(), self.capacity, self.rank, self.ranks

    def gathered(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """What each rank has sent in the launch that comes next, int32 like `mine`, by torch. For ranks
        that one process simulates: all words must have arrived."""
        if self.loopback:
            return [mine] * self.ranks
        tags = self.launches + 1
        block = torch.arange(mine.numel(), device=mine.device) // WORDS % BLOCKS
        found = []
        for rank in range(self.ranks):
            words = self.own[(tags[block] & 1).long(), rank, torch.arange(mine.numel(), device=mine.device)]
            found.append(mine if rank == self.rank else words.to(torch.int32).view(mine.shape))
        return found


def patience(default: float) -> float:
    """Seconds for which a rank waits for another one: LAB_PEER_SECONDS, which the host build reads, too.
    Raises LabError where it is no number above 0."""
    given = os.environ.get("LAB_PEER_SECONDS", "")
    try:
        seconds = float(given or default)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise LabError(f"LAB_PEER_SECONDS {given!r}: it must be a number of seconds above 0")
    return seconds


def sender_at(inboxes: tuple[torch.Tensor, ...], address: int) -> int | None:
    """The rank that writes the word at this address of an inbox; None for an address elsewhere."""
    for inbox in inboxes:
        at = address - inbox.data_ptr()
        if inbox.dim() == 3 and 0 <= at < inbox.nbytes:
            return at // inbox[0, 0].nbytes % inbox.shape[1]
    return None


def new_inbox(ranks: int, capacity: int, device) -> torch.Tensor:
    return torch.zeros(2, ranks, capacity, dtype=torch.int64, device=device)


def words_of(t: torch.Tensor) -> torch.Tensor:
    """The bits of a contiguous tensor as int32 [words]."""
    return t.view(-1).view(torch.int32)


def owners(count: int, ranks: int, device) -> torch.Tensor:
    """int64 [count]: which rank adds each word, where one does it for all. What a block has in one pass is
    added by one rank."""
    return torch.arange(count, device=device) // WORDS % ranks


def simulated(rand: Rand, sent: list[torch.Tensor], rank: int, loopback: bool) -> Exchange:
    """An exchange for one rank alone, with a random number of launches behind it. sent: int32 [words], what
    each rank sends in the next launch. It has arrived already, or comes by loopback."""
    ranks, count = len(sent), sent[0].numel()
    capacity = count + count % 2 + 6  # more than is needed, so that a slot's length matters
    inboxes = tuple(new_inbox(ranks, capacity, rand.device) for _ in range(1 if loopback else ranks))
    exchange = Exchange.of(rank, inboxes, ranks)
    exchange.launches.copy_(rand.integers(-(1 << 31), (1 << 31) - 1, BLOCKS))
    if not loopback:
        index = torch.arange(count, device=rand.device)
        tags = (exchange.launches + 1)[index // WORDS % BLOCKS].long()
        for peer, words in enumerate(sent):
            if peer != rank:
                arrived = tags << TAG_BITS | words.long() & (1 << TAG_BITS) - 1
                exchange.own[tags & 1, peer, index] = arrived
    return exchange


def check_exchange(op: str, exchange: Exchange, words: int, device: int) -> None:
    """Raises LabError for an exchange that cannot take this many words from each rank."""
    e = exchange
    if not (isinstance(e, Exchange) and 0 <= e.rank < e.ranks and len(e.inboxes) in (1, e.ranks)):
        refuse(op, "exchange must be a lab.ops.exchange.Exchange with a rank below its number of ranks")
    for inbox in e.inboxes:
        if inbox.dtype != torch.int64 or inbox.shape != (2, e.ranks, e.capacity) or e.capacity % 2:
            refuse(op, "each inbox must be int64 [2, ranks, capacity], with an even capacity")
    if e.table.dtype != torch.int64 or e.table.shape != (e.ranks,):
        refuse(op, "exchange.table must be int64 [ranks]")
    if e.launches.dtype != torch.int32 or e.launches.shape != (BLOCKS,):
        refuse(op, f"exchange.launches must be int32 [{BLOCKS}]")
    if words > e.capacity:
        refuse(op, f"a call exchanges {words} words, and a slot of the inbox has {e.capacity}")
    if e.own.get_device() != device or e.table.get_device() != device or e.launches.get_device() != device:
        refuse(op, "the exchange must be on the device of the other tensors")
