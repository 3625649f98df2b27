"""decode_step: the whole decode step of one sequence in one launch:
embedding, every layer, lm_head and argmax

  ids, positions int32 [1]   block_table int32 [1, max_pages]
  k_cache, v_cache [layers, pages, kv_heads, page_size, head_dim]; of a quantised cache codes, and
  k_scales, v_scales [layers, ...] beside them (lab/formats/kv.py)
  logits float32 [1, vocab], written   out int32 [1]: the next token; it may be ids itself
It computes the fused plan's ops with the same rounding points (lab/model/plans/fused.py). Where that plan
starts a new kernel, the blocks wait for each other's results instead. Weights depend on no result, so their
copies from DRAM continue during the wait.
A negative position marks an idle row: nothing is written. An id outside the vocabulary gives logits of NaN
and the token -1; what it leaves in the cache is undefined. CUDA needs sm_90.
Each matrix may be packed in a weight format of its own (lab/formats), and wqkv may be several below each
other: q, k and v. Rows of plain ones begin at multiples of 16 bytes. A KV head has at most 8 query heads.
Where ranks divide the model, each runs this op with its part of the matrices (lab/model/parallel.py): sums of
o and down are added up over all ranks in float32, in their order, so that all have the same residual. Logits
and token are those of the rank's rows of lm_head alone; all_argmax comes after it.
Kernels: cuda_src/decode_step.cu, triton_kernels/decode_step.py
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace

import torch

from lab.contract import DTYPE_CODES, EPS32, Op, case, dense, once, pointer, refuse
from lab.errors import Unavailable
from lab.formats import FORMATS, PackedMatrix, kv
from lab.formats.format import BLOCK
from lab.formats.operand import Operand, check_packed, of_random, pointers
from lab.ops import (
    decode_attention,
    embedding,
    linear,
    linear_add,
    norm_linear,
    norm_linear_argmax,
    norm_linear_silu_mul,
    rope_append_attention,
)
from lab.ops.exchange import Exchange, check_exchange, simulated
from lab.ops.kv_append import check_append, check_cache, paged_cache, quantised
from lab.ops.rope import check_positions
from lab.ops.step_layout import (
    APART,
    LAYER,
    MATRICES,
    MAX_GROUP,
    MAX_SPLITS,
    OPTIONAL,
    TICKETS,
    TRACE_BLOCKS,
    trace_rows,
)


@dataclass(frozen=True)
class StepModel:
    """A model's tensors as the kernels take them. table int64 [layers, len(LAYER)]: addresses, 0 for an
    absent tensor; where any matrix is packed, [layers, len(LAYER) + len(MATRICES) + 1], and with what APART
    of step_layout.py says 2 len(APART) columns more.

    layers: objects with LAYER's attributes, such as lab.model.weights.Layer; a wqkv that is several matrices
    is (q, k, v). cos_sin float32 [max_positions, head_dim].
    """

    embed: Operand
    layers: tuple
    final_norm: torch.Tensor
    lm_head: Operand
    cos_sin: torch.Tensor
    q_heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scale: float
    table: torch.Tensor

    @classmethod
    def of(cls, weights, cos_sin, q_heads, kv_heads, head_dim, eps, ranks=1):
        """weights: embed, layers, final_norm and lm_head, as lab.model.weights.Weights.operands() gives them.
        ranks: among how many the model is divided; these are the weights and the heads of one of them.
        Raises LabError for sizes that neither kernel takes."""
        name, embed = "decode_step", weights.embed
        device, dtype = embed.get_device(), weights.final_norm.dtype
        row = 16 // dtype.itemsize  # elements
        hidden, q, kv = embed.shape[1], q_heads * head_dim, kv_heads * head_dim
        if head_dim not in decode_attention.HEAD_DIMS or q_heads % kv_heads or q_heads > kv_heads * MAX_GROUP:
            refuse(
                name,
                f"{q_heads} query and {kv_heads} KV heads of {head_dim}: head_dim must be 64, 96 or 128, and "
                f"a KV head have at most {MAX_GROUP} query heads (use --plan fused)",
            )
        if not weights.layers:
            refuse(name, "the model has no layers")
        middle = weights.layers[0].w_down.shape[1]
        if dtype not in op.dtypes:
            refuse(
                name,
                f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')} (use --plan fused)",
            )
        if hidden % row or middle % row:
            refuse(
                name,
                f"rows of {hidden} and {middle} elements must begin at multiples of 16 bytes (use --plan "
                "fused)",
            )
        shapes = dict(
            attn_norm=(hidden,),
            wqkv=(q + 2 * kv, hidden),
            bqkv=(q + 2 * kv,),
            q_norm=(head_dim,),
            k_norm=(head_dim,),
            wo=(hidden, q),
            bo=(hidden,),
            mlp_norm=(hidden,),
            w_gate_up=(2 * middle, hidden),
            w_down=(hidden, middle),
        )
        layers = [with_q_k_and_v(layer, (q, kv, kv)) for layer in weights.layers]
        for layer in layers:
            for part, shape in shapes.items():
                tensor = getattr(layer, part)
                if isinstance(tensor, tuple):
                    for one, rows in zip(tensor, (q, kv, kv), strict=True):
                        check_apart(name, device, part, one, (rows, hidden), dtype)
                    continue
                if part in MATRICES and type(tensor) is PackedMatrix and tensor.shape == shape:
                    check_matrix(name, device, part, tensor)
                    continue
                if (tensor is None) != (getattr(layers[0], part) is None):
                    refuse(name, f"{part} must be in all layers or in none")
                if tensor is None and part in OPTIONAL:
                    continue
                if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
                    refuse(name, f"{part} must be {list(shape)} in the dtype of final_norm")
                dense(name, device, tensor)
        vocab = embed.shape[0]
        whole = dict(embed=(vocab, hidden), final_norm=(hidden,), lm_head=(vocab // ranks, hidden))
        for part, shape in whole.items():
            tensor = getattr(weights, part)
            if type(tensor) is PackedMatrix and part != "final_norm" and tensor.shape == shape:
                check_matrix(name, device, part, tensor)
                continue
            if tensor.shape != shape or tensor.dtype != dtype:
                refuse(name, f"{part} must be {list(shape)} in the dtype of final_norm")
            dense(name, device, tensor)
        if cos_sin.dim() != 2 or cos_sin.shape[1] != head_dim or cos_sin.dtype != torch.float32:
            refuse(name, f"cos_sin must be float32 [max_positions, {head_dim}]")
        dense(name, device, cos_sin)
        matrices = [embed, weights.lm_head, *(m for layer in layers for m in matrices_of(layer))]
        packed = [m.format for m in matrices if type(m) is PackedMatrix]
        apart = any(isinstance(layer.wqkv, tuple) for layer in layers)
        columns = len(LAYER)
        if packed or apart:
            columns += len(MATRICES) + 1
        if apart or any(f.span > 1 for f in packed):
            columns += 2 * len(APART)
        table = torch.zeros(len(layers), columns, dtype=torch.int64, device=embed.device)
        model = cls(
            embed,
            tuple(layers),
            weights.final_norm,
            weights.lm_head,
            cos_sin,
            q_heads,
            kv_heads,
            head_dim,
            eps,
            head_dim**-0.5,
            table,
        )
        model.readdress()
        return model

    def readdress(self):
        """Writes the present addresses of the layers' tensors into `table`."""
        rows = []
        for layer in self.layers:
            q, *more = apart_of(layer.wqkv)
            of_parts = {part: getattr(layer, part) for part in LAYER} | {"wqkv": q}
            row = [0 if t is None else pointers(t)[0] for t in of_parts.values()]
            if self.packed:
                matrices = [*(of_parts[part] for part in MATRICES), *more]
                addresses, scales, formats = zip(*map(pointers, matrices))
                row += [*scales[: len(MATRICES)], int.from_bytes(formats, "little")]
                row += [*addresses[len(MATRICES) :], *scales[len(MATRICES) :]]
            rows.append(row + [0] * (self.table.shape[1] - len(row)))
        self.table.copy_(torch.tensor(rows, dtype=torch.int64))

    @property
    def packed(self) -> bool:
        """Whether any matrix is packed in a weight format."""
        return self.table.shape[1] > len(LAYER)

    @property
    def apart(self) -> bool:
        """Whether any layer stores q, k and v apart."""
        return any(isinstance(layer.wqkv, tuple) for layer in self.layers)

    @functools.cached_property
    def layer_nbytes(self) -> int:
        """Bytes of the matrices of a layer."""
        return sum(matrix.nbytes for matrix in matrices_of(self.layers[0]))

    @functools.cached_property
    def by_format(self) -> dict[str, tuple[Operand, ...]]:
        """Of each of a layer's matrices one for every weight format that it has in any layer."""
        found = {}
        for part in MATRICES:
            numbers = {pointers(w)[2]: w for layer in self.layers for w in apart_of(getattr(layer, part))}
            found[part] = tuple(numbers[number] for number in sorted(numbers))
        return found

    @property
    def dtype(self) -> torch.dtype:
        """That of the activations."""
        return self.final_norm.dtype

    @property
    def group(self):
        return self.q_heads // self.kv_heads

    @property
    def intermediate(self):
        return self.layers[0].w_down.shape[1]


