"""A data set of the hub that is larger than the disk: what is left of it is what it would be if it had fitted."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch

from tests.audio_files import noise, write_clip
from tests.data.hub_server import Hub, asked_by_this_process, serving
from tests.data.table_files import AUDIO, rows_of, sound_bytes, write_parquet
from tests.data.test_shared_scan import on_each_rank
from tests.opens import counted_opens
from tests.runs import metrics
from trainer.data import cache, dataset, hub_parts, reading_in_parts
from trainer.data.audio_fault import AudioFault
from trainer.data.hub_dataset import HubDataset, fetch, find_dataset, folder_of
from trainer.data.hub_parts import PARTS, alone_with, next_part, place_of, stand_ins_of, why_in_parts
from trainer.data.peers import Alone, Peers
from trainer.data.stand_ins import StandIns
from trainer.errors import ConfigError, DataError, StorageError
from trainer.flags.config import Config
from trainer.model.source import Source, open_model
from trainer.model.stereo import in_stereo
from trainer.report import rows as report_rows
from trainer.wiring import data_settings, report_settings

COMMIT, LATER = "a" * 40, "b" * 40
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
REAL_USAGE = shutil.disk_usage


def bytes_below(folder: Path) -> int:
    """Of all files in a folder; what goes away meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


class Disk:
    """The disk of the hub's cache, with so much room in all; `peak` is the most that lay on it."""

    def __init__(self, cache: Path):
        self.cache, self.size, self.peak = cache, 1 << 40, 0

    def usage(self, path: Any) -> Any:
        if Path(path) != self.cache:
            return REAL_USAGE(path)
        return REAL_USAGE("/")._replace(free=self.size - bytes_below(self.cache))

    def look(self) -> None:
        self.peak = max(self.peak, bytes_below(self.cache))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with asked_by_this_process(tmp_path / "hub_cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(tmp_path / "hub_cache")
    monkeypatch.setattr(shutil, "disk_usage", disk.usage)
    encode = cache.fill_codes

    def watched(*args: Any, **how: Any) -> Any:
        disk.look()
        return encode(*args, **how)

    monkeypatch.setattr(cache, "fill_codes", watched)
    return disk


@functools.cache
def source() -> Source:
    return open_model("debug")


def find() -> HubDataset:
    return find_dataset("user/music", revision=None, config=None, split="train", flag="--dataset")


def config(cache_dir: Path, **flags: Any) -> Config:
    return Config(dataset_path="user/music", cache_dir=str(cache_dir), **{"code_views": 1, "min_seconds": 0.2, **flags})


def opened(cache_dir: Path, found: HubDataset, **flags: Any) -> dataset.Dataset:
    settings = data_settings(config(cache_dir, **flags), found)
    reading_in_parts.read_all({"dataset": found}, settings, source(), CPU, Alone())
    return dataset.prepare(settings, source(), CPU)


def in_parts(cache_dir: Path, found: HubDataset, **flags: Any) -> dataset.Dataset:
    return opened(cache_dir, replace(found, in_parts=True), **flags)


def why(found: HubDataset, cache_dir: Path) -> str:
    return why_in_parts({"dataset": found}, cache_dir).get("dataset", "")


def fetched(hub: Hub) -> Counter[str]:
    """How often each file but the README was handed out."""
    return Counter(
        path.partition(f"{COMMIT}/")[2] for method, path in hub.asked if method == "GET" and f"resolve/{COMMIT}" in path
    )


COLUMNS = ("path", "caption", "seconds", "sample_rate_hz", "channels", "content", "caption_source", "caption_fields")


def assert_equal(parts: dataset.Dataset, whole: dataset.Dataset) -> None:
    """That both have the same clips in the same order, codes, texts and fates."""
    assert (parts.digest, parts.seconds, parts.clips) == (whole.digest, whole.seconds, whole.clips)
    for column in COLUMNS:
        assert parts.table[column] == whole.table[column], column
    assert [(fate.path, fate.fate) for fate in parts.fates] == [(fate.path, fate.fate) for fate in whole.fates]
    pairs = [(parts.train, whole.train)]
    if parts.validation is not None and whole.validation is not None:
        pairs.append((parts.validation, whole.validation))
    for one, other in pairs:
        assert one.names == other.names and one.captions == other.captions
        assert np.array_equal(one.codes.frames, other.codes.frames)
        for clip, frames in enumerate(one.codes.frames[:, 0]):
            assert np.array_equal(*(found.codes.crop(clip, 0, 0, frames) for found in (one, other)))


def write_odd_tables(folder: Path) -> None:
    """Five shards: a sound that two have, a silent one, null captions, sounds without bytes, and one shard damaged."""
    for shard in range(4):
        write_parquet(folder / f"data/train-{shard:05d}-of-00005.parquet", rows_of([2 * shard, 2 * shard + 1]))
    audio = [
        {"bytes": sound_bytes(0), "path": "0.wav"}, {"bytes": b"no sound", "path": "text.wav"},
        {"bytes": None, "path": "absent.wav"}, {"bytes": sound_bytes(20, 0.1), "path": None},
        {"bytes": sound_bytes(21), "path": "21.wav"}, {"bytes": sound_bytes(0, form="FLAC"), "path": "0.flac"},
    ]  # fmt: skip
    texts = ["caption 0", "x", "y", "short", None, "caption 0"]
    rest = pa.table({"audio": pa.array(audio, AUDIO), "text": texts, "count": [1, 2, 3, 4, 5, 6]})
    write_parquet(folder / "data/train-00002-of-00005.parquet", rest, group_rows=2)
    (folder / "data/train-00004-of-00005.parquet").write_bytes(b"PAR1 cut off")


def write_odd_files(folder: Path) -> None:
    """Sound files whose captions are in .txt files, in a metadata.csv and in a .json, and some that are no sound."""
    for seed in range(6):
        write_clip(folder / f"music/{seed}.wav", f"caption {seed}" if seed < 3 else None, seed=seed)
    write_clip(folder / "again.wav", "caption 0", seed=0)
    (folder / "music/metadata.csv").write_text("file_name,text\n3.wav,of the table\nabsent.wav,of none\n")
    (folder / "music/4.json").write_text('{"caption": "of the json"}')
    (folder / "music/broken.mp3").write_bytes(b"no sound")
    (folder / "music/broken.txt").write_text("of none")


@pytest.mark.parametrize("write", [write_odd_tables, pytest.param(write_odd_files, marks=pytest.mark.full)])
def test_what_was_read_in_parts_is_what_the_whole_set_is(hub: Hub, disk: Disk, tmp_path: Path, write: Any) -> None:
    write(tmp_path / "made")
    hub.add("user/music", tmp_path / "made", COMMIT)
    found = find()
    # What a folder of the same files gives, without a hub.
    for name in found.files:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "made" / name, tmp_path / "copy" / name)
    flags = {"validation": "0.5", "seed": 2}
    whole_config = Config(dataset_path=str(tmp_path / "copy"), cache_dir=str(tmp_path / "whole"), code_views=1,
                          min_seconds=0.2, **flags)  # fmt: skip
    whole = dataset.prepare(data_settings(whole_config), source(), CPU)

    disk.size = max(found.sizes) * 2
    assert found.size_bytes > disk.size and "are to be fetched" in why(found, tmp_path / "cache")
    hub.asked.clear()
    parts = in_parts(tmp_path / "cache", found, **flags)
    assert_equal(parts, whole)
    assert fetched(hub) == dict.fromkeys(found.files, 1)
    assert max(found.sizes) <= disk.peak <= disk.size
    assert bytes_below(disk.cache) == 0 and not (disk.cache / PARTS).exists()


