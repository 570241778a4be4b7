"""On a GPU, making codes: every way gives the same ones, and how fast each is.

Skipped without one. `bash scripts/test.sh full -m gpu` runs them alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.generating import THEIRS, Asked, ways
from benchmarks.random_models import random_source

from scripts import benchmark
from tests.blown_up import blown_up
from tests.close_codes import equal_steps
from tests.gpu.one_card import say_figure
from trainer.evaluation.generation import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SOUNDS, FRAMES = 4, 100
# Gaps of the two likeliest codes in float32, through small's layers with peaked attention, are within 0.007 of those in
# float64 (a CPU, 2026-11-28). None of these sounds' first 47, 20, 45 and 24 steps has one below 0.05.
CLOSE = 0.04


def test_all_ways_give_the_same_greedy_codes() -> None:
    """In float32: ours one by one, together, with a static cache and compiled, transformers' and audiocraft's."""
    torch.manual_seed(0)
    asked = Asked(
        model=blown_up(random_source("small")).to("cuda"),
        text_BSD=torch.randn(SOUNDS, 20, 768),
        frames=FRAMES,
        sampling=Sampling(greedy=True),
    )
    made = {name: make() for name, make in ways(asked).items()}
    compared = {
        name: sum(equal_steps(asked.model, asked.text_BSD, made["together"], other, guidance=3.0, close=CLOSE))
        for name, other in made.items()
    }
    [steps] = set(compared.values())
    differing = {name: (other != made["together"]).double().mean().item() for name, other in made.items()}
    say_figure(
        f"equal in {steps} of {SOUNDS * FRAMES} steps, which come before one with two codes as likely; of all codes"
        f" differ {', '.join(f'{name} {share:.2f}' for name, share in differing.items())}"
    )
    assert steps >= 5 * SOUNDS and "compiled" in made


def test_the_pace_of_each_way(tmp_path: Path) -> None:
    flags = ["--suite", "generating", "--models", "small", "--frames", "500", "--clips", "8", "--precision", "bf16"]
    assert benchmark.main([*flags, "--rounds", "2", "--out", str(tmp_path)]) == 0
    rows = {row["what"]: row for row in json.loads((tmp_path / "benchmark.json").read_text())["rows"]}
    assert {"one by one", "together", "static cache", "compiled", THEIRS} <= rows.keys()
    paces = [
        f"{name} {row['codes_per_second']:,.0f} codes per second ({row['codes_of_transformers']:.2f} of transformers')"
        for name, row in rows.items()
    ]
    first = rows["compiled"]["first_seconds"]
    say_figure(f"small, 8 sounds of 10 s, bf16: {', '.join(paces)}; the first compiled call {first:.0f} s")
