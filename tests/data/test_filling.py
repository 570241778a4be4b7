"""Codes and melodies of a folder of which each machine has a copy: ranks are threads, each on a host of its own."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.audio_files import write_clip
from tests.data.test_shared_scan import RULES, on_each_rank, refused
from trainer.data import cache, melodies
from trainer.data.arrow_store import Store
from trainer.data.filling import with_codes, with_melodies
from trainer.data.peers import Peers
from trainer.data.shared_scan import SharedScan, scan_once
from trainer.data.stems import Mix
from trainer.data.treatment import AS_IT_IS
from trainer.model.source import load_codec, open_model

CPU = torch.device("cpu")


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two equal folders. By length, the second process has b.wav to do, whose melody is a file, and then d.wav."""
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)
    for seed, (name, seconds) in enumerate({"a": 2.5, "b": 2.0, "c": 1.5, "d": 1.0}.items()):
        write_clip(tmp_path / "0/data" / f"{name}.wav", f"caption {name}", seed=seed, seconds=seconds)
    for seed, name in enumerate("ab", start=7):
        write_clip(tmp_path / "0/data" / f"{name}.melody.wav", seed=seed, seconds=3)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    return [tmp_path / machine / "data" for machine in "01"]


def scanned(copies: Sequence[Path]) -> list[SharedScan]:
    tables = copies[0].parents[1] / "cache/scan"
    return on_each_rank(lambda rank, peers: scan_once(copies[rank], peers, tables, **RULES), 2)


def melodies_found(scans: Sequence[SharedScan], cache_dir: Path) -> tuple[list[Any], Store]:
    store = melodies.melody_store(cache_dir, AS_IT_IS, "mix")

    def fill(rank: int, peers: Peers) -> Any:
        return with_melodies(scans[rank], store, Mix(), peers, device=CPU)

    return on_each_rank(fill, 2), store


def changed(path: Path, copy_of: Path) -> None:
    """Another sound with the size and the date of the file."""
    write_clip(path, seed=99, seconds=3)
    assert path.stat().st_size == copy_of.stat().st_size
    shutil.copystat(copy_of, path)


def test_equal_copies_give_every_process_all_melodies_though_one_machine_lacks_what_it_need_not_hear(
    copies: list[Path], tmp_path: Path
) -> None:
    scans = scanned(copies)
    assert scans[0].several_hosts
    for needless in ("a.wav", "a.melody.wav", "b.wav", "c.wav"):
        (copies[1] / needless).unlink()
    (copies[0] / "b.melody.wav").unlink()
    found, store = melodies_found(scans, tmp_path / "cache")
    assert [scan.columns for scan, _ in found] == [scan.columns for scan in scans]
    assert [fates for _, fates in found] == [{}, {}]
    assert store.keys() == set(melodies.melody_keys(scans[0].columns)) and len(store.keys()) == 4


def test_a_melody_file_that_another_machine_lacks_or_has_otherwise_ends_the_run_with_its_name(
    copies: list[Path], tmp_path: Path
) -> None:
    scans = scanned(copies)
    other = copies[1] / "b.melody.wav"
    changed(other, copies[0] / "b.melody.wav")
    found, _ = melodies_found(scans, tmp_path / "cache of 1")
    refused(found, "b.wav on host-1: its melody b.melody.wav is unreadable: changed since it was inspected", "host-0")
    write_clip(other, seed=8, seconds=2)
    found, store = melodies_found(scans, tmp_path / "cache of 2")
    refused(found, "the melody of b.wav on host-1: has 32,0", "1 file(s)")
    assert store.keys() == set()  # nothing was begun
    other.unlink()
    refused(melodies_found(scans, tmp_path / "cache of 3")[0], "the melody of b.wav on host-1: cannot be opened")
    (copies[1] / "d.wav").unlink()
    refused(melodies_found(scans, tmp_path / "cache of 3")[0], "d.wav on host-1: cannot be opened")


def test_a_melody_that_failed_everywhere_is_the_fate_of_its_clip_for_all(copies: list[Path], tmp_path: Path) -> None:
    scans = scanned(copies)
    for folder in copies:
        write_clip(folder / "b.melody.wav", seed=99, seconds=3)  # since the folder was looked at
    found, store = melodies_found(scans, tmp_path / "cache")
    for scan, fates in found:
        assert sorted(scan.columns["path"]) == ["a.wav", "c.wav", "d.wav"] and fates.keys() == {"b.wav"}
        assert fates["b.wav"].fate == "melody unusable" and "its melody b.melody.wav is unread" in fates["b.wav"].detail
    assert found[0] == (found[0][0], found[1][1]) and len(store.keys()) == 3


def test_codes_of_a_clip_do_not_ask_for_its_melody_file(copies: list[Path], tmp_path: Path) -> None:
    scans, source = scanned(copies), open_model("debug-melody")
    identity = source.codec_identity()
    for name in ("a.melody.wav", "b.melody.wav"):
        os.unlink(copies[1] / name)
    store = cache.code_store(tmp_path / "cache", identity, 1)

    def fill(rank: int, peers: Peers) -> Any:
        return with_codes(
            scans[rank], store, lambda: load_codec(source), peers, sample_rate_hz=source.sample_rate_hz, views=1,
            channels=1, device=CPU,
        )  # fmt: skip

    found = on_each_rank(fill, 2)
    assert [(len(scan.columns["path"]), fates) for scan, fates in found] == [(4, {}), (4, {})]
    write_clip(copies[1] / "b.wav", seed=1, seconds=3)
    store = cache.code_store(tmp_path / "other", identity, 1)
    refused(on_each_rank(fill, 2), "b.wav on host-1: has 48,0")
