"""What follows from a run's validations: which step is kept, whether the run has come to its end, what the user reads.

Every rank has one and decides the same: the losses are sums over all ranks, of which each rank gets an identical copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trainer.run.standing import RISES_OF_A_TREND, Standing


class Judge:
    """Owns the standing of a run while it trains."""

    def __init__(
        self,
        standing: Standing | None = None,
        *,
        keep_best: bool = False,
        early_stop: int | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        """
        standing    before the next step; None where the run never validates
        keep_best   whether a validation better than the one that is kept has its step saved
        early_stop  validations without improvement after which the run ends; None for no such end
        say         called with what the user should read
        """
        self.standing = standing
        self._keep_best = keep_best
        self._early_stop = early_stop
        self._say = say

    @property
    def ends_run(self) -> bool:
        """Whether as many validations as --early_stop says have brought no improvement."""
        if self.standing is None or self._early_stop is None:
            return False
        return self.standing.without_improvement >= self._early_stop

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step is the best one, and has to be on disk."""
        kept = None if self.standing is None else self.standing.kept
        return self._keep_best and kept is not None and kept.step == step

    def add_step(self, loss: float) -> None:
        """Note the training loss of a step."""
        if self.standing is not None:
            self.standing = self.standing.after_step(loss)

    def add_validation(self, step: int, loss: float) -> None:
        """Note a validation after `step` steps, and say so once where the model begins to learn by heart."""
        assert self.standing is not None, "a run that validates has a standing"
        self.standing = self.standing.after_validation(step, loss, keep_best=self._keep_best)
        if self.standing.learns_by_heart and not self.standing.told:
            self.standing = replace(self.standing, told=True)
            self._say(f"{_trend_in_words(self.standing)} {self._advice()}")

    def _advice(self) -> str:
        """What to do about a model that learns by heart, of what is not done already."""
        ways = [
            *([] if self._keep_best else ["--keep_best 1 keeps and exports the best step"]),
            *([] if self._early_stop is not None else ["--early_stop 3 ends a run at such a point"]),
            "more clips or fewer epochs keep a run from getting here",
        ]
        advice = "; ".join(ways)
        return f"{advice[0].upper()}{advice[1:]}."


def _trend_in_words(standing: Standing) -> str:
    assert standing.last is not None and standing.best is not None
    return (
        f"step {standing.last.step}: the training loss falls ({standing.training_loss_at_rise:.4f} to"
        f" {standing.training_loss:.4f}) while the validation loss has risen {RISES_OF_A_TREND} times in a row or more,"
        f" to {standing.last.loss:.4f}: the model learns its clips by heart and gets worse on others. Best so far is"
        f" step {standing.best.step} with {standing.best.loss:.4f}."
    )
