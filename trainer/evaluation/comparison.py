"""Whether a tuned model is closer to some reference than its base: distances with bootstrap intervals over clips.

An embedding is one clip. Frames of a clip are alike, so that to draw frames would make intervals far too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from tqdm import tqdm

from trainer.evaluation.distances import (
    Weighted,
    frechet_distance,
    gaussian_of,
    kernel_audio_distances,
    median_distance,
)

RESAMPLES = 1000
LOW, HIGH = 0.025, 0.975
LEAST_CLIPS = 3  # of two, a quarter of the resamples or more would have one clip alone
Verdict = Literal["better", "worse"]


class Compared(TypedDict):
    """A figure of both models and its change, each [value, low, high] with a 95 % interval; the verdict is None where
    the interval of the change holds zero, and of a Fréchet distance also where KAD's change has the other sign."""

    base: list[float]
    tuned: list[float]
    difference: list[float]
    verdict: Verdict | None


def compare_distances(
    reference_ND: np.ndarray, base_MD: np.ndarray, tuned_MD: np.ndarray, *, paired: bool, seed: int
) -> dict[str, Compared]:
    """KAD and Fréchet distance of both models from the reference, by "kad" and "frechet"; smaller is better.

    paired  whether base_MD[i] and tuned_MD[i] have the same prompt: then they are drawn together
    seed    of the resamples

    The kernel's bandwidth is the reference's, the same for both and in all resamples. Raises ValueError for fewer than
    LEAST_CLIPS rows, for a reference that has no bandwidth, and for other numbers of base and tuned: a Fréchet distance
    grows as embeddings get fewer.

    It grows the more, the more a model's sounds vary, so that of few clips a model that always plays nearly the same is
    nearer than one that varies as the music does. No resample of these clips shows that whole error. KAD, which is
    unbiased, does not have it: where the two differ in sign, the Fréchet distance gets no verdict.
    """
    if len(base_MD) != len(tuned_MD):
        raise ValueError(f"{len(base_MD)} embeddings of the base and {len(tuned_MD)} of the tuned model")
    bandwidth = median_distance(reference_ND)
    if bandwidth == 0:
        raise ValueError("half of the pairs of reference embeddings are equal, so that they have no distance")
    draws = np.random.default_rng(seed)
    of_reference = resamples(draws, len(reference_ND))
    of_base = resamples(draws, len(base_MD))
    of_tuned = of_base if paired else resamples(draws, len(tuned_MD))
    reference = Weighted(rows_ND=reference_ND, weights_RN=of_reference)
    sets = [Weighted(rows_ND=base_MD, weights_RN=of_base), Weighted(rows_ND=tuned_MD, weights_RN=of_tuned)]
    exact = kernel_audio_distances(
        [Weighted.once(base_MD), Weighted.once(tuned_MD)], Weighted.once(reference_ND), bandwidth
    )
    kad = compared(exact[:, 0], kernel_audio_distances(sets, reference, bandwidth), smaller_is_better=True)
    plain = gaussian_of(reference_ND)
    values = np.array([frechet_distance(gaussian_of(rows_ND), plain) for rows_ND in (base_MD, tuned_MD)])
    frechet = compared(values, _frechet_resampled(sets, reference), smaller_is_better=True)
    if frechet["difference"][0] * kad["difference"][0] < 0:
        frechet["verdict"] = None
    return {"kad": kad, "frechet": frechet}


def compare_means(base_M: np.ndarray, tuned_M: np.ndarray, *, seed: int) -> Compared:
    """The mean of a figure that each sound has, where base and tuned have the same prompts; larger is better."""
    weights_RM = resamples(np.random.default_rng(seed), len(base_M)) / len(base_M)
    both = np.stack([base_M, tuned_M])
    return compared(both.mean(axis=1), both @ weights_RM.T, smaller_is_better=False)


def compared(values: np.ndarray, resampled: np.ndarray, *, smaller_is_better: bool) -> Compared:
    """The figures of base and tuned with their intervals.

    values     (2,) of all clips
    resampled  (2, R)
    """
    difference = interval(float(values[1] - values[0]), resampled[1] - resampled[0])
    _, low, high = difference
    verdict: Verdict | None = None
    if not low <= 0 <= high:
        verdict = "better" if (high < 0) == smaller_is_better else "worse"
    return Compared(
        base=interval(float(values[0]), resampled[0]),
        tuned=interval(float(values[1]), resampled[1]),
        difference=difference,
        verdict=verdict,
    )


def interval(value: float, resampled: np.ndarray) -> list[float]:
    """[value, low, high]: the middle 95 % of the resamples, moved so that their mean is the value, and widened to the
    same around the value less its bias.

    A resample has fewer different clips than there are, by which Fréchet distances grow: without being moved their
    interval may lie beside the value. By as much as the resamples are above the value on average, the value is above
    that of very many clips, to the first order. KAD's resamples are as large as its value, so that it is not widened.
    """
    low, high = (float(edge) for edge in np.quantile(resampled, (LOW, HIGH)) - resampled.mean())
    bias = float(resampled.mean()) - value
    return [value, value + low - max(bias, 0.0), value + high - min(bias, 0.0)]


def resamples(draws: np.random.Generator, rows: int) -> np.ndarray:
    """How often each row is drawn in each bootstrap, (RESAMPLES, rows) float64; always two different ones or more.

    Raises ValueError for fewer than LEAST_CLIPS rows.
    """
    if rows < LEAST_CLIPS:
        raise ValueError(f"{rows} clips are fewer than {LEAST_CLIPS}")
    weights_RN = np.zeros((0, rows))
    while len(weights_RN) < RESAMPLES:
        drawn = draws.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES).astype(np.float64)
        weights_RN = np.concatenate([weights_RN, drawn[(drawn > 0).sum(axis=1) > 1]])
    return weights_RN[:RESAMPLES]


def _frechet_resampled(sets: Sequence[Weighted], reference: Weighted) -> np.ndarray:
    """The Fréchet distance of each set from the reference under each weighting, (sets, R)."""
    made = np.zeros((len(sets), len(reference.weights_RN)))
    for draw, weights_N in enumerate(tqdm(reference.weights_RN, desc="resampling clips", leave=False, delay=2.0)):
        other = gaussian_of(reference.rows_ND, weights_N)
        for row, one in enumerate(sets):
            made[row, draw] = frechet_distance(gaussian_of(one.rows_ND, one.weights_RN[draw]), other)
    return made
