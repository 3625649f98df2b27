"""norm_linear_argmax: ids[b] = argmax over n of logits[b, n], logits = rmsnorm(x, norm_w) w^T:
a greedy step's end

  x [batch, k]   norm_w [k]   w [n, k] (lm_head), a tensor or packed
  logits float32 [batch, n], written   out [batch] int32
The lowest index wins a tie, and a row with NaN gives -1, as in sample.py. The last block to finish stores the
ids. Until then `scratch` int32 [batch, SCRATCH] holds the candidates of the blocks (Triton) or each row's
best so far (CUDA), and a ticket. It is zero before the first call, and each call leaves it ready for the
next. Batch 1 to 64.
Kernels: cuda_src/norm_linear_argmax.cu, triton_kernels/norm_linear_argmax.py
"""

import torch

from lab import spaces
from lab.contract import DTYPE_CODES, FLOATS, Op, case, dense, once, pointer, refuse
from lab.formats import operand
from lab.ops import linear, norm_linear, sample
from lab.ops.norm_linear import check_norm, normed

MAX_BLOCKS = 4096  # the most candidates of a row that a kernel may write to scratch
# A value (float32 bits) and an index for each candidate; then a ticket, padding, and the best so far (64
# bits).
SCRATCH = 2 * MAX_BLOCKS + 4


def validate(
    x: torch.Tensor,
    norm_w: torch.Tensor,
    eps: float,
    w: operand.Operand,
    logits: torch.Tensor,
    scratch: torch.Tensor,
    out: torch.Tensor | None = None,
) -> None:
    check_norm("norm_linear_argmax", x, norm_w)
    linear.validate(x, w, None, torch.float32, logits)
    if not (scratch.shape == (x.shape[0], SCRATCH) and scratch.dtype == torch.int32):
        refuse("norm_linear_argmax", f"scratch must be int32 [batch, {SCRATCH}], zero before its first use")
    dense("norm_linear_argmax", x.get_device(), scratch)
    if out is not None:
        if not (out.shape == x.shape[:1] and out.dtype == torch.int32):
            refuse("norm_linear_argmax", "out must be int32 [batch]")
        dense("norm_linear_argmax", x.get_device(), out)


def new_scratch(batch, device):
    return torch.zeros(batch, SCRATCH, dtype=torch.int32, device=device)


def outputs(x, *args, **options):
    return torch.empty(x.shape[0], dtype=torch.int32, device=x.device)


def reference(x, norm_w, eps, w, logits, scratch):
    want = linear.reference(normed(x, norm_w, eps), w)[0]
    return sample.greedy(want), want


def tolerance(a):
    return norm_linear.tolerance(norm_linear.op.bound(a.x, a.norm_w, a.eps, a.w, None, torch.float32))


def verify(got, a):
    """The token must be the best one in float64, or one whose logit is equal to the best within the
    tolerance."""
    want, exact = reference(*vars(a).values())
    none = want < 0  # rows with NaN, which have no token
    if bool((got[none] != -1).any()):
        return f"a token for a row with NaN: {got.tolist()}"
    if bool(none.all()):
        return None
    got, want, exact = got[~none], want[~none], exact[~none]
    if bool(((got < 0) | (got >= a.w.shape[0])).any()):
        return f"a token outside the vocabulary: {got.tolist()}"
    rtol, atol = tolerance(op.bound(**{**vars(a), "x": a.x.nan_to_num()}))
    best = exact.gather(1, want[:, None].long())
    short = best - exact.gather(1, got[:, None].long()) - 2 * (rtol * best.abs() + atol)
    # Equal rows of w have equal logits: the first of them must have won.
    first = (exact == exact.gather(1, got[:, None].long())).int().argmax(-1)
    if bool((first != got).any()):
        return f"token {got.tolist()}, and of equal logits the first is {first.tolist()}"
    worst = int(short.argmax())
    if bool((short <= 0).all()):
        return None
    return f"row {worst}: token {int(got[worst])}, not {int(want[worst])}"


