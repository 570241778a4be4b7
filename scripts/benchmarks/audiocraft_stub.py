"""The real audiocraft 1.3.0, imported beside a torch that it does not pin.

`import audiocraft` imports packages that its models do not need and that cannot be installed beside this
torch (xformers, torchaudio, av), or that are large (spacy). They are served as empty modules while it is
imported, and are gone afterwards, so that nobody else takes them for installed. Only xformers stays: attention
asks for it when it is built, and then calls torch's.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType

import torch

STUBBED = ("xformers", "spacy", "torchaudio", "av", "librosa", "num2words", "torchmetrics")
MODULES = ("audiocraft.models", "audiocraft.solvers.musicgen")


class _Stub(ModuleType):
    """A module whose every attribute is an empty class, which others may inherit from."""

    def __getattr__(self, name: str) -> object:
        # xformers.ops must be imported as a module of its own, and hasattr(x, "__path__") must not lie.
        if name.startswith("__") or self.__name__ == "xformers":
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


class _StubFinder(MetaPathFinder, Loader):
    """Stands last on sys.meta_path: it serves only what is not installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in STUBBED or fullname == "xformers.profiler":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "xformers.ops":
            module.unbind = torch.unbind  # type: ignore[attr-defined]


def import_audiocraft() -> None:
    """Import audiocraft's language model and solver; raises ImportError where it is not installed."""
    finder = _StubFinder()
    sys.meta_path.append(finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in MODULES:
                importlib.import_module(module)
    finally:
        sys.meta_path.remove(finder)
        stubs = [name for name, module in sys.modules.items() if isinstance(module, _Stub)]
        for name in stubs:
            if not name.startswith("xformers"):
                del sys.modules[name]
