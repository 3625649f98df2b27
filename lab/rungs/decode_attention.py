"""The ladder of decode_attention, at the heads of Llama 3.1 8B: from a thread for each head to split
sequences."""

from functools import partial

from lab.rungs.rung import Ladder, Rung


def triton(number, a, out):
    from triton_kernels.ladder.decode_attention import decode_attention

    decode_attention(
        number,
        a.q,
        a.k_cache,
        a.v_cache,
        a.block_table,
        a.context_lens,
        a.scale,
        a.splits,
        a.workspace.partial,
        a.workspace.tickets,
        out,
    )


rung = partial(Rung, "decode_attention")
HEADS = dict(
    needs="head_dim 64 or 128, and a cache that is not quantised",
    fits=lambda a: a.q.shape[2] in (64, 128) and a.k_scales is None,
)
PAGE_SIZE = 16  # that of lab/ops/kv_append.py, which imports torch

LADDER = Ladder(
    op="decode_attention",
    triton=triton,
    rungs=(
        rung(
            1,
            "Naive",
            idea="one thread per query head goes through the context alone",
            gain="the start: 256 threads on the card",
            **HEADS,
        ),
        rung(
            2,
            "Warp reduction",
            idea="a warp per query head; lanes share the head dimension",
            gain="32 times the threads, and a token is read by neighbouring lanes",
            factor=10.0,
            absent={"triton": "a Triton program is at least a warp, whose lanes read neighbouring elements."},
            **HEADS,
        ),
        rung(
            3,
            "Vectorised",
            idea="16 bytes a lane, so a warp works on several tokens at a time",
            gain="half the lanes, and a quarter of the loads, suffice for a token",
            factor=1.5,
            otherwise="The chain from score to new maximum to sum is as long as before, and there are no "
            "more warps.",
            **HEADS,
        ),
        rung(
            4,
            "Split-KV",
            drawing="splits",
            idea="blocks share a sequence's context, 4 warps for each part; a second kernel merges",
            gain="256 warps, one or two an SM, become thousands",
            factor=4.0,
            otherwise="Each query head still reads the whole cache: with enough warps, L2 is the limit, "
            "which the next rung removes.",
            **HEADS,
        ),
        rung(
            5,
            "Group",
            idea="a block serves all query heads of a KV head",
            gain="each key and value is loaded once, not four times; with 32 sequences a quarter of the "
            "blocks still fills the card",
            factor=1.2,
            at=dict(batch=32),
            otherwise="The repeated loads hit L2. With few sequences, a quarter of the blocks has too few "
            "loads in flight; the next rung makes up for that.",
            **HEADS,
        ),
        rung(
            6,
            "Pipeline",
            idea="a cp.async ring keeps three tokens of each lane in flight",
            gain="three times the bytes in flight",
            factor=1.3,
            otherwise="Many small blocks had most of those bytes in flight already.",
            **HEADS,
        ),
        rung(
            7,
            "Product",
            idea="the op's own kernel: all warps of a block use the same tile, four tokens of a lane "
            "take one step of the softmax together, and the last block merges, without a second "
            "kernel",
            gain="fewer exponentials and shuffles a token, one launch",
            factor=1.2,
            otherwise="At this size DRAM was nearly busy before; the single launch and the merge by the "
            "last block gain more where contexts are short.",
        ),
    ),
    cases=(
        (
            "context 1, around a page's end, an idle row; a group of 3",
            dict(lengths=(1, 15, 17, 0, 130), q_heads=6, kv_heads=2, head_dim=64, splits=2),
        ),
        ("empty splits, a group of 5", dict(lengths=(5, 70), q_heads=5, kv_heads=1, head_dim=128, splits=7)),
        ("one split, a larger page", dict(lengths=(100,), q_heads=2, kv_heads=2, head_dim=128, page_size=64)),
    ),
    points={
        "cuda": dict(
            batch=8,
            context=4096,
            shape={"q_heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": PAGE_SIZE},
        ),
        "cpu": dict(
            batch=2, context=64, shape={"q_heads": 4, "kv_heads": 2, "head_dim": 64, "page_size": PAGE_SIZE}
        ),
    },
)
