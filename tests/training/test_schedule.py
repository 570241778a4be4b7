"""The learning rate against its definition."""

from __future__ import annotations

import math

import pytest

from trainer.training.schedule import Schedule, learning_rate


def test_warm_up_is_linear_and_reaches_the_peak_with_its_last_step():
    schedule = Schedule(peak=1e-4, steps=100, warmup_steps=16)
    rates = [learning_rate(schedule, step) for step in range(100)]
    assert rates[:16] == pytest.approx([1e-4 * (step + 1) / 16 for step in range(16)])
    assert max(rates) == rates[15] == pytest.approx(1e-4)


def test_cosine_falls_along_half_a_cosine_and_never_to_zero():
    schedule = Schedule(peak=2.0, steps=50, warmup_steps=10)
    rates = [learning_rate(schedule, step) for step in range(50)]
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * n / 41) for n in range(1, 41)])
    assert 0 < rates[-1] < rates[-2]


def test_linear_and_constant_and_a_floor():
    linear = Schedule(peak=1.0, steps=9, warmup_steps=0, decay="linear", min_ratio=0.5)
    assert [learning_rate(linear, step) for step in (0, 8)] == pytest.approx([1 - 0.5 / 10, 1 - 0.5 * 9 / 10])
    constant = Schedule(peak=1.0, steps=9, warmup_steps=2, decay="constant")
    assert [learning_rate(constant, step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_a_run_shorter_than_its_warm_up_still_has_rates_above_zero():
    rates = [learning_rate(Schedule(peak=1.0, steps=3, warmup_steps=16), step) for step in range(3)]
    assert rates == pytest.approx([1 / 16, 2 / 16, 3 / 16])
