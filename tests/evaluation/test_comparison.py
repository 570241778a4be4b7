"""Intervals and verdicts: none without a difference, one where there is a clear one."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.evaluation import comparison
from trainer.evaluation.comparison import compare_distances, compare_means, compared, interval, resamples

MIXING = np.random.default_rng(99).standard_normal((6, 30))


def sounds(draws: np.random.Generator, clips: int, shift: float = 0.0) -> np.ndarray:
    """Embeddings (clips, 30) that vary in six directions, and little in others."""
    return draws.standard_normal((clips, 6)) @ MIXING + 0.3 * draws.standard_normal((clips, 30)) + shift


def test_two_models_that_are_alike_get_a_verdict_as_seldom_as_the_interval_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 40 verdicts at 5 % there are 7 or more in 3 of 1000 cases."""
    monkeypatch.setattr(comparison, "RESAMPLES", 200)
    verdicts = {"kad": 0, "frechet": 0}
    for seed in range(40):
        draws = np.random.default_rng(seed)
        sets = sounds(draws, 12), sounds(draws, 12, 0.5), sounds(draws, 12, 0.5)
        for name, found in compare_distances(*sets, paired=True, seed=seed).items():
            verdicts[name] += found["verdict"] is not None
    assert max(verdicts.values()) < 7, verdicts


def test_a_model_that_is_clearly_closer_is_called_better_and_the_other_way_round_worse() -> None:
    draws = np.random.default_rng(1)
    reference, far, near = sounds(draws, 40), sounds(draws, 25, 2.0), sounds(draws, 25)
    for paired in (True, False):
        for name, found in compare_distances(reference, far, near, paired=paired, seed=0).items():
            assert found["verdict"] == "better", name
            value, low, high = found["difference"]
            assert low < value < high < 0 and value == found["tuned"][0] - found["base"][0]
        back = compare_distances(reference, near, far, paired=paired, seed=0)
        assert {found["verdict"] for found in back.values()} == {"worse"}


def test_the_same_sounds_differ_by_nothing_at_all() -> None:
    draws = np.random.default_rng(2)
    made = sounds(draws, 10, 1.0)
    for found in compare_distances(sounds(draws, 15), made, made, paired=True, seed=0).values():
        assert found["difference"] == [0, 0, 0] and found["verdict"] is None and found["base"] == found["tuned"]


def test_pairs_are_drawn_together() -> None:
    """A model that moves every sound a little the same way differs for sure, though sounds vary by far more."""
    draws = np.random.default_rng(3)
    base = draws.standard_normal(30)
    found = compare_means(base, base + 0.1, seed=0)
    assert found["verdict"] == "better" and found["base"][2] - found["base"][1] > 0.4
    assert found["difference"] == pytest.approx([0.1, 0.1, 0.1])


def test_the_interval_of_a_mean_is_that_of_the_textbook() -> None:
    values = np.random.default_rng(4).standard_normal(200)
    value, low, high = compare_means(values, values, seed=0)["base"]
    half = 1.96 * values.std() / np.sqrt(200)
    # Quantiles of 1,000 resamples: a standard error of sqrt(0.025 x 0.975 / 1000) / 0.058 = 0.085 deviations, of 1.96.
    assert (value - low) / half == pytest.approx(1, abs=0.18) and (high - value) / half == pytest.approx(1, abs=0.18)


def test_an_interval_is_around_its_value_and_reaches_to_the_value_less_its_bias() -> None:
    value, low, high = interval(1.0, np.array([3.0, 4.0, 5.0]))
    # Of 3, 4 and 5 the middle 95 % are 3.05 to 4.95, 0.95 to each side; they are 3 above the value.
    assert (value, low, high) == pytest.approx((1.0, 1 - 0.95 - 3, 1 + 0.95))
    assert interval(7.0, np.array([3.0, 4.0, 5.0])) == pytest.approx([7.0, 7 - 0.95, 7 + 0.95 + 3])


def test_of_few_clips_a_model_that_varies_too_little_is_not_called_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuned model's sounds are drawn as the music's are, those of the base vary less. In 256 values, by the plain
    Fréchet distance, the base would be nearer in each of these cases."""
    monkeypatch.setattr(comparison, "RESAMPLES", 40)
    for seed, (clips, spread) in enumerate([(20, 0.6), (20, 0.8), (50, 0.6), (50, 0.8)]):
        draws = np.random.default_rng(seed)
        music, base, tuned = (scale * draws.standard_normal((clips, 256)) for scale in (1.0, spread, 1.0))
        found = compare_distances(music, base, tuned, paired=True, seed=seed)
        assert found["frechet"]["difference"][1] > 0, "the distances themselves say otherwise"
        assert found["kad"]["difference"][0] < 0 and found["kad"]["verdict"] != "worse"
        assert found["frechet"]["verdict"] is None


def test_no_resample_has_one_clip_alone_and_too_few_clips_are_refused() -> None:
    drawn = resamples(np.random.default_rng(0), 3)
    assert drawn.shape == (1000, 3) and (drawn.sum(axis=1) == 3).all() and ((drawn > 0).sum(axis=1) > 1).all()
    with pytest.raises(ValueError, match="2 clips are fewer than 3"):
        resamples(np.random.default_rng(0), 2)
    three, four = np.eye(3), np.eye(4)[:, :3]
    with pytest.raises(ValueError, match="3 embeddings of the base and 4"):
        compare_distances(four, three, four, paired=False, seed=0)
    with pytest.raises(ValueError, match="half of the pairs of reference embeddings are equal"):
        compare_distances(np.ones((4, 3)), four, four, paired=True, seed=0)


def test_zero_in_the_interval_is_no_verdict() -> None:
    spread = np.linspace(-1, 1, 101)
    both = np.stack([np.zeros(101), spread])
    assert compared(np.array([0, 0.5]), both, smaller_is_better=True)["verdict"] is None
    assert compared(np.array([0, 1.5]), both, smaller_is_better=True)["verdict"] == "worse"
    assert compared(np.array([0, 1.5]), both, smaller_is_better=False)["verdict"] == "better"
