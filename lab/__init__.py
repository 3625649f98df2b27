"""The decode kernel lab: every kernel of an LLM's decode step in CUDA and in Triton, and what it takes to compare them."""
