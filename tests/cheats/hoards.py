"""Takes memory without end."""

KEPT = []


def silu_mul(gate_up, y):
    while True:
        KEPT.append(b"x" * (1 << 24))
