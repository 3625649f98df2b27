"""Device code that several ops share, as in cuda_src/core/: files of the same name hold the same thing."""