def apart_of(w: Operand | tuple[Operand, ...]) -> tuple[Operand, ...]:
    """The matrices as which a part of a layer is stored: itself, or q, k and v."""
    return w if isinstance(w, tuple) else (w,)


def matrices_of(layer) -> list[Operand]:
    """All matrices of a layer."""
    return [one for part in MATRICES for one in apart_of(getattr(layer, part))]


def with_q_k_and_v(layer, rows: tuple[int, int, int]):
    """The layer, with (q, k, v) in the place of a wqkv that is several matrices, one of which may hold two of
    the three: views of the same memory. rows: of q, k and v."""
    if not isinstance(layer.wqkv, tuple):
        return layer
    ends = list(itertools.accumulate(one.shape[0] for one in layer.wqkv))
    bounds = list(itertools.accumulate(rows))
    if ends[-1] != bounds[-1] or not set(ends) <= set(bounds):
        refuse("decode_step", f"wqkv must have the {list(rows)} rows of q, k and v")
    found, begins = [], [0, *ends]
    for end, count in zip(bounds, rows):
        i = next(i for i, last in enumerate(ends) if end <= last)
        first = end - count - begins[i]
        whole = layer.wqkv[i]
        found.append(
            whole.rows_from(first, count) if type(whole) is PackedMatrix else whole[first : first + count]
        )
    return replace(layer, wqkv=tuple(found))


