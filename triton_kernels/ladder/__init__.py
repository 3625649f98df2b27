"""The ladders in Triton: the rungs below the ops' own kernels. lab/rungs/ says what each should gain."""
