"""Device code of decode_step's matrix products: the wait for all other programs, a program's share of a plain
matrix, and its share of a packed one.
"""

import triton
import triton.language as tl

from lab.ops import step_layout
from triton_kernels.core.exchange import add_sums, send_sums
from triton_kernels.core.fused_product import load_rows, normed_rows
from triton_kernels.core.packed_rows import ROWS, packed_product, prefetch_rows, segments_of, unpacked_rows
from triton_kernels.core.step_trace import record
from triton_kernels.norm_linear_argmax import NO_INDEX, first_best, keep_best
from triton_kernels.norm_linear_silu_mul import activate, activated_runs, paired_rows

BARRIER = tl.constexpr(step_layout.BARRIER)
# Columns of `table` where any matrix is packed: scales, and a word of formats' numbers; then k and v, where
# they are apart, and their scales.
SCALES = tl.constexpr(len(step_layout.LAYER))
FORMATS = tl.constexpr(len(step_layout.LAYER) + len(step_layout.MATRICES))
MORE = tl.constexpr(FORMATS.value + 1)
MORE_SCALES = tl.constexpr(MORE.value + len(step_layout.APART))
SUMS = tl.constexpr(32)  # of a program that add_sums() takes at once; an H100's program has 31 of 4096
# A WAY says how a matrix in one weight format is multiplied: (FORMAT, BLOCK_N, BLOCK_K), with FORMAT 0 for a
# plain one; a packed one continues with BITS, GROUP, SECOND, EVEN_K, BLOCK_B, SEGMENTS, STAGES (see
# packed_product()), and the type of the elements of its scales.


@triton.jit
def arrive(counters, target, trace=None):
    """Counts this program as arrived: it has stored its results. Returns the number of arrivals that the next
    wait must see."""
    tl.debug_barrier()  # every thread's stores come before the arrival
    record(trace, target, COLUMN=0)
    # The result is not used, so this compiles to a reduction, and no thread waits for an answer.
    tl.atomic_add(counters + BARRIER, 1, sem="release", scope="gpu")
    return target + tl.num_programs(0)


@triton.jit
def wait(counters, target, trace=None):
    """Waits until all programs have arrived: one thread polls for all. The acquire also invalidates the L1,
    so that later ordinary loads read what other multiprocessors have written."""
    while tl.atomic_add(counters + BARRIER, 0, sem="acquire", scope="gpu") < target:
        pass
    record(trace, target, COLUMN=1)


@triton.jit
def tensor_at(table, part, TYPE: tl.constexpr):
    """The address of a layer's tensor, as a pointer of this type."""
    return tl.multiple_of(tl.load(table + part).to(TYPE), 16)


@triton.jit
def load_added(bias, residual, column, end):
    """The values to which a tile's sums are added. No other program writes them, so they may be read before a
    wait."""
    b = tl.zeros(column.shape, tl.float32)
    r = tl.zeros(column.shape, tl.float32)
    if bias is not None:
        b = tl.load(bias + column, mask=column < end, other=0.0).to(tl.float32)
    if residual is not None:
        r = tl.load(residual + column, mask=column < end, other=0.0).to(tl.float32)
    return b, r