@pytest.mark.full
def test_a_stereo_model_reads_a_set_again_that_a_mono_one_read_in_parts(
    hub: Hub, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its codes are others; and a sound that is silent in mono alone is a clip of it."""
    write_odd_files(tmp_path / "made")
    write_clip(tmp_path / "made/music/sides.wav", "caption of both sides")
    side = noise(0.5)
    soundfile.write(tmp_path / "made/music/sides.wav", np.stack([side, -side], axis=1), 8_000)
    hub.add("user/music", tmp_path / "made", COMMIT)
    found, stereo = find(), in_stereo(source())
    shutil.copytree(tmp_path / "made", tmp_path / "copy")
    whole_config = Config(dataset_path=str(tmp_path / "copy"), cache_dir=str(tmp_path / "whole"), code_views=1,
                          min_seconds=0.2)  # fmt: skip
    whole = dataset.prepare(data_settings(whole_config), stereo, CPU)
    mono = in_parts(tmp_path / "cache", found)
    hub.asked.clear()
    monkeypatch.setattr(f"{__name__}.source", lambda: stereo)
    parts = in_parts(tmp_path / "cache", found)
    assert_equal(parts, whole)
    assert parts.train.codes.codebooks == 8 and parts.clips == mono.clips + 1
    assert "music/sides.wav" in fetched(hub)
    hub.asked.clear()
    assert_equal(in_parts(tmp_path / "cache", found), whole)
    assert not any(name.endswith(".wav") for name in fetched(hub))


@pytest.mark.full
def test_a_second_run_fetches_nothing_encodes_nothing_and_opens_no_sound(
    hub: Hub, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_odd_files(tmp_path / "made")
    hub.add("user/music", tmp_path / "made", COMMIT)
    found = find()
    disk.size = max(found.sizes) * 2
    first = in_parts(tmp_path / "cache", found)
    hub.asked.clear()
    disk.size = 1 << 40  # there would be room now
    assert why(found, tmp_path / "cache") == "parts of this commit were read before"
    shutil.move(tmp_path / "cache", tmp_path / "moved")  # and wherever the cache lies
    monkeypatch.setattr(reading_in_parts, "load_codec", lambda _: pytest.fail("a codec is loaded"))
    monkeypatch.setattr(dataset, "load_codec", lambda _: pytest.fail("a codec is loaded"), raising=False)
    folder = place_of(replace(found, in_parts=True), tmp_path / "moved") / "music"
    with counted_opens(folder) as opens:
        second = in_parts(tmp_path / "moved", found)
    assert_equal(second, first)
    assert hub.asked == []
    assert "metadata.csv" in opens and not [name for name in opens if name.endswith((".wav", ".mp3"))]


class KilledError(Exception):
    """What stops a run in these tests."""


@pytest.mark.full
@pytest.mark.parametrize("moment", ["fetched", "inspected", "encoded"])
def test_a_run_that_is_stopped_goes_on_where_it_was_and_fetches_nothing_twice(
    hub: Hub, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    for shard in range(4):
        write_parquet(tmp_path / f"made/data/train-{shard:05d}-of-00004.parquet", rows_of([shard, shard + 10]))
    hub.add("user/music", tmp_path / "made", COMMIT)
    found = find()
    disk.size = int(max(found.sizes) * 1.5)
    owner = reading_in_parts._Reader
    name = {"fetched": "_take_in", "inspected": "_encode", "encoded": "_encode"}[moment]
    step, counts = getattr(owner, name), []

    def stopping(self: Any, part: Sequence[str]) -> None:
        counts.append(part)
        if moment == "encoded" or len(counts) < 2:
            step(self, part)
        if len(counts) == 2:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(KilledError):
            in_parts(tmp_path / "cache", found)
    assert len(fetched(hub)) == 2
    again = in_parts(tmp_path / "cache", found)
    assert fetched(hub) == dict.fromkeys(found.files, 1)
    assert again.clips == 8 and disk.peak <= disk.size and bytes_below(disk.cache) == 0


@pytest.mark.full
def test_what_the_hubs_cache_had_before_is_read_there_and_stays(hub: Hub, disk: Disk, tmp_path: Path) -> None:
    for shard in range(3):
        write_parquet(tmp_path / f"made/data/train-{shard:05d}-of-00003.parquet", rows_of([shard]))
    hub.add("user/music", tmp_path / "made", COMMIT)
    found = find()
    fetch(replace(found, files=found.files[1:2], sizes=found.sizes[1:2]), "--dataset")
    before = bytes_below(disk.cache)
    hub.asked.clear()
    assert in_parts(tmp_path / "cache", found).clips == 3
    assert fetched(hub) == {found.files[0]: 1, found.files[2]: 1}
    assert bytes_below(disk.cache) == before
    assert (folder_of(found) / found.files[1]).read_bytes() == (tmp_path / "made" / found.files[1]).read_bytes()


@pytest.mark.full
def test_codes_of_another_kind_are_a_reading_of_their_own_and_other_captions_are_none(
    hub: Hub, disk: Disk, tmp_path: Path
) -> None:
    table = rows_of([1, 2], other=["of the other column", "and another"])
    write_parquet(tmp_path / "made/data/train-00000-of-00001.parquet", table)
    hub.add("user/music", tmp_path / "made", COMMIT)
    found = find()
    assert in_parts(tmp_path / "cache", found).clips == 2
    hub.asked.clear()
    captions = in_parts(tmp_path / "cache", found, caption_column="other").table["caption"]
    assert sorted(captions) == ["and another", "of the other column"] and not fetched(hub)
    louder = in_parts(tmp_path / "cache", found, loudness=-14.0)
    assert louder.clips == 2 and fetched(hub) == dict.fromkeys(found.files, 1)


def of_sizes(**sizes: int) -> HubDataset:
    names = {name.replace("_", "."): count for name, count in sizes.items()}
    return HubDataset(
        repo="user/music", revision=COMMIT, asked="main", files=tuple(names), sizes=tuple(names.values()),
        size_bytes=sum(names.values()),
    )  # fmt: skip


def test_a_part_is_what_fits_with_all_captions_first(tmp_path: Path, hub: Hub) -> None:
    found = of_sizes(a_wav=40, b_txt=5, c_wav=40, d_wav=5, e_txt=5)
    assert next_part(found, found.files, {}, 100, "--dataset") == ["b.txt", "e.txt", "a.wav", "c.wav"]
    assert next_part(found, found.files, {"a.wav": tmp_path}, 100, "--dataset")[-2:] == ["c.wav", "d.wav"]
    assert next_part(found, ["c.wav", "d.wav"], {}, 40, "--dataset") == ["c.wav"]  # nothing is left over, and it fits
    for waiting, free in ((["c.wav"], 39), (["b.txt", "e.txt", "a.wav"], 9)):
        with pytest.raises(StorageError, match="make room, or set HF_HOME"):
            next_part(found, waiting, {}, free, "--dataset")


def test_a_clip_and_its_melody_are_in_one_part(tmp_path: Path, hub: Hub) -> None:
    found = of_sizes(a_melody_wav=40, ab_wav=30, a_wav=40, b_melody_wav=5)
    assert next_part(found, found.files, {}, 100, "--dataset") == ["a.melody.wav", "a.wav"]
    assert next_part(found, found.files[1:], {}, 100, "--dataset") == ["ab.wav", "a.wav", "b.melody.wav"]
    with pytest.raises(StorageError, match=r"its next part, a\.melody\.wav, a\.wav, takes 80 bytes"):
        next_part(found, found.files, {}, 79, "--dataset")


def test_melodies_of_a_data_set_read_in_parts_are_those_of_the_whole(hub: Hub, disk: Disk, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b", "c")):
        write_clip(tmp_path / "made" / f"{name}.wav", f"caption {name}", seed=seed)
    for seed, name in enumerate(("a", "c"), start=5):
        write_clip(tmp_path / "made" / f"{name}.melody.wav", seed=seed)
    hub.add("user/music", tmp_path / "made", COMMIT)
    found = find()
    of_folder = replace(config(tmp_path / "cache of the folder"), dataset_path=str(tmp_path / "made"))
    whole = dataset.prepare(data_settings(of_folder), source(), CPU)
    disk.size = 40_000 + bytes_below(tmp_path / "hub_cache")  # two sounds of 16 kB at once
    read = in_parts(tmp_path / "cache", found)
    assert read.digest == whole.digest and sum(map(bool, read.table["melody_content"])) == 2
    assert read.table["melody_content"] == whole.table["melody_content"]
    assert disk.peak < 40_000 + 16_000
    hub.asked.clear()
    assert in_parts(tmp_path / "cache", found).digest == whole.digest and not fetched(hub)


def test_what_needs_the_sounds_at_each_start_is_refused_with_its_reason(hub: Hub, tmp_path: Path) -> None:
    found = of_sizes(a_wav=40)
    with pytest.raises(ConfigError, match="--rehash 1 cannot be had of a data set"):
        hub_parts.check_flags("--dataset", found, rehash=True, template=None)
    with pytest.raises(ConfigError, match=r"tags inside its sounds \(title, genre\) are not kept"):
        hub_parts.check_flags("--dataset", found, rehash=False, template="{title}, {genre}, {folder}")
    hub_parts.check_flags("--dataset", found, rehash=False, template="{folder}")
    stand_ins = stand_ins_of(found, tmp_path)
    with alone_with(stand_ins):
        with pytest.raises(ConfigError, match="another run is reading the same data set"), alone_with(stand_ins):
            pass
        stand_ins.place("a.wav", tmp_path)
        settings = data_settings(config(tmp_path), replace(found, in_parts=True))
        with pytest.raises(DataError, match=r"a\.wav was not read yet: give the name of the data set"):
            dataset.prepare(replace(settings, captions=replace(settings.captions, no_label=True)), source(), CPU)


@pytest.mark.full
def test_the_page_says_why_it_plays_nothing(hub: Hub, tmp_path: Path) -> None:
    write_odd_files(tmp_path / "made")
    hub.add("user/music", tmp_path / "made", COMMIT)
    data = in_parts(tmp_path / "cache", find())
    rows = report_rows.rows_of(data.folders, report_settings(config(tmp_path)), tmp_path, None)
    sounds = [row for row in rows if row.path.endswith((".wav", ".mp3"))]
    assert len(sounds) == 8 and {(row.link, row.unplayed) for row in sounds} == {
        ("", "it was read in parts, and is not kept on this machine")
    }


SMALL_DISK = """
import os, shutil
real = shutil.disk_usage
def usage(path):
    if str(path) != os.environ["SMALL_CACHE"]:
        return real(path)
    used = sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)
    return real(path)._replace(free=int(os.environ["SMALL_SIZE"]) - used)
