"""Has what is cached of a scanned folder's clips found by all processes, and leaves out the clips that fail at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import compress

import torch
from transformers import EncodecModel

from trainer.data import cache, melodies
from trainer.data.arrow_store import Store
from trainer.data.fates import Fate, FateKind
from trainer.data.peers import Peers
from trainer.data.places import forget_tables
from trainer.data.shared_scan import SharedScan, check_encoded, check_sizes

Faults = list[tuple[int, FateKind, str]]  # rows of the scan, each with the fate of its clip and the detail


def with_codes(
    scanned: SharedScan, store: Store, load_codec: Callable[[], EncodecModel], peers: Peers, *, sample_rate_hz: int,
    views: int, channels: int, device: torch.device,
) -> tuple[SharedScan, dict[str, Fate]]:
    """The scan with the clips of which the store has the codes by now, and the fates of the others, by their path.

    load_codec  called only if something is missing

    Raises ConfigError where a machine's copy of the folder differs in a file that it has to encode, StorageError where
    the store cannot be written.
    """

    def fill() -> Faults:
        faults = cache.fill_codes(
            store, scanned.columns, load_codec, sample_rate_hz=sample_rate_hz, views=views, channels=channels,
            device=device, show_progress=peers.rank == 0, rank=peers.rank, world_size=peers.world_size,
        )
        return [(row, fault.fate, fault.detail) for row, fault in faults]

    missing = cache.missing_codes(store, scanned.columns, rank=peers.rank, world_size=peers.world_size)
    return _filled(scanned, peers, "codes", missing, fill)


def with_melodies(
    scanned: SharedScan, store: Store, stems: melodies.Stems, peers: Peers, *, device: torch.device
) -> tuple[SharedScan, dict[str, Fate]]:
    """The same with the melodies of the clips."""

    def fill() -> Faults:
        faults = melodies.fill_melodies(
            store, scanned.columns, stems, device=device,
            show_progress=peers.rank == 0, rank=peers.rank, world_size=peers.world_size,
        )
        return [(row, *melodies.fate_of(fault, scanned.columns, row)) for row, fault in faults]

    missing = melodies.missing_melodies(store, scanned.columns, rank=peers.rank, world_size=peers.world_size)
    return _filled(scanned, peers, "melodies", missing, fill)


def _filled(
    scanned: SharedScan, peers: Peers, what: str, missing: Mapping[str, Sequence[int]], fill: Callable[[], Faults]
) -> tuple[SharedScan, dict[str, Fate]]:
    """The scan without the clips that `fill` finds faults in, on any process, and their fates.

    missing  this process's share of what is to be filled, with its rows
    """
    # Of a clip that has a melody file, that file is read for its melody, and not the clip's own.
    in_melody_file = [what == "melodies" and bool(content) for content in scanned.columns["melody_content"]]
    own_rows = [row for rows in missing.values() for row in rows]
    for of_melodies in (False, True) if scanned.several_hosts else ():
        rows = [row for row in own_rows if in_melody_file[row] is of_melodies]
        check_sizes(scanned, rows, peers, of_melodies=of_melodies)
    own_faults = fill()
    forget_tables()
    peers.wait(what)
    faults_of_ranks = peers.gather(own_faults)
    for of_melodies in (False, True):
        of_kind = [[one for one in of_rank if in_melody_file[one[0]] is of_melodies] for of_rank in faults_of_ranks]
        check_encoded(scanned, of_kind, peers, of_melodies=of_melodies)
    faults = {row: (fate, detail) for of_rank in faults_of_ranks for row, fate, detail in of_rank}
    paths = scanned.columns["path"]
    fates = {paths[row]: Fate(path=paths[row], fate=fate, detail=detail) for row, (fate, detail) in faults.items()}
    kept = [row not in faults for row in range(len(paths))]
    columns = {name: list(compress(values, kept)) for name, values in scanned.columns.items()}
    return replace(scanned, columns=columns), fates
