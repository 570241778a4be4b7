"""One scan of a folder for all processes of a run, and what follows where other machines have a copy of the folder.

The first process looks at the folder. The others read its table, and of the folder only the sound files that are
their share to encode. Where these lie on another machine, they may be missing there or differ, which ends the run: to
leave such a clip out would train on other clips than the user gave. What the cache holds already needs no file, so
that a copy which differs there neither changes a number nor is noticed.

Machines are told apart by their host names. The first process's absolute paths hold on its own host. On another one
the folder lies where --dataset, or --validation, leads from the working directory there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data import audio, clip_table, manifest
from trainer.data.audio_fault import AudioFault
from trainer.data.caption_settings import CaptionSettings
from trainer.data.fates import Fate, display
from trainer.data.inventory import InspectedFile
from trainer.data.manifest import Columns, Manifest
from trainer.data.peers import Peers
from trainer.data.places import file_of, sound_at
from trainer.data.table_scan import TableSettings
from trainer.data.treatment import Treatment
from trainer.errors import ConfigError, StorageError

SHOWN = 5  # differing files that a message names


@dataclass(frozen=True, kw_only=True)
class SharedScan:
    """What the first process found in `folder`.

    columns  those of Manifest; paths in bytes lead to the sounds on this process's machine
    fates    of all files of the folder
    hosts    the host name of every rank
    inspected  the sound files that are in order, on the first rank; on others none
    """

    folder: Path
    columns: Columns
    fates: tuple[Fate, ...]
    hosts: tuple[str, ...]
    inspected: tuple[InspectedFile, ...] = ()

    @property
    def several_hosts(self) -> bool:
        return len(set(self.hosts)) > 1


def scan_once(
    folder: Path,
    peers: Peers,
    tables: Path,
    *,
    captions: CaptionSettings,
    min_seconds: float,
    rehash: bool,
    treatment: Treatment,
    tables_used: TableSettings = manifest.ALL_TABLES,
    channels: int = 1,
) -> SharedScan:
    """What `manifest.scan` finds in the folder for the first process, the same for all.

    tables       folder of the cache in which the scan is remembered and handed on
    tables_used  which rows and columns of Parquet and Arrow files are used
    channels     of the model

    Raises what `manifest.scan` raises, in the first process alone; StorageError where there are other processes and
    the table cannot be written for them, or where they cannot read it.
    """
    found, root_and_names = None, None
    if peers.rank == 0:
        found = manifest.scan(
            folder,
            captions=captions,
            tables=tables_used,
            min_seconds=min_seconds,
            facts_folder=tables,
            rehash=rehash,
            treatment=treatment,
            channels=channels,
        )
        root_and_names = os.path.abspath(folder), _written(found, tables, needed=peers.world_size > 1)
    peers.wait("scanned")
    answers = peers.gather((socket.gethostname(), root_and_names))
    hosts = tuple(host for host, _ in answers)
    root, names = answers[0][1]
    if found is None:
        found = clip_table.read(names, tables)
    columns = found.columns
    if hosts[peers.rank] != hosts[0]:
        here = os.path.abspath(folder)
        columns = {**columns, **{name: _moved(columns[name], root, here) for name in manifest.PATHS}}
    return SharedScan(folder=folder, columns=columns, fates=found.fates, hosts=hosts, inspected=found.inspected)


def check_sizes(scan: SharedScan, rows: Sequence[int], peers: Peers, *, of_melodies: bool = False) -> None:
    """Raise ConfigError, on every rank, where a machine lacks a file that it is to encode, or has one of another size.

    rows         of the table that this rank is to encode; looked at only where it is not on the first rank's host
    of_melodies  whether it is the clips' melody files that it is to read; a row without one is passed over
    """
    differing = []
    if scan.hosts[peers.rank] != scan.hosts[0]:
        start = _start(of_melodies)
        paths, sizes = scan.columns[f"{start}path_bytes"], scan.columns[f"{start}size_bytes"]
        reasons = ((row, _difference(paths[row], sizes[row])) for row in rows if paths[row])
        differing = [(row, reason) for row, reason in reasons if reason]
    peers.wait("sizes")
    found = peers.gather((len(differing), differing[:SHOWN]))
    _refuse(scan, sum(count for count, _ in found), [shown for _, shown in found], of_melodies)


def check_encoded(
    scan: SharedScan, faults: Sequence[Sequence[tuple[int, str, str]]], peers: Peers, *, of_melodies: bool = False
) -> None:
    """Raise ConfigError, on every rank, where a file failed on another machine and is in order on the first rank's.

    faults       of each rank (row, fate, detail), as `cache.fill_codes` found them; the same on all ranks
    of_melodies  whether it is the clips' melody files that failed, which the details say

    A file that failed everywhere, as on a disk that all machines share, is left to become a fate of its clip.
    """
    elsewhere = [of_rank if host != scan.hosts[0] else () for host, of_rank in zip(scan.hosts, faults, strict=True)]
    if not any(elsewhere):
        return
    in_order = []
    if peers.rank == 0:
        in_order = [row for of_rank in elsewhere for row, _, _ in of_rank if _is_in_order(scan, row, of_melodies)]
    peers.wait("copies")
    here = set(peers.gather(in_order)[0])
    differing = [[(row, detail) for row, _, detail in of_rank if row in here] for of_rank in elsewhere]
    _refuse(scan, len(here), [of_rank[:SHOWN] for of_rank in differing])


def _written(found: Manifest, tables: Path, *, needed: bool) -> tuple[str, str] | None:
    try:
        return clip_table.write(found, tables)
    except StorageError:
        if needed:
            raise
        return None  # a complete cache on a read-only disk serves one process as it is


def _moved(paths: Sequence[bytes], from_root: str, to_root: str) -> list[bytes]:
    """The same references below another folder, or in another table where the root is one."""
    start, goal = os.fsencode(from_root), os.fsencode(to_root)
    return [goal + path.removeprefix(start) if path.startswith(start) else path for path in paths]


def _difference(path: bytes, size_bytes: int) -> str:
    """What tells the file that `path` leads to from one of that size; empty if nothing does."""
    try:
        found = os.stat(file_of(path)).st_size
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    return "" if found == size_bytes else f"has {found:,} bytes and not {size_bytes:,}"


def _start(of_melodies: bool) -> str:
    """How the names of the columns begin."""
    return "melody_" if of_melodies else ""


def _is_in_order(scan: SharedScan, row: int, of_melodies: bool) -> bool:
    start = _start(of_melodies)
    try:
        sound = sound_at(scan.columns[f"{start}path_bytes"][row])
        return audio.content_of(sound) == scan.columns[f"{start}content"][row]
    except AudioFault:
        return False


def _refuse(
    scan: SharedScan, count: int, differing: Sequence[Sequence[tuple[int, str]]], of_melodies: bool = False
) -> None:
    """Raise ConfigError with the (row, reason) of each rank, unless there are none."""
    if count == 0:
        return
    lines = [
        f"{'the melody of ' if of_melodies else ''}{display(scan.columns['path'][row])} on {host}: {reason}"
        for host, of_rank in zip(scan.hosts, differing, strict=True)
        for row, reason in of_rank
    ]
    raise ConfigError(
        f"the folder {display(scan.folder)} is not the same on all machines: {count} file(s) to be encoded differ from"
        f" those of the first process, on {scan.hosts[0]}: {'; '.join(lines[:SHOWN])}. Copy the folder again, or give"
        " one that all machines share"
    )
