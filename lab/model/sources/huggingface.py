"""Weights, shape and tokenizer from a Hugging Face folder: config.json, safetensors files, tokenizer.json."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lab.errors import LabError, Unavailable, named
from lab.files import read_json, regular_file
from lab.formats import PackedMatrix, kv
from lab.model.config import from_huggingface, huggingface_biases, with_held_biases
from lab.model.sources import quantised
from lab.model.sources.store import Stored, check_scales, check_shape, store
from lab.model.unsupported import quoted

try:
    from safetensors import safe_open
except ImportError as error:
    raise Unavailable(
        f"reading safetensors needs the package safetensors ({error}): run `pip install safetensors`"
    ) from None

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # where transformers finds it, it loads the base model and adds the adapter
IGNORED = ".rotary_emb.inv_freq"  # RoPE's frequencies, which old checkpoints hold and the config gives


class HuggingFaceSource:
    """A source (see lab/model/sources/__init__.py). Raises LabError for a folder that it cannot read."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.name, self.where = self.folder.resolve().name, str(self.folder)
        if (self.folder / ADAPTER).exists():
            raise LabError(
                f"{self.folder}: {ADAPTER} says that this is an adapter (LoRA) to another model, which is "
                "not applied here; merge it into its base model first"
            )
        settings, where = read_json(self.folder / "config.json"), str(self.folder / "config.json")
        config = from_huggingface(settings, self.name, where)
        self.scheme = quantised.scheme_of(settings, where)
        self.shards = {}  # file name -> open file
        self.files = self._files()  # tensor name -> file name
        required = huggingface_biases(settings, where)
        self.notes = [f"{self.where}: {self.scheme.note}"] if self.scheme and self.scheme.note else []
        self.config = with_held_biases(config, required, self.files, str, self.where)
        self.asked = set()

    def holds(self, name: str) -> bool:
        return name in self.files or self._stem(name) is not None

    def unread(self) -> list[str]:
        return sorted(name for name in self.files.keys() - self.asked if not name.endswith(IGNORED))

    def stored(self, name: str) -> Stored:
        if self._stem(name) is not None:
            return Stored(self.scheme.type, True, self.scheme.format)
        return Stored(self._open(self._file(name)).get_slice(name).get_dtype())

    def fill(self, name: str, out: torch.Tensor) -> None:
        if (stem := self._stem(name)) is not None:
            codes = quantised.read(self.scheme, stem, tuple(out.shape), str(self.folder), self._find)
            store(quantised.expanded(self.scheme, codes), out, name, str(self.folder))
            return
        self._store(name, self._read(name), out)

    def fill_part(self, name: str, out: torch.Tensor, shape: tuple[int, ...], dim: int, first: int) -> None:
        """fill() of the part of a plain tensor [shape] that begins at `first` of dimension `dim`. No more
        than that is read."""
        part = [slice(None)] * dim + [slice(first, first + out.shape[dim])]
        self._store(name, self._read(name, tuple(part), shape), out)

    def _store(self, name: str, values: torch.Tensor, out: torch.Tensor) -> None:
        path = self.folder / self.files[name]
        if values.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise LabError(
                f"{path}: tensor {name} is {values.dtype}; only float32, float16 and bfloat16 are supported"
            )
        store(values, out, name, str(path))

    def packed(self, name: str, shape: tuple[int, int], device: torch.device) -> PackedMatrix:
        stem, where = self._stem(name), str(self.folder)
        codes = quantised.read(self.scheme, stem, shape, where, self._find)
        matrix = quantised.packed(self.scheme, codes, stem, where)
        return replace(matrix, codes=matrix.codes.to(device), scales=matrix.scales.to(device))

    def kv_scales(self) -> list[tuple[float, float]] | None:
        if self.scheme is None or not self.scheme.kv_scales:
            return None
        return [
            tuple(self._scale(f"model.layers.{layer}.self_attn.{kind}_scale") for kind in "kv")
            for layer in range(self.config.layers)
        ]

    def _scale(self, name: str) -> float:
        """The only number of a tensor, which must be a scale."""
        values = self._read(name)
        if values.numel() != 1 or values.dtype not in quantised.SCALES:
            raise LabError(
                f"{self._file(name)}: tensor {name} must be one floating-point number in float16, bfloat16 "
                f"or float32; it is {values.dtype} {list(values.shape)}"
            )
        check_scales(values, name, str(self._file(name)))
        if (scale := values.float().item()) <= 0:
            raise LabError(f"{self._file(name)}: tensor {name} is {scale:g}; a scale must be positive")
        least, most = kv.SCALES_OF_FILES
        if not least <= scale <= most:
            would = "be cut off at its largest code" if scale < least else "become 0"
            raise LabError(
                f"{self._file(name)}: tensor {name} is {scale:g}; with a scale outside {least:g} .. {most:g} "
                f"keys and values of usual size would {would}; the file is mangled"
            )
        return scale

    def _stem(self, name: str) -> str | None:
        """NAME of a matrix NAME.weight that the checkpoint quantises; None for another tensor."""
        stem = name.removesuffix(".weight")
        there = self.scheme is not None and stem != name and f"{stem}.{self.scheme.marker}" in self.files
        return stem if there else None

    def _find(self, name: str) -> torch.Tensor | None:
        return self._read(name) if name in self.files else None

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise LabError(f"{self.folder}: tensor {name} is in none of the safetensors files")
        return self.folder / self.files[name]

    def _read(self, name: str, part: tuple[slice, ...] | None = None, shape=()) -> torch.Tensor:
        """A tensor, or the part of one that must have this shape."""
        path = self._file(name)
        self.asked.add(name)
        try:
            if part is None:
                return self._open(path).get_tensor(name)
            whole = self._open(path).get_slice(name)
            check_shape(whole.get_shape(), shape, name, str(path))
            return whole[part]
        except LabError:
            raise
        except Exception as error:
            raise LabError(f"{path}: tensor {name} cannot be read: {named(str(error), 200)}") from error

    def tokenizer(self):
        from lab.model.text.tokenizer import from_huggingface as tokenizer_from_huggingface

        return tokenizer_from_huggingface(self.folder)

    def _files(self) -> dict[str, str]:
        """The file of each tensor. A whole file goes before an index, as in transformers.

        Shards are asked for what they hold: what the index names and no shard has is an error, and what the
        index does not name counts, since transformers loads it.
        """
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._open(self.folder / SINGLE).keys(), SINGLE)
        if not (self.folder / INDEX).exists():
            raise LabError(
                f"{self.folder}: neither {SINGLE} nor {INDEX} is there; only safetensors weights are read"
            )
        index = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise LabError(f"{self.folder / INDEX}: weight_map is missing or mangled")
        files = {}
        for file in sorted(set(index.values())):
            if Path(file).name != file or file in ("", "..") or len(file) > 255:
                raise LabError(f"{self.folder / INDEX}: {quoted(file)} is not the name of a file beside it")
            if not (self.folder / file).exists():
                raise LabError(f"{self.folder}: {named(file)}, named in {INDEX}, is missing")
            for name in self._open(self.folder / file).keys():
                if name in files:
                    raise LabError(f"{self.folder}: tensor {named(name)} is in {files[name]} and in {file}")
                files[name] = file
        for name, file in index.items():
            if name not in files and not name.endswith(IGNORED):
                raise LabError(
                    f"{self.folder}: tensor {named(name)}, which {INDEX} places in {file}, is in none "
                    "of the safetensors files"
                )
        return files

    def _open(self, path: Path):
        if path.name not in self.shards:
            try:
                # safetensors calls a file that may not be read a missing one
                regular_file(path).open("rb").close()
                self.shards[path.name] = safe_open(path, framework="pt")
            except LabError:
                raise
            except OSError as error:
                raise LabError(f"{path} cannot be read: {error.strerror or error}") from error
            except Exception as error:
                raise LabError(f"{path} is truncated or mangled: {named(str(error), 200)}") from error
        return self.shards[path.name]
