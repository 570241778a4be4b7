"""Whether a run is too long or too short is told by its losses, and not by their noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.report.made_runs import line, made_run, validation
from tests.report.pages import Page
from tests.report.test_run_page import DEFAULTS
from trainer.report.overfitting import FALLS, LEVEL, RISES, TOO_FEW, has_fallen, noise_of, trend_of
from trainer.report.run_facts import RunReader
from trainer.report.run_page import page_of_run

NOISE = 0.02


def noisy(curve: np.ndarray, seed: int) -> np.ndarray:
    return curve + NOISE * np.random.default_rng(seed).standard_normal(len(curve))


def test_the_noise_of_a_loss_is_its_standard_deviation_around_a_straight_line() -> None:
    found = noise_of(noisy(np.linspace(5, 3, 20_000), 0))
    assert found == pytest.approx(NOISE, rel=0.03)
    assert noise_of(np.linspace(5, 3, 50)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [5, 12, 40, 200])
def test_noise_alone_is_hardly_ever_a_rise_or_a_fall(count: int) -> None:
    told = [trend_of(noisy(np.full(count, 4.0), seed)) for seed in range(400)]
    assert told.count(LEVEL) >= 0.93 * len(told), {one: told.count(one) for one in set(told)}


@pytest.mark.parametrize("count", [12, 40, 200])
def test_a_rise_or_a_fall_of_ten_times_the_noise_is_told(count: int) -> None:
    at = np.linspace(0, 1, count)
    rises = [trend_of(noisy(4 + 1.2 * (at - 0.5) ** 2, seed)) for seed in range(100)]  # 0.3 above its lowest
    falls = [trend_of(noisy(4 - 1.2 * at, seed)) for seed in range(100)]
    assert rises.count(RISES) >= 95 and falls.count(FALLS) >= 95


def test_a_curve_that_settles_is_level_and_a_change_that_nobody_hears_is_none() -> None:
    at = np.arange(40)
    assert trend_of(3 + 4 * np.exp(-at / 3)) == LEVEL
    assert trend_of(3 + 1e-4 * at) == LEVEL  # without any noise
    assert trend_of(np.array([3.0, 2.0, 9.0, 10.0])) == TOO_FEW


def test_a_loss_that_never_fell_is_told_from_one_that_has_settled() -> None:
    told = [has_fallen(noisy(np.full(40, 4.0), seed)) for seed in range(400)]
    assert sum(told) <= 0.05 * len(told)
    assert all(has_fallen(noisy(3 + 4 * np.exp(-np.arange(40) / 3), seed)) for seed in range(100))
    assert not has_fallen(np.array([4.0, 3.0, 2.0, 1.0]))  # four, of which nothing is said


def page_with(run: Path, losses: dict[int, float], **settings: object) -> Page:
    made_run(run, sounds=False)
    lines = [line(step) + (validation(step, losses[step]) if step in losses else "") for step in range(1, 201)]
    (run / "metrics.jsonl").write_text("".join(lines))
    for name, value in settings.items():
        (run / f"{name}.json").write_text(str(value))
    return Page(page_of_run(RunReader(run), run, DEFAULTS, exit_code=0))


def test_the_page_names_the_step_from_which_the_loss_rises_and_what_to_do(tmp_path: Path) -> None:
    losses = {step: 3 + abs(step - 80) / 200 for step in range(20, 201, 20)}
    page = page_with(tmp_path / "run", losses)
    assert "Since step 80 the validation loss rises" in page.text and "--early_stop 5" in page.text
    assert float(page.figures["fit/80/validation"]) == 3.0 and float(page.figures["fit/200/validation"]) == 3.6
    gap = float(page.figures["fit/200/validation"]) - float(page.figures["fit/200/training"])
    assert float(page.figures["fit/200/gap"]) == pytest.approx(gap)
    # the training loss of made_runs falls to 2 and has 0.06 of noise at most on average
    assert float(page.figures["fit/200/training"]) == pytest.approx(2 + 5 * np.exp(-5) + 0.06, abs=0.03)
    kept = page_with(tmp_path / "kept", losses, finished='{"step": 200, "exported_step": 80}')
    assert "What is exported is step 80 (--keep_best 1)" in kept.text and "--early_stop 5" not in kept.text


def test_the_page_says_that_a_run_is_too_short_or_that_nothing_was_held_out(tmp_path: Path) -> None:
    falling = page_with(tmp_path / "falling", {step: 5 - step / 100 for step in range(20, 201, 20)})
    assert "The validation loss still falls" in falling.text and "rises" not in falling.text.split("Too long")[1][:900]
    assert float(falling.figures["fit/200/step"]) == 200 and "last and lowest" in falling.text
    unmoved = page_with(tmp_path / "unmoved", {step: 3.5 for step in range(20, 201, 20)}).text
    assert "is what it was at the first validation" in unmoved and "stays where it is" not in unmoved
    settled = page_with(tmp_path / "settled", {step: 3 + 4 * np.exp(-step / 20) for step in range(5, 201, 5)}).text
    assert "stays where it is" in settled and "is what it was" not in settled
    assert "no clip is held out" in page_with(tmp_path / "none", {}).text
    assert "was validated 2 times" in page_with(tmp_path / "few", {50: 3.0, 100: 4.0}).text
