"""One rank of test_exchange_of_processes.py: sums of all kinds follow each other through one exchange, and
every element is compared."""

import sys
import zlib
from pathlib import Path

import torch

from lab.contract import Rand
from lab.dispatch import select
from lab.harness import exchange_bench
from lab.model import ranks
from lab.ops.all_reduce_add_rmsnorm import slot_words

# (kind, batch, n, dtype). The same sizes stand for several kinds, whose residuals must have the same bits.
# The last ones have more blocks than run at the same time on a CPU, and the very last takes two passes.
CALLS = [
    (kind, batch, n, dtype)
    for batch, n, dtype in ((1, 64, torch.bfloat16), (3, 1000, torch.float32), (2, 520, torch.float16))
    for kind in ("one shot", "two shots", "with norm", "two shots")
] + [
    ("two shots", 2, 2560, torch.float32),
    ("one shot", 2, 2560, torch.float32),
    ("two shots", 20, 2048, torch.float32),
]


def main(file: str) -> None:
    group = ranks.join("cpu")
    group.agree("test", "exchange")
    group.connect()
    exchange = group.exchange(max(slot_words(batch, n * dtype.itemsize) for _, batch, n, dtype in CALLS))
    backends = [select(name, "cpu") for name in ("cuda", "triton")]
    found = []
    for step, (kind, batch, n, dtype) in enumerate(CALLS):
        rand = Rand("cpu", dtype, seed=n)  # the same for calls of the same sizes
        partials = [rand(batch, n, scale=10.0**rank) for rank in range(group.ranks)]
        residual, w = rand(batch, n), rand(n)
        want = (residual.float() + sum(one.float() for one in partials)).to(dtype)
        ops = backends[(step + group.rank) % 2 if batch < 20 else 0]  # other ranks run another language
        exchange.two_shot_bytes = 0 if kind == "two shots" else 1 << 30
        if kind == "with norm":
            y = ops.all_reduce_add_rmsnorm(partials[group.rank], residual, w, 1e-5, exchange)
            assert (y - backends[0].rmsnorm(want, w, 1e-5)).abs().max() <= 0.05, kind
        else:
            ops.all_reduce_add(partials[group.rank], residual, exchange)
        assert torch.equal(residual, want), (kind, batch, n, dtype, group.rank)
        found.append(f"{batch} {n} {zlib.crc32(residual.view(torch.uint8).numpy().tobytes())}")
    Path(f"{file}-{group.rank}").write_text("\n".join(found))
    exchange_bench.CHECKED["cpu"] = 2
    for kind in exchange_bench.kinds(1024) if group.ranks == 2 else ():
        for name in ("cuda", "triton"):
            assert exchange_bench.check(group, "cpu", name, 1024, kind) == 0, (kind, name)
    group.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
