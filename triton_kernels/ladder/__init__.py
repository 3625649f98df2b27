"""The ladders in Triton: the rungs below the ops' own kernels. What each should gain is in lab/rungs/."""
