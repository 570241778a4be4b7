"""What a run exports does not depend on the strategy that trained it, nor on the number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.ranks.harness import launch_rank, run_ranks
from tests.rounding import REACH, SMALL, assert_same_training
from tests.runs import few_clips
from trainer.exports.audiocraft_names import lm_to_audiocraft
from trainer.model.source import DECODER, PROJECTION, open_model

pytestmark = pytest.mark.numbers
LR, STEPS = 1e-5, 4
FLAGS: tuple[str, ...] = ("--dataset", "data", "--model_id", "debug", "--code_views", "2", "--segment_seconds", "4")
FLAGS += ("--lr", str(LR), "--lr_schedule", "constant", "--warmup_steps", "0", "--max_steps", str(STEPS))
FLAGS += ("--batch_size", "4", "--global_batch", "4", "--use_cfg", "1", "--cfg_rate", "0.3")
QUICK = {("zero2", 2), ("fsdp", 2)}
CASES = [(strategy, world_size) for strategy in ("ddp", "zero2", "zero3", "fsdp") for world_size in (2, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset, whose cache the first run fills."""
    root = tmp_path_factory.mktemp("exports")
    few_clips(root / "data")
    return root


@pytest.fixture(scope="module")
def single(folder) -> dict[str, Tensor]:
    return exports(folder, "single", 1)


def exports(folder: Path, strategy: str, world_size: int) -> dict[str, Tensor]:
    """lm_final.pt of a run, after a look at whether the other exports hold the same values."""
    name = f"{strategy}-{world_size}"
    for rank, (code, output) in enumerate(
        run_ranks(world_size, launch_rank, str(folder), *FLAGS, "--strategy", strategy, "--output_dir", name)
    ):
        assert code == 0, f"rank {rank}:\n{output}"
    plan = json.loads((folder / name / "plan.json").read_text())
    assert (plan["strategy"], plan["world_size"]) == (strategy, world_size)
    final = torch.load(folder / name / "lm_final.pt", weights_only=True)
    audiocraft = torch.load(folder / name / "audiocraft" / "state_dict.bin", weights_only=False)["best_state"]
    assert difference(final, audiocraft) == 0
    model = load_file(folder / name / "huggingface" / "model.safetensors")
    assert difference(final, lm_to_audiocraft(trained(model))) == 0
    return final


def trained(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the decoder and of its text projection."""
    return {name: weights[name] for name in weights if name.startswith((DECODER, PROJECTION))}


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest absolute difference of any value."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    "strategy,world_size", [case if case in QUICK else pytest.param(*case, marks=pytest.mark.full) for case in CASES]
)
def test_exports_equal_those_of_one_process(strategy, world_size, folder, single):
    assert_same_training(exports(folder, strategy, world_size), single, [LR] * STEPS)


def test_the_weights_moved_by_far_more_than_may_differ(single):
    base = lm_to_audiocraft(trained(open_model("debug").weights))
    moved = {name: float((single[name] - base[name]).abs().max()) for name in single}
    way = REACH * STEPS * LR
    assert min(moved.values()) > 100 * SMALL * way
    assert max(moved.values()) <= 1.01 * way  # weight decay, and weights of 1 round by up to 6e-8 a step