def check_apart(op: str, device: int, part: str, w: Operand, shape: tuple[int, int], dtype) -> None:
    """Raises LabError for a matrix of several that the kernels do not take."""
    if w.shape != shape or (type(w) is not PackedMatrix and w.dtype != dtype):
        refuse(op, f"{part} must be {list(shape)} in the dtype of final_norm")
    if type(w) is PackedMatrix:
        check_matrix(op, device, part, w)
    else:
        dense(op, device, w)


def check_matrix(op: str, device: int, part: str, w: PackedMatrix) -> None:
    """Raises LabError for a packed matrix that the kernels do not take."""
    dense(op, device, *w.tensors())
    check_packed(op, w)
    if part == "w_gate_up" and w.rows // 2 % BLOCK:
        refuse(
            op, f"packed gate and up have {w.rows // 2} rows each, no multiple of {BLOCK} (use --plan fused)"
        )


@dataclass(frozen=True)
class StepWorkspace:
    """The memory in which the phases of a step pass results to each other. `words` and `counters` are zero at
    first.

    The Triton kernel uses a row of each result in the model's dtype, and float32 results of attention's
    splits in `partial`; `normed` only where weights are packed. The CUDA kernel passes the same values in
    `words` of 64 bits: two elements of a row, or one element of a split's result, and a tag, by which a
    reader knows that the word has been written in this phase.
    With a `trace` the kernel records when each block waited (lab/ops/step_layout.py). If ranks divide the
    model, they add up their sums of o and down through `exchange`, which nothing else may use: a float32 is a
    word's data. Its tags count the exchanges, and launches[0] the launches.
    """

    h: torch.Tensor  # [hidden]: the residual stream
    qkv: torch.Tensor  # [(q_heads + 2 kv_heads) head_dim]
    attention: torch.Tensor  # [q_heads head_dim]
    act: torch.Tensor  # [intermediate]
    normed: torch.Tensor  # [hidden]: the norm of h
    partial: torch.Tensor  # float32 [kv_heads, MAX_SPLITS, group, head_dim + 2]
    words: torch.Tensor  # int64 [rows' elements / 2 + partial's elements]
    counters: torch.Tensor  # int32 [TICKETS + kv_heads]
    trace: torch.Tensor | None = None  # int64 [TRACE_BLOCKS, trace_rows(layers), 4]
    exchange: Exchange | None = None

    @classmethod
    def of(cls, m, exchange=None):
        made = cls(
            *(
                (torch.zeros if part in ("words", "counters") else torch.empty)(
                    shape, dtype=dtype, device=m.embed.device
                )
                for part, (shape, dtype) in cls.sizes(m).items()
            )
        )
        return replace(made, exchange=exchange)

    def readdress(self):
        if self.exchange is not None:
            self.exchange.readdress()

    @property
    def ranks(self) -> int:
        return 1 if self.exchange is None else self.exchange.ranks

    @staticmethod
    def sizes(m) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and the dtype of each tensor."""
        partial = m.kv_heads, MAX_SPLITS, m.group, m.head_dim + 2
        rows = dict(
            h=m.embed.shape[1],
            qkv=(m.q_heads + 2 * m.kv_heads) * m.head_dim,
            attention=m.q_heads * m.head_dim,
            act=m.intermediate,
        )
        return {
            **{name: ((n,), m.dtype) for name, n in rows.items()},
            "normed": ((rows["h"],), m.dtype),
            "partial": (partial, torch.float32),
            "words": ((sum(rows.values()) // 2 + math.prod(partial),), torch.int64),
            "counters": ((TICKETS + m.kv_heads,), torch.int32),
        }


def validate(
    ids: torch.Tensor,
    positions: torch.Tensor,
    model: StepModel,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    logits: torch.Tensor,
    workspace: StepWorkspace,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    name, device = "decode_step", model.embed.get_device()
    for t in (ids, positions, *([] if out is None else [out])):
        if not (t.shape == (1,) and t.dtype == torch.int32 and t.get_device() == device):
            refuse(
                name,
                "one sequence only: ids, positions and out must be int32 [1] on the model's device (use "
                "--batch 1, or --plan fused)",
            )
    if not (
        k_cache.dim() == v_cache.dim() == 5
        and k_cache.shape == v_cache.shape
        and k_cache.shape[0] == len(model.layers)
    ):
        refuse(name, "k_cache and v_cache must be [layers, pages, kv_heads, page_size, head_dim]")
    dense(name, device, k_cache, v_cache)
    if (k_scales is None) != (v_scales is None):
        refuse(name, "k_scales and v_scales go together: give both, or none for a plain cache")
    for scales in (k_scales, v_scales):
        if scales is not None and not (scales.shape[:1] == k_cache.shape[:1] and scales.is_contiguous()):
            refuse(name, "k_scales and v_scales must be [layers, ...], those of each layer behind each other")
    check_cache(
        name,
        k_cache[0],
        v_cache[0],
        block_table,
        1,
        model.kv_heads,
        model.head_dim,
        model.dtype,
        *scales_of(k_scales, v_scales),
    )
    m, w = model, workspace
    wanted = StepWorkspace.sizes(m)
    if any(
        (t := getattr(w, part)).shape != shape or t.dtype != dtype for part, (shape, dtype) in wanted.items()
    ):
        refuse(name, "the workspace is of another size or dtype: make it by StepWorkspace.of(model)")
    dense(name, device, *(getattr(w, part) for part in wanted))
    if w.trace is not None:
        if w.trace.shape != (TRACE_BLOCKS, trace_rows(len(m.layers)), 4) or w.trace.dtype != torch.int64:
            refuse(name, f"the trace must be int64 [{TRACE_BLOCKS}, {trace_rows(len(m.layers))}, 4]")
        dense(name, device, w.trace)
    if w.exchange is not None:
        check_exchange(name, w.exchange, m.embed.shape[1], device)
    if not (logits.shape == (1, model.lm_head.shape[0]) and logits.dtype == torch.float32):
        refuse(name, "logits must be float32 [1, vocab]")
    dense(name, device, logits)


def scales_of(k_scales, v_scales, layer=0):
    """The scales of one layer, (None, None) where there are none."""
    return (None, None) if k_scales is None else (k_scales[layer], v_scales[layer])


def outputs(ids, *args, **options):
    return torch.empty(1, dtype=torch.int32, device=ids.device)


def reference(
    ids, positions, model, k_cache, v_cache, block_table, logits, workspace, k_scales=None, v_scales=None
):
    """The references of the fused plan's ops, one after the other, with each result rounded to the model's
    dtype. Ranks that one process simulates all have the same sums."""
    m, dtype, ranks = model, model.dtype, workspace.ranks
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    scales = () if k_scales is None else (k_scales.clone(), v_scales.clone())
    h = embedding.reference(ids, m.embed)[0].to(dtype)
    for i, layer in enumerate(m.layers):
        products = [
            norm_linear.reference(h, layer.attn_norm, m.eps, w, bias)[0] for w, bias, _ in qkv_products(layer)
        ]
        qkv = torch.cat(products, -1).to(dtype)
        q, k, v = qkv.view(1, -1, m.head_dim).split([m.q_heads, m.kv_heads, m.kv_heads], dim=1)
        of_layer = [s[i] for s in scales]
        a, k_cache[i], v_cache[i], *new = rope_append_attention.reference(
            q,
            k,
            v,
            layer.q_norm,
            layer.k_norm,
            m.eps,
            positions,
            m.cos_sin,
            k_cache[i],
            v_cache[i],
            block_table,
            m.scale,
            1,
            None,
            *of_layer,
        )
        for one, stored in zip(of_layer, new):
            one.copy_(stored)
        h = (h.double() + ranks * linear.reference(a.to(dtype).view(1, -1), layer.wo, layer.bo)[0]).to(dtype)
        act = norm_linear_silu_mul.reference(h, layer.mlp_norm, m.eps, layer.w_gate_up)[0].to(dtype)
        h = (h.double() + ranks * linear.reference(act, layer.w_down)[0]).to(dtype)
    if int(positions) < 0:
        return torch.full_like(ids, -1), k_cache, v_cache, logits.double(), *scales
    token, want = norm_linear_argmax.reference(h, m.final_norm, m.eps, m.lm_head, logits, None)
    return token, k_cache, v_cache, want, *scales


def qkv_products(layer):
    """[(w, bias or None, slice of the outputs)] of the matrices that wqkv consists of."""
    found, first = [], 0
    for w in apart_of(layer.wqkv):
        outputs = slice(first, first + w.shape[0])
        found.append((w, None if layer.bqkv is None else layer.bqkv[outputs], outputs))
        first = outputs.stop
    return found


def tolerance(a):
    """(rtol, atol) of the logits. About 16 roundings a layer, each of half a step of T and random sign, move
    the residual stream by 2 steps in all; the sums are float32's. The error is relative to the largest logit,
    or to the largest key.

    With a quantised cache a list of (rtol, atol): of K's codes, V's codes, the logits and the scales. The new
    keys and values move as in a plain cache, and their codes may be all that lie within that distance. Such a
    change of code is up to 1/8 (fp8) or 1/127 (int8) of one element of a head: it changes the logits by
    as much divided by sqrt(head_dim).
    """
    want = reference(*vars(a).values())
    size = float(want[3].nan_to_num().abs().max())
    steps = (2 * torch.finfo(a.model.dtype).eps + 16 * EPS32) * (len(a.model.layers) + 1)
    if a.k_scales is None:
        return 0.0, steps * max(size, float(want[1].double().abs().max()))
    name, page_size, position = kv.NAMES[a.k_cache.dtype], a.k_cache.shape[3], max(int(a.positions), 0)
    where = slice(None), int(a.block_table[0, position // page_size]), slice(None), position % page_size
    codes, scales = [], []
    for after, scale in zip(want[1:3], want[4:6]):
        atol, of_scale = (torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in (after, scale))
        if name == "int8":  # the scale is the largest number of the head, rounded to float16
            atol[where] = 1.0 + 127 * steps
            of_scale[where] = (2 * steps + torch.finfo(torch.float16).eps) * scale[where].double()
        else:
            ones = scale[:, :, None]
            numbers = kv.numbers(after[where], ones)
            moved = steps * numbers.abs().max()
            lower, upper = (
                (kv.quantise(numbers + by, name, ones)[0].double() - after[where].double()).abs()
                for by in (-moved, moved)
            )
            # At least the next code: a number half way between two may be moved by less than a step.
            # A code begins with its sign, so that those of the numbers around 0 lie far apart.
            moved_codes = torch.maximum(lower, upper).clamp(min=1.0)
            atol[where] = torch.where(numbers.abs() <= moved, 255.0, moved_codes)
        codes.append((0.0, atol))
        scales.append((0.0, of_scale))
    jump = 1 / (8 if name == "fp8" else 127) / a.model.head_dim**0.5
    return [*codes, (0.0, (steps + jump) * size), *scales]


def verify(got, a):
    """The token must be the best one in float64, or one whose logit is equal to the best within the
    tolerance. An idle row has none."""
    if int(a.positions) < 0:
        return None if int(got) < -1 else f"a token for an idle row: {int(got)}"
    limits = tolerance(a)
    exact, (_, atol) = (reference(*vars(a).values())[3][0], limits[2] if isinstance(limits, list) else limits)
    if not 0 <= int(got) < exact.numel():
        return f"a token outside the vocabulary: {int(got)}"
    short = float(exact.max() - exact[int(got)]) - 2 * atol
    return None if short <= 0 else f"token {int(got)}, not {int(exact.argmax())}"


def cuda(
    kernels,
    ids,
    positions,
    model,
    k_cache,
    v_cache,
    block_table,
    logits,
    workspace,
    k_scales=None,
    v_scales=None,
    *,
    out,
):
    m, w = model, workspace
    if m.table.is_cuda and torch.cuda.get_device_capability(m.embed.device)[0] < 9:
        raise Unavailable(
            "decode_step by CUDA needs an sm_90 GPU (bulk copies): use --plan fused, or --backend triton"
        )
    vocab, hidden = m.embed.shape
    layers, pages, kv_heads, page_size, head_dim = k_cache.shape
    scales = 0, 0, 0
    if k_scales is not None:
        scales = k_scales.data_ptr(), v_scales.data_ptr(), kv.NUMBERS[k_cache.dtype]
    kernels.decode_step(
        ids=ids.data_ptr(),
        positions=positions.data_ptr(),
        weights=(
            pointers(m.embed),
            m.table.data_ptr(),
            m.final_norm.data_ptr(),
            pointers(m.lm_head),
            m.cos_sin.data_ptr(),
            m.table.shape[1],
        ),
        cache=(
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            block_table.data_ptr(),
            pages,
            kv_heads,
            page_size,
            *scales,
        ),
        logits=logits.data_ptr(),
        out=out.data_ptr(),
        exchange=(w.words.data_ptr(), w.counters.data_ptr(), pointer(w.trace)),
        sizes=(layers, vocab, m.lm_head.shape[0], hidden, m.intermediate, m.layer_nbytes),
        q_heads=m.q_heads,
        head_dim=head_dim,
        eps=m.eps,
        scale=m.scale,
        dtype=DTYPE_CODES[m.dtype],
        stream=kernels.stream(),
        peers=(0, 0, 0, 0, 1) if w.exchange is None else w.exchange.pointers,
    )


def triton(*args, **options):
    from triton_kernels.decode_step import decode_step

    decode_step(*args, **options)


def torch_(
    ids,
    positions,
    model,
    k_cache,
    v_cache,
    block_table,
    logits,
    workspace,
    k_scales=None,
    v_scales=None,
    out=None,
):
    """The fused plan's ops by torch, one after the other, because torch has no such kernel."""
    if workspace.trace is not None:
        raise Unavailable("torch runs decode_step op by op: there is no kernel that could record its phases")
    m, h, qkv, act = model, workspace.h[None], workspace.qkv[None], workspace.act[None]
    live, found, token = positions >= 0, torch.empty_like(logits), torch.empty_like(ids)
    add = (
        linear_add.torch_ if workspace.exchange is None else functools.partial(add_total, workspace.exchange)
    )
    attention = workspace.attention.view(1, m.q_heads, m.head_dim)
    embedding.torch_(ids, m.embed, out=h)
    for i, layer in enumerate(m.layers):
        for w, bias, outputs in qkv_products(layer):
            norm_linear.torch_(h, layer.attn_norm, m.eps, w, bias, out=qkv[:, outputs])
        q, k, v = qkv.view(1, -1, m.head_dim).split([m.q_heads, m.kv_heads, m.kv_heads], dim=1)
        rope_append_attention.torch_(
            q,
            k,
            v,
            layer.q_norm,
            layer.k_norm,
            m.eps,
            positions,
            m.cos_sin,
            k_cache[i],
            v_cache[i],
            block_table,
            m.scale,
            1,
            None,
            *scales_of(k_scales, v_scales, i),
            out=attention,
        )
        add(attention.view(1, -1), layer.wo, h, layer.bo)
        norm_linear_silu_mul.torch_(h, layer.mlp_norm, m.eps, layer.w_gate_up, out=act)
        add(act, layer.w_down, h)
    norm_linear_argmax.torch_(h, m.final_norm, m.eps, m.lm_head, found, None, out=token)
    logits.copy_(torch.where(live, found, logits))  # an idle row changes neither the logits nor the token
    out.copy_(torch.where(live, token, out))


