"""The best checkpoint stays, and nothing else does, whatever comes in whatever order, a kill included."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.synthetic import HEADER
from trainer.run import checkpoint as checkpoint_module
from trainer.run.best import mend_best
from trainer.run.checkpoint import FlatSlice, Saver, newest, rotate
from trainer.run.checkpoint_folders import complete_checkpoints, folder_name
from trainer.run.standing import Standing

FRESH = Standing(validated_on="clips", steps=100)


class Killed(BaseException):
    """Stands for kill -9: nothing handles it."""


def save(root: Path, step: int, standing: Standing) -> None:
    """Saves a checkpoint that holds its step; raises Killed where the writing was cut short by it."""
    saver = Saver(root / "checkpoints", best=root / "best.json")
    state = {"weight/a": FlatSlice(shape=(2,), start=0, values=torch.full((2,), float(step)))}
    saver.save(step, state, replace(HEADER, validations=standing))
    saver.wait()


def steps_on_disk(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in complete_checkpoints(root / "checkpoints"))


def named_best(root: Path) -> int | None:
    file = root / "best.json"
    return json.loads(file.read_bytes())["step"] if file.exists() else None


@pytest.mark.parametrize("seed", range(12))
def test_on_disk_are_the_newest_two_and_the_best_after_every_save(seed: int, tmp_path: Path) -> None:
    draw, standing, saved, losses = random.Random(seed), FRESH, [], {}
    for step in range(1, 26):
        standing = standing.after_step(1.0)
        if draw.random() < 0.5:
            losses[step] = draw.choice((1.0, 2.0, 3.0, 4.0, 5.0)) + draw.choice((0, draw.random()))
            standing = standing.after_validation(step, losses[step], keep_best=True)
        best = min(losses, key=lambda step: (losses[step], step), default=None)
        if step == best or draw.random() < 0.4:
            save(tmp_path, step, standing)
            saved.append(step)
            assert steps_on_disk(tmp_path) == sorted({*saved[-2:], *([] if best is None else [best])})
            assert named_best(tmp_path) == best
            assert len(list((tmp_path / "checkpoints").iterdir())) <= 3, "half of a checkpoint was left"


def killed_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the next save die where it would call this function of trainer/run/checkpoint.py."""

    def kill(*arguments: object, **named: object) -> None:
        raise Killed(name)

    monkeypatch.setattr(checkpoint_module, name, kill)


@pytest.mark.parametrize(
    ("at", "left", "named"),
    [
        ("rename_folder", [1, 3, 4], 1),
        ("name_best", [1, 3, 4, 5], 1),
        ("rotate", [1, 3, 4, 5], 5),
    ],
)
def test_a_kill_at_any_point_of_a_best_save_leaves_a_best_and_is_mended(
    at: str, left: list[int], named: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best_first = FRESH.after_validation(1, 2.0, keep_best=True)
    for step in (1, 2, 3, 4):
        save(tmp_path, step, best_first)
    assert steps_on_disk(tmp_path) == [1, 3, 4]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, at)
        save(tmp_path, 5, best_first.after_validation(5, 1.0, keep_best=True))
    assert (steps_on_disk(tmp_path), named_best(tmp_path)) == (left, named)
    found = newest(tmp_path / "checkpoints")
    assert found is not None and found.run.validations is not None and found.run.validations.kept is not None
    mend_best(tmp_path / "best.json", tmp_path / "checkpoints", found.run.validations.kept)
    rotate(tmp_path / "checkpoints", found.run.validations)
    assert named_best(tmp_path) == found.run.validations.kept.step == (1 if at == "rename_folder" else 5)
    assert steps_on_disk(tmp_path) == ([1, 3, 4] if at == "rename_folder" else [4, 5])


def test_the_best_is_named_with_its_loss_and_the_time_at_which_it_was_complete(tmp_path: Path) -> None:
    save(tmp_path, 1, FRESH.after_validation(1, 2.25, keep_best=True))
    header = tmp_path / "checkpoints" / folder_name(1) / "checkpoint.json"
    before = (tmp_path / "best.json").read_bytes()
    assert json.loads(before) == {"step": 1, "validation_loss": 2.25, "time": header.stat().st_mtime}
    (tmp_path / "best.json").write_bytes(before[:7])  # as a power loss cuts it
    found = newest(tmp_path / "checkpoints")
    assert found is not None and found.run.validations is not None
    mend_best(tmp_path / "best.json", tmp_path / "checkpoints", found.run.validations.kept)
    assert (tmp_path / "best.json").read_bytes() == before


def test_a_name_whose_checkpoint_is_gone_goes_too(tmp_path: Path) -> None:
    standing = FRESH.after_validation(1, 2.0, keep_best=True)
    (tmp_path / "best.json").write_text('{"step": 1}')
    mend_best(tmp_path / "best.json", tmp_path / "checkpoints", standing.kept)
    assert not (tmp_path / "best.json").exists()
