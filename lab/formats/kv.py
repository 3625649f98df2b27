"""The formats of a quantised KV cache: codes of 8 bits, and scales beside them

  fp8     number = scale * e4m3(code)    codes uint8    one float32 scale for a layer's K and one for its V
  int8    number = scale * code          codes int8     a float16 scale for each token and KV head

codes [pages, kv_heads, page_size, head_dim]; scales float32 [1], or float16 [pages, kv_heads, page_size]. A
head of 64 numbers takes 64 bytes in fp8 and 66 in int8; in bf16 it takes 128.

All backends round alike, bit for bit. In float32, with one rounding to nearest even in each step:
  fp8     code = e4m3(x / scale): what lies beyond +-448, the largest number, becomes it, and so does NaN
  int8    scale = float16(max |x| / 127), over one head of one token; code = round(x / scale), within +-127
          Where the scale rounds to 0 all codes are 0. Where the head holds a NaN or an infinity, so does the
          scale,
          and all codes are 0: whoever reads the head gets NaN.
Kernels: cuda_src/core/kv_codes.cuh, triton_kernels/core/kv_codes.py
"""

import torch

from lab.contract import dtype_name, refuse

DTYPES = {"fp8": torch.uint8, "int8": torch.int8}  # of the codes
SCALE_DTYPES = {"fp8": torch.float32, "int8": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
NUMBERS = {torch.uint8: 1, torch.int8: 2}  # KvFormat of cuda_src/launchers/arguments.h; 0: not quantised
LARGEST = {"fp8": 448.0, "int8": 127.0}
# What a scale of fp8 in a checkpoint may be: it is the largest key or value that was seen, divided by 448.
# With a smaller one than these, all above 4.5e-5 would become the largest code, with a larger one all below
# 97 would become 0.
SCALES_OF_FILES = 1e-7, 1e5


def scale_shape(name: str, pages: int, kv_heads: int, page_size: int) -> tuple[int, ...]:
    """The shape of the scales of one layer's K, or V."""
    return (1,) if name == "fp8" else (pages, kv_heads, page_size)


def scale_bytes(dtype: torch.dtype) -> int:
    """Bytes of scales that go with one head of one token, in a cache of this dtype."""
    return SCALE_DTYPES["int8"].itemsize if dtype == DTYPES["int8"] else 0


def check(op: str, k_cache, v_cache, k_scales, v_scales, dtype: torch.dtype) -> None:
    """Raises LabError unless the caches are both in `dtype`, without scales, or codes with scales that fit
    them."""
    cached = k_cache.dtype
    if cached == dtype and k_scales is None and v_scales is None:
        return
    if cached not in NAMES:
        if cached != dtype:
            refuse(
                op,
                f"the cache is {dtype_name(cached)} and the heads are {dtype_name(dtype)}: it must "
                "have their dtype, or codes (uint8 for fp8, int8)",
            )
        refuse(op, "k_scales and v_scales belong to a cache of codes (uint8 for fp8, int8)")
    name, (pages, kv_heads, page_size, _) = NAMES[cached], k_cache.shape
    shape, wanted = scale_shape(name, pages, kv_heads, page_size), SCALE_DTYPES[name]
    for scales in (k_scales, v_scales):
        if scales is None or scales.dtype != wanted or scales.shape != shape or not scales.is_contiguous():
            refuse(
                op, f"a cache in {name} needs k_scales and v_scales, each {dtype_name(wanted)} {list(shape)}"
            )
        # The scales of 8 tokens are one access. A layer's one number is part of a tensor of all layers.
        if scales.get_device() != k_cache.get_device() or scales.data_ptr() & (15 if name == "int8" else 3):
            refuse(op, "k_scales and v_scales must be aligned and on the device of the cache")


def check_scales(op: str, k_cache, k_scales, v_scales) -> None:
    """Raises LabError for a layer's scale that is not a positive number. Reads it on the host."""
    if k_cache.dtype != DTYPES["fp8"]:
        return
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        scale = float(scales[0])
        if not 0 < scale < float("inf"):
            refuse(op, f"{name} is {scale}: the scale of a cache in fp8 must be a positive number")


def quantise(x: torch.Tensor, name: str, scale: torch.Tensor | None = None):
    """(codes [..., head_dim], scales [...] or None) of x [..., head_dim]. scale: that of fp8, float32 [1]."""
    wide = x.float()
    if name == "fp8":
        # What is not below the largest number becomes it, so NaN does.
        wide = wide / scale
        wide = torch.where(wide < 448.0, wide, 448.0)
        wide = torch.where(wide > -448.0, wide, -448.0)
        return wide.to(torch.float8_e4m3fn).view(torch.uint8), None
    scales = (wide.abs().amax(-1) / 127.0).to(torch.float16)
    divisor = scales.float()[..., None]
    usable = (divisor > 0) & (divisor < float("inf"))
    codes = torch.where(usable, wide / divisor, 0.0).round_().clamp_(-127.0, 127.0)
    return codes.to(torch.int8), scales


def numbers(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the codes stand for, rounded to float32 once if that is `dtype`. scales: float32 [1], or [...] of
    codes [..., head_dim]."""
    if codes.dtype == torch.uint8:
        return codes.view(torch.float8_e4m3fn).to(dtype) * scales.to(dtype)
    return codes.to(dtype) * scales.to(dtype)[..., None]


def cache_numbers(cache: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """A cache's numbers in float64, whether it is quantised or not."""
    return cache.double() if scales is None else numbers(cache, scales, torch.float64)
