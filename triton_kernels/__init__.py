"""The Triton kernel of every op: one file per op, the twin of cuda_src/<op>.cu."""
