"""Data sets of the hub, from a server on this machine that speaks its protocol."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest

from tests.audio_files import write_clip
from tests.data.hub_server import Hub, asked_by_this_process, serving
from tests.data.table_files import rows_of, write_parquet
from trainer.data import hub_dataset
from trainer.data.hub_dataset import HubDataset, fetch, find_dataset, folder_of
from trainer.data.split_files import configurations_of, files_of_split, missing_shards, split_of
from trainer.errors import ConfigError, DataError, StorageError
from trainer.spec.dataset_path import is_hub_id

FIRST, SECOND = "a" * 40, "b" * 40
ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with asked_by_this_process(tmp_path / "hub_cache", monkeypatch) as hub:
        monkeypatch.chdir(tmp_path)
        yield hub


def find(repo: str = "user/music", **how: Any) -> HubDataset:
    return find_dataset(repo, **({"revision": None, "config": None, "split": "train", "flag": "--dataset"} | how))


def tables(folder: Path) -> Path:
    write_parquet(folder / "data/train-00000-of-00002.parquet", rows_of([1, 2]))
    write_parquet(folder / "data/train-00001-of-00002.parquet", rows_of([3]))
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows_of([4]))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Music\n")
    return folder


def test_the_files_of_the_split_are_fetched_once_and_no_others(hub: Hub, tmp_path: Path) -> None:
    hub.add("user/music", tables(tmp_path / "made"), FIRST)
    found = find()
    assert (found.revision, found.files) == (FIRST, tuple(f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)))
    assert found.size_bytes == sum((tmp_path / "made" / name).stat().st_size for name in found.files)
    fetch(found, "--dataset")
    for name in found.files:
        assert (folder_of(found) / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    assert not (folder_of(found) / "data/test-00000-of-00001.parquet").exists()
    hub.asked.clear()
    fetch(found, "--dataset")
    assert hub.asked == []


def test_a_revision_is_a_branch_or_a_commit(hub: Hub, tmp_path: Path) -> None:
    hub.add("user/music", tables(tmp_path / "old"), FIRST)
    hub.add("user/music", tables(tmp_path / "new"), SECOND)
    hub.add("user/music", tmp_path / "old", FIRST, branch="v1")
    assert [find(revision=revision).revision for revision in (None, "v1", FIRST)] == [SECOND, FIRST, FIRST]
    with pytest.raises(DataError, match="has no revision v2: --dataset_revision takes"):
        find(revision="v2")


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (None, "no data set of this name, or it is private: check the name, or log in with `hf auth login`, or set"),
        ((403, "GatedRepo"), "asks for consent: agree at "),
        ((403, ""), r"refuses to hand it out \(HTTP 403\): log in"),
        ((404, "RepoNotFound"), "no data set of this name"),
        ((418, ""), "the hub failed"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words_that_name_both_readings(
    hub: Hub, refused: tuple[int, str] | None, words: str
) -> None:
    if refused is not None:
        hub.refused["user/music"] = refused
    with pytest.raises(DataError, match=words) as raised:
        find()
    assert "--dataset user/music: there is no folder user/music in " in str(raised.value)


def test_a_hub_that_cannot_be_reached_leaves_the_folder_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    Path("user").mkdir()
    with pytest.raises(DataError, match=r"user is there, and has no music.*cannot be reached") as raised:
        find()
    assert "there is no folder user/music in " in str(raised.value)


def test_offline_the_cache_serves_and_what_it_lacks_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("user/music", tables(tmp_path / "made"), FIRST)
    found = find()
    fetch(found, "--dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    # README.md was read to choose the files, and main was asked for: both are in the cache.
    assert find() == found
    fetch(found, "--dataset")
    (folder_of(found) / found.files[1]).unlink()
    with pytest.raises(DataError, match=r"lacks data/train-00001-of-00002.parquet of"):
        find()
    with pytest.raises(DataError, match=r"no folder user/other in .*HF_HUB_OFFLINE is set.*hf download user/other"):
        find("user/other")
    assert hub.asked == []


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("user/music", tables(tmp_path / "made"), FIRST)
    found = find()
    usage = hub_dataset.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hub_dataset.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="make room, set HF_HOME"):
        fetch(found, "--dataset")
    assert not any("resolve" in path and "parquet" in path for _, path in hub.asked)


def test_a_folder_of_sounds_is_fetched_with_its_captions(hub: Hub, tmp_path: Path) -> None:
    for name in ("train/a", "train/test drive", "test/c"):
        write_clip(tmp_path / f"made/{name}.wav", "caption")
    (tmp_path / "made/train/metadata.csv").write_text("file_name,text\n")
    (tmp_path / "made/README.md").write_text("# x")
    hub.add("user/music", tmp_path / "made", FIRST)
    names = ("a.txt", "a.wav", "metadata.csv", "test drive.txt", "test drive.wav")
    assert find().files == tuple(f"train/{name}" for name in names)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/x.tar").write_bytes(b"x")
    hub.add("user/odd", tmp_path / "odd", FIRST)
    with pytest.raises(DataError, match=r"neither .parquet files nor sound files .*its files: .tar"):
        find("user/odd")


README = """---
configs:
- config_name: short
  data_files:
  - split: train
    path: "a/*.parquet"
  - split: test
    path: ["b/x.parquet", "c/**"]
