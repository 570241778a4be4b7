"""The average of the weights is that of every step's weights, however they are sharded, and it is what is validated."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.plans import plan_for
from tests.ranks.cases import LENGTHS, SEGMENT, steps
from tests.ranks.harness import run_ranks
from tests.rounding import REACH, ROUNDING, assert_same_training
from tests.runs import assert_bit_equal
from tests.synthetic import random_examples
from trainer.data.batches import Batch
from trainer.data.order import Row
from trainer.model.language_model import load_language_model
from trainer.model.source import open_model
from trainer.run.checkpoint import EMA, WEIGHT, newest

pytestmark = pytest.mark.numbers
DECAY, STEPS = 0.8, 6
RATES = [1e-3] * STEPS
# Each update rounds the difference and the sum, errors of 2 x 2**-24 of a value that stay in the average as long as the
# value does: for 1 / (1 - DECAY) steps. A value that passed through larger ones on its way here keeps their errors.
UPDATES = 2 * ROUNDING / (1 - DECAY)
RUN = {"count": STEPS, "save_at": STEPS, "ema_decay": DECAY}


def parts(engine, kind: str) -> dict[str, Tensor]:
    """Copies of this rank's share, in float64."""
    state = engine.state()
    return {key.removeprefix(kind): state[key].values.double().clone() for key in state if key.startswith(kind)}


class Recomputed:
    """The average again, in float64 from the weights of every step; raises where a rank's share differs."""

    def __init__(self, *, share: float):
        """share: of the parameters that a rank should hold the average of."""
        self.share = share
        self.expected: dict[str, Tensor] = {}

    def __call__(self, engine) -> None:
        weights, found = parts(engine, WEIGHT), parts(engine, EMA)
        for name, weight in weights.items():
            before = self.expected.get(name, weight)
            self.expected[name] = DECAY * before + (1 - DECAY) * weight
            atol = UPDATES * REACH * sum(RATES)
            torch.testing.assert_close(found[name], self.expected[name], rtol=UPDATES, atol=atol)
        held = 4 * sum(len(shard.ema) for shard in engine.shards())
        planned = plan_for("single", ema=True).memory.optimizer - plan_for("single").memory.optimizer
        assert held == pytest.approx(self.share * planned, rel=0.05)


def everything(folder: Path) -> dict[str, Tensor]:
    checkpoint = newest(folder)
    assert checkpoint is not None and checkpoint.step == STEPS
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def averages(folder: Path) -> dict[str, Tensor]:
    return {name: values for name, values in everything(folder).items() if name.startswith(EMA)}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """A checkpoint of one process."""
    folder = tmp_path_factory.mktemp("single")
    run_ranks(1, steps, "single", 1, **RUN, folder=str(folder))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders with a checkpoint of 2 ranks, whose average was compared with the recomputed one after every step."""
    made: dict[tuple[str, bool], Path] = {}

    def folder(strategy: str, offload: bool = False) -> Path:
        if (strategy, offload) not in made:
            made[strategy, offload] = tmp_path_factory.mktemp(strategy)
            watch = Recomputed(share=1 if strategy == "ddp" else 0.5)
            run_ranks(2, steps, strategy, 1, **RUN, folder=str(made[strategy, offload]), offload=offload, watch=watch)
        return made[strategy, offload]

    return folder


@pytest.mark.parametrize(
    "strategy,offload",
    [
        ("zero2", False),
        ("fsdp", False),
        *(pytest.param(*case, marks=pytest.mark.full) for case in [("ddp", False), ("zero3", False), ("zero2", True)]),
    ],
)
def test_it_is_the_average_of_every_steps_weights_and_that_of_one_process(strategy, offload, single, whole):
    assert_same_training(averages(whole(strategy, offload)), averages(single), RATES)


def validation_batch() -> Batch:
    rows = [
        Row(clip=clip, epoch=0, view=0, start=0, frames=min(length, SEGMENT), drop_caption=False)
        for clip, length in enumerate(LENGTHS)
    ]
    return random_examples(LENGTHS, segment_frames=SEGMENT).batch(rows)


class Validated:
    """Validates after every step, and leaves the sums of the last validation in a file."""

    def __init__(self, file: Path):
        self.file = file

    def __call__(self, engine) -> None:
        before = {key: piece.values.clone() for key, piece in engine.state().items()}
        sums, _ = engine.evaluate([validation_batch()])
        assert all(torch.equal(piece.values, before[key]) for key, piece in engine.state().items())
        if engine.ranks.is_first:
            np.save(self.file, sums / engine.ranks.world_size)  # every rank has the same batch


def summed_losses(tensors: Mapping[str, Tensor]) -> np.ndarray:
    """Of the validation batch, by a plain model of these weights."""
    model = load_language_model(open_model("debug")).eval()
    model.load_state_dict(dict(tensors), strict=False)
    assert {name for name, _ in model.named_parameters()} == set(tensors)
    batch = validation_batch()
    with torch.no_grad():
        sums = model(
            batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS, labels_BKT=batch.labels_BKT
        )
    return sums.numpy()


@pytest.mark.parametrize(
    "strategy", ["zero2", *(pytest.param(other, marks=pytest.mark.full) for other in ("ddp", "zero3", "fsdp"))]
)
def test_validation_is_of_the_average_and_leaves_training_as_it_was(strategy, whole, tmp_path):
    file, folder = tmp_path / "sums.npy", tmp_path / "watched"
    run_ranks(2, steps, strategy, 1, **RUN, folder=str(folder), watch=Validated(file))
    assert_bit_equal(everything(folder), everything(whole(strategy)))
    checkpoint = newest(folder)
    assert checkpoint is not None
    names = list(checkpoint.weights())
    trained = {name: checkpoint.read(WEIGHT + name).reshape(checkpoint.shape(WEIGHT + name)) for name in names}
    # Sums over so many cells at most, in another order; the batch is the same.
    cells = sum(min(length, SEGMENT) for length in LENGTHS)
    np.testing.assert_allclose(np.load(file), summed_losses(checkpoint.weights()), rtol=cells * ROUNDING)
    assert (abs(np.load(file) / summed_losses(trained) - 1) > 1e-3).all(), "the average and the weights are alike"


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("part", [{"lora_rank": 4}, {"freeze": "embeddings,layers.0"}], ids=["lora", "freeze"])
def test_validation_of_a_trained_part_is_that_of_one_process(part, strategy, tmp_path):
    found = {}
    for ranks, name in ((1, "single"), (2, strategy)):
        found[name] = tmp_path / f"{name}.npy"
        run_ranks(ranks, steps, name, 1, count=3, ema_decay=DECAY, flags=part, watch=Validated(found[name]))
    np.testing.assert_allclose(np.load(found[strategy]), np.load(found["single"]), rtol=1e-6)


@pytest.mark.parametrize(
    "strategy", ["zero2", *(pytest.param(other, marks=pytest.mark.full) for other in ("ddp", "zero3", "fsdp"))]
)
def test_it_continues_bit_for_bit_and_under_another_strategy(strategy, single, whole, tmp_path):
    half = RUN | {"count": STEPS // 2}
    run_ranks(2, steps, strategy, 1, **half | {"save_at": STEPS // 2}, folder=str(tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere")
    run_ranks(2, steps, strategy, 1, **half, folder=str(tmp_path / "run"))
    assert_bit_equal(everything(tmp_path / "run"), everything(whole(strategy)))
    run_ranks(1, steps, "single", 1, **half, folder=str(tmp_path / "elsewhere"))
    assert_same_training(averages(tmp_path / "elsewhere"), averages(single), RATES)
