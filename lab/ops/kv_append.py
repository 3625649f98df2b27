"""kv_append: writes the token's k and v into its page:
cache[block_table[b, p / page], :, p % page] = k[b], p = positions[b]

  k, v [batch, kv_heads, head_dim]   views of the packed qkv
  k_cache, v_cache [pages, kv_heads, page_size, head_dim]
  block_table [batch, max_pages] int32   positions [batch] int32
  k_scales, v_scales   of a quantised cache, whose codes and scales lab/formats/kv.py describes, or None
A negative position marks an idle row of a padded batch, which is skipped. A page belongs
to one row, so no two rows write to one slot.
Source of paging: Kwon et al., PagedAttention (arXiv 2309.06180).
Kernels: cuda_src/kv_append.cu, triton_kernels/kv_append.py
"""

import torch

from lab.contract import DTYPE_CODES, FLOATS, Op, case, dense, refuse, rows_of_heads
from lab.formats import kv
from lab.ops.rope import heads_of, packed_qkv

PAGE_SIZES = (16, 32, 64, 128, 256)
PAGE_SIZE = 16  # the page size that is measured
MAX_QUANTISED = 256  # the largest head of a quantised cache


def check_cache(
    op, k_cache, v_cache, block_table, batch, heads, head_dim, dtype, k_scales=None, v_scales=None
):
    """Conditions that kv_append and decode_attention share. heads: the number of KV heads, or None if it may
    be any. dtype: that of the heads."""
    shape = k_cache.shape
    if not (len(shape) == 4 and shape == v_cache.shape and k_cache.dtype == v_cache.dtype):
        refuse(op, "k_cache and v_cache must be [pages, kv_heads, page_size, head_dim] of one dtype")
    kv.check(op, k_cache, v_cache, k_scales, v_scales, dtype)
    _, cached_heads, page, cached_dim = shape
    if cached_dim != head_dim or (heads is not None and cached_heads != heads):
        refuse(op, f"the cache has {cached_heads} heads of {cached_dim}, but the call needs others")
    if page not in PAGE_SIZES:
        refuse(op, f"page_size {page} is not a power of two from 16 to 256")
    table = block_table.shape
    if not (len(table) == 2 and table[0] == batch and block_table.dtype == torch.int32):
        refuse(op, "block_table must be int32 [batch, max_pages]")
    dense(op, k_cache.get_device(), k_cache, v_cache, block_table)


def validate(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    out: None = None,
) -> None:
    if out is not None:
        refuse("kv_append", "writes into the cache; out= is not taken")
    shape, dtype = k.shape, k.dtype
    if not (len(shape) == 3 and shape == v.shape and dtype == v.dtype):
        refuse("kv_append", "k and v must be [batch, kv_heads, head_dim] of one dtype")
    if dtype not in FLOATS:
        refuse("kv_append", f"takes no {dtype}: k and v must be float32, float16 or bfloat16")
    batch, heads, head_dim = shape
    check_cache("kv_append", k_cache, v_cache, block_table, batch, heads, head_dim, dtype, k_scales, v_scales)
    if not (positions.shape == (batch,) and positions.dtype == torch.int32):
        refuse("kv_append", "positions must be int32 [batch]")
    if k_scales is not None and head_dim > MAX_QUANTISED:
        refuse("kv_append", f"a quantised cache takes heads of at most {MAX_QUANTISED}, not {head_dim}")
    device = k_cache.get_device()
    rows_of_heads("kv_append", device, k, v)
    dense("kv_append", device, positions)


