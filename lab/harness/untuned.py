"""Which measured kernels were left with settings that nobody raced, though there are others to choose from.

The time of such a kernel is no limit of its language, so whatever shows it says "untuned" beside it. A bench
on a GPU records it with each op row (config["tuned"]: true or false, absent where there is nothing to
choose). For records that do not say it, the fairness cards of the run do: an op that `lab tune` knows and of
which no setting was raced is untuned at every shape. What reports call imports no torch.
"""

from lab import declared

WORD = "untuned"


def raced(backend, op, rows, itemsize, shape, entries, format=None):
    """True where the tuner's table has an entry for a launch, False where it has none though `lab tune` could
    have made one; None where there is nothing to choose.

    rows, itemsize (bytes), shape, format: as lab.tune.tuned.lookup takes them; entries: of the backend's
    table.
    """
    from lab import spaces
    from lab.ops import find
    from lab.tune import tuned

    if not spaces.of(find(op), backend, rows, itemsize, shape, format):
        return None
    return tuned.lookup(entries, op, itemsize, rows, shape, format) is not None


def by_cards(cards):
    """{(backend, op)} of the Fairness records of one run that say that no setting was raced."""
    return {(c.backend, c.op) for c in cards if c.tried == 0 and c.backend in declared.spaces(c.op)}


def is_untuned(row, cards):
    """Does an op row say that it was untuned, or, where it does not say, do the cards (of `by_cards`)? The
    rungs of a ladder are written to be compared, not to be tuned: only the last, the op's own kernel, can be
    untuned."""
    tuned = row.config.get("tuned")
    if isinstance(tuned, bool):
        return not tuned
    if row.weight_format is not None:
        return False  # the cards are of plain weights
    own_kernel = row.rung is None or row.config.get("name") == "Product"
    return own_kernel and not row.emulated and (row.backend, row.op) in cards
