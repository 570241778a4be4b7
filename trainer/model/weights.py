"""The tensors of a model folder by name, each read from disk when it is asked for and not before."""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import ModelError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class Weights(Mapping[str, Tensor]):
    """Tensors by name, of which shapes and ranges can be had without the rest."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened tensor, in its own dtype."""


class MemoryWeights(Weights):
    """Weights over tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].detach().reshape(-1)[start:stop]


class ReplacedWeights(Weights):
    """`weights` in which `others` stand in place of the tensors of the same names."""

    def __init__(self, weights: Weights, others: Weights):
        self._weights = weights
        self._others = others
        self._replaced = frozenset(weights) & frozenset(others)

    def __getitem__(self, name: str) -> Tensor:
        return self._of(name)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._of(name).read(name, start, stop)

    def _of(self, name: str) -> Weights:
        return self._others if name in self._replaced else self._weights


class MoreWeights(Weights):
    """`weights`, and `others` under names of their own."""

    def __init__(self, weights: Weights, others: Weights):
        self._weights = weights
        self._others = others

    def __getitem__(self, name: str) -> Tensor:
        return self._of(name)[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._weights, *self._others))

    def __len__(self) -> int:
        return len(self._weights) + len(self._others)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._of(name).read(name, start, stop)

    def _of(self, name: str) -> Weights:
        return self._others if name in self._others else self._weights


class SomeWeights(Weights):
    """Those of `weights` whose names start with one of `prefixes`."""

    def __init__(self, weights: Weights, *prefixes: str):
        self._weights = weights
        self._names = [name for name in weights if name.startswith(prefixes)]

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._weights.read(name, start, stop)


class WeightFiles(Weights):
    """Read-only mapping from tensor name to tensor over the weight files of a Hugging Face folder.

    Takes one file or an index with shards, safetensors before pickled ones; the latter are read with
    weights_only, so that no code in them can run. Names are those of the installed transformers
    (see `current_name`). Every look-up reads from a memory map: keep what you need.

    Raises ModelError where the folder holds no weights or a file cannot be read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file_of: dict[str, tuple[Path, str]] = {}
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        for path in _weight_files(folder):
            for stored in self._names_in(path):
                name = current_name(stored)
                if name is not None:
                    self._file_of[name] = (path, stored)

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._file_of[name]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored)
        return self._load_pickled(path)[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        path, stored = self._file_of[name]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return tuple(file.get_slice(stored).get_shape())
        return tuple(self._load_pickled(path)[stored].shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        path, stored = self._file_of[name]
        if path.suffix != ".safetensors":
            return self._load_pickled(path)[stored].reshape(-1)[start:stop]
        with safe_open(path, framework="pt") as file:
            whole = file.get_slice(stored)
            shape = whole.get_shape()
            if not shape:  # safetensors slices no scalar
                return file.get_tensor(stored).reshape(-1)[start:stop]
            row = torch.Size(shape[1:]).numel()
            first, last = start // row, -(-stop // row)
            return whole[first:last].reshape(-1)[start - first * row : stop - first * row]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _names_in(self, path: Path) -> list[str]:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    return list(file.keys())
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read ({error}): download the model again") from error
        return list(self._load_pickled(path))

    def _load_pickled(self, path: Path) -> dict[str, Tensor]:
        if path not in self._pickled:
            try:
                self._pickled[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except UnpicklingError as error:
                raise ModelError(
                    f"{path} cannot be read: it holds other things than tensors, which could run code when loaded."
                    " Download the model again, best as safetensors"
                ) from error
            except (RuntimeError, OSError, ValueError, EOFError) as error:
                raise ModelError(f"{path} cannot be read ({error}): download the model again") from error
        return self._pickled[path]


def current_name(stored: str) -> str | None:
    """The name that the installed transformers gives to a stored tensor; None for one that is computed.

    Published MusicGen folders were saved before torch renamed weight_norm's tensors (2.0) and while the
    sinusoidal positions were still stored. T5's embedding stands under two names, one of which suffices.
    """
    if stored.endswith(("embed_positions.weights", "text_encoder.encoder.embed_tokens.weight")):
        return None
    name = re.sub(r"\.weight_g$", ".parametrizations.weight.original0", stored)
    return re.sub(r"\.weight_v$", ".parametrizations.weight.original1", name)


def under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, which is cut off."""
    return {name[len(prefix) :]: weights[name] for name in weights if name.startswith(prefix)}


def fingerprint(weights: Mapping[str, Tensor], prefix: str, *, also: str = "") -> str:
    """Hex digest (blake2b, 128 bit) of the tensors under `prefix`, names and dtypes included, and `also`."""
    digest = hashlib.blake2b(also.encode(), digest_size=16)
    for name in sorted(name for name in weights if name.startswith(prefix)):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                shards = set(json.loads((folder / index).read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{folder / index} cannot be read ({error!r}): download the model again") from error
            missing = sorted(shard for shard in shards if not (folder / shard).is_file())
            if missing:
                raise ModelError(f"{folder} lacks {', '.join(missing)}: download the model again")
            return [folder / shard for shard in sorted(shards)]
    raise ModelError(f"{folder} holds no weights: expected one of {', '.join(SINGLE_FILES + INDEX_FILES)}")
