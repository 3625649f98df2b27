"""What is checked of an order by its text alone, where no run on a CPU can notice that it is missing."""

import ast
import re

from mutants.planted import FUNCTION

CALL = re.compile(
    r"\b(wgmma|wgmma_begin|wgmma_publish|mbarrier_init|mbarrier_fence_init|named_barrier|__syncthreads"
    r"|cluster_sync)\("
)


def functions(text: str) -> list[tuple[str, list[str]]]:
    """(name, calls of the names above in the order of the text) of the device functions of a CUDA file."""
    found = [("", [])]
    for line in text.splitlines():
        code = line.partition("//")[0]
        if match := FUNCTION.search(code):
            found.append((match["device"] or match["kernel"], []))
        else:
            found[-1][1].extend(CALL.findall(code))
    return found


def missing_fences(text: str) -> list[str]:
    """Fences of a CUDA file between memory and the units that read it by another path: in front of a wgmma,
    after shared memory has been written that wgmma reads, and after barriers in memory have been
    initialised. On a CPU there is one path alone."""
    wrong, of_file = [], functions(text)
    multiplies = any("wgmma" in calls for _, calls in of_file)
    for name, calls in of_file:
        if "wgmma" in calls and "wgmma_begin" not in calls[: calls.index("wgmma")]:
            wrong.append(f"{name}: no wgmma_begin() before wgmma()")
        if (
            multiplies
            and "named_barrier" in calls
            and "wgmma_publish" not in calls[: calls.index("named_barrier")]
        ):
            wrong.append(f"{name}: no wgmma_publish() before the barrier")
        inits = [i for i, call in enumerate(calls) if call == "mbarrier_init"]
        if inits and calls[inits[-1] + 1 : inits[-1] + 2] != ["mbarrier_fence_init"]:
            wrong.append(f"{name}: no mbarrier_fence_init() after mbarrier_init()")
    return wrong


def _calls(function):
    """(name, keywords) of the calls in a Python function, in the order of the text."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            found.append((node.lineno, node.col_offset, ast.unparse(node.func), keywords))
    return [(name, keywords) for _, _, name, keywords in sorted(found, key=lambda c: c[:2])]


def unordered_arrivals(source: str) -> list[str]:
    """Functions of a Triton file in which an atomic that releases is not directly after a tl.debug_barrier():
    Triton's threads then arrive while others of the program still store. (After another scalar atomic there
    is nothing of theirs to wait for: one thread does both.) And arrivals that order nothing."""
    wrong = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        before = ""
        for name, keywords in _calls(function):
            if name == "tl.atomic_add":
                order = keywords.get("sem", "'acq_rel'").strip("'")
                if order in ("release", "acq_rel") and before not in ("tl.debug_barrier", "tl.atomic_max"):
                    wrong.append(f"{function.name}: no tl.debug_barrier() before the arrival")
                if keywords.get("scope", "'gpu'") != "'gpu'" or order == "relaxed":
                    wrong.append(f"{function.name}: an arrival that orders nothing between programs")
            if name.startswith("tl.") and name not in ("tl.arange", "tl.program_id", "tl.num_programs"):
                before = name
    return wrong
