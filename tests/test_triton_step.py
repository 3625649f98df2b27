"""decode_step's Triton half beyond the op's cases: programs that wait for each other, ties, NaN, the machine
code."""

import re

import pytest
import torch
from test_triton_compile import BF16, STEPS, empty, run_step

from lab.contract import Rand
from lab.ops import decode_step
from triton_kernels import offline, settings
from triton_kernels.common import recording

pytestmark = pytest.mark.usefixtures("kept_listings")
SIZES = dict(
    layers=2, hidden=64, intermediate=136, vocab=101, q_heads=4, kv_heads=2, head_dim=64, position=70
)
SETTINGS = dict(elements=1 << 10, tile=16, min_rows=1, splits=3, num_warps=1)


def run(args, programs, times=1):
    """(token, logits, K, V), the same each time."""
    *_, k_cache, v_cache, _, logits, workspace = args
    found = []
    for _ in range(times):
        out = torch.full((1,), -7, dtype=torch.int32)
        with settings.forced("decode_step", dict(SETTINGS, programs=programs)):
            decode_step.op.launchers["triton"](*args, out=out)
        assert not workspace.counters.any(), "the counters are left for the next launch"
        found.append((int(out), logits.clone(), k_cache.clone(), v_cache.clone()))
    for again in found[1:]:
        assert again[0] == found[0][0] and all(map(torch.equal, again[1:], found[0][1:]))
    return found[0]


@pytest.fixture(scope="module")
def by_one_program():
    return run(decode_step.inputs(Rand("cpu", BF16), **SIZES), 1, times=2)


@pytest.mark.parametrize("programs", [2, 3, 7])
def test_any_number_of_programs_gives_the_same_bits(programs, by_one_program):
    """Rows are summed and splits are merged in an order that does not depend on who does it."""
    token, *rest = run(decode_step.inputs(Rand("cpu", BF16), **SIZES), programs, times=2)
    one, *others = by_one_program
    assert token == one and all(map(torch.equal, rest, others))


@pytest.mark.parametrize("name", ["int8", "q6_k"])
def test_packed_rows_of_more_segments_than_a_step_takes(name):
    """As on a GPU, where a step takes 8 segments: of the token's row of the embedding, too."""
    args = decode_step.inputs(
        Rand("cpu", BF16),
        **dict(SIZES, layers=1, hidden=328, intermediate=8, vocab=20, position=2, head_format=name),
    )
    want = decode_step.reference(*args)
    steps = dict(SETTINGS, programs=2, packed=dict(BLOCK_N=8, SEGMENTS=2, STAGES=1))
    out = torch.full((1,), -7, dtype=torch.int32)
    with settings.forced("decode_step", steps):
        decode_step.op.launchers["triton"](*args, out=out)
    limit = decode_step.tolerance(decode_step.op.bound(*args))[1]
    torch.testing.assert_close(args[6].double(), want[-1], rtol=0, atol=limit)


def test_heads_that_outnumber_programs_and_programs_that_outnumber_rows():
    args = decode_step.inputs(Rand("cpu", BF16), **dict(SIZES, vocab=3, kv_heads=4))
    want = decode_step.reference(*args)
    token, logits, *_ = run(args, 5)
    torch.testing.assert_close(
        logits.double(), want[-1], rtol=0, atol=decode_step.tolerance(decode_step.op.bound(*args))[1]
    )
    assert 0 <= token < 3


def test_the_lowest_of_equal_logits_wins_and_nan_gives_no_token():
    args = decode_step.inputs(Rand("cpu", BF16), **dict(SIZES, layers=1, intermediate=8, position=2))
    lm_head = args[2].lm_head
    best = run(args, 4)[0]
    for twin in (100, 55, 3, 2):  # of several programs, and of one tile
        lm_head[twin] = lm_head[best]
        assert run(args, 4)[0] == min(best, twin)
        best = min(best, twin)
    lm_head[:] = -lm_head[best]  # all equal, and negative
    assert run(args, 4)[0] == 0
    lm_head[77] = torch.nan
    assert run(args, 4)[0] == -1 == run(args, 4)[0]


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b"])  # without norms of q and k, and with them
def test_weights_are_on_their_way_before_every_wait(name):
    """An arrival is a RED, which nobody waits for; a wait ends with an empty L1."""
    with recording("sm_90") as launches:
        run_step(lambda *s: empty(*s, dtype=BF16), lambda *s: empty(*s, dtype=torch.int32), **STEPS[name])
    assert launches[0].meta["launch_cooperative_grid"] and launches[0].grid == (132,)
    code = offline.sass(offline.compile(launches[0], "sm_90"))
    between = re.findall(r"\bREDG?\.E\.ADD\.STRONG\.GPU(.*?)CCTL\.IVALL", code, re.S)
    assert len(between) == 5
    for part in between:
        assert "STG" not in part and re.search(r"\bLDG\.E\.EF\S*128", part), (
            "no weights, keys or values are asked for"
        )
        assert len(re.findall(r"\bLDG\S*STRONG\.GPU", part)) == 1, "something else than the counter is read"