@triton.jit
def product(
    counters,
    target,
    x,
    norm_w,
    eps,
    w,
    bias,
    residual,
    y,
    n,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIRS: tl.constexpr = False,
    ARGMAX: tl.constexpr = False,
    trace=None,
    peers=None,
    RANK: tl.constexpr = 0,
    RANKS: tl.constexpr = 1,
):
    """y[j] = xn . w[j] (+ bias[j]) (+ residual[j]) for this program's share of n outputs; xn: x or its norm.

    With PAIRS y[j] = silu(xn . w[j]) * (xn . w[n + j]). With ARGMAX it returns its best outputs and their
    indices, [1, BLOCK_N]. Optional arguments may be None. With RANKS > 1 xn . w[j] + bias[j] is added up over
    all ranks, before the residual is added; peers: see add_sums().
    """
    PARTS: tl.constexpr = 2 if PAIRS else 1
    EVEN_K: tl.constexpr = K == BLOCK_K
    first = (tl.program_id(0) * n) // tl.num_programs(0)
    end = ((tl.program_id(0) + 1) * n) // tl.num_programs(0)
    column = first + tl.arange(0, BLOCK_N)[None, :]
    i = tl.arange(0, PARTS * BLOCK_N)[None, :, None]
    row = i // PARTS + (i % PARTS) * n  # gate and up alternate, as in norm_linear_silu_mul
    left = end - first
    col = tl.arange(0, BLOCK_K)[None, None, :]

    # The rows of a tile are at constant distances from w, so that one register holds all their addresses.
    w += first.to(tl.int64) * K
    tile = load_rows(w, row, i < PARTS * left, col, K, EVEN_K)
    ahead = load_rows(w + BLOCK_N * K, row, i < PARTS * (left - BLOCK_N), col, K, EVEN_K)
    b, r = load_added(bias, residual, column, end)
    if norm_w is not None:
        weight = tl.load(norm_w + col, mask=col < K, other=0.0, eviction_policy="evict_last")
    wait(counters, target, trace)
    if norm_w is not None:
        xn = normed_rows(x, weight, rows=1, k=K, eps=eps, b=tl.zeros([1, 1, 1], tl.int32), col=col)
    else:
        xn = tl.load(x + col, mask=col < K, other=0.0, eviction_policy="evict_last")

    best = tl.full([1, BLOCK_N], float("-inf"), tl.float32)
    index = tl.full([1, BLOCK_N], NO_INDEX, tl.int32)
    for _ in range(first, end, BLOCK_N):
        total = tl.sum(tile.to(tl.float32) * xn.to(tl.float32), axis=2)
        tile = ahead
        w += BLOCK_N * K
        left -= BLOCK_N
        ahead = load_rows(w + BLOCK_N * K, row, i < PARTS * (left - BLOCK_N), col, K, EVEN_K)
        if PAIRS:
            total = activate(total, BLOCK_B=1, BLOCK_N=BLOCK_N)
        else:
            total = total + b if RANKS > 1 else r + (total + b)
        if RANKS > 1:
            send_sums(peers, column, column < end, total, RANK, RANKS)
        else:
            tl.store(y + column, total.to(y.dtype.element_ty), mask=column < end)
        if ARGMAX:
            best, index = keep_best(best, index, tl.where(column < end, total, float("-inf")), column)
        column += BLOCK_N
        b, r = load_added(bias, residual, column, end)
    if RANKS > 1:
        add_sums(peers, residual, y, first, end, BLOCK=SUMS, RANK=RANK, RANKS=RANKS)
    return best, index


@triton.jit
def unpack_token(words, scales, token, h, K: tl.constexpr, WAY: tl.constexpr):
    """h = row `token` of a packed embedding. Every program writes the whole row, the same numbers."""
    row = token + tl.zeros([1], tl.int32)
    for first in range(0, segments_of(K, WAY[0], WAY[3]), WAY[8]):
        value, col = unpacked_rows(
            words,
            scales,
            row,
            live=row >= 0,
            first=first,
            k=K,
            FORMAT=WAY[0],
            BITS=WAY[3],
            GROUP=WAY[4],
            SECOND=WAY[5],
            BLOCK_N=1,
            SEGMENTS=WAY[8],
        )
        tl.store(h + col, value.to(h.dtype.element_ty), mask=col < K)
    tl.debug_barrier()  # its own stores come before the program's loads


