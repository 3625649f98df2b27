"""The families of models that the lab runs: one file each, and its name in BUILT_IN.

A family here differs from Llama in names, defaults, biases and norms of q and k. One whose layers are of
another kind also changes lab/model/description.py, lab/model/torch_layer.py and lab/model/plans.
"""

from __future__ import annotations

from importlib import import_module

from lab.errors import LabError
from lab.model.description import ModelConfig
from lab.model.families.family import Family

# Each is a file beside this one.
BUILT_IN = ("llama", "mistral", "qwen2", "qwen3")

FAMILIES: dict[str, Family] = {}  # by Family.name
PRESETS: dict[str, ModelConfig] = {}  # of all families, by ModelConfig.name


def register(family: Family) -> None:
    """Makes a family and its presets known. Raises LabError where a name of it is taken."""
    if family.name in FAMILIES:
        raise LabError(f"there is a family {family.name} already")
    if family.gguf is not None and (other := find_gguf(family.gguf)):
        raise LabError(f"GGUF files of architecture {family.gguf} are of family {other.name} already")
    for preset in family.presets:
        if preset.name in PRESETS:
            raise LabError(f"there is a preset {preset.name} already")
        if preset.architecture != family.name:
            raise LabError(f"preset {preset.name} is of family {preset.architecture}, not {family.name}")
    FAMILIES[family.name] = family
    PRESETS.update({preset.name: preset for preset in family.presets})


def find_gguf(architecture: str) -> Family | None:
    """The family whose GGUF files have this general.architecture; None where there is none."""
    return next((family for family in FAMILIES.values() if family.gguf == architecture), None)


for _name in BUILT_IN:
    register(import_module(f"lab.model.families.{_name}").FAMILY)
