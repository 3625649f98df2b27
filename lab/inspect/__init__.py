"""What the two compilers made of an op's twins, on a machine with no GPU (`lab inspect`).

A call of the op is recorded instead of run, so what is looked at is the instantiation and the launch that
such a call really takes. Reading order:
  command.py       the verb: sizes of the call, the table, JSON, the listings
  cuda_half.py     the launch as lab._cuda records it, its machine code and PTX out of lab._cuda's file
  triton_half.py   the launch as triton_kernels.common records it, compiled for the GPU that is asked for
  kernel.py        Kernel: registers, spills, shared memory, occupancy, instruction mix
  gpu.py           the limits of a multiprocessor, and the occupancy they allow
  binary.py        ELF symbols, and NVIDIA's disassembler (Triton brings one)
  listing.py       SASS, PTX and TTGIR beside the source lines they came from
  fairness.py      the fairness card: what was spent on each side
"""
