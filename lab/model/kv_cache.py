"""A paged KV cache: fixed-size pages, handed to sequences as they grow, found through a block table.

Token t of sequence b in layer l lies in page block_table[b, t // page_size], row t % page_size:
    k[l][page, kv_head, row, :]
A page holds `page_size` tokens of one sequence in every layer, or of several that begin alike (`share`). The
page numbers are decided on the host; the kernels read them from the block table on the device, so that a
captured CUDA graph keeps working while sequences grow. A quantised cache holds codes, and scales beside them
(lab/formats/kv.py).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping

import torch

from lab.errors import LabError
from lab.formats import kv
from lab.model.description import ModelConfig
from lab.model.memory import require_memory
from lab.names import known

PAGE_SIZES = (16, 32, 64, 128, 256)


def kv_dtype_of(option: str | None) -> str | None:
    """The option --kv-dtype: a format of lab/formats/kv.py, or None (auto) for a cache in the model's dtype.
    Raises LabError for a name that is unknown."""
    name = known(option or "auto", ("auto", *kv.DTYPES), "KV dtype")
    return None if name == "auto" else name


def token_bytes(config: ModelConfig, dtype: torch.dtype, kv_dtype: str | None = None) -> int:
    """Bytes of one token's keys and values in all layers, scales of heads included."""
    if kv_dtype is not None:
        dtype = kv.DTYPES[kv_dtype]
    return 2 * config.layers * config.kv_heads * (config.head_dim * dtype.itemsize + kv.scale_bytes(dtype))


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


