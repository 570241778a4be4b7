"""The tensors of a model by name, each of which is read from where it lies only when it is asked for.

A model's tensors may take more memory than the host has, and a process of a sharded run needs only ranges of most of
them. So whatever puts weights together (replacing, choosing, merging adapters) passes on where each tensor lies and
reads none.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer.errors import ModelError
from trainer.model.safetensors_file import files_kept_open, fill, read_header

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor(ABC):
    """Where one tensor lies. Its shape is known without reading it."""

    shape: tuple[int, ...]

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened tensor, (stop - start,), in its own dtype, without the others."""

    def whole(self) -> Tensor:
        """The whole tensor in its own dtype."""
        return self.read(0, math.prod(self.shape)).reshape(self.shape)


class Weights(Mapping[str, Tensor]):
    """Tensors by name. `weights[name]` reads the whole tensor, at every look-up anew."""

    def __init__(self, stored: Mapping[str, StoredTensor]):
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].whole()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored  # Mapping's own answer would read the tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self.stored[name].shape

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened tensor, (stop - start,), in its own dtype, without the others."""
        return self.stored[name].read(start, stop)

    def starting_with(self, *prefixes: str) -> Weights:
        """The tensors whose names start with one of `prefixes`, under their whole names."""
        return Weights({name: tensor for name, tensor in self.stored.items() if name.startswith(prefixes)})

    def replaced(self, others: Weights) -> Weights:
        """These names, with the tensors of `others` where it has the same name; its other names are left out."""
        return Weights({name: others.stored.get(name, tensor) for name, tensor in self.stored.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class InMemory(StoredTensor):
    """A tensor in memory or in the memory map of a pickled file. `whole` is the tensor itself, not a copy."""

    tensor: Tensor

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor.detach().reshape(-1)[start:stop]

    def whole(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Computed(StoredTensor):
    """A tensor that `compute` makes anew at each look-up, the same each time. For a range the whole tensor is made."""

    compute: Callable[[], Tensor]

    def read(self, start: int, stop: int) -> Tensor:
        return self.compute().reshape(-1)[start:stop]

    def whole(self) -> Tensor:
        return self.compute()


@dataclass(frozen=True, kw_only=True, eq=False)
class InSafetensors(StoredTensor):
    """A tensor of a safetensors file; what is read is a copy in memory."""

    path: Path
    dtype: torch.dtype
    offset: int

    def read(self, start: int, stop: int) -> Tensor:
        values = torch.empty(stop - start, dtype=self.dtype)
        fill(values, self.path, self.offset + start * self.dtype.itemsize)
        return values


def weights_in_memory(tensors: Mapping[str, Tensor]) -> Weights:
    """Weights over tensors that are in memory already."""
    return Weights({name: InMemory(shape=tuple(tensor.shape), tensor=tensor) for name, tensor in tensors.items()})


def weights_in_folder(folder: Path) -> Weights:
    """The tensors in the weight files of a Hugging Face folder; opening them reads names and shapes only.

    Takes one file or an index with shards, safetensors before pickled ones. Pickled files are read with weights_only,
    so that no code in them can run, and mapped, so that no tensor is copied. Names are those of the installed
    transformers (see `current_name`).

    Raises ModelError where the folder holds no weights or a file cannot be read.
    """
    stored: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        for name, tensor in (_in_safetensors(path) if path.suffix == ".safetensors" else _in_pickled(path)).items():
            now = current_name(name)
            if now is not None:
                stored[now] = tensor
    return Weights(stored)


def current_name(stored: str) -> str | None:
    """The name that the installed transformers gives to a stored tensor; None for one that is computed.

    Published MusicGen folders were saved before torch renamed weight_norm's tensors (2.0) and while the
    sinusoidal positions were still stored. T5's embedding stands under two names, one of which suffices.
    """
    if stored.endswith(("embed_positions.weights", "text_encoder.encoder.embed_tokens.weight")):
        return None
    name = re.sub(r"\.weight_g$", ".parametrizations.weight.original0", stored)
    return re.sub(r"\.weight_v$", ".parametrizations.weight.original1", name)


@files_kept_open()
def under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, which is cut off; reads them all."""
    return {name[len(prefix) :]: weights[name] for name in weights if name.startswith(prefix)}


@files_kept_open()
def fingerprint(weights: Mapping[str, Tensor], prefix: str, *, also: str = "") -> str:
    """Hex digest (blake2b, 128 bit) of the tensors under `prefix`, names and dtypes included, and of the text `also`.

    The digest is part of a cache's and a run's identity: if it is computed otherwise, caches are filled anew and runs
    cannot be resumed.
    """
    digest = hashlib.blake2b(also.encode(), digest_size=16)
    for name in sorted(name for name in weights if name.startswith(prefix)):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _in_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        places, _ = read_header(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}): download the model again") from error
    return {
        name: InSafetensors(shape=place.shape, path=path, dtype=place.dtype, offset=place.offset)
        for name, place in places.items()
    }


def _in_pickled(path: Path) -> dict[str, StoredTensor]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ModelError(
            f"{path} cannot be read: it holds other things than tensors, which could run code when loaded."
            " Download the model again, best as safetensors"
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise ModelError(f"{path} cannot be read ({error}): download the model again") from error
    return dict(weights_in_memory({name: value for name, value in values.items() if isinstance(value, Tensor)}).stored)


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