def reference(k, v, k_cache, v_cache, block_table, positions, k_scales=None, v_scales=None):
    page, name = k_cache.shape[2], kv.NAMES.get(k_cache.dtype)
    caches = k_cache.double(), v_cache.double()
    scales = () if k_scales is None else (k_scales.double(), v_scales.double())
    for b, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        slot = block_table[b, position // page].long(), slice(None), position % page
        for i, new in enumerate((k[b], v[b])):
            if name is not None:
                new, scale = kv.quantise(new, name, (k_scales, v_scales)[i])
                if scale is not None:
                    scales[i][slot] = scale.double()
            caches[i][slot] = new.double()
    return *caches, *scales


def pages_of(k_cache, v_cache, block_table, k_scales=None, v_scales=None):
    """CachePages of cuda_src/launchers/arguments.h."""
    _, kv_heads, page_size, _ = k_cache.shape
    if k_scales is None:
        scales = 0, 0, 0
    else:
        scales = k_scales.data_ptr(), v_scales.data_ptr(), kv.NUMBERS[k_cache.dtype]
    return (
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_table.data_ptr(),
        kv_heads,
        page_size,
        block_table.shape[1],
        *scales,
    )


def cuda(kernels, k, v, k_cache, v_cache, block_table, positions, k_scales=None, v_scales=None, out=None):
    batch, _, head_dim = k.shape
    kernels.kv_append(
        k=(k.data_ptr(), k.stride(0)),
        v=(v.data_ptr(), v.stride(0)),
        cache=pages_of(k_cache, v_cache, block_table, k_scales, v_scales),
        positions=positions.data_ptr(),
        batch=batch,
        head_dim=head_dim,
        dtype=DTYPE_CODES[k.dtype],
        stream=kernels.stream(),
    )


def triton(k, v, k_cache, v_cache, block_table, positions, k_scales=None, v_scales=None, out=None):
    from triton_kernels.kv_append import kv_append

    kv_append(k, v, k_cache, v_cache, block_table, positions, k_scales, v_scales)


def torch_(k, v, k_cache, v_cache, block_table, positions, k_scales=None, v_scales=None, out=None):
    # A captured graph has fixed shapes, so every row writes: an idle row writes back what it reads. Its own
    # table may name pages that live rows have by now. So it takes the page that the longest live row writes
    # into, which no other row does, and there a slot beside the one written. Where all rows are idle, their
    # position stays negative, and they take page 0.
    batch, page_size = k.shape[0], k_cache.shape[2]
    if not batch:
        return
    idle = positions < 0
    row, token, nowhere = 0, positions.long(), idle
    if batch > 1:
        row = torch.where(idle, token.argmax(), torch.arange(batch, device=k.device))
        token = token[row] ^ idle  # the neighbour within a pair, so within a page, and below 0 for -1
        nowhere = token < 0
    # Rounding down, -1 // page_size is -1: the last entry of the table, read and not used.
    page = block_table[row, token // page_size].masked_fill(nowhere, 0).long()
    slot = token % page_size
    for cache, new, scales in ((k_cache, k, k_scales), (v_cache, v, v_scales)):
        if scales is not None:
            new, own = kv.quantise(new, kv.NAMES[cache.dtype], scales)
            if own is not None:
                scales[page, :, slot] = torch.where(idle[:, None], scales[page, :, slot], own)
        cache[page, :, slot] = torch.where(idle[:, None, None], cache[page, :, slot], new)


def contents(a):
    """Raises LabError if a live row would write outside the cache, or into a page of another live row."""
    check_append("kv_append", a.block_table, a.positions, a.k_cache)
    kv.check_scales("kv_append", a.k_cache, a.k_scales, a.v_scales)


def check_append(op, block_table, positions, k_cache):
    """positions int32 [batch]: the tokens that are appended. Raises LabError for one past the table, for a
    page that the cache does not have, and for a page that is written although it stands elsewhere in a live
    row's table."""
    page_size, table = k_cache.shape[2], block_table.tolist()
    check_pages(
        op,
        table,
        [p // page_size if p >= 0 else -1 for p in positions.tolist()],
        k_cache,
        "positions",
        positions,
    )
    held = {}  # page -> the places in live rows' tables that name it
    for b, position in enumerate(positions.tolist()):
        for i in range(position // page_size + 1):
            held.setdefault(table[b][i], []).append(f"block_table[{b}, {i}]")
    for b, position in enumerate(positions.tolist()):
        places = held[table[b][position // page_size]] if position >= 0 else []
        if len(places) > 1:
            refuse(
                op,
                f"row {b} writes page {table[b][position // page_size]}, which {' and '.join(places[:2])} "
                "both name: a page that is written must belong to one live row, once",
            )


def check_pages(op, table, last, k_cache, what, tokens):
    """Raises LabError unless entries 0 to last[b] of each row b are pages of the cache (-1: no entries).

    table: a list of rows. what, tokens: the tensor from which `last` was computed, for the message.
    """
    pages, page_size, width = k_cache.shape[0], k_cache.shape[2], len(table[0]) if table else 0
    for b, count in enumerate(last):
        if count >= width:
            refuse(
                op,
                f"{what}[{b}] is {int(tokens[b])}, and a row of block_table ends after {width * page_size} "
                "tokens",
            )
        for i, page in enumerate(table[b][: count + 1]):
            if not 0 <= page < pages:
                refuse(op, f"block_table[{b}, {i}] is {page}, and the cache has pages 0 to {pages - 1}")


def inputs(rand, positions, q_heads, kv_heads, head_dim, page_size=16, apart=False, kv_dtype=None, odd=False):
    """apart: k and v are views of buffers with different strides. kv_dtype: the format of the cache. odd:
    heads that are hard to quantise: zeros, NaN, an infinity, very small and very large numbers, numbers
    between two codes."""
    _, k, v = packed_qkv(rand, len(positions), q_heads, kv_heads, head_dim, apart)
    if odd:
        for t in (k, v):
            t[0] = 0.0
            t[1, 0], t[2, 0], t[3, 0] = torch.nan, torch.inf, -torch.inf
            t[1, :, 1], t[2, :, 2], t[3, :, 3] = torch.nan, torch.inf, -torch.inf
            t[4, 0].mul_(1e-7), t[4, 1:].mul_(1e-4), t[5, 0].mul_(3e4), t[5, 1:].mul_(3e7)
            steps = torch.arange(head_dim, device=rand.device, dtype=torch.float32)
            t[6] = (steps - head_dim // 2 + 0.5).to(t.dtype)
            t[7] = ((steps + 1) * 2.0**-11).to(t.dtype)
    k_cache, v_cache, block_table = paged_cache(
        rand, [p + 1 for p in positions], kv_heads, head_dim, page_size
    )
    k_cache, v_cache, *scales = quantised(rand, k_cache, v_cache, kv_dtype)
    where = torch.tensor(positions, dtype=torch.int32, device=rand.device)
    return k, v, k_cache, v_cache, block_table, where, *scales


def quantised(rand, k_cache, v_cache, kv_dtype):
    """(k_cache, v_cache, k_scales, v_scales) in a format of lab/formats/kv.py; the two caches where it is
    None."""
    if kv_dtype is None:
        return k_cache, v_cache
    made = []
    for cache, scale in ((k_cache, 0.037), (v_cache, 0.011)):  # no powers of two; large numbers saturate in V
        scales = torch.full((1,), scale, device=rand.device)
        codes, own = kv.quantise(cache, kv_dtype, scales)
        made.append((codes, scales if own is None else own))
    return made[0][0], made[1][0], made[0][1], made[1][1]


def paged_cache(rand, lengths, kv_heads, head_dim, page_size):
    """Random caches that hold `lengths` tokens, with their pages in random order, as in a server that has run
    for long.

    All entries of an idle row (one without a token) name the page of a live row's last token, as if the idle
    row's old page had been given to that row: the first idle row names the first live row's page, and so on.
    """
    max_pages = max(1, max(-(-n // page_size) for n in lengths))
    pages = len(lengths) * max_pages
    block_table = rand.permutation(pages).view(len(lengths), max_pages)
    live, idle = [[b for b, n in enumerate(lengths) if (n > 0) is one] for one in (True, False)]
    for i, b in enumerate(idle):
        if live:
            other = live[i % len(live)]
            block_table[b] = block_table[other, (lengths[other] - 1) // page_size]
    shape = (pages, kv_heads, page_size, head_dim)
    return rand(*shape), rand(*shape), block_table


def paged_heads_of(c):
    """heads_of() a model, and the page size of the cache that the harness makes."""
    return {**heads_of(c), "page_size": PAGE_SIZE}


def appended_bytes(a):
    """Bytes that appending one token of each sequence writes."""
    heads, head_dim = a.k.shape[0] * a.k.shape[1], a.k.shape[2]
    return 2 * heads * (head_dim * a.k_cache.itemsize + kv.scale_bytes(a.k_cache.dtype))


# Cases of a quantised cache, in each of its formats.
QUANTISED = (
    (
        "page boundaries, idle rows whose table names the pages written, different strides",
        dict(positions=(0, 15, 16, -1, 47, -1), q_heads=9, kv_heads=3, head_dim=64, apart=True),
    ),
    (
        "heads of zeros, NaN and infinities, of very small and very large numbers, between two codes",
        dict(positions=(3, 4, 5, 6, 7, 8, 9, 10), q_heads=4, kv_heads=2, head_dim=96, odd=True),
    ),
    (
        "head 128, the largest batch, a larger page",
        dict(positions=tuple(range(64)), q_heads=8, kv_heads=2, head_dim=128, page_size=32),
    ),
)

op = Op(
    name="kv_append",
    summary="cache[page of p, :, slot of p] = k, v",
    dtypes=FLOATS,
    validate=validate,
    outputs=lambda *args: None,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: a.k.nbytes + a.v.nbytes + appended_bytes(a) + 2 * a.positions.nbytes,
    flops=lambda a: 0,
    tolerance=lambda a: (0.0, 0.0),  # a copy is exact, and all backends quantise alike
    contents=contents,
    mutates=("k_cache", "v_cache", "k_scales", "v_scales"),
    plans=("basic",),
    uses=lambda c: [(None, paged_heads_of(c))],
    # The last slot of a page. A longer cache would only take memory.
    rows=lambda batch, context: {"positions": (PAGE_SIZE - 1,) * batch},
    cold=("k_cache", "v_cache"),
    direction="copy",
    color="#999933",
    inspect_sizes=dict(positions=(15,), q_heads=32, kv_heads=8, head_dim=128),
    cases=(
        case(
            "first token, last slot of a page, first of the next, idle rows whose table names the pages "
            "written",
            positions=(0, 15, 16, -1, 47, -1, -1, -1),
            q_heads=9,
            kv_heads=3,
            head_dim=64,
        ),
        case(
            "k and v of different strides, an idle row in front",
            positions=(-1, 5, 16, 33),
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            apart=True,
        ),
        case("no live row", positions=(-1, -1), q_heads=4, kv_heads=2, head_dim=64),
        case(
            "head 96, one KV head, a larger page",
            positions=(63, 64, 7),
            q_heads=4,
            kv_heads=1,
            head_dim=96,
            page_size=64,
        ),
        case("head 128, the largest batch", positions=tuple(range(64)), q_heads=8, kv_heads=2, head_dim=128),
        *(
            case(f"{kv_dtype}: {why}", kv_dtype=kv_dtype, **sizes)
            for kv_dtype in kv.DTYPES
            for why, sizes in QUANTISED
        ),
    ),
)
