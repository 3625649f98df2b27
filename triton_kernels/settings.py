"""Launch settings by shape: those that the tuner measured on this architecture, or else the op's hand-written
table.

`lab tune OP` writes triton_kernels/tuned/sm_90.json on such a GPU: see lab/tune/tuned.py.
"""

import contextlib
import functools

import torch
import triton

from lab.tune import tuned
from triton_kernels.common import architecture, config

ANY = 1 << 31
BY_HAND = {}  # for `forced`: use the hand-written table, not the tuned one
_measured = {}  # (op, architecture, itemsize, rows, format, shape) -> result of `measured`
_products = {}  # (op, architecture, itemsize, rows, n, k) -> result of `product`; with a format, of `packed`
_forced = {}  # op -> settings, while the tuner tries them
_used = None  # entries used instead of a table's, while the tuner tries whole tables


@functools.lru_cache(maxsize=None)
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(tensor):
    """The number of multiprocessors of the tensor's GPU; 1 for a CPU. While launches are recorded: 132 (H100)
    or 108 (A100)."""
    if tensor.is_cuda:
        return _multiprocessors(tensor.device)
    return {"interpreter": 1, "sm_90": 132}.get(architecture(tensor), 108)


def dependent_launch(tensor):
    """The keywords for programmatic dependent launch (sm_90 and later): a constexpr and the launch
    attribute."""
    name = architecture(tensor)
    on = name != "interpreter" and int(name[3:]) >= 90
    return dict(PDL=True, launch_pdl=True) if on else dict(PDL=False)


@functools.lru_cache(maxsize=None)
def _tuned(name):
    return tuned.read(tuned.path_of("triton", name)) if _used is None else _used


def measured(op, tensor, rows, format=None, **shape):
    """The settings that the tuner found for this architecture and shape (tuned.lookup chooses them), or None.

    They take precedence over the op's own table. format: of packed weights.
    """
    if op in _forced:
        return dict(_forced[op]) or None
    key = op, architecture(tensor), tensor.itemsize, rows, format, *shape.values()
    if key not in _measured:
        _measured[key] = tuned.lookup(_tuned(key[1]), op, tensor.itemsize, rows, shape, format)
    return dict(_measured[key]) if _measured[key] else None


def forget():
    """Forgets all settings that were read and chosen, after the tables have changed."""
    use(None)


def use(entries):
    """Makes launches use these entries instead of the table's; None restores the table."""
    global _used
    _used = entries
    _clear()


def _clear():
    _measured.clear()
    _products.clear()
    _tuned.cache_clear()


@contextlib.contextmanager
def forced(op, settings):
    """Makes every launch of `op` use `settings`, or with BY_HAND the hand-written ones. The tuner tries
    settings this way."""
    before = dict(_forced)
    _forced[op] = settings
    _clear()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _clear()


def product(op, table, x, n, k, whole_rows=False, parts=1, most_programs=ANY):
    """(path, programs, meta) to multiply x [rows, k] with w [parts * n, k]; an output has `parts` rows of w.

    path is "sum" or "dot", `programs` the grid, and meta the kernel's constexprs and the compiler's options.
    With whole_rows the sum path keeps rows of x in registers, so BLOCK_K covers k, and a program may take
    several tiles (LOOP).
    """
    key = op, architecture(x), x.itemsize, x.shape[0], n, k
    if key not in _products:
        _products[key] = _product(op, table, x, n, k, whole_rows, parts, most_programs)
    path, programs, meta = _products[key]
    return path, programs, dict(meta)


def _product(op, table, x, n, k, whole_rows, parts, most_programs):
    rows = x.shape[0]
    meta = measured(op, x, rows, n=n, k=k) or by_hand(
        config(table, x), x.itemsize, rows, n, k, whole_rows, parts
    )
    path, per_multiprocessor = meta.pop("path"), meta.pop("per_multiprocessor", 0)
    least = 16 if path == "dot" and architecture(x) != "interpreter" else 1  # columns of a tensor-core tile
    meta["BLOCK_B"] = max(triton.next_power_of_2(rows), least)
    tiles = triton.cdiv(n, meta["BLOCK_N"])
    programs = min(
        tiles, per_multiprocessor * multiprocessors(x) if per_multiprocessor else tiles, most_programs
    )
    meta.update(EVEN_K=k % meta["BLOCK_K"] == 0, **dependent_launch(x))
    if whole_rows:
        meta["LOOP"] = programs < tiles
    if path == "dot":
        meta["FULL"] = rows == meta["BLOCK_B"]
    return path, programs, meta


def packed_format(f):
    """A weight format as the device code of core/packed_rows.py takes it."""
    return dict(FORMAT=f.number, BITS=f.bits, GROUP=f.group or 0, SECOND=f.second or "")