- config_name: long
  data_dir: deep
  data_files: "*.parquet"
---
"""
NAMES = ("a/1.parquet", "a/sub/2.parquet", "b/x.parquet", "c/d/e.parquet", "deep/y.parquet")


def test_the_readme_says_which_files_a_configuration_has() -> None:
    configurations = configurations_of(README)
    chosen = {
        (config, split): files_of_split(NAMES, split, config=config, configurations=configurations)
        for config, split in (("short", "train"), ("short", "test"), ("long", "train"))
    }
    assert chosen == {
        ("short", "train"): ("a/1.parquet",), ("short", "test"): ("b/x.parquet", "c/d/e.parquet"),
        ("long", "train"): ("deep/y.parquet",),
    }  # fmt: skip
    for config, split, words in ((None, "train", "several configurations: .*short, long"),
                                 ("wide", "train", "no such configuration; it has short, long"),
                                 ("long", "test", "no such split; it has train")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            files_of_split(NAMES, split, config=config, configurations=configurations)
    for broken in ("", "---\nconfigs: 3\n---\n", "---\n: [\n---\n", "---\nconfigs:\n- 1\n- config_name: x\n---\n"):
        assert configurations_of(broken) == ()


def test_names_say_their_split() -> None:
    splits = {
        "data/train-00000-of-00001.parquet": "train", "all.parquet": "train", "my_dev_set.parquet": "validation",
        "en/bonus-00000-of-00003.parquet": "bonus", "test/data-00000-of-00001.arrow": "test", "val/x.wav": "validation",
    }  # fmt: skip
    assert {name: split_of(name) for name in splits} == splits
    assert split_of("test drive.wav", by_folder=True) == "train"
    of_three = [f"d/x-0000{number}-of-00003.parquet" for number in range(3)]
    assert missing_shards(of_three[::2]) == of_three[1:2]
    assert files_of_split(["de/x.parquet", "en/x.parquet"], "train", config="en") == ("en/x.parquet",)


def test_a_path_that_exists_wins_and_only_a_name_of_two_parts_is_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/music").mkdir(parents=True)
    assert is_hub_id("user/music") and is_hub_id("user/music.v2_x")
    others = ("here/music", "./user/music", "/user/music", "../music", "user/music/", "a/b/c", "music", "a b/c", "~/x")
    assert not any(map(is_hub_id, others))


STARTS = ("--max_steps", "1", "--segment_seconds", "1", "--model_id", "debug", "--code_views", "1", "--device", "cpu")


def launch(tmp_path: Path, hub_url: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *STARTS, *flags], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | variables | environment, timeout=200,
    )  # fmt: skip


@pytest.mark.full
def test_a_run_trains_on_a_data_set_of_the_hub_and_resumes_on_its_commit(tmp_path: Path) -> None:
    with serving() as hub:
        hub.add("user/music", tables(tmp_path / "made"), FIRST)
        flags = ("--dataset", "user/music", "--validation", "user/music", "--validation_split", "test")
        done = launch(tmp_path, hub.url, *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"data set user/music of the hub, commit {FIRST}: 2 file(s)" in done.stdout
        recorded = json.loads((tmp_path / "models/hub_datasets.json").read_text())
        assert recorded["dataset"]["revision"] == recorded["validation"]["revision"] == FIRST
        write_parquet(tmp_path / "newer/data/train-00000-of-00001.parquet", rows_of([9]))
        write_parquet(tmp_path / "newer/data/test-00000-of-00001.parquet", rows_of([8]))
        hub.add("user/music", tmp_path / "newer", SECOND)
        again = launch(tmp_path, hub.url, *flags, "--max_steps", "2")
        assert again.returncode == 0 and FIRST in again.stdout, again.stdout + again.stderr
        offline = launch(tmp_path, hub.url, *flags, "--max_steps", "3", HF_HUB_OFFLINE="1")
        assert not any(f"{SECOND}/data" in path for _, path in hub.asked)
        assert offline.returncode == 0, offline.stdout + offline.stderr
        missing = launch(tmp_path, hub.url, "--dataset", "user/none", "--output_dir", "other")
        assert missing.returncode == 3 and "there is no folder user/none" in missing.stderr, missing.stderr


@pytest.mark.full
def test_two_processes_train_on_a_data_set_that_one_of_them_fetches(tmp_path: Path) -> None:
    with serving() as hub:
        hub.add("user/music", tables(tmp_path / "made"), FIRST)
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
             "--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no", str(ROOT / "launch.py"),
             *STARTS, "--dataset", "user/music"],
            cwd=tmp_path, capture_output=True, text=True, env=os.environ | variables, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        gets = [path for method, path in hub.asked if method == "GET" and path.endswith(".parquet")]
        assert len(gets) == len(set(gets)) == 2
        assert sum(path == "/api/datasets/user/music" for _, path in hub.asked) == 1
