"""Tables that say which backend is faster for an op at a batch and context, for `lab run --dispatch`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lab.contract import BACKENDS
from lab.errors import LabError, shown
from lab.files import read_json
from lab.names import known


def read_table(path: str) -> dict[str, list[dict]]:
    """A dispatch table as `lab bench crossover --export` writes it: {"op": [{"batch", "context",
    "backend"}]}.

    context is null for ops that do not depend on it. Raises LabError for a file that is no such table, an
    unknown op or an unknown backend.
    """
    from lab.ops import find

    writes = "`lab bench crossover --export FILE` writes one"
    try:
        table = read_json(path)
    except LabError as error:
        raise LabError(f"{error}: it is no dispatch table; {writes}") from None
    try:
        for name, cells in table.items():
            find(name)
            for cell in cells:
                known(cell["backend"], BACKENDS, "backend")
                sizes = [cell["batch"], *([] if cell["context"] is None else [cell["context"]])]
                if any(isinstance(size, bool) or not 1 <= size < 2**63 for size in sizes):
                    raise ValueError(f"batch {shown(cell['batch'])}, context {shown(cell['context'])}")
    except LabError as error:
        raise LabError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(f"{path} is no dispatch table ({error}); {writes}") from None
    return table


def from_table(table: Mapping[str, list[dict]], batch: int, context: int) -> dict[str, str]:
    """The overrides that a dispatch table prescribes: for each op the backend of the cell whose sizes are
    nearest, compared by their ratio."""

    def distance(cell):
        return (abs(math.log(cell["batch"] / batch)), abs(math.log((cell["context"] or context) / context)))

    return {name: min(cells, key=distance)["backend"] for name, cells in table.items() if cells}
