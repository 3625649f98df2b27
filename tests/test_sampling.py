"""sample draws from the distribution that its contract names: counts over many rows, and thresholds that are
nearly met."""

import pytest
import torch

from lab.contract import BACKENDS
from lab.dispatch import select
from lab.ops import sample

EVERYWHERE = pytest.mark.parametrize("backend", BACKENDS)
ROWS = 1 << 14


def rows_for(backend, device):
    """How many draws a backend has time for: the interpreter takes a tenth of a second for each one with a
    threshold. All backends draw the same tokens. The first 16 draws show every token that is kept, and would
    show those that a wrong threshold kept."""
    return {"cuda": 1 << 11, "triton": 16, "torch": ROWS}[backend] if device == "cpu" else ROWS


def draw(backend, device, logits, rows=None, **options):
    """Tokens of rows with the same logits: each row and position has noise of its own."""
    rows = rows or rows_for(backend, device)
    logits = torch.tensor(logits, dtype=torch.float32, device=device).expand(rows, -1).contiguous()
    positions = torch.arange(rows, dtype=torch.int32, device=device) % 997
    return select(backend, device, {"sample": backend}).sample(logits, positions, **options)


def probabilities(logits, temperature, top_k, top_p):
    """float64, by a sort: softmax, then the top_k largest, then the fewest whose mass reaches top_p of what
    is left."""
    p = torch.softmax(torch.tensor(logits, dtype=torch.float32).double() / temperature, 0)
    order = p.argsort(descending=True, stable=True)
    kept = order[: top_k or len(logits)]
    mass = p[kept].cumsum(0) / p[kept].sum()
    kept = kept[: int((mass < top_p).sum()) + 1]
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


def chi_square(tokens, p):
    """(statistic, degrees of freedom); tokens of probability 0 must not come at all."""
    counts = torch.bincount(tokens.long().cpu(), minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * len(tokens)
    return float(((counts[p > 0] - expected) ** 2 / expected).sum()), len(expected) - 1


LOGITS = [float(x) for x in torch.linspace(-2.0, 2.0, 23).roll(7)]
MANY = pytest.mark.parametrize("backend", ["cuda", pytest.param("triton", marks=pytest.mark.gpu), "torch"])


@MANY
@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, 0, 1.0),
        (0.6, 0, 1.0),
        (2.5, 0, 1.0),
        (1.0, 7, 1.0),
        (1.0, 0, 0.8),
        (1.3, 11, 0.6),
        (1.0, 1, 1.0),
    ],
)
def test_draws_are_distributed_as_the_softmax_of_what_is_kept(backend, temperature, top_k, top_p, device):
    p = probabilities(LOGITS, temperature, top_k, top_p)
    tokens = draw(backend, device, LOGITS, temperature=temperature, top_k=top_k, top_p=top_p, seed=11)
    statistic, freedom = chi_square(tokens, p)
    assert statistic <= freedom + 5 * (2 * freedom) ** 0.5 + 1e-9  # 5 standard deviations


@MANY
@pytest.mark.parametrize("seeds", [(1, 2), (7, 7 + (1 << 32)), (1 << 63, (1 << 63) + 1)])
def test_seeds_rows_and_positions_draw_independently(backend, seeds, device):
    """Two seeds agree as often as chance has it: sum of p^2; so do neighbouring rows."""
    p = probabilities(LOGITS, 1.0, 0, 1.0)
    a, b = (draw(backend, device, LOGITS, temperature=1.0, seed=seed) for seed in seeds)
    want = float((p**2).sum())
    bound = 5 * (want * (1 - want) / len(a)) ** 0.5
    for one, other in ((a, b), (a[1:], a[:-1]), (a[997:], a[:-997])):
        assert abs(float((one == other).double().mean()) - want) < bound


