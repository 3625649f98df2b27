"""Weights, shape and tokenizer from a Hugging Face folder: config.json, safetensors files, tokenizer.json."""
from __future__ import annotations

from pathlib import Path

import torch

from lab.errors import LabError, Unavailable
from lab.files import read_json
from lab.model.config import from_huggingface
from lab.model.sources.store import store

try:
    from safetensors import safe_open
except ImportError as error:
    raise Unavailable(f"reading safetensors needs the package safetensors ({error}): run `pip install safetensors`"
                      ) from None

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class HuggingFaceSource:
    """A source (see lab.model.weights) backed by a folder. Raises LabError for one it cannot read."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.config = from_huggingface(read_json(self.folder / "config.json"), self.name,
                                       str(self.folder / "config.json"))
        self.shards = {}                # file name -> open file; opened at its first tensor
        self.files = self._files()      # tensor name -> file name

    def fill(self, name: str, out: torch.Tensor) -> None:
        if name not in self.files:
            raise LabError(f"{self.folder}: tensor {name} is in none of the safetensors files")
        path = self.folder / self.files[name]
        try:
            values = self._open(path).get_tensor(name)
        except LabError:
            raise
        except Exception as error:
            raise LabError(f"{path}: tensor {name} cannot be read: {error}") from error
        if values.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise LabError(f"{path}: tensor {name} is {values.dtype}; only float32, float16 and bfloat16 are supported")
        store(values, out, name, str(path))

    def tokenizer(self):
        from lab.model.sources.tokenizer import from_huggingface as tokenizer_from_huggingface
        return tokenizer_from_huggingface(self.folder)

    def _files(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            files = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise LabError(f"{self.folder / INDEX}: weight_map is missing or mangled")
            for file in sorted(set(files.values())):
                if Path(file).name != file:
                    raise LabError(f"{self.folder / INDEX}: {file!r} is not the name of a file in this folder")
                if not (self.folder / file).is_file():
                    raise LabError(f"{self.folder}: {file}, named in {INDEX}, is missing")
            return files
        if not (self.folder / SINGLE).is_file():
            raise LabError(f"{self.folder}: neither {SINGLE} nor {INDEX} is there; only safetensors weights are read")
        return dict.fromkeys(self._open(self.folder / SINGLE).keys(), SINGLE)

    def _open(self, path: Path):
        if path.name not in self.shards:
            try:
                path.open("rb").close()             # safetensors calls a file that may not be read a missing one
                self.shards[path.name] = safe_open(path, framework="pt")
            except OSError as error:
                raise LabError(f"{path} cannot be read: {error.strerror or error}") from error
            except Exception as error:
                raise LabError(f"{path} is truncated or mangled: {error}") from error
        return self.shards[path.name]
