"""The decode kernel lab: the kernels of LLM decoding in CUDA and in Triton, and what it takes to compare
them."""
