"""What several ops are made of, as cuda_src/core/: a file of the same name holds the same thing in both languages."""