@triton.jit
def share_rows(first, n, PAIRS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(outputs, rows of w), int32 [BLOCK_N] each: of a tile of packed rows from output `first` on."""
    if PAIRS:
        out, row = paired_rows(first, n, BLOCK_N)
    else:
        out = first + tl.arange(0, BLOCK_N)
        row = out
    return out, row


@triton.jit
def packed_product_of_share(
    counters,
    target,
    x,
    norm_w,
    normed,
    eps,
    words,
    scales,
    bias,
    residual,
    y,
    n,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SECOND: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PAIRS: tl.constexpr = False,
    ARGMAX: tl.constexpr = False,
    trace=None,
    peers=None,
    RANK: tl.constexpr = 0,
    RANKS: tl.constexpr = 1,
):
    """product() of a packed matrix: whole blocks of 8 rows.

    Its loads go to shared memory, together with those of x, so that none can be issued before the wait. L2 is
    asked for the first weights instead. normed: the row to which every program writes the same norm of x.
    """
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if PAIRS else BLOCK_N
    blocks = tl.cdiv(n, ROWS)
    first = tl.program_id(0) * blocks // tl.num_programs(0) * ROWS
    end = tl.minimum((tl.program_id(0) + 1) * blocks // tl.num_programs(0) * ROWS, n)
    out, row = share_rows(first, n, PAIRS, BLOCK_N)
    prefetch_rows(words, row, out < end, K, BITS, SEGMENTS, PDL=PREFETCH)
    if norm_w is not None:
        col = tl.arange(0, BLOCK_K)[None, None, :]
        weight = tl.load(norm_w + col, mask=col < K, other=0.0, eviction_policy="evict_last")
    wait(counters, target, trace)
    if norm_w is not None:
        xn = normed_rows(x, weight, rows=1, k=K, eps=eps, b=tl.zeros([1, 1, 1], tl.int32), col=col)
        tl.store(normed + col, xn, mask=col < K)
        tl.debug_barrier()  # its own stores come before the program's loads
        operand = normed
    else:
        operand = x

    # Only row 0 of the BLOCK_B rows of sums is used. "flatten" makes one loop of this one and of the one over
    # k in packed_product(), so that copies of the next tile are issued while this one is multiplied.
    b = tl.arange(0, BLOCK_B)[:, None]
    best = tl.full([BLOCK_B, OUTPUTS], float("-inf"), tl.float32)
    index = tl.full([BLOCK_B, OUTPUTS], NO_INDEX, tl.int32)
    for begin in tl.range(first, end, OUTPUTS, flatten=True):
        out, row = share_rows(begin, n, PAIRS, BLOCK_N)
        column = begin + tl.arange(0, OUTPUTS)[None, :]
        added, r = load_added(bias, residual, column, end)
        total = packed_product(
            operand,
            words,
            scales,
            row,
            live=out < end,
            rows=1,
            k=K,
            FORMAT=FORMAT,
            BITS=BITS,
            GROUP=GROUP,
            SECOND=SECOND,
            EVEN_K=EVEN_K,
            BLOCK_B=BLOCK_B,
            BLOCK_N=BLOCK_N,
            SEGMENTS=SEGMENTS,
            STAGES=STAGES,
        )
        if PAIRS:
            total = activated_runs(total, BLOCK_B, BLOCK_N)
        else:
            total = total + added if RANKS > 1 else r + (total + added)
        live = (b == 0) & (column < end)
        if RANKS > 1:
            send_sums(peers, b * n + column, live, total, RANK, RANKS)
        else:
            tl.store(y + b * n + column, total.to(y.dtype.element_ty), mask=live)
        if ARGMAX:
            best, index = keep_best(best, index, tl.where(live, total, float("-inf")), column)
    if RANKS > 1:
        add_sums(peers, residual, y, first, end, BLOCK=SUMS, RANK=RANK, RANKS=RANKS)
    return first_best(best, index, axis=0)


@triton.jit
def any_product(
    counters,
    target,
    x,
    norm_w,
    normed,
    eps,
    w,
    scales,
    bias,
    residual,
    y,
    n,
    K: tl.constexpr,
    WAY: tl.constexpr,
    PREFETCH: tl.constexpr,
    PAIRS: tl.constexpr = False,
    ARGMAX: tl.constexpr = False,
    trace=None,
    peers=None,
    RANK: tl.constexpr = 0,
    RANKS: tl.constexpr = 1,
):
    """product() of a plain or packed matrix."""
    if WAY[0] == 0:
        best, index = product(
            counters,
            target,
            x=x,
            norm_w=norm_w,
            eps=eps,
            w=w,
            bias=bias,
            residual=residual,
            y=y,
            n=n,
            K=K,
            BLOCK_N=WAY[1],
            BLOCK_K=WAY[2],
            PAIRS=PAIRS,
            ARGMAX=ARGMAX,
            trace=trace,
            peers=peers,
            RANK=RANK,
            RANKS=RANKS,
        )
    else:
        best, index = packed_product_of_share(
            counters,
            target,
            x=x,
            norm_w=norm_w,
            normed=normed,
            eps=eps,
            words=w,
            scales=scales,
            bias=bias,
            residual=residual,
            y=y,
            n=n,
            K=K,
            FORMAT=WAY[0],
            BLOCK_N=WAY[1],
            BLOCK_K=WAY[2],
            BITS=WAY[3],
            GROUP=WAY[4],
            SECOND=WAY[5],
            EVEN_K=WAY[6],
            BLOCK_B=WAY[7],
            SEGMENTS=WAY[8],
            STAGES=WAY[9],
            PREFETCH=PREFETCH,
            PAIRS=PAIRS,
            ARGMAX=ARGMAX,
            trace=trace,
            peers=peers,
            RANK=RANK,
            RANKS=RANKS,
        )
    return best, index


@triton.jit
def layer_product(
    counters,
    target,
    table,
    x,
    norm_w,
    normed,
    eps,
    bias,
    residual,
    y,
    n,
    K: tl.constexpr,
    column,
    matrix,
    WAYS: tl.constexpr,
    PREFETCH: tl.constexpr,
    PAIRS: tl.constexpr = False,
    trace=None,
    peers=None,
    RANK: tl.constexpr = 0,
    RANKS: tl.constexpr = 1,
    scales_column=None,
):
    """product() of one of a layer's matrices, whose address is in this column of the table.

    matrix: the number of its byte among the formats. WAYS: one for each weight format that the matrix has in
    any layer. Several are several copies of the code, of which a layer takes one. scales_column: of the
    address of its scales; without it the matrix is one of MATRICES.
    """
    COUNT: tl.constexpr = len(WAYS)
    if COUNT > 1:
        format = (tl.load(table + FORMATS) >> (8 * matrix)) & 0xFF
    for i in tl.static_range(COUNT):
        mine = True
        if COUNT > 1:
            mine = format == WAYS[i][0]
        if mine:
            if WAYS[i][0] == 0:
                w = tensor_at(table, column, x.dtype)
                scales = None
            else:
                w = tensor_at(table, column, tl.pointer_type(tl.int32))
                at = SCALES + matrix if scales_column is None else scales_column
                scales = tensor_at(table, at, tl.pointer_type(WAYS[i][10]))
            any_product(
                counters,
                target,
                x=x,
                norm_w=norm_w,
                normed=normed,
                eps=eps,
                w=w,
                scales=scales,
                bias=bias,
                residual=residual,
                y=y,
                n=n,
                K=K,
                WAY=WAYS[i],
                PREFETCH=PREFETCH,
                PAIRS=PAIRS,
                trace=trace,
                peers=peers,
                RANK=RANK,
                RANKS=RANKS,
            )


@triton.jit
def qkv_product(
    counters,
    target,
    table,
    x,
    norm_w,
    normed,
    eps,
    bias,
    y,
    Q: tl.constexpr,
    KV: tl.constexpr,
    K: tl.constexpr,
    COLUMN: tl.constexpr,
    WAYS: tl.constexpr,
    APART: tl.constexpr,
    PREFETCH: tl.constexpr,
    trace=None,
):
    """layer_product() of wqkv, Q + 2 KV rows, whose address is in COLUMN of the table.

    APART: whether any layer stores q, k and v apart. In such a layer these are three products in one phase,
    and a program has a share of each.
    """
    if not APART:
        layer_product(
            counters,
            target,
            table,
            x=x,
            norm_w=norm_w,
            normed=normed,
            eps=eps,
            bias=bias,
            residual=None,
            y=y,
            n=Q + 2 * KV,
            K=K,
            column=COLUMN,
            matrix=0,
            WAYS=WAYS,
            PREFETCH=PREFETCH,
            trace=trace,
        )
    else:
        apart = tl.load(table + MORE) != 0
        for i in range(0, tl.where(apart, 3, 1)):
            first = tl.where(i == 0, 0, Q + (i - 1) * KV)
            n = tl.where(apart, tl.where(i == 0, Q, KV), Q + 2 * KV)
            layer_product(
                counters,
                target,
                table,
                x=x,
                norm_w=norm_w,
                normed=normed,
                eps=eps,
                bias=bias + first if bias is not None else None,
                residual=None,
                y=y + first,
                n=n,
                K=K,
                column=tl.where(i == 0, COLUMN, MORE + i - 1),
                matrix=tl.where(i == 0, 0, 3 + i),
                WAYS=WAYS,
                PREFETCH=PREFETCH,
                # The end of the wait is that of the first: the others' goes to a column that nobody reads.
                trace=trace + tl.where(i == 0, 0, 1) if trace is not None else None,
                scales_column=tl.where(i == 0, SCALES, MORE_SCALES + i - 1),
            )
