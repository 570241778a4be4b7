"""What became of each file of a data folder, in one line for a person, and the report of all of them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from trainer.atomic import write_whole
from trainer.data.wav_header import REREAD
from trainer.errors import StorageError

# docs/cache.md explains each; tests/test_readme.py holds it to this list.
FateKind = Literal[
    "used", "melody", "melody unusable", "no caption", "caption unreadable", "caption too long", "too short", "silent",
    "not finite", "out of range", "empty", "truncated", "unreadable", "not a file", "duplicate", "unsupported format",
    "no audio", "ignored",
]
IN_USE: tuple[FateKind, ...] = ("used", "melody")  # every other one is left out
FATE_KINDS: tuple[FateKind, ...] = get_args(FateKind)
REPORT = "dataset.csv"
EXAMPLES = 10  # files left out that a summary shows
IN_THE_REPORT = f"named in {REPORT} of the output folder"
BY_CHECKING = "named by python scripts/check_dataset.py"  # where no report is written
# Said once, where files have no caption: the ways that need no text file for each.
HOW_TO_CAPTION = """\
For files without a caption, the first that suits:
  python scripts/caption.py DIR drafts them, from tags, names, tempo and key, for you to mend
  --caption_template "{genre}, {title}, {folder}" makes them of tags and names
  --default_caption "slow rock" is one for all that have none; --no_label 1 trains without any"""
NO_FILES = "       no files: put sounds there (.wav, .mp3 ...), each with a .txt caption of the same name beside it"
NOWHERE = ("not there", "")  # fate and detail of a file that a report does not have


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What became of one file.

    path    as `display` shows it, relative to the data folder
    fate    "used" for a clip to train on, "melody" for the melody of a clip; every other kind says why it is left out
    detail  what exactly was found, and what the user can do about it; may be empty
    """

    path: str
    fate: FateKind
    detail: str = ""

    def with_remark(self, remark: str) -> Fate:
        """The same with something more in its detail; nothing for ""."""
        return replace(self, detail="; ".join(filter(None, (self.detail, remark)))) if remark else self


def summary(fates: Iterable[Fate], *, rest: str = IN_THE_REPORT) -> str:
    """How many files had each kind of fate, and those left out with what to do: of every kind one, and ten in all.

    rest  where the others are named
    """
    by_kind: dict[FateKind, list[Fate]] = {kind: [] for kind in FATE_KINDS}
    for fate in fates:
        by_kind[fate.fate].append(fate)
    lines = [f"{len(group):>9,}  {kind}" for kind, group in by_kind.items() if group]
    if not lines:
        return NO_FILES
    groups = [group for kind, group in by_kind.items() if kind not in IN_USE]
    # The first of every kind, then the second of every kind, and so on; of what is no music, more than one only where
    # nothing else is left out.
    turns = [(turn, group) for turn in range(EXAMPLES) for group in groups if turn < len(group)]
    turns.sort(key=lambda one: one[0] > 0 and one[1] is by_kind["ignored"])
    examples = [group[turn] for turn, group in turns]
    shown = examples[: max(EXAMPLES, sum(map(bool, groups)))]
    if shown:
        lines.append("Left out:")
        lines += [f"  {fate.path}: {fate.fate}: {fate.detail}" for fate in shown]
    if more := sum(map(len, groups)) - len(shown):
        lines.append(f"  and {more:,} more, {rest}")
    if by_kind["no caption"]:
        lines.append(HOW_TO_CAPTION)
    return "\n".join(lines)


def reasons(fates: Iterable[Fate]) -> str:
    """Why files are left out, the most frequent reason first and ignored files last, each with its number of files and
    below it what to do about some of them: one for every reason, and ten in all. "" where none is left out."""
    everything = list(fates)
    if not everything:
        return NO_FILES
    groups: dict[FateKind, list[Fate]] = {}
    for fate in everything:
        if fate.fate not in IN_USE:
            groups.setdefault(fate.fate, []).append(fate)
    shown: dict[FateKind, int] = dict.fromkeys(groups, 1)
    while sum(shown.values()) < EXAMPLES and (more := [kind for kind in groups if shown[kind] < len(groups[kind])]):
        shown[min(more, key=shown.__getitem__)] += 1
    lines = []
    for kind, group in sorted(groups.items(), key=lambda item: (item[0] == "ignored", -len(item[1]))):
        lines.append(f"{len(group):>9,}  {kind}")
        lines += [f"             {fate.path}: {fate.detail}" for fate in group[: shown[kind]]]
        if hidden := len(group) - shown[kind]:
            lines.append(f"             and {hidden:,} more")
    if "no caption" in groups:
        lines.append(HOW_TO_CAPTION)
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


def changed_since(report: Path, fates: Iterable[Fate]) -> str:
    """The files that are used otherwise than when `report` was written, in words for a person; "" for none.

    A file is named if it was used and is not, the other way round, or if other samples of it are read than by
    versions before 2026-11-27. One whose content or caption was changed cannot be told from the report.
    """
    then, now = _read_report(report), {fate.path: (str(fate.fate), fate.detail) for fate in fates}
    changes = (_change(path, then.get(path, NOWHERE), now.get(path, NOWHERE)) for path in sorted({*then, *now}))
    named = [change for change in changes if change]
    more = f" and {len(named) - EXAMPLES} more" if len(named) > EXAMPLES else ""
    return f"files used otherwise than then: {', '.join(named[:EXAMPLES])}{more}" if named else ""


def _change(path: str, then: tuple[str, str], now: tuple[str, str]) -> str:
    """What became of a file between two fates with their details, in words; "" where nothing is used otherwise."""
    if then[0] == now[0] == "used":
        return f"{path} ({now[1]})" if REREAD in now[1] and REREAD not in then[1] else ""
    return f"{path} ({then[0]} then, {now[0]} now)" if "used" in (then[0], now[0]) else ""


def _read_report(path: Path) -> dict[str, tuple[str, str]]:
    """Fate and detail of each path in a report; empty where it is missing or damaged."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {row["path"]: (row["fate"], row["detail"]) for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error):
        return {}


def display(path: str | os.PathLike[str]) -> str:
    """A file's name as one printable line: a byte that is no UTF-8 is shown as \\xff, a line break as \\n."""
    if isinstance(path, str) and path.isascii() and path.isprintable():  # it is called several times for each file
        return path
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    if text.isprintable():  # nearly always, and much quicker than looking at each character
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
