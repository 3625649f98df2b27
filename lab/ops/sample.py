"""sample: the next token of each row: greedy, or a draw after temperature, top-k, top-p and min-p

  logits float32 [batch, vocab]   positions [batch] int32   out [batch] int32
Greedy (temperature 0): the largest logit; the lowest index wins a tie. A row with NaN gives -1.
Draw: l = logit / temperature; keep the top_k largest (0 keeps all, ties at the k-th stay); of those keep l >=
t for the largest t whose kept mass reaches top_p of what top-k left; of those keep l >= max(l) + log(min_p),
the tokens that are at least min_p as likely as the likeliest; then token = argmax over the kept of l + g (the
Gumbel-max trick), g = -log(-log(u)), u = ((r >> 8) + 0.5) / 2^24, r = word 0 of Philox4x32-10 with key = seed
and counter = (token, position, row, 0). So the draw depends only on the seed, the position, the row and the
logits.
With `table`, int32 [batch, 6], each row has parameters of its own, and the other arguments are left out:
temperature, top_k, top_p, min_p, the low and the high half of the seed; of the three floats the bits of their
float32. The row in the counter is then 0, so that a sequence draws the same tokens in every row of a batch.
Source of Philox: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
Kernels: cuda_src/sample.cu, triton_kernels/sample.py
"""

import math
from types import SimpleNamespace

import torch

from lab.contract import Op, case, dense, once, pointer, refuse

# How far below the best float64 score a float32 draw may be: log, exp and sums of the mass differ by less.
SLACK = 1e-4
TABLE_COLUMNS = 6


def check_options(temperature, top_k, top_p, seed, min_p=0.0):
    """Raises LabError for options that the kernels do not support. Temperatures below 1e-6 would make float32
    logits overflow."""
    if not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        refuse("sample", f"temperature {temperature}: it must be 0 (greedy) or from 1e-6 to 1e6")
    if not (0 <= top_k < 1 << 31):
        refuse("sample", f"top_k {top_k}: it must be 0 (keeps every token) or more, below 2^31")
    if not (0 < top_p <= 1):
        refuse("sample", f"top_p {top_p}: it must be above 0 and at most 1")
    if not (0 <= min_p <= 1):
        refuse("sample", f"min_p {min_p}: it must be from 0 (keeps every token) to 1")
    if not (0 <= seed < 1 << 64):
        refuse("sample", f"seed {seed}: it must be a 64-bit unsigned integer")


def table_row(temperature, top_k, top_p, seed, min_p):
    """The six int32 numbers of a row of `table`, as a list."""
    floats = torch.tensor([temperature, top_p, min_p], dtype=torch.float32).view(torch.int32).tolist()
    halves = torch.tensor([seed & 0xFFFFFFFF, seed >> 32]).to(torch.int32).tolist()
    return [floats[0], top_k, *floats[1:], *halves]


def options_of(row):
    """The arguments that a row of `table` stands for: table_row() undone."""
    temperature, top_p, min_p = row[[0, 2, 3]].contiguous().view(torch.float32).tolist()
    low, high = (int(half) & 0xFFFFFFFF for half in row[4:])
    return dict(temperature=temperature, top_k=int(row[1]), top_p=top_p, seed=high << 32 | low, min_p=min_p)


def validate(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    min_p: float = 0.0,
    table: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    if not (logits.dim() == 2 and logits.dtype == torch.float32):
        refuse("sample", "logits must be float32 [batch, vocab]")
    if not (positions.shape == logits.shape[:1] and positions.dtype == torch.int32):
        refuse("sample", "positions: int32 [batch]")
    if table is None:
        check_options(temperature, top_k, top_p, seed, min_p)
    elif (temperature, top_k, top_p, seed, min_p) != (0.0, 0, 1.0, 0, 0.0):
        refuse("sample", "with a table of parameters the other options must be left out")
    elif not (table.shape == (logits.shape[0], TABLE_COLUMNS) and table.dtype == torch.int32):
        refuse("sample", f"table: int32 [batch, {TABLE_COLUMNS}]")
    else:
        dense("sample", logits.get_device(), table)
    if not (out is None or (out.shape == positions.shape and out.dtype == torch.int32)):
        refuse("sample", "out: int32 [batch]")
    dense("sample", logits.get_device(), logits, positions, *(() if out is None else (out,)))


def outputs(logits, *args, **options):
    return torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)