shutil.disk_usage = usage
"""
FLAGS = (
    *("--dataset", "user/music", "--validation", "user/music", "--validation_split", "test", "--model_id", "debug"),
    *("--max_steps", "3", "--segment_seconds", "1", "--code_views", "2", "--device", "cpu", "--batch_size", "2"),
)


def start(folder: Path, hub: Hub, *flags: str, size: int = 1 << 40, offline: bool = False) -> subprocess.Popen[str]:
    """launch.py in `folder`, where the disk of the hub's cache has `size` bytes."""
    (folder / "site").mkdir(parents=True, exist_ok=True)
    (folder / "site/sitecustomize.py").write_text(SMALL_DISK)
    variables = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "PYTHONPATH": f"{folder / 'site'}:{ROOT}",
        "SMALL_CACHE": str(folder / "hf/hub"), "SMALL_SIZE": str(size), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *flags, str(ROOT / "launch.py"), *FLAGS], cwd=folder, env=os.environ | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def output_of(run: subprocess.Popen[str]) -> str:
    output, _ = run.communicate(timeout=280)
    assert run.returncode == 0, output
    return output


def shards(folder: Path) -> int:
    """Four shards to train on and two to validate on; returns the largest one's bytes."""
    for shard in range(4):
        write_parquet(folder / f"data/train-{shard:05d}-of-00004.parquet", rows_of([2 * shard, 2 * shard + 1]))
    for shard in range(2):
        write_parquet(folder / f"data/test-{shard:05d}-of-00002.parquet", rows_of([20 + shard]))
    return max(path.stat().st_size for path in folder.rglob("*.parquet"))


