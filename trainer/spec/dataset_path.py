"""What --dataset and --validation name: something on this machine, or a data set of the Hugging Face hub."""

from __future__ import annotations

import os
import re

# As huggingface_hub's validate_repo_id has it: up to 96 of these, no -- or .., and nothing but a letter, digit or _ at
# either end.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
HUB_ID = re.compile(rf"{_PART}/{_PART}")


def is_hub_id(path: str) -> bool:
    """Whether this is read as user/name on the hub: it has that form, and there is nothing of this name here."""
    fits = HUB_ID.fullmatch(path) and len(path) <= 96 and "--" not in path and ".." not in path
    return bool(fits) and not path.endswith(".git") and not os.path.lexists(path)


def not_here(path: str) -> str:
    """What is said of the other reading of a hub id, as a path, which needs no network: "there is no folder ..."."""
    folder, _, name = path.partition("/")
    missing = f"there is no folder {path} in {os.getcwd()}"
    if os.path.isdir(folder):
        return f"{missing} ({folder} is there, and has no {name})"
    return missing
