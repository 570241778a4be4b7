"""Under ZeRO, gradients that are not finite change no weight, also with the defaults of an older DeepSpeed."""

from __future__ import annotations

import pytest
import torch

from tests.ranks.cases import steps
from tests.ranks.harness import run_ranks
from trainer.errors import NotFiniteError

pytestmark = pytest.mark.full


class Spoiled:
    """At the start: the first micro-batch of rank 1 gives gradients that are NaN. Keeps copies of this rank's state."""

    def __call__(self, engine) -> None:
        self.engine = engine
        self.before = {name: piece.values.clone() for name, piece in engine.state().items()}
        backward = engine.backend.backward

        def with_nan(loss: torch.Tensor, *, last: bool) -> None:
            backward(loss * float("nan") if engine.ranks.rank == 1 else loss, last=last)

        engine.backend.backward = with_nan


def as_deepspeed_0_18() -> None:
    """The default that DeepSpeed 0.18 has for bf16."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    DeepSpeedBF16Config.model_fields["check_grad_overflow"].default = False
    DeepSpeedBF16Config.model_rebuild(force=True)
    assert not DeepSpeedBF16Config().check_grad_overflow


def changed_by_a_spoiled_step(strategy: str, precision: str, reduces_once: bool = False) -> list[str]:
    """The names of this rank's weights and moments that a step with NaN gradients on one rank changed."""
    as_deepspeed_0_18()
    watch = Spoiled()
    with pytest.raises(NotFiniteError):
        steps(strategy, 1 + reduces_once, count=1, precision=precision, reduces_once=reduces_once, watch=watch)
    state = watch.engine.state()
    return [name for name, values in watch.before.items() if not torch.equal(state[name].values, values)]


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(strategy, precision):
    assert run_ranks(2, changed_by_a_spoiled_step, strategy, precision) == [[], []]


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_nor_does_it_where_gradients_are_reduced_once_for_a_step(precision):
    assert run_ranks(2, changed_by_a_spoiled_step, "zero2", precision, True) == [[], []]