def add_total(exchange, x, w, residual, bias=None):
    """residual += the sum over ranks of x w^T + bias, which is added up in float32."""
    total = torch.empty(residual.shape, dtype=torch.float32, device=x.device)
    linear.torch_(x, w, bias, torch.float32, out=total)
    if exchange.group is not None:
        torch.distributed.all_reduce(total, group=exchange.group)
    else:  # one process simulates ranks that all have the same sums
        total *= exchange.ranks
    residual.copy_(residual.float() + total)


def contents(a):
    """Raises LabError for a position past cos_sin or the table, and for a page that the cache does not
    have."""
    check_positions("decode_step", a.positions, a.model.cos_sin.shape[0], "cos_sin")
    check_append("decode_step", a.block_table, a.positions, a.k_cache[0])
    for i in range(len(a.model.layers)):
        kv.check_scales("decode_step", a.k_cache, *scales_of(a.k_scales, a.v_scales, i))


def inputs(
    rand,
    layers,
    hidden,
    intermediate,
    vocab,
    q_heads,
    kv_heads,
    head_dim,
    position,
    page_size=16,
    bias=False,
    qk_norm=False,
    poison=False,
    size=1.0,
    format=None,
    head_format=None,
    ranks=1,
    rank=0,
    kv_dtype=None,
    more_format=None,
):
    """Random weights that keep activations near 1, like those of lab.model.sources.random.RandomSource.
    poison: NaN and inf in every slot that holds no token. size: a factor of the embedding and of everything
    that is added to it; a small one makes a norm's eps count. format, head_format: the weight format of the
    layers' matrices, and that of the embedding and of lm_head; None: plain. ranks, rank: this one of so many,
    which gets its own sums as those of the others, so that a call may be repeated. kv_dtype: the format
    of the cache. more_format: that of v and down in every second layer, as in GGUF's Q4_K_M."""
    from lab.model.rope import cos_sin_table
    from lab.model.weights import Layer, Weights

    q, kv = q_heads * head_dim, kv_heads * head_dim

    def matrix(n, k, scale=1.0, format=format):
        return of_random(rand(n, k, scale=scale * k**-0.5), format)

    def norm(n):
        return (rand(n, scale=0.1, dtype=torch.float32) + 1).to(rand.dtype)

    def layer(i):
        more = more_format if i % 2 else None
        return Layer(
            norm(hidden),
            (matrix(q + kv, hidden), matrix(kv, hidden, format=more)) if more else matrix(q + 2 * kv, hidden),
            rand(q + 2 * kv, scale=0.1) if bias else None,
            norm(head_dim) if qk_norm else None,
            norm(head_dim) if qk_norm else None,
            matrix(hidden, q, size * (2 * layers) ** -0.5),
            rand(hidden, scale=0.1) if bias else None,
            norm(hidden),
            matrix(2 * intermediate, hidden),
            matrix(hidden, intermediate, size * (2 * layers) ** -0.5, more or format),
        )

    weights = Weights(
        None,
        of_random(rand(vocab, hidden, scale=size), head_format),
        [layer(i) for i in range(layers)],
        norm(hidden),
        matrix(vocab // ranks, hidden, format=head_format),
    )
    cos_sin = cos_sin_table(head_dim, 10000.0, None, max(1, position + 1), rand.device)
    model = StepModel.of(weights, cos_sin, q_heads, kv_heads, head_dim, 1e-5, ranks)
    no_words = torch.empty(hidden + hidden % 2, dtype=torch.int32, device=rand.device)
    exchange = simulated(rand, [no_words] * ranks, rank, loopback=True) if ranks > 1 else None
    k, v, block_table = paged_cache(rand, [position + 1], kv_heads, head_dim, page_size)
    of_layers = [quantised(rand, k / (i + 1), v / (i + 1), kv_dtype) for i in range(layers)]
    if poison:
        for one in of_layers:
            decode_attention.poison_unused([position], [position + 1], *one[:2], block_table, *one[2:])
    k_cache, v_cache, *scales = map(torch.stack, zip(*of_layers))
    ids = rand.integers(0, vocab, 1)
    return (
        ids,
        torch.full_like(ids, position),
        model,
        k_cache,
        v_cache,
        block_table,
        torch.full((1, vocab // ranks), torch.nan, device=rand.device),
        StepWorkspace.of(model, exchange),
        *scales,
    )


def nbytes(a):
    """Every weight once, the KV of the context, the new token's KV, one row of embed, the logits."""
    m = a.model
    head = m.head_dim * a.k_cache.itemsize + kv.scale_bytes(a.k_cache.dtype)
    token = 2 * len(m.layers) * m.kv_heads * head
    parts = [getattr(layer, part) for layer in m.layers for part in LAYER]
    held = [one for part in parts for one in apart_of(part)]
    weights = sum(t.nbytes for t in (*held, m.final_norm, m.lm_head) if t is not None)
    return weights + (int(a.positions) + 1) * token + m.embed.nbytes // m.embed.shape[0] + a.logits.nbytes


def flops(a):
    m = a.model
    matrices = sum(t.numel() for layer in m.layers for t in matrices_of(layer))
    return 2 * (matrices + m.lm_head.numel()) + 4 * len(m.layers) * m.q_heads * m.head_dim * (
        int(a.positions) + 1
    )


# Cases of a quantised cache, in each of its formats.
QUANTISED = (
    (
        "several pages and splits, NaN wherever there is no token, packed weights",
        dict(
            layers=2,
            hidden=72,
            intermediate=136,
            vocab=101,
            q_heads=6,
            kv_heads=2,
            head_dim=64,
            position=337,
            poison=True,
            format="int4-g32",
        ),
    ),
    (
        "head 128, Qwen3's per-head norm, the first slot of a page",
        dict(
            layers=2,
            hidden=264,
            intermediate=136,
            vocab=101,
            q_heads=4,
            kv_heads=2,
            head_dim=128,
            position=144,
            qk_norm=True,
        ),
    ),
    (
        "head 96, the largest group, a larger page and its last slot",
        dict(
            layers=1,
            hidden=96,
            intermediate=64,
            vocab=83,
            q_heads=8,
            kv_heads=1,
            head_dim=96,
            position=63,
            page_size=64,
        ),
    ),
    (
        "an idle row",
        dict(layers=1, hidden=72, intermediate=64, vocab=83, q_heads=2, kv_heads=1, head_dim=64, position=-1),
    ),
)

op = Op(
    name="decode_step",
    summary="a whole greedy decode step of one sequence",
    dtypes=(torch.float16, torch.bfloat16),
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=nbytes,
    flops=flops,
    tolerance=tolerance,
    verify=verify,
    contents=contents,
    mutates=("k_cache", "v_cache", "logits", "k_scales", "v_scales"),
    state=("workspace",),
    plans=("persistent",),
    whole_step=True,
    cold=("model", "k_cache", "v_cache"),
    calls=once,
    uses=lambda c: [(None, {"layers": c.layers, "hidden": c.hidden, "vocab": c.vocab})],
    color="#44aa99",  # that of matrix products, which take most of its time
    # One layer is enough: the kernel is the same for any number of layers.
    inspect_sizes=dict(
        layers=1,
        hidden=4096,
        intermediate=14336,
        vocab=128256,
        position=8191,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
    ),
    cases=(
        case(
            "first token; GQA group 3; sizes that are no multiple of a tile",
            layers=2,
            hidden=72,
            intermediate=136,
            vocab=101,
            q_heads=3,
            kv_heads=1,
            head_dim=64,
            position=0,
        ),
        case(
            "Qwen3's per-head norm, Qwen2's biases, several splits, head 128",
            layers=2,
            hidden=264,
            intermediate=520,
            vocab=300,
            q_heads=4,
            kv_heads=2,
            head_dim=128,
            position=130,
            bias=True,
            qk_norm=True,
        ),
        case(
            "MHA, head 96, a page's last slot; more KV heads than the host build has blocks",
            layers=1,
            hidden=96,
            intermediate=64,
            vocab=83,
            q_heads=5,
            kv_heads=5,
            head_dim=96,
            position=63,
            page_size=64,
        ),
        case(
            "the largest group; rows longer than a tile",
            layers=1,
            hidden=2112,
            intermediate=2056,
            vocab=40,
            q_heads=8,
            kv_heads=1,
            head_dim=64,
            position=33,
        ),
        case(
            "rank 1 of 3 by loopback, biases, rows of several batches of sums",
            layers=2,
            hidden=1032,
            intermediate=136,
            vocab=102,
            q_heads=2,
            kv_heads=1,
            head_dim=64,
            position=5,
            bias=True,
            ranks=3,
            rank=1,
        ),
        case(
            "an idle row",
            layers=1,
            hidden=72,
            intermediate=64,
            vocab=83,
            q_heads=2,
            kv_heads=1,
            head_dim=64,
            position=-1,
        ),
        case(
            "NaN and inf wherever there is no token",
            layers=2,
            hidden=72,
            intermediate=136,
            vocab=101,
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            position=69,
            poison=True,
        ),
        case(
            "activations so small that eps counts",
            layers=2,
            hidden=264,
            intermediate=136,
            vocab=101,
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            position=20,
            qk_norm=True,
            size=2e-3,
        ),
        case(
            "packed: several tiles of a row, the last with an odd number of segments",
            layers=1,
            hidden=2328,
            intermediate=1096,
            vocab=40,
            q_heads=2,
            kv_heads=1,
            head_dim=64,
            position=3,
            format="int8-g32",
        ),
        *(
            case(
                f"{name}: no whole segments and no whole blocks of rows; the head in another format",
                layers=2,
                hidden=264,
                intermediate=136,
                vocab=101,
                q_heads=3,
                kv_heads=1,
                head_dim=64,
                position=5,
                bias=True,
                format=name,
                head_format=head,
            )
            for name, head in zip(FORMATS, [None, *FORMATS])
        ),
        *(
            case(f"{kv_dtype}: {why}", kv_dtype=kv_dtype, **sizes)
            for kv_dtype in kv.DTYPES
            for why, sizes in QUANTISED
        ),
        *(
            case(
                f"{kv_dtype}: rank 1 of 3 by loopback; one kernel takes plain and packed weights then",
                layers=2,
                hidden=264,
                intermediate=136,
                vocab=102,
                q_heads=2,
                kv_heads=1,
                head_dim=64,
                position=17,
                ranks=3,
                rank=1,
                kv_dtype=kv_dtype,
            )
            for kv_dtype in kv.DTYPES
        ),
        case(
            "as GGUF's Q4_K_M: v and down of a layer in another format, several tiles of a row",
            layers=2,
            hidden=2328,
            intermediate=136,
            vocab=40,
            q_heads=2,
            kv_heads=1,
            head_dim=64,
            position=3,
            bias=True,
            format="q4_k",
            head_format="q6_k",
            more_format="q6_k",
        ),
        case(
            "the same with plain matrices between packed ones, rank 1 of 3 by loopback and a cache in int8",
            layers=2,
            hidden=264,
            intermediate=136,
            vocab=102,
            q_heads=2,
            kv_heads=1,
            head_dim=64,
            position=5,
            more_format="fp8-g128",
            ranks=3,
            rank=1,
            kv_dtype="int8",
        ),
    ),
)
