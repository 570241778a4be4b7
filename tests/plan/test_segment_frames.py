"""A crop has as many frames in the plan as in training, and as many as exact arithmetic gives."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from trainer import wiring
from trainer.data import dataset
from trainer.flags.config import Config, parse
from trainer.model.source import open_model
from trainer.plan import dry_run
from trainer.plan.launcher import Launch
from trainer.plan.strategies import Cluster
from trainer.spec.shapes import FRAME_RATE_HZ, KNOWN, segment_frames

ONE_PROCESS = Cluster(
    nodes=1,
    gpus_per_node=1,
    device="cpu",
    gpu_memory_bytes=None,
    host_memory_bytes=None,
    supports_bf16=False,
)


def typed_lengths() -> list[str]:
    """1,000 values of --segment_seconds as they are typed, from 1 to 300 seconds."""
    draw = random.Random(0)
    borders = [n / FRAME_RATE_HZ for n in draw.sample(range(51, 15_000), 250)]  # a whole number of frames
    beside = [border + shift for border in borders[:200] for shift in (-0.0001, 0.0001)]
    decimals = [draw.randint(10_000, 3_000_000) / 10_000 for _ in range(150)]
    thirds = [n / 3 for n in draw.sample(range(3, 900), 197)]  # with all their 16 digits
    return ["4.1", "30", "1.01", *(f"{s:.4f}" for s in (*borders, *beside, *decimals)), *(str(s) for s in thirds)]


def test_the_plan_counts_the_frames_that_training_crops_and_exact_arithmetic_gives(monkeypatch):
    source = open_model("debug")
    monkeypatch.setattr(dataset.cache, "open_codes", lambda *arguments: None)  # no clips are needed for this
    no_clips = {"content": [], "caption": [], "path": []}
    lengths = typed_lengths()
    assert len(lengths) == 1000
    for text in lengths:
        config = Config(dataset_path="music", model_id="debug", segment_seconds=float(text))
        dry = dry_run.plan_of(config, frozenset(), ONE_PROCESS, KNOWN["debug"])
        real = wiring.plan_of(config, frozenset(), ONE_PROCESS, Launch(), source, None)
        examples = dataset._examples(wiring.data_settings(config), source, no_clips, None)
        counted = dry.layout.workload.segment_frames, real.layout.workload.segment_frames, examples.segment_frames
        assert set(counted) == {math.floor(Fraction(text) * FRAME_RATE_HZ)}, (text, counted)


def test_a_typed_length_is_read_as_that_number():
    for text in typed_lengths()[::100]:
        config, _ = parse(["--dataset", "music", "--segment_seconds", text])
        assert config.segment_seconds == float(text)


@pytest.mark.parametrize("seconds,frames", [(4.1, 205), (30, 1500), (1.01, 50), (0.999, 49)])
def test_a_crop_has_all_its_frames_whatever_the_rounding(seconds: float, frames: int):
    assert segment_frames(seconds) == frames  # 4.1 x 50 is 204.99999999999997
