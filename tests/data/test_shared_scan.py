"""One scan for all processes, which here are threads: what each is told, and copies of the folder that differ."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.audio_files import write_clip
from tests.data.table_files import rows_of, sound_bytes, write_parquet
from trainer.data import places
from trainer.data.caption_settings import CaptionSettings
from trainer.data.fates import Fate
from trainer.data.peers import Alone, Peers
from trainer.data.shared_scan import SharedScan, check_encoded, check_sizes, scan_once
from trainer.data.treatment import AS_IT_IS
from trainer.errors import ConfigError, StorageError


class Threads:
    """Ranks that are threads of one process."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=30)
        self.values: list[Any] = [None] * world_size

    def of(self, rank: int) -> Peers:
        class Rank:
            world_size = self.world_size

            def wait(_, what: str) -> None:
                self.barrier.wait()

            def gather(_, value: Any) -> list[Any]:
                self.values[rank] = value
                self.barrier.wait()
                values = list(self.values)
                self.barrier.wait()
                return values

        peers: Any = Rank()
        peers.rank = rank
        return peers


def on_each_rank(function: Callable[[int, Peers], Any], world_size: int) -> list[Any]:
    """What `function(rank, peers)` returned, or the error that it raised."""
    threads = Threads(world_size)

    def guarded(rank: int) -> Any:
        threading.current_thread().name = f"host-{rank}"
        try:
            return function(rank, threads.of(rank))
        except (ConfigError, StorageError) as error:
            threads.barrier.abort()
            return error
        except threading.BrokenBarrierError as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(guarded, range(world_size)))


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is on a host of its own: host-0, host-1, and so on."""
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)


@pytest.fixture
def copies(tmp_path: Path) -> list[Path]:
    """Three equal folders of four clips, one of which has a name that is no UTF-8."""
    for seed, name in enumerate((b"a.wav", b"b.wav", b"sub/c.wav", b"\xff.wav")):
        write_clip(tmp_path / "0/data" / os.fsdecode(name), f"caption {seed}", seed=seed, seconds=1 + seed / 4)
    for machine in "12":
        shutil.copytree(tmp_path / "0", tmp_path / machine)
    return [tmp_path / machine / "data" for machine in "012"]


RULES: dict[str, Any] = {
    "captions": CaptionSettings(), "min_seconds": 0.5, "rehash": False, "treatment": AS_IT_IS,
}


def scanned(copies: Sequence[Path]) -> list[SharedScan]:
    tables = copies[0].parents[1] / "cache/scan"
    return on_each_rank(lambda rank, peers: scan_once(copies[rank], peers, tables, **RULES), len(copies))


def paths(scan: SharedScan) -> list[str]:
    return [os.fsdecode(path) for path in scan.columns["path_bytes"]]


def test_all_processes_of_a_machine_have_the_first_ones_table_and_never_look_for_themselves(copies: list[Path]) -> None:
    first, second, third = scanned([copies[0], copies[1] / "nowhere", copies[2]])
    assert first.columns == second.columns == third.columns and len(first.columns["path"]) == 4
    assert first.fates == second.fates == third.fates and first.fates[0] == Fate(path="\\xff.wav", fate="used")
    assert paths(second) == [str(copies[0] / os.path.relpath(path, copies[0])) for path in paths(first)]
    assert not first.several_hosts


@pytest.mark.usefixtures("hosts")
def test_on_another_machine_the_table_leads_to_the_files_there(copies: list[Path]) -> None:
    first, second, _ = scanned(copies)
    assert second.several_hosts and second.hosts == ("host-0", "host-1", "host-2")
    assert paths(second) == [str(copies[1] / os.path.relpath(path, copies[0])) for path in paths(first)]
    assert all(os.path.isfile(path) for path in paths(second))
    assert {**second.columns, "path_bytes": None} == {**first.columns, "path_bytes": None}


def refused(found: list[Any], *words: str) -> None:
    assert all(isinstance(error, (ConfigError, threading.BrokenBarrierError)) for error in found), found
    errors = [str(error) for error in found if isinstance(error, ConfigError)]
    assert errors and all(word in error for word in words for error in errors), errors


@pytest.mark.usefixtures("hosts")
def test_a_file_to_be_encoded_that_another_machine_lacks_or_has_of_another_size_is_named_with_its_host(
    copies: list[Path],
) -> None:
    def check(*rows: int) -> list[Any]:
        return on_each_rank(lambda rank, peers: check_sizes(scans[rank], rows if rank else (), peers), 3)

    scans = scanned(copies)
    everything = range(4)
    assert check(*everything) == [None] * 3
    row = scans[0].columns["path"].index("b.wav")
    write_clip(copies[2] / "b.wav", seconds=3)
    assert check(*(set(everything) - {row})) == [None] * 3  # what it need not encode is not looked at
    refused(check(*everything), "b.wav on host-2: has 48,0", "1 file(s)", "of the first process, on host-0")
    (copies[1] / "sub/c.wav").unlink()
    refused(check(*everything), "sub/c.wav on host-1: cannot be opened (No such file", "b.wav on host-2", "2 file(s)")


@pytest.mark.usefixtures("hosts")
def test_a_file_that_fails_on_another_machine_alone_is_named_with_its_host(copies: list[Path]) -> None:
    def check(faulty_rank: int) -> list[Any]:
        faults = [[(row, "unreadable", "changed since")] if rank == faulty_rank else [] for rank in range(3)]
        return on_each_rank(lambda rank, peers: check_encoded(scans[rank], faults, peers), 3)

    scans = scanned(copies)
    row = scans[0].columns["path"].index("\\xff.wav")
    refused(check(2), "\\xff.wav on host-2: changed since", "on host-0")
    assert check(0) == [None] * 3  # on the first process's machine it is the clip's fate
    write_clip(Path(paths(scans[0])[row]), seed=9)
    assert check(2) == [None] * 3  # and so it is where it has changed for the first process too


def test_rows_of_a_table_lead_to_the_copy_of_each_machine(hosts: None, tmp_path: Path) -> None:
    for machine in "01":
        write_parquet(tmp_path / machine / "data/x.parquet", rows_of(range(4)))
        write_parquet(tmp_path / machine / "one.parquet", rows_of(range(2)))
    for name, rows in (("data", 4), ("one.parquet", 2)):
        roots = [tmp_path / machine / name for machine in "01"]

        def scanned(rank: int, peers: Peers, roots: list[Path] = roots) -> SharedScan:
            return scan_once(roots[rank], peers, tmp_path / "cache", **RULES)

        first, second = on_each_rank(scanned, 2)
        for found, root in ((first, roots[0]), (second, roots[1])):
            assert len(found.columns["content"]) == rows
            for reference, path in zip(found.columns["path_bytes"], found.columns["path"], strict=True):
                assert os.fsdecode(places.file_of(reference)).startswith(str(root))
                assert places.sound_at(reference) == sound_bytes(int(path.removesuffix(".wav")))
    write_parquet(tmp_path / "1/one.parquet", rows_of(range(3)))
    errors = on_each_rank(lambda rank, peers: check_sizes((first, second)[rank], [0], peers), 2)
    assert any(f"{first.columns['path'][0]} on host-1: has" in str(error) for error in errors), errors


def test_one_process_needs_no_table_and_several_do(copies: list[Path]) -> None:
    cache = copies[0].parents[1] / "cache/scan"
    whole = scan_once(copies[0], Alone(), cache, **RULES)
    for path in cache.glob("*.arrow"):
        path.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as on a read-only disk
    try:
        assert scan_once(copies[0], Alone(), cache, **RULES) == whole
        found = on_each_rank(lambda rank, peers: scan_once(copies[0], peers, cache, **RULES), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(found[0], StorageError) and "--cache_dir" in str(found[0])