def cuda(k, x, norm_w, eps, w, logits, scratch, out):
    memory, tiled = norm_linear.workspace(x, w), linear.tiled(x, w)
    rows, columns = x.shape
    k.norm_linear_argmax(
        x=x.data_ptr(),
        norm_w=norm_w.data_ptr(),
        w=operand.pointers(w),
        logits=logits.data_ptr(),
        scratch=scratch.data_ptr(),
        normed=pointer(memory),
        tiled=pointer(tiled),
        out=out.data_ptr(),
        rows=rows,
        n=w.shape[0],
        k=columns,
        eps=eps,
        dtype=DTYPE_CODES[x.dtype],
        stream=k.stream(),
    )


def triton(x, norm_w, eps, w, logits, scratch, out):
    from triton_kernels.norm_linear_argmax import norm_linear_argmax

    norm_linear_argmax(x, norm_w, eps, w, logits, scratch, out)


def torch_(x, norm_w, eps, w, logits, scratch, out):
    norm_linear.torch_(x, norm_w, eps, w, None, torch.float32, out=logits)
    out.copy_(sample.greedy(logits))


def inputs(rand, batch, n, k, size=1.0, kind="normal", nan=(), equal=False, negative=False, format=None):
    """size, kind: of x, as in rmsnorm.py. nan: the rows of x that have a NaN. equal: w has each row twice, so
    that every logit has an equal. negative: all logits are below 0. format: of w, as in linear.py."""
    x, norm_w, eps, w, _, _ = norm_linear.inputs(rand, batch, n, k, size=size, kind=kind)
    for row in nan:
        x[row, k // 2] = torch.nan
    if equal:
        w[n // 2 : n // 2 * 2] = w[: n // 2]
    if negative:
        x, norm_w, w = x.abs(), norm_w.abs(), -w.abs()
    w = operand.of_random(w, format)
    return (
        x,
        norm_w,
        eps,
        w,
        torch.full((batch, n), torch.nan, device=rand.device),
        new_scratch(batch, rand.device),
    )


op = Op(
    name="norm_linear_argmax",
    summary="ids = argmax of rmsnorm(x) w^T",
    dtypes=FLOATS,
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: a.x.nbytes + a.norm_w.nbytes + a.w.nbytes + a.logits.nbytes,
    flops=lambda a: 2 * a.x.shape[0] * a.w.numel() + 4 * a.x.numel(),
    tolerance=tolerance,
    verify=verify,
    mutates=("logits", "scratch"),
    state=("scratch",),
    plans=("fused",),
    calls=once,
    uses=lambda c: [("lm_head", linear.sizes_of(c, "lm_head"))],
    use_of=linear.size_of,
    cold=("w",),
    color="#882255",
    inspect_sizes=dict(batch=1, n=128256, k=4096),
    tuned_by=("n", "k"),
    spaces={"cuda": spaces.cuda_product, "triton": spaces.products},
    cases=(
        case("SmolLM2's width, one row", batch=1, n=1000, k=576),
        case("no multiple of a tile or vector", batch=3, n=37, k=101),
        case("the widest batch of the GEMV path", batch=8, n=1041, k=520),
        case("a tensor-core batch, odd n", batch=17, n=83, k=200),
        case("x so small that eps counts", batch=2, n=37, k=576, size=1e-3),
        case("one large term among many small ones", batch=2, n=37, k=4096, kind="peak"),
        case("rows with NaN, which have no token", batch=3, n=300, k=72, nan=(0, 2)),
        case("the same in a tensor-core batch", batch=17, n=83, k=200, nan=(3,)),
        case("every logit stands twice: the first wins", batch=3, n=1000, k=72, equal=True),
        case("all logits negative, no multiple of a tile", batch=3, n=37, k=101, negative=True),
        case("the same in a tensor-core batch", batch=17, n=83, k=200, negative=True),
        *operand.some_format_cases(),
    ),
)
