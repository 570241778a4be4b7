"""Which captions were drafted here and not changed since, so that --overwrite replaces no word that a person wrote."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from trainer.atomic import write_whole

# Hidden, so that it counts as no file of the data set.
FILE_NAME = ".caption_drafts.json"


class Record:
    """The drafts of a folder: a digest by the path of each caption file, kept in the folder itself."""

    def __init__(self, root: Path):
        self._path = root / FILE_NAME
        self._digests = _load(self._path)

    def is_unchanged_draft(self, path: Path) -> bool:
        """Whether `path` is a file that was drafted here and holds what was written then."""
        expected = self._digests.get(self._key(path))
        try:
            return expected is not None and not path.is_symlink() and _digest(path.read_bytes()) == expected
        except OSError:
            return False

    def write(self, path: Path, caption: str) -> None:
        """Write a draft whole. `save` keeps that it was written; a kill before leaves a file that is never replaced."""
        content = f"{caption}\n".encode()
        self._digests[self._key(path)] = _digest(content)
        write_whole(path, content)

    def save(self) -> None:
        """Keep what was written, for a later --overwrite."""
        write_whole(self._path, json.dumps(self._digests, indent=0, sort_keys=True).encode())

    def _key(self, path: Path) -> str:
        return os.path.relpath(path, self._path.parent)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _load(path: Path) -> dict[str, str]:
    """What was kept; nothing where it is missing or damaged, and then no file is taken for a draft."""
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in stored.items()} if isinstance(stored, dict) else {}
