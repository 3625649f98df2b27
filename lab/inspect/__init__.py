"""`lab inspect`: what the two compilers made of an op's CUDA and Triton kernels, on a machine without a GPU.

A call of the op is recorded instead of run. So the inspector shows the very instantiation and launch
configuration that such a call uses. Reading order:
  command.py       the verb: sizes of the call, the table, JSON, the listings
  cuda_code.py     the launch as lab._cuda records it; machine code and PTX from lab._cuda's file
  triton_code.py   the launch as triton_kernels.common records it, compiled for the chosen architecture
  kernel.py        Kernel: registers, spills, shared memory, occupancy, instruction mix
  gpu.py           the limits of a multiprocessor, and the occupancy that they allow
  binary.py        ELF symbols, and NVIDIA's disassembler (Triton brings one)
  listing.py       SASS, PTX and TTGIR, each line beside its source line
  fairness.py      the fairness card: how much effort went into each of the two kernels
"""
