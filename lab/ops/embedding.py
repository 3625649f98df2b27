"""embedding: out[b, :] = table[ids[b], :]

  ids [batch] int32   table [vocab, hidden], a tensor or packed (lab/formats)   out [batch, hidden]
A packed table has no dtype of its own, so `dtype` says that of out; its numbers are rounded once.
An id outside the vocabulary gives a row of NaN, which is noticed, and no invalid access. (The model checks
the ids that users pass.)
Kernels: cuda_src/embedding.cu, triton_kernels/embedding.py
"""

import torch

from lab.contract import DTYPE_CODES, EPS32, FLOATS, Op, case, dense, once, refuse
from lab.formats import FORMATS, PackedMatrix, operand


def validate(
    ids: torch.Tensor,
    table: operand.Operand,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> None:
    if not (ids.dim() == 1 and table.dim() == 2 and ids.dtype == torch.int32):
        refuse("embedding", "ids must be int32 [batch] and the table [vocab, hidden]")
    if type(table) is PackedMatrix:
        if dtype not in FLOATS:
            refuse("embedding", "a packed table needs dtype=: float32, float16 or bfloat16")
        operand.check_packed("embedding", table)
        dense("embedding", table.get_device(), ids, *table.tensors(), *(() if out is None else (out,)))
    else:
        if table.dtype not in FLOATS:
            refuse("embedding", f"takes no {table.dtype}: the table must be float32, float16 or bfloat16")
        if not (dtype is None or dtype == table.dtype):
            refuse("embedding", f"dtype must be the table's, {table.dtype}")
        dense("embedding", table.get_device(), ids, table, *(() if out is None else (out,)))
    if out is not None:
        if not (out.shape == (ids.shape[0], table.shape[1]) and out.dtype == (dtype or table.dtype)):
            refuse("embedding", "out must be [batch, hidden] in the table's dtype")


def outputs(ids, table, dtype=None):
    return torch.empty(ids.shape[0], table.shape[1], dtype=dtype or table.dtype, device=table.device)


def reference(ids, table, dtype=None):
    inside = (ids >= 0) & (ids < table.shape[0])
    known = torch.where(inside, ids, 0).long()
    rows = table[known].double() if isinstance(table, torch.Tensor) else table.some_rows(known).double()
    return (torch.where(inside[:, None], rows, torch.nan),)


def cuda(k, ids, table, dtype=None, out=None):
    vocab, cols = table.shape
    k.embedding(
        ids=ids.data_ptr(),
        table=operand.pointers(table),
        out=out.data_ptr(),
        rows=ids.shape[0],
        cols=cols,
        vocab=vocab,
        dtype=DTYPE_CODES[out.dtype],
        stream=k.stream(),
    )


def triton(ids, table, dtype=None, out=None):
    from triton_kernels.embedding import embedding

    embedding(ids, table, out)


def torch_(ids, table, dtype=None, out=None):
    inside = ids.clamp(0, table.shape[0] - 1)
    if isinstance(table, torch.Tensor):
        torch.index_select(table, 0, inside, out=out)
    else:
        out.copy_(table.some_rows(inside).double())
    out.masked_fill_((inside != ids)[:, None], torch.nan)


def inputs(rand, batch, vocab, hidden, outside=False, format=None):
    """outside: some ids are just outside the vocabulary, or far from it. format: of the table, as in
    linear.py."""
    ids = rand.integers(0, vocab, batch)
    if outside:
        ids[1:7] = torch.tensor([vocab, -1, vocab - 1, 0, (1 << 31) - 1, -(1 << 31)])
    if format is not None:
        return ids, FORMATS[format].quantise(rand(vocab, hidden)), rand.dtype
    return ids, rand(vocab, hidden)


def nbytes(a):
    """The rows read, and the rows written."""
    (vocab, hidden), rows = a.table.shape, a.ids.shape[0]
    return a.ids.nbytes + rows * (a.table.nbytes // vocab + hidden * (a.dtype or a.table.dtype).itemsize)


def tolerance(a):
    """A copy is exact. Unpacked numbers are rounded once; one with a minimum once more, in float32."""
    if a.dtype is None:
        return 0.0, 0.0
    return torch.finfo(a.dtype).eps, EPS32 * float(operand.magnitude(a.table).max())


op = Op(
    name="embedding",
    summary="out[b] = table[ids[b]]",
    dtypes=FLOATS,
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=nbytes,
    flops=lambda a: 0,
    tolerance=tolerance,
    plans=("basic", "fused"),
    calls=once,
    uses=lambda c: [(None, {"vocab": c.parts["embed"].rows, "hidden": c.parts["embed"].columns})],
    cold=("table",),
    direction="copy",
    color="#5f55c4",
    inspect_sizes=dict(batch=1, vocab=128256, hidden=4096),
    cases=(
        case("one row, SmolLM2's width", batch=1, vocab=1000, hidden=576),
        case("a width that is no multiple of the 16-byte vector", batch=3, vocab=17, hidden=101),
        case("the largest batch", batch=64, vocab=300, hidden=136),
        case(
            "ids outside the vocabulary, the first and the last inside",
            batch=8,
            vocab=40,
            hidden=72,
            outside=True,
        ),
        *(case(f"{name}, no whole segment", batch=3, vocab=30, hidden=300, format=name) for name in FORMATS),
        case("packed, ids outside", batch=8, vocab=40, hidden=72, outside=True, format="int4-g32-min"),
    ),
)
