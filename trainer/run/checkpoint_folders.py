"""The folders in checkpoints/: which are the program's own, which of those are complete, and their removal.

Ours are the names that we write, `step-00000120`, and `step-00000120.partial` while it is written. Everything else that
lies there, such as a copy `step-00000120-best`, is the user's: never chosen by itself, counted or removed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from trainer.atomic import PARTIAL, names_in

HEADER = "checkpoint.json"
# Eight digits, and more only where the number needs them.
OUR_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
OUR_FILE = re.compile(rf"({re.escape(HEADER)}|rank-\d{{5,}}\.safetensors)({re.escape(PARTIAL)})?")


def folder_name(step: int) -> str:
    """The name of the complete checkpoint after `step` steps; PARTIAL stands behind it while it is written."""
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """The name of a rank's file in the folder."""
    return f"rank-{rank:05d}.safetensors"


def is_complete(folder: Path) -> bool:
    """Whether this folder, of whatever name, holds a header, which is written last and removed first."""
    try:
        return HEADER in names_in(folder)
    except NotADirectoryError:
        return False
    except PermissionError:  # opening it then says so
        return True


def complete_checkpoints(folder: Path) -> list[Path]:
    """Our complete checkpoints in `folder`, newest first."""
    ours = [name for name in names_in(folder) if OUR_NAME.fullmatch(name)]
    newest_first = sorted(ours, key=lambda name: int(name.removeprefix("step-")), reverse=True)
    return [folder / name for name in newest_first if is_complete(folder / name)]


def remove_unfinished(folder: Path) -> None:
    """Remove the checkpoints of ours that a killed run left half-written or half-removed."""
    for name in names_in(folder):
        path = folder / name
        if path.is_symlink() or not path.is_dir():  # neither of which we make
            continue
        if OUR_NAME.fullmatch(name.removesuffix(PARTIAL)) and name.endswith(PARTIAL):
            shutil.rmtree(path)
        elif OUR_NAME.fullmatch(name) and not is_complete(path):
            _remove_files(path)


def remove_all_but_newest(folder: Path, kept: int, spared: Collection[str] = ()) -> None:
    """Remove our complete checkpoints but for the newest `kept`, and for those of these names."""
    for path in complete_checkpoints(folder)[kept:]:
        if path.name in spared:
            continue
        if path.is_symlink():  # somebody moved the checkpoint elsewhere, and it is theirs
            path.unlink()
        else:
            (path / HEADER).unlink()  # first, so that a kill in between leaves nothing that looks complete
            _remove_files(path)


def _remove_files(folder: Path) -> None:
    """Remove a checkpoint's files, and the folder unless somebody has put other files into it."""
    for name in names_in(folder):
        if OUR_FILE.fullmatch(name):
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty. On NFS also where another machine still has a file open: the next start
        folder.rmdir()
