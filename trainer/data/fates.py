"""What became of each file of a data folder, in one line for a person, and the report of all of them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from trainer.atomic import write_whole
from trainer.errors import StorageError

# docs/cache.md explains each; tests/test_readme.py holds it to this list.
FateKind = Literal[
    "used", "no caption", "caption unreadable", "caption too long", "too short", "silent", "not finite", "empty",
    "truncated", "unreadable", "not a file", "duplicate", "unsupported format", "no audio", "ignored",
]
FATE_KINDS: tuple[FateKind, ...] = get_args(FateKind)
EXAMPLES = 10  # files left out that a summary shows


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What became of one file.

    path    as `display` shows it, relative to the data folder
    fate    "used" for a clip to train on; every other kind says why the file is left out
    detail  what exactly was found, and what the user can do about it; may be empty
    """

    path: str
    fate: FateKind
    detail: str = ""


def summary(fates: Iterable[Fate]) -> str:
    """How many files had each kind of fate, and ten of those left out with what to do, of every kind at least one."""
    by_kind: dict[FateKind, list[Fate]] = {kind: [] for kind in FATE_KINDS}
    for fate in fates:
        by_kind[fate.fate].append(fate)
    lines = [f"{len(group):>9,}  {kind}" for kind, group in by_kind.items() if group]
    if not lines:
        return "       no files: put .wav files there, each with a .txt caption of the same name beside it"
    groups = [group for kind, group in by_kind.items() if kind != "used"]
    # The first of every kind, then the second of every kind, and so on.
    examples = [group[turn] for turn in range(EXAMPLES) for group in groups if turn < len(group)]
    if examples:
        lines.append("Left out, for example:")
        lines += [f"  {fate.path}: {fate.fate}: {fate.detail}" for fate in examples[:EXAMPLES]]
    return "\n".join(lines)


def write_report(fates: Iterable[Fate], path: Path) -> None:
    """Write all fates to `path` as CSV in UTF-8 with the columns path, fate, detail; StorageError if that fails."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(("path", "fate", "detail"))
    rows.writerows((fate.path, fate.fate, fate.detail) for fate in fates)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.getvalue().encode())
    except OSError as error:
        raise StorageError(f"the dataset report {display(path)} cannot be written ({error.strerror}): "
                           "free space there, or give another --output_dir") from error


def display(path: str | os.PathLike[str]) -> str:
    """A file's name as one printable line: a byte that is no UTF-8 is shown as \\xff, a line break as \\n."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
