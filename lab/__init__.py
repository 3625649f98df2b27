"""The decode kernel lab: the kernels of LLM decoding in CUDA and in Triton, and what it takes to compare
them.

    import lab

    llm = lab.load("smollm2-135m", backend="cuda")
    print(llm.generate(["Why is the sky blue?"], lab.Sampling(temperature=0.7))[0].text)

    y = lab.select("triton", device="cpu").rmsnorm(x, w, 1e-5)  # an op of one backend
    lab.use("triton")                                           # the same for torch.compile and torch.export:
    y = torch.ops.lab.rmsnorm(x, w, 1e-5)

docs/python.md describes these names. Each is imported when it is first used, so that `import lab` alone, and
with it the command line's help, does not wait for torch.
"""

import importlib

TYPE_CHECKING = False  # true for type checkers; `typing` takes a while to import
if TYPE_CHECKING:
    from lab.api import LLM, load
    from lab.dispatch import Trace, select
    from lab.errors import LabError, Unavailable
    from lab.model.generate import Generation
    from lab.model.sampling import Sampling
    from lab.torch_ops import use

_MODULES = {  # public name: where it is
    "LLM": "lab.api",
    "load": "lab.api",
    "Trace": "lab.dispatch",
    "select": "lab.dispatch",
    "LabError": "lab.errors",
    "Unavailable": "lab.errors",
    "Generation": "lab.model.generate",
    "Sampling": "lab.model.sampling",
    "use": "lab.torch_ops",
}
__all__ = ["LLM", "Generation", "LabError", "Sampling", "Trace", "Unavailable", "load", "select", "use"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
