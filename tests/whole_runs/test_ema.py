"""With --ema_decay, all that a run hands out is the average of its weights, and nobody gets it unasked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.plans import engine_for, plan_for
from tests.runs import launch_here, metrics
from tests.synthetic import random_examples
from trainer.data.order import Row, valid_cells
from trainer.errors import NotFiniteError
from trainer.exports.audiocraft_names import lm_to_audiocraft
from trainer.exports.init_from import find_starting_point
from trainer.flags.config import Config
from trainer.run.checkpoint import EMA, WEIGHT, newest

FLAGS = ("--max_steps", "4", "--lr", "3e-3", "--warmup_steps", "1", "--batch_size", "2", "--grad_acc", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("average")
    output = launch_here(root, *FLAGS, "--ema_decay", "0.9", "--save_step", "4")
    assert "over some 10 steps" in output and "66% are the starting weights" in output  # 0.9 ** 4
    return root


def tensors(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    checkpoint = newest(folder / "models" / "checkpoints")
    assert checkpoint is not None
    names = [name.removeprefix(kind) for name in checkpoint.names(kind)]
    return {name: checkpoint.read(kind + name).reshape(checkpoint.shape(kind + name)) for name in names}


@pytest.mark.parametrize("file", ["lm_final.pt", "lm_4.pt"])
def test_exports_hold_the_average_and_not_the_last_weights(folder: Path, file: str) -> None:
    exported = torch.load(folder / "models" / file, weights_only=True)
    expected, last = (lm_to_audiocraft(tensors(folder, kind)) for kind in (EMA, WEIGHT))
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert any(not torch.equal(exported[name], last[name]) for name in last)


def test_a_run_that_starts_from_it_starts_from_the_average(folder: Path) -> None:
    weights = find_starting_point(str(folder / "models")).weights
    expected = tensors(folder, EMA)
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_average_does_not_touch_the_training(folder: Path) -> None:
    losses = metrics(folder)
    launch_here(folder, *FLAGS, "--output_dir", "plain")
    (folder / "models").rename(folder / "averaged")
    (folder / "plain").rename(folder / "models")
    try:
        assert metrics(folder) == losses and not tensors(folder, EMA)
    finally:
        (folder / "models").rename(folder / "plain")
        (folder / "averaged").rename(folder / "models")


@pytest.mark.parametrize("flags,now", [((), "None now"), (("--ema_decay", "0.8"), "0.8 now")])
def test_a_checkpoint_of_another_average_is_refused(folder: Path, flags: tuple[str, ...], now: str) -> None:
    output = launch_here(folder, *FLAGS, *flags, expect=1)
    assert f"--ema_decay: 0.9 then, {now}" in output


def test_a_step_that_is_not_finite_does_not_move_the_average() -> None:
    engine = engine_for(plan_for(ema=True), Config(dataset_path="unused", ema_decay=0.5))
    rows = [Row(clip=0, epoch=0, view=0, start=0, frames=20, drop_caption=False)]
    batch, cells = random_examples([20], ["words"]).batch(rows), valid_cells(rows, 4, 40)
    engine.step([batch], cells, step=0, learning_rate=1e-3)
    before = {name: piece.values.clone() for name, piece in engine.state().items()}
    with pytest.raises(NotFiniteError, match="step 2"):
        faulty = replace(batch, text_BSD=torch.full_like(batch.text_BSD, torch.inf))
        engine.step([faulty], cells, step=1, learning_rate=1e-3)
    assert all(torch.equal(piece.values, before[name]) for name, piece in engine.state().items())
