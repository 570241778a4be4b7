"""What the validations of a run have shown so far: the best of them, and how many since then were no better.

Every rank computes it from numbers that are the same on all of them, and each checkpoint's header holds it, so that a
run that goes on decides as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

# Validations in a row whose loss has risen, after which a falling training loss means learning by heart.
RISES_OF_A_TREND = 3


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One validation: the optimizer steps done then, and its cross entropy in nats."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Standing:
    """After some optimizer steps of a run.

    validated_on            digest of the clips that validate: losses over others cannot be compared
    steps                   all steps of the run, as it was meant to be then
    best, last              the validation of the lowest loss, and the latest; None before the first
    without_improvement     validations since the best one
    kept                    the best validation whose checkpoint stays (--keep_best); None where there is none
    rises                   validations in a row, up to the latest, of a higher loss than the one before
    training_loss           mean over the steps between the latest two validations; None before the first
    training_loss_at_rise   the same of the last validation before those rises; None while there are none
    told                    whether the user was told of these rises
    sum_since, steps_since  of the training losses since the latest validation, and how many they are
    """

    validated_on: str
    steps: int
    best: Validation | None = None
    last: Validation | None = None
    without_improvement: int = 0
    kept: Validation | None = None
    rises: int = 0
    training_loss: float | None = None
    training_loss_at_rise: float | None = None
    told: bool = False
    sum_since: float = 0.0
    steps_since: int = 0

    def after_step(self, loss: float) -> Standing:
        """The standing after one more step of this training loss."""
        return replace(self, sum_since=self.sum_since + loss, steps_since=self.steps_since + 1)

    def after_validation(self, step: int, loss: float, *, keep_best: bool) -> Standing:
        """The standing after a validation of this loss. A loss that is not a number is no improvement."""
        found = Validation(step=step, loss=loss)
        improves = is_better(loss, self.best)
        rises = self.rises + 1 if self.last is not None and loss > self.last.loss else 0
        at_rise = {0: None, 1: self.training_loss}.get(rises, self.training_loss_at_rise)
        return replace(
            self,
            best=found if improves else self.best,
            last=found,
            without_improvement=0 if improves else self.without_improvement + 1,
            kept=found if keep_best and is_better(loss, self.kept) else self.kept,
            rises=rises,
            training_loss=self.sum_since / self.steps_since if self.steps_since else self.training_loss,
            training_loss_at_rise=at_rise,
            told=self.told and rises > 0,
            sum_since=0.0,
            steps_since=0,
        )

    @property
    def learns_by_heart(self) -> bool:
        """Whether the validation loss has risen for some validations in a row while the training loss fell."""
        if self.training_loss is None or self.training_loss_at_rise is None:
            return False
        return self.rises >= RISES_OF_A_TREND and self.training_loss < self.training_loss_at_rise

    def loss_at(self, step: int) -> float | None:
        """The validation loss after `step` steps, where it is remembered."""
        known = (self.kept, self.best, self.last)
        return next((one.loss for one in known if one is not None and one.step == step), None)

    def to_json(self) -> dict[str, object]:
        """As a checkpoint's header holds it. Keep the names: older checkpoints have them."""
        return asdict(self)

    @staticmethod
    def of_json(values: Mapping[str, Any]) -> Standing:
        """The inverse of `to_json`; what an older or newer version lacks or adds is left out.

        Raises KeyError, TypeError or ValueError where `values` is not what it returns.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{values!r} is no standing")
        own = {name: value for name, value in values.items() if name in Standing.__dataclass_fields__}
        for name in ("best", "last", "kept"):
            if own.get(name) is not None:
                own[name] = Validation(step=int(own[name]["step"]), loss=float(own[name]["loss"]))
        return Standing(**own)


def is_better(loss: float, than: Validation | None) -> bool:
    """Whether a validation loss is better than that of another validation, or the first that is a number."""
    return loss < (math.inf if than is None else than.loss)
