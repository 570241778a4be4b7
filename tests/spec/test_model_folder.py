"""A local model is found where it lies, also in a folder of the Hugging Face cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.errors import ModelError
from trainer.spec.model_folder import model_folder
from trainer.spec.shapes import shape_of

NAME = "models--facebook--musicgen-small"
OLD, NEW = 40 * "a", 40 * "b"


def cached(hub: Path, *snapshots: str, main: str | None = None) -> Path:
    """A folder as huggingface_hub lays it out: blobs, refs/main with a commit, and a snapshot of each commit."""
    folder = hub / NAME
    (folder / "blobs").mkdir(parents=True)
    (folder / "snapshots").mkdir()
    for commit in snapshots:
        (folder / "snapshots" / commit).mkdir()
    if main is not None:
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(main)
    return folder


def test_of_a_cache_folder_the_snapshot_of_main_is_taken(tmp_path: Path) -> None:
    folder = cached(tmp_path, OLD, NEW, main=OLD)
    assert model_folder(str(folder)) == model_folder(str(folder / "snapshots")) == folder / "snapshots" / OLD
    assert model_folder(str(folder / "snapshots" / NEW)) == folder / "snapshots" / NEW


def test_without_a_branch_the_only_snapshot_is_taken_and_of_several_none(tmp_path: Path) -> None:
    folder = cached(tmp_path, NEW)
    assert model_folder(str(folder)) == folder / "snapshots" / NEW
    (folder / "snapshots" / OLD).mkdir()
    with pytest.raises(ModelError, match=f"2 snapshots to take: give one, such as .*{OLD}"):
        model_folder(str(folder))


def test_a_cache_folder_without_a_snapshot_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="without a snapshot: fetch it by `hf download facebook/musicgen-small`"):
        model_folder(str(cached(tmp_path, main=OLD)))


def test_other_folders_are_themselves_and_what_is_none_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model/snapshots").mkdir(parents=True)
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_folder("~/model") == tmp_path / "model"  # a model of a user, with a folder of that name in it
    assert model_folder(str(tmp_path / "model/snapshots")) == tmp_path / "model/snapshots"
    assert model_folder("small") is None


def test_a_dry_run_knows_the_size_of_a_cached_model_by_its_folder(tmp_path: Path) -> None:
    folder = cached(tmp_path, NEW, main=NEW)
    config = {"model_type": "musicgen", "decoder": {"num_hidden_layers": 3}, "text_encoder": {"d_model": 768}}
    (folder / "snapshots" / NEW / "config.json").write_text(json.dumps(config))
    assert shape_of(str(folder)).layers == 3
