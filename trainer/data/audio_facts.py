"""What inspecting each sound file found, kept in a file of the cache, so that an unchanged sound is not read again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.atomic import write_whole
from trainer.data.audio import CANCELS, AudioFacts, inspect
from trainer.data.audio_fault import AudioFault, unreadable
from trainer.data.garbage_collection import put_off
from trainer.data.levels import Levels
from trainer.data.places import file_of, sound_at
from trainer.errors import StorageError

FILE_NAME = "audio_facts.json"
# To be raised when `inspect` comes to judge files differently: all files are then read again. Version 3 (2026-11-27)
# tells formats, equal samples, levels and fingerprints, and finds files of more formats cut off; version 2 looked at
# peaks and headers.
VERSION = 3
SAVE_SECONDS = 5.0  # of work that a kill can lose; more where saving itself takes long
# As many as there are cores: more quarrel over Python's lock, and short files take a fifth longer with twice as many.
THREADS = max(2, min(4, os.cpu_count() or 1))
BAR_AFTER_SECONDS = 2.0
Stamp = tuple[int, int]  # a file's size in bytes and modification time in ns, by which a change is noticed
NOTHING_SEEN: Mapping[str, Stamp] = {}


def inspect_all(
    paths: Sequence[str], facts_folder: Path, *, rehash: bool = False, show_progress: bool = True,
    seen: Mapping[str, Stamp] = NOTHING_SEEN, channels: int = 1,
) -> dict[str, AudioFacts | AudioFault]:
    """What `inspect` returns or raises for each absolute path, or other reference to a sound (trainer/data/places.py,
    by os.fsdecode), found by a few threads.

    It is kept in a file in `facts_folder`, under the path, size and modification time of each sound, which are those of
    the table for one in a row: an unchanged one is not read again unless `rehash`, or unless it was judged by
    an older VERSION. Raises StorageError if something new cannot be kept there.

    seen      size and modification time of those that were looked at just now, by path: they are not asked for again
    channels  of the model: what an older version judged for mono alone is read again where they are 2
    """
    known = _load(facts_folder)
    results: dict[str, AudioFacts | AudioFault] = {}
    stamps: dict[str, Stamp] = {}
    stamp_of_file = lru_cache(maxsize=64)(_stamp)  # the rows of a table stand one behind the other
    for path in dict.fromkeys(paths):
        try:
            stamp = seen.get(path) or stamp_of_file(file_of(os.fsencode(path)))
        except OSError as error:
            results[path] = unreadable(error)
            continue
        if not rehash and path in known and known[path][0] == stamp and is_known(known[path][1], channels):
            results[path] = known[path][1]
        else:
            stamps[path] = stamp
    if stamps:
        save: Callable[[], None] = partial(_save, facts_folder, known)
        try:
            save()  # a folder that cannot be written shows now, not after an hour of reading
        except StorageError:
            if not _of_older_version(facts_folder).issuperset(stamps):
                raise
            save = _keep_nothing  # an older version's complete cache on a read-only disk
        _inspect_new(stamps, known, results, save, show_progress)
    return results


def is_known(said: AudioFacts | AudioFault, channels: int) -> bool:
    """Whether this says all of a sound for a model of so many channels. Versions before stereo models kept nothing of
    one that is silent in mono alone, and did not ask whether the first two of more channels are silent."""
    if channels == 1:
        return True
    return said.detail != CANCELS if isinstance(said, AudioFault) else said.silent_front is not None


# By path: a file's size in bytes and modification time in ns when it was inspected, and what `inspect` said.
_Known = dict[str, tuple[Stamp, AudioFacts | AudioFault]]


def _inspect_new(
    stamps: dict[str, Stamp], known: _Known, results: dict[str, AudioFacts | AudioFault],
    save: Callable[[], None], show_progress: bool,
) -> None:
    """Inspect the files of `stamps`, and put what was found into `results` and `known`.

    Threads suffice, because decoding and hashing release Python's global lock.
    """
    pool = ThreadPoolExecutor(THREADS)
    bar = tqdm(total=len(stamps), desc="Inspecting audio", unit="file", delay=BAR_AFTER_SECONDS,
               disable=not show_progress)
    paths, pending, unsaved, save_at = iter(stamps), dict[Future, str](), False, time.monotonic() + SAVE_SECONDS
    try:
        while True:
            for path in islice(paths, 2 * THREADS - len(pending)):
                pending[pool.submit(_verdict, path)] = path
            if not pending:
                break
            # Wait no longer than until the next save: a single file may take minutes.
            done, _ = wait(pending, max(0.1, save_at - time.monotonic()), FIRST_COMPLETED)
            for future in done:
                path = pending.pop(future)
                results[path], lasting = future.result()
                if lasting:
                    known[path] = (stamps[path], results[path])
                    unsaved = True
                bar.update()
            if unsaved and time.monotonic() >= save_at:
                began = time.monotonic()
                save()
                unsaved, save_at = False, time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - began))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        save()


def _stamp(path: bytes) -> Stamp:
    return stamp_of(os.stat(path))


def stamp_of(status: os.stat_result) -> Stamp:
    """Size and modification time of a file that was looked at."""
    return status.st_size, status.st_mtime_ns


def _keep_nothing() -> None:
    """In place of `_save`, where what is learnt cannot be kept and need not be."""


def _verdict(path: str) -> tuple[AudioFacts | AudioFault, bool]:
    """What `inspect` says, and whether it holds for as long as the file is unchanged.

    It may not where the operating system failed, or a decoder is not installed: rights are given, disks recover and
    packages come without a change to the file.
    """
    try:
        return inspect(sound_at(os.fsencode(path))), True
    except AudioFault as fault:
        of_this_machine = fault.fate in ("not a file", "unsupported format") or isinstance(fault.__cause__, OSError)
        # A new fault, because the traceback of this one would hold decoded blocks in memory.
        return AudioFault(fault.fate, fault.detail), not of_this_machine


@put_off()
def _load(facts_folder: Path) -> _Known:
    """What was kept; nothing if the file is missing, damaged or of another version."""
    try:
        stored = json.loads((facts_folder / FILE_NAME).read_bytes())
        if stored["version"] != VERSION:
            return {}
        return {
            path: ((size, mtime_ns), facts_of_json(said))
            for path, (size, mtime_ns, said) in stored["files"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def facts_of_json(said: dict[str, Any]) -> AudioFacts | AudioFault:
    """What `json_of_facts` made of it. Raises TypeError or KeyError for anything else."""
    if "fate" in said:
        return AudioFault(**said)
    unsaid = {"silent_front": None} if said["channels"] > 2 else {}
    return AudioFacts(**{**unsaid, **said, "levels": Levels(**said["levels"])})


def json_of_facts(facts: AudioFacts | AudioFault) -> dict[str, Any]:
    """What is known of a sound, as plain JSON values. What concerns stereo models alone is left out where it says
    nothing, so that earlier versions can read what is kept where no sound is of that kind."""
    if isinstance(facts, AudioFault):
        return {"fate": facts.fate, "detail": facts.detail}
    says_nothing = {"cancels": not facts.cancels, "silent_front": facts.channels <= 2 or facts.silent_front is None}
    return {name: value for name, value in asdict(facts).items() if not says_nothing.get(name)}


def _of_older_version(facts_folder: Path) -> frozenset[str]:
    """The paths of which an older version kept something."""
    try:
        stored = json.loads((facts_folder / FILE_NAME).read_bytes())
        return frozenset(stored["files"]) if stored["version"] < VERSION else frozenset()
    except (OSError, ValueError, TypeError, KeyError):
        return frozenset()


def _save(facts_folder: Path, known: _Known) -> None:
    files = {path: [*stamp, json_of_facts(said)] for path, (stamp, said) in known.items()}
    # ASCII JSON, so that names which are no UTF-8 survive as escaped surrogates.
    content = json.dumps({"version": VERSION, "files": files}).encode("ascii")
    try:
        facts_folder.mkdir(parents=True, exist_ok=True)
        write_whole(facts_folder / FILE_NAME, content, shared=True)
    except OSError as error:
        raise StorageError(
            f"cache folder {os.fspath(facts_folder)!r}: what was learnt of the sound files cannot be kept there "
            f"({error.strerror}). Free some space or permit access, or choose another folder with --cache_dir"
        ) from error
