"""Reads files that others wrote with torch.save: tensors and plain values, and never any code of the file.

A pickle may name any class or function, which is called when the file is loaded. audiocraft's solver keeps omegaconf's
configuration objects beside the tensors, and under FSDP torch's sharded tensors. Such classes are known here by name
alone: an inert stand-in takes the place of each, so that nothing that the file names is imported, called or built,
whether or not omegaconf is installed. A file that names anything else is refused.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from trainer.errors import ModelError

# Names of the classes and functions that audiocraft 1.3.0's solvers pickle besides tensors. Source: audiocraft 1.3.0,
# solvers/base.py and optim/ema.py; flashy 0.0.2, state.py.
INERT = re.compile(
    r"omegaconf\.\w+\.\w+"
    r"|pathlib\.(Pure)?(Posix|Windows)?Path"
    r"|typing\.Any"
    r"|builtins\.(int|float|str|bool|bytes|list|dict|tuple|set)"
    r"|numpy\.(_?core\.multiarray\.scalar|dtype)"
    r"|torch\.distributed\.(_shard\.[\w.]+|remote_device\._remote_device)"
)
# These two only where a solver trained with FSDP: a class inside a class is pickled as a call of getattr.
SHARDED, GETATTR = "torch.distributed._shard.sharded_tensor.api.ShardedTensor", "builtins.getattr"
DICTIONARY = "collections.defaultdict"  # in what audiocraft's ModuleDictEMA saves
READ_ERRORS = (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, UnpicklingError)


class Inert:
    """Stands where a file names a class. It takes any arguments and does nothing.

    state  what the file would have set as the object's attributes
    """

    state: Any = None

    def __init__(self, *arguments: object):
        """Without effect."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class InertTensor(torch.Tensor):
    """Stands where a file names a class of tensors. It holds no values, and nothing can be computed with it."""

    @classmethod
    def __torch_dispatch__(cls, *arguments: object) -> None:
        raise TypeError("an inert tensor has no values")

    def __setstate__(self, state: object) -> None:
        """Without effect."""


def load_pickled(file: Path) -> dict[str, Any]:
    """The dictionary that torch.save wrote to `file`; its tensors are views of the mapped file, on the CPU.

    Files of before torch 1.6, which are no zip archives, cannot be mapped and are read whole. Raises ModelError where
    there is no such file, where it is truncated or holds no dictionary, or where it names a class or function besides
    those of INERT; such a one is never imported.
    """
    if not file.is_file():
        raise ModelError(f"there is no {file}")
    try:
        mapped = zipfile.is_zipfile(file)
        named = get_unsafe_globals_in_checkpoint(file) if mapped else []
        _refuse_others(file, named)
        with safe_globals(_stand_ins(named)):
            package = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except READ_ERRORS as error:
        raise ModelError(f"{file} cannot be read as a file of tensors ({error}); is it complete?") from error
    if not isinstance(package, dict):
        raise ModelError(f"{file} holds a {type(package).__name__}, not the tensors of a model by name")
    return package


def plain_config(node: object) -> Any:
    """The dictionaries, lists and values of an omegaconf configuration for which `node` is the stand-in.

    A reference to another value (`${name}`) is not followed: it stays the text that it is.
    """
    if not isinstance(node, Inert):
        return node
    state = node.state if isinstance(node.state, dict) else {}
    content = state.get("_content", state.get("_val"))
    if isinstance(content, dict):
        return {key: plain_config(value) for key, value in content.items()}
    if isinstance(content, list):
        return [plain_config(value) for value in content]
    return None if isinstance(content, Inert) else content


def _refuse_others(file: Path, named: list[str]) -> None:
    known = {DICTIONARY, GETATTR} if SHARDED in named else {DICTIONARY}
    refused = sorted(name for name in named if not INERT.fullmatch(name) and name not in known)
    if refused:
        raise ModelError(
            f"{file} cannot be read: it names {', '.join(refused[:4])}, and what is no tensor, number or text could run"
            " code when loaded. Save the tensors alone: torch.save(model.state_dict(), path)"
        )


def _stand_ins(named: list[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    # A defaultdict becomes a plain dict: torch's weights_only unpickler sets no items of a dict's subclass.
    special: dict[str, Callable[..., Any]] = {DICTIONARY: _dictionary, GETATTR: _attribute, SHARDED: InertTensor}
    return [(special.get(name, Inert), name) for name in named]


def _dictionary(*arguments: object) -> dict[object, object]:
    return {}


def _attribute(*arguments: object) -> type[Inert]:
    return Inert
