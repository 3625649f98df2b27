"""The ladders in Triton: the rungs below the product's kernels; what each should gain is in lab/rungs.py."""