def philox(
    seed: int | tuple[torch.Tensor, torch.Tensor],
    token: torch.Tensor,
    position: torch.Tensor,
    row: torch.Tensor,
) -> torch.Tensor:
    """Word 0 of Philox4x32-10 as int64 in [0, 2^32), for counter (token, position, row, 0); the arguments
    broadcast. seed: 64 bits, or in two int64 tensors its low and its high half."""
    low = 0xFFFFFFFF
    token, position, row = torch.broadcast_tensors(token.long(), position.long() & low, row.long())
    c = [token, position, row, torch.zeros_like(token)]
    key = list(seed) if isinstance(seed, tuple) else [seed & low, seed >> 32]
    for _ in range(10):
        # A product of two 32-bit numbers does not fit a signed 64-bit integer, so the constant is split into
        # 16-bit parts.
        (hi0, lo0), (hi1, lo1) = (_mul32(c[0], 0xD2511F53), _mul32(c[2], 0xCD9E8D57))
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return c[0]


def _mul32(a: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    upper, lower = a * (constant >> 16), a * (constant & 0xFFFF)  # each below 2^48
    total = (upper & 0xFFFF) * 65536 + lower  # below 2^49: the low part with its carry
    return (upper >> 16) + (total >> 32), total & 0xFFFFFFFF


def gumbel(logits, positions, seed, rows=None):
    """float64 [batch, vocab]: the noise that the draw adds. rows: the third word of the counter, by default
    the number of the row."""
    batch, vocab = logits.shape
    device = logits.device
    rows = torch.arange(batch, device=device) if rows is None else rows
    r = philox(seed, torch.arange(vocab, device=device)[None], positions[:, None], rows[:, None])
    return -torch.log(-torch.log(((r >> 8).double() + 0.5) / (1 << 24)))


def thresholds(scaled, top_k, top_p, min_p):
    """[batch, 1]: the smallest scaled logit that top-k, top-p and min-p keep. Works in the dtype of
    `scaled`."""
    lowest = torch.full_like(scaled[:, :1], -torch.inf)
    if 0 < top_k < scaled.shape[1]:
        lowest = scaled.topk(top_k, dim=-1).values[:, -1:]
    if top_p < 1:
        ordered = scaled.sort(dim=-1, descending=True).values
        mass = torch.where(ordered >= lowest, (ordered - ordered[:, :1]).exp(), 0).cumsum(-1)
        reached = mass >= top_p * mass[:, -1:]
        lowest = torch.maximum(lowest, ordered.gather(1, reached.int().argmax(-1, keepdim=True)))
    if min_p > 0:
        lowest = torch.maximum(lowest, scaled.amax(-1, keepdim=True) + math.log(min_p))
    return lowest


def greedy(logits):
    best = logits.amax(-1, keepdim=True)
    index = torch.arange(logits.shape[1], device=logits.device)
    first = torch.where(logits == best, index, logits.shape[1]).amin(-1)
    return torch.where(best[:, 0].isnan(), -1, first).to(torch.int32)


def reference(logits, positions, temperature=0.0, top_k=0, top_p=1.0, seed=0, min_p=0.0, table=None):
    if table is not None:
        rows = zip(logits.split(1), positions.split(1), map(options_of, table))
        return (torch.cat([reference(*row, **own)[0] for *row, own in rows]),)
    if temperature == 0:
        return (greedy(logits.double()),)
    scaled = logits.double() / temperature
    kept = scaled >= thresholds(scaled, top_k, top_p, min_p)
    drawn = torch.where(kept, scaled + gumbel(logits, positions, seed), -torch.inf).argmax(-1)
    return (torch.where(logits.isnan().any(-1), -1, drawn).to(torch.int32),)


def verify(got, a):
    """A greedy token must be exactly the right one. A drawn token may differ from the float64 draw only by a
    tie in float32."""
    if a.table is not None:
        for row, own in enumerate(map(options_of, a.table)):
            one = slice(row, row + 1)
            given = dict(logits=a.logits[one], positions=a.positions[one], **own, table=None)
            if wrong := verify(got[one], SimpleNamespace(**given)):
                return wrong.replace("row 0", f"row {row}", 1)
        return None
    want, logits, temperature = reference(**vars(a))[0], a.logits, a.temperature
    if torch.equal(got, want):
        return None
    bad = int((got != want).nonzero()[0])
    message = f"row {bad}: token {int(got[bad])}, not {int(want[bad])}"
    if temperature == 0 or bool(((got < 0) | (got >= logits.shape[1])).any()):
        return message
    if bool(((want < 0) & (got != want)).any()):  # a row with NaN must give -1
        return message
    scaled = logits.double() / temperature
    score = scaled + gumbel(logits, a.positions, a.seed)
    chosen, best = (t.gather(1, got[:, None].long()) for t in (scaled, score))
    allowed = chosen >= thresholds(scaled, a.top_k, a.top_p, a.min_p) - SLACK
    near = best >= score.gather(1, want[:, None].long()) - SLACK
    return None if bool((allowed & near).all()) else message


def cuda(k, logits, positions, temperature=0.0, top_k=0, top_p=1.0, seed=0, min_p=0.0, table=None, out=None):
    rows, vocab = logits.shape
    k.sample(
        logits=logits.data_ptr(),
        positions=positions.data_ptr(),
        out=out.data_ptr(),
        table=pointer(table),
        rows=rows,
        vocab=vocab,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stream=k.stream(),
    )


def triton(logits, positions, temperature=0.0, top_k=0, top_p=1.0, seed=0, min_p=0.0, table=None, out=None):
    from triton_kernels.sample import sample

    sample(logits, positions, temperature, top_k, top_p, seed, min_p, table, out)


def by_table(logits, positions, table):
    """Draws by the parameters of `table` in the dtype of the logits, without reading it on the host."""
    temperature, top_p, min_p = (table[:, i, None].contiguous().view(torch.float32) for i in (0, 2, 3))
    vocab, top_k = logits.shape[1], table[:, 1:2].long()
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)
    ordered = scaled.sort(dim=-1, descending=True).values
    kth = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k) - 1
    lowest = ordered.gather(1, kth)
    mass = torch.where(ordered >= lowest, (ordered - ordered[:, :1]).exp(), 0).cumsum(-1)
    reached = (mass >= top_p * mass[:, -1:]) & (top_p < 1)
    by_mass = ordered.gather(1, reached.int().argmax(-1, keepdim=True))
    lowest = torch.where(top_p < 1, torch.maximum(lowest, by_mass), lowest)
    lowest = torch.where(min_p > 0, torch.maximum(lowest, ordered[:, :1] + min_p.log()), lowest)
    seeds = tuple(table[:, 4:].long().bitwise_and(0xFFFFFFFF)[:, :, None].unbind(1))
    noise = gumbel(logits, positions, seeds, torch.zeros_like(positions)).float()
    drawn = torch.where(scaled >= lowest, scaled + noise, -torch.inf).argmax(-1)
    drawn = torch.where(logits.isnan().any(-1), -1, drawn)
    return torch.where(temperature[:, 0] > 0, drawn, greedy(logits))


