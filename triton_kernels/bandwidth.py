"""bandwidth: only reads, copies or writes a buffer. Its speed is the ceiling for every other kernel.

src, dst  int32 [n], n a multiple of 4
mapping   a persistent grid; program p takes the blocks p, p + programs, ..., with 8192 elements in flight
traffic   read: bytes. copy: bytes read + bytes written. write: bytes. Times `passes`
used by   lab/harness/ceiling.py          twin  cuda_src/bandwidth.cu
"""

import triton
import triton.language as tl

from triton_kernels.common import launch

READ, COPY, WRITE = 0, 1, 2


@triton.jit
def bandwidth_kernel(src, dst, n, passes, MODE: tl.constexpr, BLOCK: tl.constexpr):
    # 1. Locate: blocks p, p + programs, ... of the buffer.
    lane = tl.arange(0, BLOCK).to(tl.int64)
    folded = tl.zeros((BLOCK,), tl.int32)
    for _ in range(passes):
        for first in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
            at = first + lane
            live = at < n
            # 2. Load: read only once, so it may be evicted first. For writing, varied data are generated.
            if MODE == 2:
                v = (at * 1640531527).to(tl.int32)
            else:
                v = tl.load(src + at, mask=live, other=0, eviction_policy="evict_first")
            # 3. Use: combine into registers, or store.
            if MODE == 0:
                folded ^= v
            else:
                tl.store(dst + at, v, mask=live)
    if MODE == 0:
        # Keeps the compiler from removing the loads; on random data one program in 2^32 stores.
        all_folded = tl.xor_sum(folded, 0)
        tl.store(dst, all_folded, mask=all_folded == 0x5BD1E995)


def bandwidth(src, dst, mode, passes=1, programs=1, block=8192, num_warps=8):
    """Launches one pass over src (read, copy) or dst (write); read needs a dst of at least one element."""
    n = (dst if mode == WRITE else src).numel()
    launch(bandwidth_kernel, (programs,), src, dst, n, passes, MODE=mode, BLOCK=block, num_warps=num_warps)
