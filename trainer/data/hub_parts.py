"""Data sets of the hub that are larger than the free disk: what of one is fetched at a time, and where that lies.

What is fetched for a part lies in a folder of its own in the hub's cache, which is removed once the part is encoded: so
nothing is removed that was there before, and what a killed run leaves is found and used by the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trainer.atomic import remove, write_whole
from trainer.data.arrow_store import storage_errors
from trainer.data.hub_dataset import HubDataset, fetch_files, folder_of, missing_files
from trainer.data.melody_files import in_groups
from trainer.data.progress import size
from trainer.data.sound_kind import SOUND_SUFFIXES
from trainer.data.stand_ins import KEPT, REHASH, StandIns, is_table_name
from trainer.data.tags import FIELDS
from trainer.errors import ConfigError, StorageError
from trainer.spec.model_folder import BRANCH

PARTS = ".musicgen-trainer-parts"  # in the hub's cache
# Of the free disk, what is left alone: codes of mp3 at 128 kbit/s take a tenth of its bytes, at four offsets.
RESERVE = 0.1
SET = "set-"  # files that say what a data set consists of
SHOWN = 3


def stand_ins_of(found: HubDataset, cache_dir: Path) -> StandIns:
    """Where in the run's cache the files lie that stand in for the data set's; each commit has a folder of its own."""
    return StandIns(cache_dir / "hub" / found.repo.replace("/", "--") / found.revision)


def place_of(found: HubDataset, cache_dir: Path) -> Path:
    """The folder that a run scans for the data set: what was fetched, or what stands in for what was read in parts."""
    return stand_ins_of(found, cache_dir).folder if found.in_parts else folder_of(found)


def why_in_parts(hub: Mapping[str, HubDataset], cache_dir: Path) -> dict[str, str]:
    """Of the data sets that a run uses, by name: why one has to be read in parts on this machine, in words.

    One of which nothing is to be fetched need not; nor does any where all that is missing fits onto the free disk,
    except one of which parts were read before, which are not fetched again.
    """
    reasons, needed = {}, {}
    for name, found in hub.items():
        missing = set(missing_files(found, found.files))
        if not missing:
            continue
        read = stand_ins_of(found, cache_dir).names() & missing
        if read:
            reasons[name] = "parts of this commit were read before"
        sizes = zip(found.files, found.sizes, strict=True)
        needed[name] = sum(size_bytes for file, size_bytes in sizes if file in missing - read)
    total = sum(needed.values())
    free = free_bytes() if total else 0
    if total > (1 - RESERVE) * free:
        reason = f"{size(total)} are to be fetched, and the hub's cache {hub_cache()} has {size(free)} left"
        # All of them, so that one which would fit leaves the room for parts of the other; but a prepared folder is what
        # parts would become.
        reasons |= {name: reason for name in needed if name not in reasons and not hub[name].is_prepared}
    return reasons


def record(found: HubDataset, config: str | None, split: str, cache_dir: Path) -> None:
    """Remember what the data set consists of, for `recorded`."""
    kept = stand_ins_of(found, cache_dir).kept
    content = json.dumps({"config": config, "split": split, "found": asdict(replace(found, in_parts=False))})
    name = hashlib.blake2b(repr((found.asked, config, split)).encode(), digest_size=8).hexdigest()
    with storage_errors(kept, "what the data set consists of cannot be kept"):
        write_whole(kept / f"{SET}{name}.json", content.encode())


def recorded(
    repo: str, *, revision: str | None, config: str | None, split: str, cache_dir: Path
) -> HubDataset | None:
    """The data set as it was when it was read in parts, where there is no network; None where it was not.

    revision  the branch, tag or commit; None is main. Of several commits that a branch led to, the last that was read
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return None
    paths = (cache_dir / "hub" / repo.replace("/", "--")).glob(f"*/{KEPT}/{SET}*.json")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            said = json.loads(path.read_bytes())
            items = said["found"].items()
            values: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in items}
            found = HubDataset(**values)
            asked = (said["config"], said["split"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        if asked == (config, split) and (revision or BRANCH) in (found.asked, found.revision):
            return found
    return None


def announcement(found: HubDataset, reason: str, cache_dir: Path) -> str:
    """For the console."""
    return (
        f"data set {found.repo} of the hub is read in parts: {reason}. Each part is fetched, encoded into {cache_dir}"
        " and removed again; a run that is stopped goes on with the part that it had reached"
    )


def check_flags(flag: str, found: HubDataset, *, rehash: bool, template: str | None) -> None:
    """Raise ConfigError for what needs the sounds themselves at every start."""
    if rehash:
        raise ConfigError(f"{flag} {found.repo}: {REHASH}")
    tags = [name for name in FIELDS if template is not None and f"{{{name}}}" in template]
    if tags:
        raise ConfigError(
            f"--caption_template {template}: {flag} {found.repo} is read in parts, and tags inside its sounds"
            f" ({', '.join(tags)}) are not kept: use fields of names alone, or set HF_HOME to a folder on a larger disk"
        )


def hub_cache() -> Path:
    """The hub's cache folder on this machine, which may not be there yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()


def free_bytes() -> int:
    """What the disk of the hub's cache has left."""
    hub_cache().mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(hub_cache()).free


def next_part(found: HubDataset, waiting: Sequence[str], here: Mapping[str, Path], free: int, flag: str) -> list[str]:
    """Which of the files that wait are read next: in their order, as many as the disk takes, and one at least; a clip
    together with the melodies beside it, which are heard while it is encoded.

    here  files that need not be fetched
    free  bytes of the disk

    What may hold captions comes first, and all of it at once, since one file may speak of many sounds. Raises
    StorageError where the disk has no room for the next file.
    """
    size_of = {name: 0 if name in here else bytes_ for name, bytes_ in zip(found.files, found.sizes, strict=True)}
    beside = [name for name in waiting if not has_sounds(name)]
    part, room = list(beside), (1 - RESERVE) * free - sum(size_of[name] for name in beside)
    groups = in_groups([name for name in waiting if has_sounds(name)])
    for group in groups:
        takes = sum(size_of[name] for name in group)
        alone = not part and takes <= free
        if takes > room and not alone:
            break
        part += group
        room -= takes
    lacking = part or groups[0]
    needed = sum(size_of[name] for name in lacking)
    if not part or needed > free:
        raise StorageError(
            f"{flag} {found.repo}: its next part, {_some(lacking)}, takes {size(needed)}, and the"
            f" hub's cache {hub_cache()} has {size(free)} left: make room, or set HF_HOME to a folder on a larger disk."
            " What was read already is kept"
        )
    return part


def is_sound_name(name: str) -> bool:
    """Whether a file of this name is a sound."""
    return os.path.splitext(name)[1].lower() in SOUND_SUFFIXES


def has_sounds(name: str) -> bool:
    """Whether a file of this name is a sound, or a table of sounds; others may hold captions."""
    return is_table_name(name) or is_sound_name(name)


def beside_sounds(found: HubDataset) -> frozenset[str]:
    """The files of the data set that may hold captions."""
    return frozenset(name for name in found.files if not has_sounds(name))


class PartFolder:
    """The files of a part on this machine: those that the hub's cache had before, and those that are fetched.

    cache_dir  of the run: runs with other ones do not share what they fetch
    """

    def __init__(self, found: HubDataset, cache_dir: Path):
        owner = hashlib.blake2b(os.fsencode(os.path.abspath(cache_dir)), digest_size=8).hexdigest()
        self._found = found
        self.folder = hub_cache() / PARTS / f"{found.repo.replace('/', '--')}-{found.revision}-{owner}"

    def here(self, names: Sequence[str]) -> dict[str, Path]:
        """Where those of the files lie that need not be fetched, by their names."""
        lacking = set(missing_files(self._found, names))
        places = {name: folder_of(self._found) / name for name in names if name not in lacking}
        return places | {name: self.folder / name for name in lacking if (self.folder / name).is_file()}

    def fetch(self, part: Sequence[str], flag: str) -> None:
        """Have these files here. Raises DataError where one cannot be fetched."""
        here = self.here(part)
        fetch_files(self._found, [name for name in part if name not in here], flag, self.folder)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove all other files, and what the hub's library had fetched of some: what a killed process leaves."""
        remove(self.folder / ".cache")
        for path in [path for path in self.folder.rglob("*") if path.is_file()]:
            if path.relative_to(self.folder).as_posix() not in names:
                remove(path)

    def remove(self, part: Sequence[str]) -> None:
        """Remove those of the files that were fetched."""
        for name in part:
            remove(self.folder / name)

    def clear(self) -> None:
        """Remove all that was fetched."""
        shutil.rmtree(self.folder, ignore_errors=True)  # another machine may share the disk, and remove it too
        with suppress(OSError):  # another run may read parts of its own
            self.folder.parent.rmdir()


@contextmanager
def alone_with(stand_ins: StandIns) -> Iterator[None]:
    """Raise ConfigError unless no other process makes these stand-ins. Where a disk has no locks, none is noticed."""
    stand_ins.kept.mkdir(parents=True, exist_ok=True)
    with open(stand_ins.kept / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is reading the same data set in parts into {stand_ins.folder}: wait until its first step,"
                " and start again; what it has read is then used. Or choose another --cache_dir"
            ) from error
        except OSError:
            pass
        yield


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