def packed(op, table, x, w, n, parts=1):
    """(programs, meta) to multiply x [rows, k] with a PackedMatrix w [parts * n, k].

    table: for each architecture, "half" (x of 16 bits) and "float" (of 32): lists of (most rows, largest n,
    settings), of which the first that fits is used, unless the tuner found better ones. A program takes
    BLOCK_N rows of w, `parts` for each output.
    """
    key = op, architecture(x), x.itemsize, x.shape[0], n, w.k, w.format_name
    if key not in _products:
        _products[key] = _packed(op, table, x, w, n, parts)
    programs, meta = _products[key]
    return programs, dict(meta)


def _packed(op, table, x, w, outputs, parts):
    rows, k = x.shape
    f, n, interpreted = w.format, outputs * parts, architecture(x) == "interpreter"
    meta = measured(op, x, rows, format=f.name, n=outputs, k=k)
    if meta is None and interpreted:
        meta = packed_interpreted(f, n, k)
    elif meta is None:
        entries = config(table, x)["float" if x.itemsize == 4 else "half"]
        meta = next(dict(m) for most_rows, most_n, m in entries if rows <= most_rows and n <= most_n)
        if rows > 8 and meta["SEGMENTS"] > 1 and f.group and f.group <= 32:
            # Each part of a segment has its sums until they are scaled, which would not fit into registers.
            meta["BLOCK_N"] = min(meta["BLOCK_N"], 32)
    meta.setdefault("num_warps", meta["SEGMENTS"])
    meta.update(
        **packed_format(f),
        EVEN_K=k % (meta["SEGMENTS"] * f.columns) == 0,
        # 8 rows of x are the narrowest tile of tensor cores; the interpreter needs no padding.
        BLOCK_B=max(triton.next_power_of_2(rows), 1 if interpreted else 8),
    )
    return triton.cdiv(n, meta["BLOCK_N"]), meta


def packed_interpreted(f, n, k):
    """Settings for the interpreter: whole rows, and tiles of up to 2^17 weights, as in _interpreted."""
    segments = triton.next_power_of_2(f.segments(k))
    most = max((1 << 17) // (segments * f.columns), 2)
    return dict(BLOCK_N=min(most, triton.next_power_of_2(n)), SEGMENTS=segments, STAGES=1)


def by_hand(table, itemsize, rows, n, k, whole_rows, parts):
    """Settings from an op's hand-written entry for an architecture.

    sum_rows: the most rows that the sum path takes; sum_rows_f32: the same in float32, which has no tensor
    cores. sum, dot, dot_f32: lists of (most rows, largest n, settings); the first entry that fits is used.
    lane: how many elements of a tile's row, over all rows of x, a thread holds (in float32 half as many).
    warps: the warps of all programs on a multiprocessor; each program then takes several tiles. Without
    `warps` each program has one tile.
    """
    block_b = triton.next_power_of_2(rows)
    most = table.get("sum_rows_f32", table["sum_rows"]) if itemsize == 4 else table["sum_rows"]
    path = "sum" if rows <= most else "dot"
    if "sum" not in table:
        if n * k >= 1 << 22:
            # This is the size of an lm_head: there NumPy's matrix product is faster.
            path = "dot"
        return _interpreted(path, block_b, n, k, whole_rows, parts)
    meta = next(
        dict(m)
        for most_rows, most_n, m in table["dot_f32" if path == "dot" and itemsize == 4 else path]
        if rows <= most_rows and n <= most_n
    )
    if path == "dot":
        return dict(meta, path=path)
    lane = meta.pop("lane") * 2 // itemsize
    if whole_rows:
        meta["BLOCK_K"] = triton.next_power_of_2(k)
        meta["num_warps"] = min(max(block_b * meta["BLOCK_K"] // (32 * lane), 1), 16)
        if "warps" in meta:
            meta["per_multiprocessor"] = max(meta.pop("warps") // meta["num_warps"], 1)
    else:
        meta["BLOCK_K"] = min(32 * lane * meta["num_warps"], triton.next_power_of_2(k))
    return dict(meta, path=path)


def _interpreted(path, block_b, n, k, whole_rows, parts):
    """Settings for the interpreter: few programs, because it costs per operation, and tiles of up to 2^17
    elements, which fit in the cache."""
    block_k = triton.next_power_of_2(k)
    if path == "dot" and k % 64 == 0:
        block_k = k & -k  # divides k: a mask costs as much as the multiply
    depth = 1 if path == "dot" else block_b
    block_n = min(max((1 << 17) // (depth * parts * block_k), 1), triton.next_power_of_2(n))
    meta = dict(path=path, BLOCK_N=block_n, BLOCK_K=block_k)
    if whole_rows:
        meta["per_multiprocessor"] = 1
    if path == "dot":
        meta["STAGES"] = 1
    elif not whole_rows:
        meta["UNROLL"] = 1
    return meta
