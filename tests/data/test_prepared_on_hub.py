"""A prepared folder that was pushed to the hub is a data set there, and is trained on as the folder itself is."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import prepare_dataset
import pytest
import torch

from tests.audio_files import write_clip
from tests.data.hub_server import Hub, asked_by_this_process, serving
from tests.data.test_prepared import CPU, batches, edit, make, music, opened, source
from tests.data.test_prepared_upload import Hub as PushHub
from tests.runs import command, environ, launch_here, metrics
from trainer import preflight
from trainer.data import dataset, prepared
from trainer.data.hub_dataset import fetch
from trainer.data.prepared_upload import push
from trainer.errors import EXIT_DATA, EXIT_USAGE, ConfigError, DataError
from trainer.flags.config import Config
from trainer.wiring import data_settings, find_hub_datasets

COMMIT, TABLE = "c" * 40, prepared.TABLE


def pushed(folder: Path, to: Path, *, former: dict[str, bytes] | None = None) -> Path:
    """What a hub that held the files `former` has, as files in `to`, once the prepared folder was pushed to it."""
    with PushHub() as server:
        server.files = dict(former or {})
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            push(prepared.open_prepared(folder), "user/set", private=True, endpoint=server.address)
        finally:
            server.shutdown()
            thread.join()
    for name, content in server.files.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, prepared/ made of it, and set/ with the files that a hub had after a push."""
    root = tmp_path_factory.mktemp("made")
    make(music(root / "data", 1), root / "prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", "hf_test")
        pushed(root / "prepared", root / "set", former={"extra/notes.parquet": b"mine", ".gitattributes": b"*.arrow"})
    return root


