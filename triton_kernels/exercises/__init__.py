"""Small Triton kernels with a planted fault each. The list, and what checks them: lab/learn/exercises.py."""
