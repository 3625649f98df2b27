"""Device code that several ops share, as cuda_src/core/ has it for CUDA. Files of the same name do the same
in both."""
