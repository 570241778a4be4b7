"""What trains otherwise than in float32 and bf16 with AdamW on the device: offload, moments of 8 bits, fp16."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.gpu.one_card import run_ranks, say_figure
from tests.ranks.cases import Numbers, differences, steps
from tests.rounding import LOSS, NORM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 8


@cache
def plain() -> Numbers:
    return run_ranks(1, steps, "single", 1, count=STEPS)[0]


def compared(name: str, strategy: str, **layout: Any) -> tuple[Numbers, float, float]:
    """The numbers of a layout in one process, and how far losses and norms are from float32 AdamW's on the device."""
    found = run_ranks(1, steps, strategy, 1, count=STEPS, **layout)[0]
    loss, norm = differences(found, plain())
    held = found.optimizer_bytes
    say_figure(f"{name}: losses within {loss:.1e} nats, norms within {norm:.1e}, optimizer {held} bytes")
    return found, loss, norm


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_an_offloaded_optimizer_gives_the_numbers_of_one_on_the_device(strategy: str) -> None:
    pytest.importorskip("deepspeed")
    _, loss, norm = compared("offload", strategy, offload=True)
    # The host rounds AdamW's update otherwise than the device; see tests/rounding.py for both bounds.
    assert loss <= LOSS and norm <= NORM


def test_moments_of_8_bits_learn_alike_in_a_quarter_of_the_memory() -> None:
    pytest.importorskip("bitsandbytes")
    found, loss, norm = compared("adamw8bit", "single", optimizer="adamw8bit")
    assert 0 < loss <= 2e-3 and norm <= 2e-4  # see tests/ranks/test_adamw_8bit.py
    assert found.optimizer_bytes <= 0.27 * plain().optimizer_bytes


def test_fp16_with_its_loss_scaling_stays_near_float32() -> None:
    _, loss, norm = compared("fp16", "single", precision="fp16")
    # fp16 has 11 bits of mantissa, eight times finer than bf16, for which 2e-3 and 1e-2 hold.
    assert loss <= 2e-3 and norm <= 1e-2
