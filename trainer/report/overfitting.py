"""Whether a run is too long or too short: its training loss beside its validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.report.curves import smoothed
from trainer.report.run_metrics import Metrics

RISES, FALLS, LEVEL, TOO_FEW, NONE = "rises", "falls", "level", "too few", "none"
LOWEST = "lowest"
FEWEST = 5  # validations, below which a rise cannot be told from noise
AVERAGED = 3  # validations in a row whose mean is looked at
LEAST_CHANGE = 0.005  # of the loss: what is smaller is nothing that a person hears
NOISES = 3.0  # times the noise of one validation; the mean of three has a third of its variance, so 5.2 of its own


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A validation with the training loss around it, averaged as in the chart; None where none was reported."""

    title: str
    step: int
    training: float | None
    validation: float

    @property
    def is_lowest(self) -> bool:
        return LOWEST in self.title

    @property
    def gap(self) -> float | None:
        """By how much the validation loss is above the training loss."""
        return None if self.training is None else self.validation - self.training


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the losses say.

    state    RISES since the lowest, FALLS to the end, LEVEL, TOO_FEW validations to say, NONE at all
    validations  how many there were
    moments  the first validation, the lowest and the last one, each once
    has_fallen  whether the loss has fallen since the first validations by more than chance
    """

    state: str
    validations: int
    moments: Sequence[Moment]
    has_fallen: bool


def fit_of(metrics: Metrics) -> Fit:
    """What the losses of a run say."""
    steps, losses = metrics.validation["step"], metrics.validation["validation_loss"]
    known = np.isfinite(steps) & np.isfinite(losses)
    steps, losses = steps[known], losses[known]
    if not len(losses):
        return Fit(state=NONE, validations=0, moments=(), has_fallen=False)
    at = {0: "first", len(losses) - 1: "last"}
    lowest = int(losses.argmin())
    at[lowest] = f"{at[lowest]} and {LOWEST}" if lowest in at else LOWEST
    training, loss = metrics.training["step"], smoothed(metrics.training["loss"])
    moments = [
        Moment(title=at[place], step=int(steps[place]), training=_at(training, loss, steps[place]),
               validation=float(losses[place]))
        for place in sorted(at)
    ]  # fmt: skip
    return Fit(state=trend_of(losses), validations=len(losses), moments=moments, has_fallen=has_fallen(losses))


def trend_of(losses: np.ndarray) -> str:
    """RISES, FALLS, LEVEL or TOO_FEW, of validation losses (n,) in order.

    Means of AVERAGED losses in a row are compared: the last with the lowest, and with the one after two thirds of all.
    What counts is a change of more than NOISES times the noise of one loss, and of LEAST_CHANGE of the loss.
    """
    if len(losses) < FEWEST:
        return TOO_FEW
    means, least = _means_and_least_change(losses)
    if means[-1] - means.min() > least:
        return RISES
    return FALLS if means[2 * (len(means) - 1) // 3] - means[-1] > least else LEVEL


def has_fallen(losses: np.ndarray) -> bool:
    """Whether the mean of AVERAGED losses in a row was ever below the first one by what counts as a change."""
    if len(losses) < FEWEST:
        return False
    means, least = _means_and_least_change(losses)
    return bool(means[0] - means.min() > least)


def _means_and_least_change(losses: np.ndarray) -> tuple[np.ndarray, float]:
    means = np.convolve(losses, np.full(AVERAGED, 1 / AVERAGED), "valid")
    return means, max(NOISES * noise_of(losses), LEAST_CHANGE * abs(float(means.min())))


def noise_of(losses: np.ndarray) -> float:
    """The standard deviation of a loss around its curve, (n,) with n >= 3, by how far each lies from the middle between
    its neighbours: that has 1.5 times the variance of one loss, on a straight line. The median of the distances leaves
    out the bend at the start of a run; of normal noise it is 0.6745 standard deviations."""
    bends = losses[1:-1] - (losses[:-2] + losses[2:]) / 2
    return float(np.median(np.abs(bends)) / 0.6745 / 1.5**0.5)


def _at(steps: np.ndarray, values: np.ndarray, step: float) -> float | None:
    """The value of the nearest step that has one."""
    known = np.isfinite(steps) & np.isfinite(values)
    if not known.any():
        return None
    steps, values = steps[known], values[known]
    return float(values[np.abs(steps - step).argmin()])
