"""The weight formats, by name. Adding one is a file here and its name below, and a file of the same name in
cuda_src/formats and triton_kernels/formats."""

from lab.formats import fp8, int4, int8, mxfp4, q4_k, q6_k
from lab.formats.format import Format, PackedMatrix

MODULES = (int8, int4, fp8, mxfp4, q4_k, q6_k)
FORMATS: dict[str, Format] = {f.name: f for module in MODULES for f in module.FORMATS}

__all__ = ["FORMATS", "Format", "PackedMatrix"]