@pytest.mark.parametrize(
    "backend, k",
    [
        *(("cuda", k) for k in (1, 2, 5, 31, 32, 33, 63, 64)),
        ("triton", 1),
        ("triton", 5),
        ("torch", 5),
        ("torch", 64),
    ],
)
def test_top_k_keeps_k_and_no_more(backend, k, device):
    """64 logits that differ by one step of float32 or little more: all that are kept come, and no other."""
    logits = torch.linspace(1.0, 1.001, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    kept = logits.topk(k).indices
    tokens = draw(backend, device, logits.tolist(), temperature=1.0, top_k=k, seed=5)
    assert sorted(set(tokens.tolist())) == sorted(kept.tolist())


@EVERYWHERE
def test_top_k_keeps_all_that_tie_with_the_kth(backend, device):
    tokens = draw(
        backend, device, [0.0, 3.0, 2.0, 2.0, 2.0, -1.0, 1.9999999], temperature=1.0, top_k=2, seed=6
    )
    assert sorted(set(tokens.tolist())) == [1, 2, 3, 4]


@EVERYWHERE
@pytest.mark.parametrize(
    "top_p, kept", [(0.4996, 1), (0.5004, 2), (0.7496, 2), (0.7504, 3), (0.8746, 3), (0.8754, 5), (0.9999, 5)]
)
def test_top_p_is_exact_to_a_twentieth_of_a_percent(backend, top_p, kept, device):
    """Masses 1/2, 1/4, 1/8, 1/16, 1/16: the two last tie, so both stay."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log().tolist()
    tokens = draw(backend, device, logits, temperature=1.0, top_p=top_p, seed=8)
    assert sorted(set(tokens.tolist())) == list(range(kept))


@EVERYWHERE
@pytest.mark.parametrize("top_p, kept", [(0.8746, 2), (0.8754, 3)])
def test_top_p_counts_what_top_k_left(backend, top_p, kept, device):
    """Of masses 1/2, 3/8, 1/8 and a fourth that top-k removes; so 7/8 of the three is the first two."""
    logits = torch.tensor([0.5, 0.375, 0.125, 0.1]).log().tolist()
    tokens = draw(backend, device, logits, temperature=1.0, top_k=3, top_p=top_p, seed=8)
    assert sorted(set(tokens.tolist())) == list(range(kept))


QUIET, SIGNALLING = (0x7FC00000, -0x400000), (0x7F800001, -0x7FFFFF)  # NaN of either sign
OPTIONS = [
    dict(),
    dict(temperature=1.0),
    dict(temperature=1.0, top_k=2),
    dict(temperature=0.7, top_p=0.5),
    dict(temperature=0.7, top_k=3, top_p=0.5),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "backend, nans",
    [
        *((backend, (bits,)) for backend in ("cuda", "torch") for bits in (*QUIET, *SIGNALLING)),
        ("triton", (*QUIET, *SIGNALLING)),  # in turn, for an interpreted draw takes a tenth of a second
    ],
)
def test_a_row_with_nan_has_no_token_wherever_it_stands(backend, options, nans, device):
    vocab, at = 517, [0, 1, 255, 256, 515, 516]
    bits = [nans[(row + OPTIONS.index(options)) % len(nans)] for row in range(len(at))]
    logits = torch.randn(len(at) + 1, vocab, generator=torch.Generator().manual_seed(0)).to(device)
    logits[range(len(at)), at] = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(device)
    out = select(backend, device, {"sample": backend}).sample(
        logits, torch.arange(len(at) + 1, dtype=torch.int32, device=device), **options
    )
    assert (out[:-1] == -1).all() and 0 <= int(out[-1]) < vocab


def test_the_reference_draws_from_the_same_distribution():
    logits = torch.tensor(LOGITS).expand(ROWS, -1).contiguous()
    positions = torch.arange(ROWS, dtype=torch.int32)
    tokens = sample.reference(logits, positions, 1.0, 9, 0.9, 3)[0]
    statistic, freedom = chi_square(tokens, probabilities(LOGITS, 1.0, 9, 0.9))
    assert statistic <= freedom + 5 * (2 * freedom) ** 0.5
