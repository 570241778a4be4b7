"""The model that sounds are made with: its weights are those of an export, and training does not notice it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks.cases import steps
from tests.ranks.harness import run_ranks
from tests.runs import assert_bit_equal
from trainer.model.language_model import load_language_model
from trainer.model.source import open_model
from trainer.model.trained_model import merged
from trainer.run.checkpoint import newest
from trainer.spec.trainable import selection_of_flags

STEPS = 3
RUN: dict[str, Any] = {"count": STEPS, "save_at": STEPS}


class Sampled:
    """Makes the copy before the first step and after each, computes with it, and leaves its weights in a file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, engine: Any) -> None:
        before = torch.get_rng_state()
        with engine.sampling_model() as model:
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in model.modules())
            codes = torch.randint(0, 2048, (1, 4, 20), generator=torch.Generator().manual_seed(1))
            logits = model.decoder(codes[0], use_cache=False).logits
            kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
            torch.save({"weights": kept, "logits": logits}, self.folder / f"sampled-{engine.ranks.rank}.pt")
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), before)


def exported(folder: Path, flags: dict[str, Any]) -> nn.Module:
    """The whole model of a checkpoint, in float32."""
    checkpoint = newest(folder)
    assert checkpoint is not None and checkpoint.step == STEPS
    source = open_model("debug")
    weights = merged(source, checkpoint.weights(), selection_of_flags(flags))
    return load_language_model(replace(source, weights=weights)).eval()


def everything(folder: Path) -> dict[str, Tensor]:
    checkpoint = newest(folder)
    assert checkpoint is not None and checkpoint.step == STEPS
    return {name: checkpoint.read(name) for name in checkpoint.names()}


CASES = {
    "single": (1, "single", {}),
    "ddp": (2, "ddp", {}),
    "zero2": (2, "zero2", {}),
    "zero3": (2, "zero3", {}),
    "fsdp": (2, "fsdp", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_holds_the_weights_of_an_export_and_leaves_the_run_as_it_was(case: str, tmp_path: Path) -> None:
    world_size, strategy, named = CASES[case]
    run_ranks(world_size, steps, strategy, 1, **RUN, **named, folder=str(tmp_path / "with"), watch=Sampled(tmp_path))
    run_ranks(world_size, steps, strategy, 1, **RUN, **named, folder=str(tmp_path / "without"))
    assert_bit_equal(everything(tmp_path / "with"), everything(tmp_path / "without"))
    model = exported(tmp_path / "with", {})
    for rank in range(world_size):
        found = torch.load(tmp_path / f"sampled-{rank}.pt")["weights"]
        assert_bit_equal(found, {name: parameter.detach() for name, parameter in model.named_parameters()})