class Asked(list[tuple[str, str]]):
    """What a hub was asked for; the process is killed when it begins to ask for a file."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.process = name, None

    def append(self, request: tuple[str, str]) -> None:
        super().append(request)
        if self.process is not None and request[1].endswith(self.name):
            self.process.send_signal(signal.SIGKILL)
            self.process = None


@pytest.mark.full
def test_a_run_on_a_set_larger_than_the_disk_has_the_losses_of_one_that_fits_though_it_was_killed(
    tmp_path: Path,
) -> None:
    with serving() as hub:
        largest = shards(tmp_path / "made")
        hub.add("user/music", tmp_path / "made", COMMIT)
        for name in ("whole", "parts"):
            (tmp_path / name).mkdir()
        assert "in parts" not in output_of(start(tmp_path / "whole", hub))
        hub.asked = asked = Asked("train-00002-of-00004.parquet")
        asked.process = killed = start(tmp_path / "parts", hub, size=int(1.5 * largest))
        killed.communicate(timeout=280)
        assert killed.returncode == -signal.SIGKILL
        said = output_of(start(tmp_path / "parts", hub, size=int(1.5 * largest)))
        assert "data set user/music of the hub is read in parts: parts of this commit were read before" in said
        assert "user/music, part 1: 1 file(s), " in said and "; 1 of 2 file(s) are done" in said
        assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
        validated = [metrics(tmp_path / name, "validation_loss") for name in ("parts", "whole")]
        assert validated[0] == validated[1] != {}
        names = [path.relative_to(tmp_path / "made").as_posix() for path in (tmp_path / "made").rglob("*.parquet")]
        assert fetched(hub) == dict.fromkeys(names, 1)
        assert bytes_below(tmp_path / "parts/hf/hub") == 0
        asked.clear()
        shutil.rmtree(tmp_path / "parts/models")
        output_of(start(tmp_path / "parts", hub, size=int(1.5 * largest), offline=True))
        assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole") and asked == []


@pytest.mark.full
def test_two_processes_read_a_set_in_parts_that_one_of_them_fetches(tmp_path: Path) -> None:
    with serving() as hub:
        largest = shards(tmp_path / "made")
        hub.add("user/music", tmp_path / "made", COMMIT)
        for name in ("whole", "parts"):
            (tmp_path / name).mkdir()
        two = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no",
               "--num_machines", "1", "--dynamo_backend", "no")  # fmt: skip
        output_of(start(tmp_path / "whole", hub, *two))
        hub.asked.clear()
        said = output_of(start(tmp_path / "parts", hub, *two, size=2 * largest))
        assert "kB are to be fetched, and the hub's cache" in said
        assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
        assert set(fetched(hub).values()) == {1} and len(fetched(hub)) == 6


@pytest.mark.full
def test_each_machine_fetches_a_part_for_itself_and_encodes_its_share(
    hub: Hub, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)
    for shard in range(3):
        write_parquet(tmp_path / f"made/data/train-{shard:05d}-of-00003.parquet", rows_of([shard, shard + 10]))
    hub.add("user/music", tmp_path / "made", COMMIT)
    found = replace(find(), in_parts=True)
    disk.size = max(found.sizes) * 2
    settings, opened = data_settings(config(tmp_path / "cache"), found), source()

    def on_a_rank(rank: int, peers: Peers) -> dataset.Dataset:
        reading_in_parts.read_all({"dataset": found}, settings, opened, CPU, peers)
        return dataset.prepare(settings, opened, CPU, peers)

    first, second = on_each_rank(on_a_rank, 2)
    assert first.clips == 6
    assert_equal(second, first)
    assert fetched(hub) == dict.fromkeys(found.files, 1)  # the two share a disk here
    assert bytes_below(disk.cache) == 0


def test_what_fails_while_it_is_encoded_stays_known_and_what_is_damaged_is_unknown(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    rows = [os.fsencode(tmp_path / "x.parquet") + b"\0row %d\0audio" % row for row in range(2)]
    silent, gone = AudioFault("silent", "it is"), AudioFault("truncated", "it was")
    stand_ins.keep(["x.parquet", "empty.parquet"], dict.fromkeys(rows, silent))
    stand_ins.keep_faults({rows[1]: gone})
    for found in (stand_ins, StandIns(tmp_path)):
        facts = found.facts_of(map(os.fsdecode, rows), rehash=False)
        assert [str(fault) for fault in facts.values()] == [str(silent), str(gone)]
    for path in stand_ins.kept.glob("facts-*.json"):
        path.write_bytes(path.read_bytes()[:-9])
    assert StandIns(tmp_path).names() == frozenset() and StandIns(tmp_path).lacks(rows[0])
