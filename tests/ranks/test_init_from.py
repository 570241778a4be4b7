"""A run that starts from other weights, with words dropped, has the losses of one process under every strategy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.ranks.harness import launch_rank, run_ranks
from tests.rounding import LOSS, NORM
from tests.runs import few_clips, launch_here

pytestmark = pytest.mark.numbers
FLAGS = ("--dataset", "data", "--model_id", "debug", "--code_views", "2", "--segment_seconds", "2", "--lr", "1e-3")
FLAGS += ("--max_steps", "3", "--warmup_steps", "1", "--global_batch", "4", "--batch_size", "2")
VARIED = ("--word_dropout", "0.4", "--caption_variants", "3", "--caption_lines", "1")
# A file that is mapped, and a checkpoint that is read by range; each with either kind of sharding in the full tier.
PLACES = ("first/audiocraft", "first")
QUICK = {("zero2", "first"), ("fsdp", "first/audiocraft")}
CASES = [(strategy, place) for strategy in ("ddp", "zero2", "zero3", "fsdp") for place in PLACES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in first/, and in single/ one that one process started from it."""
    root = tmp_path_factory.mktemp("starting")
    few_clips(root / "data")
    for path in (root / "data").glob("*.txt"):
        path.write_text(path.read_text().strip() + f"\nanother caption of the song named {path.stem}\n")
    launch_here(root, *FLAGS, "--output_dir", "first")
    launch_here(root, *FLAGS, *VARIED, "--init_from", "first", "--output_dir", "single")
    return root


def numbers(output_dir: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [[line["loss"], line["grad_norm"]] for line in lines]


@pytest.mark.parametrize(
    ("strategy", "place"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.full]) for case in CASES],
)
def test_the_losses_are_those_of_one_process(folder: Path, strategy: str, place: str) -> None:
    name = f"{strategy}-{place.replace('/', '-')}"
    flags = (*FLAGS, *VARIED, "--init_from", place, "--strategy", strategy, "--output_dir", name)
    for code, output in run_ranks(2, launch_rank, str(folder), *flags):
        assert code == 0, output
    found, expected = np.array(numbers(folder / name)), np.array(numbers(folder / "single"))
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=0, atol=LOSS)
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=NORM)
