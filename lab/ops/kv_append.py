"""kv_append: writes the token's k and v into its page: cache[block_table[b, p / page], :, p % page] = k[b], p = positions[b]

  k, v [batch, kv_heads, head_dim]   views of the packed qkv
  k_cache, v_cache [pages, kv_heads, page_size, head_dim]   block_table [batch, max_pages] int32   positions [batch] int32
A negative position marks an idle row of a padded batch, which is skipped. Rows own their pages: no two write one slot.
Source of paging: Kwon et al., PagedAttention (arXiv 2309.06180).
Halves: cuda_src/kv_append.cu, triton_kernels/kv_append.py
"""
import torch

from lab.dispatch import FLOATS, Op, case, dense, require, rows_of_heads
from lab.backends.cuda import DTYPE_CODES
from lab.ops.rope import packed_qkv


def check_cache(op, k_cache, v_cache, block_table, batch, dtype):
    """Conditions that kv_append and decode_attention share."""
    require(k_cache.dim() == 4 and k_cache.shape == v_cache.shape and k_cache.dtype == v_cache.dtype == dtype, op,
            "k_cache and v_cache must be [pages, kv_heads, page_size, head_dim] in the dtype of the heads")
    page = k_cache.shape[2]
    require(16 <= page <= 256 and page & (page - 1) == 0, op, f"page_size {page} is not a power of two from 16 to 256")
    require(block_table.dim() == 2 and block_table.shape[0] == batch and block_table.dtype == torch.int32, op,
            "block_table must be int32 [batch, max_pages]")
    dense(op, k_cache.get_device(), k_cache, v_cache, block_table)


def validate(k, v, k_cache, v_cache, block_table, positions, out=None):
    require(out is None, "kv_append", "writes into the cache; out= is not taken")
    require(k.dim() == 3 and k.shape == v.shape and k.dtype == v.dtype, "kv_append",
            "k and v must be [batch, kv_heads, head_dim] of one dtype")
    check_cache("kv_append", k_cache, v_cache, block_table, k.shape[0], k.dtype)
    require(k_cache.shape[1] == k.shape[1] and k_cache.shape[3] == k.shape[2], "kv_append",
            "the cache must have the heads and head_dim of k")
    require(positions.shape == k.shape[:1] and positions.dtype == torch.int32, "kv_append",
            "positions must be int32 [batch]")
    device = k_cache.get_device()
    rows_of_heads("kv_append", device, k, v)
    dense("kv_append", device, positions)


def reference(k, v, k_cache, v_cache, block_table, positions):
    page = k_cache.shape[2]
    caches = k_cache.double(), v_cache.double()
    for b, position in enumerate(positions.tolist()):
        if position >= 0:
            for cache, new in zip(caches, (k, v), strict=True):
                cache[block_table[b, position // page].long(), :, position % page] = new[b].double()
    return caches


def cuda(kernels, k, v, k_cache, v_cache, block_table, positions, out=None):
    kernels.kv_append(k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), block_table.data_ptr(),
                      positions.data_ptr(), k.shape[0], k.shape[1], k.shape[2], k_cache.shape[2], block_table.shape[1],
                      k.stride(0), v.stride(0), DTYPE_CODES[k.dtype], kernels.stream())


def triton(k, v, k_cache, v_cache, block_table, positions, out=None):
    from triton_kernels.kv_append import kv_append
    kv_append(k, v, k_cache, v_cache, block_table, positions)


def torch_(k, v, k_cache, v_cache, block_table, positions, out=None):
    idle = positions < 0
    where = positions.clamp(min=0).long()
    page = block_table.gather(1, (where // k_cache.shape[2])[:, None]).long()[:, 0]
    slot = where % k_cache.shape[2]
    for cache, new in ((k_cache, k), (v_cache, v)):              # an idle row writes back what its slot held
        cache[page, :, slot] = torch.where(idle[:, None, None], cache[page, :, slot], new)


def inputs(rand, positions, q_heads, kv_heads, head_dim, page_size=16):
    _, k, v = packed_qkv(rand, len(positions), q_heads, kv_heads, head_dim)
    k_cache, v_cache, block_table = paged_cache(rand, [p + 1 for p in positions], kv_heads, head_dim, page_size)
    return k, v, k_cache, v_cache, block_table, torch.tensor(positions, dtype=torch.int32, device=rand.device)


def paged_cache(rand, lengths, kv_heads, head_dim, page_size):
    """Random caches that hold `lengths` tokens, their pages in random order, as after a long-running server's work."""
    max_pages = max(1, max(-(-n // page_size) for n in lengths))
    pages = len(lengths) * max_pages
    block_table = rand.permutation(pages).view(len(lengths), max_pages)
    shape = (pages, kv_heads, page_size, head_dim)
    return rand(*shape), rand(*shape), block_table


op = Op(
    name="kv_append", summary="cache[page of p, :, slot of p] = k, v", dtypes=FLOATS,
    validate=validate, outputs=lambda *args: None, reference=reference, cuda=cuda, triton=triton, torch=torch_,
    inputs=inputs,
    nbytes=lambda k, v, k_cache, v_cache, block_table, positions: 2 * (k.nbytes + v.nbytes) + 2 * positions.nbytes,
    flops=lambda k, v, k_cache, v_cache, block_table, positions: 0,
    tolerance=lambda *args: (0.0, 0.0),                          # a copy is exact
    mutates=(2, 3),
    cases=(case("first token, last slot of a page, first of the next, an idle row",
                positions=(0, 15, 16, -1, 47), q_heads=9, kv_heads=3, head_dim=64),
           case("head 96, one KV head, a larger page", positions=(63, 64, 7), q_heads=4, kv_heads=1, head_dim=96,
                page_size=64),
           case("head 128, the largest batch", positions=tuple(range(64)), q_heads=8, kv_heads=2, head_dim=128)))