def torch_(logits, positions, temperature=0.0, top_k=0, top_p=1.0, seed=0, min_p=0.0, table=None, out=None):
    if table is not None:
        out.copy_(by_table(logits, positions, table))
    elif temperature == 0:
        out.copy_(greedy(logits))
    else:
        scaled = logits / temperature
        kept = scaled >= thresholds(scaled, top_k, top_p, min_p)
        drawn = torch.where(kept, scaled + gumbel(logits, positions, seed).float(), -torch.inf).argmax(-1)
        out.copy_(torch.where(logits.isnan().any(-1), -1, drawn))


def inputs(
    rand,
    batch,
    vocab,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    tie=False,
    distance=None,
    special=False,
    position=None,
    min_p=0.0,
    mixed=False,
):
    """tie: the maximum stands twice. distance: between the two. special: the last rows hold NaN of either
    sign, infinities, and -inf for most tokens, as a grammar's mask leaves them. position: that of all rows;
    random by default. mixed: each row has parameters of its own."""
    logits = rand(batch, vocab, dtype=torch.float32, scale=3.0)
    if tie:  # the lower index must win
        logits[:, [vocab // 2, vocab - 1] if distance is None else [5, 5 + distance]] = 99.0
    if special:
        logits[-1, 0], logits[-2, vocab // 2], logits[-3, vocab - 1] = torch.nan, -torch.nan, torch.nan
        logits[-4, vocab // 3], logits[-5, 1 : vocab - 2] = torch.inf, -torch.inf
        logits[-6, [1, 2]] = torch.tensor([torch.inf, torch.nan], device=logits.device)
    positions = rand.integers(*((0, 1000) if position is None else (position, position + 1)), batch)
    table = None
    if mixed:
        kinds = [
            (0.0, 0, 1.0, 0, 0.0),
            (0.8, 0, 1.0, 5, 0.0),
            (1.1, 9, 1.0, (1 << 40) + 3, 0.0),
            (1.3, 0, 0.7, (1 << 64) - 1, 0.0),
            (1.5, 0, 1.0, 1 << 31, 0.1),
            (0.7, 11, 0.6, 4, 0.05),
            (0.0, 3, 0.5, 4, 0.5),
        ]
        rows = [table_row(*kinds[row % len(kinds)]) for row in range(batch)]
        table = torch.tensor(rows, dtype=torch.int32, device=logits.device)
    return logits, positions, temperature, top_k, top_p, seed, min_p, table


op = Op(
    name="sample",
    summary="next token: argmax, or a seeded draw after temperature, top-k, top-p, min-p",
    dtypes=(torch.float32,),
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: a.logits.nbytes + 4 * a.logits.shape[0],
    flops=lambda a: a.logits.numel(),
    tolerance=lambda a: (0.0, 0.0),
    verify=verify,
    plans=("basic",),
    calls=once,
    uses=lambda c: [("greedy", {"vocab": c.parts["lm_head"].rows})],
    inspect_sizes=dict(batch=1, vocab=128256),
    color="#882255",
    cases=(
        case("greedy, one row", batch=1, vocab=1000),
        case("greedy, ties, a vocabulary that is no multiple of a vector", batch=5, vocab=4099, tie=True),
        case("temperature alone", batch=3, vocab=1001, temperature=0.8, seed=1),
        case("top-k", batch=4, vocab=777, temperature=1.0, top_k=7, seed=2),
        case(
            "top-p with a seed past 32 bits",
            batch=4,
            vocab=1030,
            temperature=1.3,
            top_p=0.8,
            seed=(1 << 40) + 3,
        ),
        case(
            "top-k and top-p; a vocabulary smaller than a warp",
            batch=12,
            vocab=19,
            temperature=0.7,
            top_k=11,
            top_p=0.6,
            seed=4,
        ),
        case("min-p", batch=4, vocab=1001, temperature=1.2, min_p=0.2, seed=9),
        case("parameters of its own for each row", batch=14, vocab=1003, mixed=True),
        case("the same with NaN and infinities", batch=14, vocab=1001, mixed=True, special=True),
        case(
            "min-p with NaN and infinities",
            batch=8,
            vocab=1001,
            temperature=0.8,
            min_p=0.1,
            seed=3,
            special=True,
        ),
        case("NaN, infinities, masked tokens; greedy", batch=8, vocab=1001, special=True),
        case("the same in a draw", batch=8, vocab=1001, temperature=0.8, seed=5, special=True),
        case("the same with top-k", batch=8, vocab=1001, temperature=0.8, top_k=9, seed=6, special=True),
        case("the same with top-p", batch=8, vocab=1001, temperature=0.8, top_p=0.7, seed=7, special=True),
        # Token 299 has u = 1 - 2^-25: rounded to float32 it is 1, and the noise infinite instead of 17.3.
        case("the largest u there is", batch=1, vocab=1001, temperature=0.05, seed=23, position=979),
        case(
            "a tie of tokens that one thread sees one after the other",
            batch=1,
            vocab=(1 << 18) + 900,
            tie=True,
            distance=1 << 18,
        ),
        case(
            "a vocabulary of more than one pass, top-k and top-p",
            batch=1,
            vocab=(1 << 18) + 900,
            temperature=1.0,
            top_k=5000,
            top_p=0.5,
            seed=8,
        ),
    ),
)