class PagedKVCache:
    """k, v: [layers, pages, kv_heads, page_size, head_dim]; block_table: int32 [sequences, max_pages] on the
    device. k_scales, v_scales: those of each layer, [layers, ...] as lab/formats/kv.py says, or None.

    kv_dtype: "fp8" or "int8"; None keeps keys and values in `dtype`. scales: (of K, of V) of each layer in
    fp8, 1 where it is not given.

    pages: size of the pool; by default enough for every sequence to reach max_context.
    shuffle: hand pages out in a seeded random order, so that a kernel that assumes neighbouring pages fails.
    Raises LabError for a page size that the kernels do not take and for a context that the model cannot
    attend to.
    """

    def __init__(
        self,
        config: ModelConfig,
        sequences: int,
        max_context: int,
        dtype: torch.dtype,
        device: str | torch.device,
        page_size: int = 16,
        pages: int | None = None,
        shuffle: bool = True,
        kv_dtype: str | None = None,
        scales: Iterable[tuple[float, float]] | None = None,
    ):
        if page_size not in PAGE_SIZES:
            raise LabError(f"page size {page_size}: choose from {', '.join(map(str, PAGE_SIZES))}")
        if max_context < 1 or sequences < 1:
            raise LabError(
                f"a KV cache of {sequences} sequences of {max_context} tokens: both must be at least 1"
            )
        config.check_context(max_context)
        self.page_size, self.max_context, self.sequences = page_size, max_context, sequences
        self.most = config.max_positions  # tokens of a sequence that the model was made for
        self.max_pages = pages_for(max_context, page_size)
        self.pages = self.max_pages * sequences if pages is None else pages
        shape = (config.layers, self.pages, config.kv_heads, page_size, config.head_dim)
        self.kv_dtype, self.k_scales, self.v_scales = kv_dtype, None, None
        require_memory(
            self.pages * page_size * token_bytes(config, dtype, kv_dtype),
            device,
            f"a KV cache of {sequences} x {max_context} tokens",
            "use a shorter --max-context or fewer sequences",
        )
        self.dtype = dtype  # of what is written and read
        stored = dtype if kv_dtype is None else kv.DTYPES[kv_dtype]
        self.k = torch.zeros(shape, dtype=stored, device=device)
        self.v = torch.zeros(shape, dtype=stored, device=device)
        if kv_dtype is not None:
            made = config.layers, *kv.scale_shape(kv_dtype, *shape[1:4])
            self.k_scales, self.v_scales = (
                torch.ones(made, dtype=kv.SCALE_DTYPES[kv_dtype], device=device) for _ in range(2)
            )
        if scales is not None:
            for i, (of_k, of_v) in enumerate(scales):
                self.k_scales[i], self.v_scales[i] = of_k, of_v
        self.block_table = torch.zeros(sequences, self.max_pages, dtype=torch.int32, device=device)
        self.free = list(range(self.pages))
        if shuffle:
            random.Random(0).shuffle(self.free)
        self.held: list[list[int]] = [[] for _ in range(sequences)]  # page numbers of each sequence, in order
        self.lengths = [0] * sequences  # tokens of each sequence, on the host
        self.holders = [0] * self.pages  # how many sequences hold each page
        # Full pages of prompts that others may share. A page is known by its tokens and the page before it,
        # which its holders hold too, so that it is not reused for others as long as the entry stands.
        self.prefixes: dict[tuple[int, tuple[int, ...]], int] = {}
        self.prefix_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # the same by the page

    def extend(self, sequence: int, tokens: int) -> None:
        """Gives a sequence the pages for `tokens` more tokens. Raises LabError, changing nothing, where there
        are too few."""
        self.extend_all([sequence], tokens)

    def extend_all(self, sequences: Collection[int], tokens: int) -> None:
        """extend() for several sequences. Raises LabError, changing nothing, unless all can grow."""
        self.reserve(dict.fromkeys(sequences, tokens))
        for sequence in sequences:
            self.lengths[sequence] += tokens

    def reserve(self, wanted: Mapping[int, int]) -> None:
        """Gives sequences the pages for more tokens, without those tokens yet. wanted: how many, by sequence.
        Raises LabError, changing nothing, unless all can have them."""
        grown, free = [], len(self.free)
        for sequence, tokens in wanted.items():
            length = self.lengths[sequence] + tokens
            missing = pages_for(length, self.page_size) - len(self.held[sequence])
            if length > self.max_context:
                advice = (
                    "all that the model was made for"
                    if self.max_context == self.most
                    else "raise --max-context"
                )
                raise LabError(
                    f"the KV cache is full: sequence {sequence} would hold {length} tokens and its limit is "
                    f"{self.max_context}; {advice}"
                )
            if missing > free:
                raise LabError(
                    f"the KV cache is full: sequence {sequence} needs {missing} more page(s) of "
                    f"{self.page_size} tokens and {free} of {self.pages} are free"
                )
            if missing > 0:
                free -= missing
                grown.append((sequence, missing))
        places, new = [], []  # in the flattened block table, and the pages that go there
        for sequence, missing in grown:
            held = self.held[sequence]
            for _ in range(missing):
                places.append(sequence * self.max_pages + len(held))
                held.append(self.free.pop())
                new.append(held[-1])
                self.holders[held[-1]] = 1
        if new:
            # One copy for all rows, and no blocking one: it would wait for the step that the device works on.
            both = torch.tensor([places, new]).to(self.block_table.device, non_blocking=True)
            self.block_table.view(-1)[both[0]] = both[1].int()

    def missing(self, sequence: int, tokens: int) -> int:
        """The pages that a sequence lacks for `tokens` more tokens."""
        return max(0, pages_for(self.lengths[sequence] + tokens, self.page_size) - len(self.held[sequence]))

    def shorten(self, sequences: Iterable[int], tokens: int) -> None:
        """Undoes an extension of each sequence by `tokens`, for a step that failed. The sequence keeps its
        pages."""
        for sequence in sequences:
            self.lengths[sequence] -= tokens

    def release(self, sequence: int) -> None:
        """Gives a sequence's pages back; those that others share stay theirs."""
        for page in reversed(self.held[sequence]):
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.free.append(page)
                if page in self.prefix_of:
                    del self.prefixes[self.prefix_of.pop(page)]
        self.held[sequence], self.lengths[sequence] = [], 0

    def shared_pages(self, ids: list[int]) -> list[int]:
        """The pages that hold the longest beginning of `ids`, in whole pages, that offer() has made known."""
        found: list[int] = []
        for start in range(0, len(ids) - self.page_size + 1, self.page_size):
            key = (found[-1] if found else -1, tuple(ids[start : start + self.page_size]))
            if key not in self.prefixes:
                break
            found.append(self.prefixes[key])
        return found

    def share(self, sequence: int, ids: list[int]) -> int:
        """Begins an empty sequence with the pages that hold a beginning of `ids`; returns how many tokens
        they hold."""
        pages = self.shared_pages(ids)
        for page in pages:
            self.holders[page] += 1
        row = torch.tensor(pages, dtype=torch.int32)
        self.block_table[sequence, : len(pages)].copy_(row, non_blocking=True)
        self.held[sequence], self.lengths[sequence] = pages, len(pages) * self.page_size
        return self.lengths[sequence]

    def offer(self, sequence: int, ids: list[int]) -> None:
        """Lets later sequences share the full pages of `ids`, with which this sequence begins."""
        for index in range(len(ids) // self.page_size):
            page, before = self.held[sequence][index], self.held[sequence][index - 1] if index else -1
            key = before, tuple(ids[index * self.page_size : (index + 1) * self.page_size])
            if key not in self.prefixes:
                self.prefixes[key], self.prefix_of[page] = page, key

    def move(self, source: int, to: int) -> None:
        """An empty sequence takes the place of another one, which is empty then."""
        self.block_table[to] = self.block_table[source]
        self.held[to], self.held[source] = self.held[source], []
        self.lengths[to], self.lengths[source] = self.lengths[source], 0

    def utilisation(self) -> dict[str, float]:
        """Shares from 0 to 1: pages_used and tokens_used of the whole pool, and fill, tokens of what the used
        pages could hold."""
        used, tokens = self.pages - len(self.free), sum(self.lengths)
        return {
            "pages_used": used / self.pages,
            "tokens_used": tokens / (self.pages * self.page_size),
            "fill": tokens / (used * self.page_size) if used else 0.0,
        }

    # How torch reads and writes the cache, for prefill and checks.

    def slots(self, sequence: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(page, row) of tokens start..stop-1, int64 on the device."""
        token = torch.arange(start, stop, device=self.k.device)
        return self.block_table[sequence, token // self.page_size].long(), token % self.page_size

    def write(
        self, layer: int, slots: tuple[torch.Tensor, torch.Tensor], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """k, v: [tokens, kv_heads, head_dim] to the slots of those tokens."""
        page, row = slots
        for cache, scales, new in self.of_layer(layer, k, v):
            if scales is not None:
                new, own = kv.quantise(new, self.kv_dtype, scales)
                if own is not None:
                    scales[page, :, row] = own
            cache[page, :, row] = new

    def read(self, layer: int, slots: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v: [tokens, kv_heads, head_dim], gathered from the slots of those tokens; of a quantised cache
        the numbers that its codes stand for."""
        page, row = slots
        found = []
        for cache, scales in self.of_layer(layer):
            values = cache[page, :, row]
            if scales is not None:
                own = scales if self.kv_dtype == "fp8" else scales[page, :, row]
                values = kv.numbers(values, own).to(self.dtype)
            found.append(values)
        return tuple(found)

    def of_layer(self, layer: int, *more) -> Iterable[tuple]:
        """(cache, its scales or None) of a layer's K, then of its V; each with its one of `more`."""
        scales = (None, None) if self.k_scales is None else (self.k_scales[layer], self.v_scales[layer])
        return zip((self.k[layer], self.v[layer]), scales, *((more,) if more else ()), strict=True)

    def tensors(self) -> list[torch.Tensor]:
        """What the cache consists of."""
        return [t for t in (self.k, self.v, self.k_scales, self.v_scales) if t is not None]

    def fill_random(self) -> None:
        """Random numbers in every slot, N(0, 1), for a benchmark."""
        if self.kv_dtype is None:
            self.k.normal_(), self.v.normal_()
            return
        for layer in range(self.k.shape[0]):
            for cache, scales in self.of_layer(layer):
                new = torch.randn(cache.shape, device=cache.device)
                codes, own = kv.quantise(new, self.kv_dtype, scales)
                cache.copy_(codes)
                if own is not None:
                    scales.copy_(own)
