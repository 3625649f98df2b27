"""embedding: out[b, :] = table[ids[b], :]

  ids [batch] int32   table [vocab, hidden]   out [batch, hidden]
An id outside the vocabulary gives a row of NaN, which is noticed, and no invalid access. (The model checks
the ids that users pass.)
Kernels: cuda_src/embedding.cu, triton_kernels/embedding.py
"""

import torch

from lab.contract import DTYPE_CODES, FLOATS, Op, case, dense, once, refuse


def validate(ids, table, out=None):
    if not (ids.dim() == 1 and table.dim() == 2 and ids.dtype == torch.int32):
        refuse("embedding", "ids must be int32 [batch] and the table [vocab, hidden]")
    if table.dtype not in FLOATS:
        refuse("embedding", f"takes no {table.dtype}: the table must be float32, float16 or bfloat16")
    if not (out is None or (out.shape == (ids.shape[0], table.shape[1]) and out.dtype == table.dtype)):
        refuse("embedding", "out must be [batch, hidden] in the table's dtype")
    dense("embedding", table.get_device(), ids, table, *(() if out is None else (out,)))


def outputs(ids, table):
    return torch.empty(ids.shape[0], table.shape[1], dtype=table.dtype, device=table.device)


def reference(ids, table):
    inside = (ids >= 0) & (ids < table.shape[0])
    rows = table.double()[torch.where(inside, ids, 0).long()]
    return (torch.where(inside[:, None], rows, torch.nan),)


def cuda(k, ids, table, out):
    vocab, cols = table.shape
    k.embedding(
        ids=ids.data_ptr(),
        table=table.data_ptr(),
        out=out.data_ptr(),
        rows=ids.shape[0],
        cols=cols,
        vocab=vocab,
        dtype=DTYPE_CODES[table.dtype],
        stream=k.stream(),
    )


def triton(ids, table, out):
    from triton_kernels.embedding import embedding

    embedding(ids, table, out)


def torch_(ids, table, out):
    inside = ids.clamp(0, table.shape[0] - 1)
    torch.index_select(table, 0, inside, out=out)
    out.masked_fill_((inside != ids)[:, None], torch.nan)


def inputs(rand, batch, vocab, hidden, outside=False):
    """outside: some ids are just outside the vocabulary, or far from it."""
    ids = rand.integers(0, vocab, batch)
    if outside:
        ids[1:7] = torch.tensor([vocab, -1, vocab - 1, 0, (1 << 31) - 1, -(1 << 31)])
    return ids, rand(vocab, hidden)


op = Op(
    name="embedding",
    summary="out[b] = table[ids[b]]",
    dtypes=FLOATS,
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: a.ids.nbytes + 2 * a.ids.shape[0] * a.table.shape[1] * a.table.itemsize,
    flops=lambda a: 0,
    tolerance=lambda a: (0.0, 0.0),  # a copy is exact
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
    ),
)
