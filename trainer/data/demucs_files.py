"""Where the package demucs and the weights of its model htdemucs lie on this machine. Nothing is ever fetched.

Known without torch, so that a run which cannot have them is refused before anything is loaded. demucs 4.1 fetches its
weights from the Hugging Face hub into the hub's cache and, where that fails, from its own site into torch hub's folder;
before 4.1 it knew the site alone.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import yaml

from trainer.errors import ConfigError

MODEL = "htdemucs"  # what audiocraft 1.3.0 separates with (ChromaStemConditioner in modules/conditioners.py)
REPOSITORY = "adefossez/HTDemucs"  # of its weights on the hub (demucs 4.1.0, hf.py)
INSTALL = "bash scripts/setup.sh stems"
FETCH = f"""python -c "from demucs.pretrained import get_model; get_model('{MODEL}')\""""


def what_is_missing() -> str:
    """Why demucs cannot be used on this machine, and the command that mends it; "" where it can."""
    if _package() is None:
        return f"the package demucs is not installed: {INSTALL}"
    if weights_path() is None:
        return f"the weights of {MODEL} are not on this disk, and are not fetched by a run: {FETCH}"
    return ""


def refuse_missing() -> None:
    """Raise ConfigError where --stems demucs cannot be had on this machine."""
    if missing := what_is_missing():
        raise ConfigError(f"--stems demucs: {missing}; or give --stems mix, to hear melodies in the full mix")


def weights_path() -> Path | None:
    """The file of htdemucs' weights: that of the hub's cache, else that of torch hub's folder; None where neither is.

    The first holds tensors alone, and no pickle.
    """
    from huggingface_hub import try_to_load_from_cache

    package = _package()
    if package is None:
        return None
    (signature,) = yaml.safe_load((package / "remote" / f"{MODEL}.yaml").read_text())["models"]
    found = try_to_load_from_cache(REPOSITORY, f"{signature}.safetensors")
    if isinstance(found, str):
        return Path(found)
    names = (package / "remote" / "files.txt").read_text().split()
    (name,) = (name for name in names if name.startswith(f"{signature}-"))
    path = _torch_hub() / name
    return path if path.is_file() else None


def _package() -> Path | None:
    """The folder of the package; None where it is not installed."""
    spec = importlib.util.find_spec("demucs")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _torch_hub() -> Path:
    """The folder in which torch hub keeps what it has fetched, as torch.hub.get_dir (torch 2.13) has it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(home).expanduser() / "hub" / "checkpoints"