@pytest.fixture
def hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a copy of that set as user/set, which tests may change: Path("set")."""
    with asked_by_this_process(tmp_path / "hub_cache", monkeypatch) as hub:
        monkeypatch.chdir(tmp_path)
        hub.add("user/set", shutil.copytree(made / "set", tmp_path / "set"), COMMIT)
        yield hub


def config_of(**flags: Any) -> Config:
    return Config(**({"dataset_path": "user/set", "code_views": 2, "model_id": "debug", "cache_dir": "none"} | flags))


def read(**flags: Any) -> dataset.Dataset:
    """What a run makes of user/set."""
    config = config_of(**flags)
    found = find_hub_datasets(config, {})
    preflight.check_prepared(config, found)
    for name, one in found.items():
        fetch(one, f"--{name}")
    return dataset.prepare(data_settings(config, found.get("dataset"), found.get("validation")), source(), CPU)


def test_a_pushed_set_gives_the_clips_and_tensors_of_the_folder_and_of_it_no_other_file_is_fetched(hub, made, tmp_path):
    first, second = opened(made / "prepared", tmp_path / "cache"), read()
    assert (first.digest, first.train.names) == (second.digest, second.train.names)
    for one, other in zip(batches(first), batches(second), strict=True):
        assert torch.equal(one, other)
    answered = [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]
    fetched = {path.partition(f"/{COMMIT}/")[2] for path in answered}
    assert fetched == {"prepared.json", *prepared.open_prepared(made / "prepared").about.files}
    assert not Path("none").exists()


def test_a_pushed_set_validates_a_run_and_is_read_without_a_network_once_it_was_fetched(hub, tmp_path, monkeypatch):
    write_clip(tmp_path / "own/a.wav", "own", seed=50, seconds=0.6)
    data = read(dataset_path="own", validation="user/set", cache_dir="cache")
    assert list(data.train.names) == ["a.wav"] and data.validation is not None and len(data.validation.names) == 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert read().clips == 3 and hub.asked == []
    [part] = Path("hub_cache").glob("*/snapshots/*/codes/part-00000.arrow")
    part.unlink()
    with pytest.raises(DataError, match=r"the hub's cache lacks codes/part-00000.arrow of it\. Where there"):
        read()


@pytest.mark.parametrize(
    "flags,words",
    [
        ({"code_views": 4}, "--code_views 4: the prepared folder .* lacks it, since it was made with --code_views 2"),
        ({"caption_lines": True}, "--caption_lines 1: .* lacks it"),
        ({"dataset_split": "test"}, "--dataset_split test has no effect on the prepared folder user/set"),
        ({"dataset_config": "clips"}, "--dataset_config clips has no effect"),
        ({"audio_column": "audio"}, "--audio_column audio has no effect"),
        (
            {"validation": "user/set", "validation_split": "test"},
            "--validation_split test has no effect on the prepared folder user/set",
        ),
    ],
)
def test_what_a_pushed_set_lacks_and_what_has_no_effect_on_it_is_refused_before_it_is_fetched(hub, flags, words):
    with pytest.raises(ConfigError, match=words):
        read(**flags)
    assert not any(path.endswith((".arrow", ".parquet")) for _, path in hub.asked)


def test_a_pushed_set_of_another_version_or_with_a_file_missing_is_refused_with_its_name_before_it_is_fetched(hub):
    edit(Path("set"), version=2)
    with pytest.raises(DataError, match=r"--dataset user/set: .* is of version 2, and this program reads 1"):
        read()
    shutil.rmtree("hub_cache")
    edit(Path("set"), version=1, files={**json.loads(Path("set/prepared.json").read_text())["files"], TABLE: 1})
    with pytest.raises(DataError, match=r"set is incomplete: clips.parquet has [\d,]+ bytes and not 1\. Push it again"):
        read()
    shutil.rmtree("hub_cache")
    Path("set", TABLE).unlink()
    with pytest.raises(DataError, match=r"set is incomplete: it lacks clips.parquet\. Push it again"):
        read()
    shutil.rmtree("hub_cache")
    Path("set/prepared.json").unlink()
    hub.add("user/other", shutil.copytree(Path("set"), Path("other")), COMMIT)
    Path("other", TABLE).write_bytes(b"")
    with pytest.raises(DataError, match=r"--dataset user/other: .*prepared.json is missing"):
        read(dataset_path="user/other")
    assert not any(path.endswith((".arrow", ".parquet")) for _, path in hub.asked)


TRAINED = ("--lr", "1e-3", "--warmup_steps", "1", "--batch_size", "1", "--grad_acc", "1", "--code_views", "2")


def test_a_data_set_of_the_hub_is_prepared_by_its_name_as_its_files_are_and_a_prepared_one_is_not(hub, made, capsys):
    shutil.copytree(made / "data", Path("data/train"))
    write_clip(Path("data/test/other.wav"), "other", seed=77, seconds=0.6)
    hub.add("user/music", Path("data"), COMMIT, branch="v1")
    make(Path("user/music"), Path("from_hub"), "--dataset_revision", "v1")
    assert f"data set user/music of the hub, commit {COMMIT}" in (said := capsys.readouterr().out)
    assert "on it, here or elsewhere: python launch.py --dataset from_hub --code_views 2 --model_id debug\n" in said
    assert opened(Path("from_hub"), Path("none")).digest == opened(made / "data", made / "cache").digest
    given = ["user/set", "--output", "new", "--model_id", "debug"]
    assert prepare_dataset.main(given) == EXIT_USAGE
    assert "user/set is a prepared folder already" in capsys.readouterr().err
    assert prepare_dataset.main(["user/none", *given[1:]]) == EXIT_DATA
    assert f"there is no folder user/none in {Path.cwd()}; and the hub has no" in capsys.readouterr().err
    assert not any(path.endswith(".arrow") for _, path in hub.asked) and not Path("new").exists()


@pytest.mark.full
def test_the_losses_of_a_run_on_a_pushed_set_are_those_of_the_folder(made, tmp_path):
    """And a checkpoint of the one goes on with the other."""
    flags = (*TRAINED, "--lr_schedule", "constant", "--segment_seconds", "1")
    here, there = tmp_path / "here", tmp_path / "there"
    for root in (here, there):
        root.mkdir()
    launch_here(here, *flags, "--dataset", str(made / "prepared"), "--max_steps", "6")
    with serving() as hub:
        hub.add("user/set", made / "set", COMMIT)
        for steps in ("4", "6"):
            argv = command(there, *flags, "--dataset", "user/set", "--cache_dir", "none", "--max_steps", steps)
            done = subprocess.run(
                argv, cwd=there, capture_output=True, text=True, timeout=200,
                env=environ(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="0"),
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout and not (there / "none/codes").exists()
    assert len(metrics(here)) == 6
    for key in ("loss", "grad_norm"):
        assert metrics(here, key) == metrics(there, key)
