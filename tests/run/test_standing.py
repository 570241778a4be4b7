"""What validations show is counted as a slow obvious version counts it, and survives being written and read."""

from __future__ import annotations

import json
import math
import random

import pytest

from tests.synthetic import HEADER
from trainer.run.checkpoint import RunHeader
from trainer.run.standing import Standing, Validation

FRESH = Standing(validated_on="clips", steps=100)


def after(standing: Standing, losses: list[float], training: list[float] | None = None) -> Standing:
    """The standing after a validation at each step from the latest one on; `training` losses of these steps."""
    first = 1 + (0 if standing.last is None else standing.last.step)
    for step, loss in enumerate(losses, first):
        standing = standing.after_step(1.0 if training is None else training[step - first])
        standing = standing.after_validation(step, loss, keep_best=True)
    return standing


@pytest.mark.parametrize("seed", range(20))
def test_best_and_count_are_those_of_the_whole_list_wherever_the_run_was_interrupted(seed: int) -> None:
    draw = random.Random(seed)
    # Few values, so that there are ties: an equal loss is no improvement.
    losses = [draw.choice((3.0, 2.5, 2.0, 1.5, 1.0, math.nan)) for _ in range(draw.randint(1, 12))]
    cut = draw.randint(0, len(losses))
    stopped = after(FRESH, losses[:cut])
    found = after(Standing.of_json(json.loads(json.dumps(stopped.to_json()))), losses[cut:])
    numbers = [loss for loss in losses if not math.isnan(loss)]
    if not numbers:
        assert found.best is found.kept is None and found.without_improvement == len(losses)
        return
    best = losses.index(min(numbers))
    assert found.best == found.kept == Validation(step=best + 1, loss=losses[best])
    assert found.without_improvement == len(losses) - 1 - best


def test_nothing_is_kept_where_nobody_asks_for_it() -> None:
    found = FRESH.after_validation(1, 2.0, keep_best=False)
    assert found.best == Validation(step=1, loss=2.0) and found.kept is None
    # Asked for later, the best from there on is kept, though another one was better before.
    later = found.after_validation(2, 2.5, keep_best=True)
    assert later.best == found.best and later.kept == Validation(step=2, loss=2.5)


def test_learning_by_heart_takes_three_rises_in_a_row_and_a_falling_training_loss() -> None:
    falling, rising = [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    assert not after(FRESH, [1.0, 1.1, 1.2], falling).learns_by_heart
    assert after(FRESH, [1.0, 1.1, 1.2, 1.3], falling).learns_by_heart
    assert after(FRESH, [1.0, 1.1, 1.2, 1.3, 1.4], falling).learns_by_heart
    assert not after(FRESH, [1.0, 1.1, 1.2, 1.3], rising).learns_by_heart
    assert not after(FRESH, [1.0, 1.1, 1.1, 1.2, 1.3], falling).learns_by_heart, "an equal loss is no rise"
    assert not after(FRESH, [1.0, 1.1, 1.2, 1.3, 0.9], falling).learns_by_heart


def test_a_header_without_the_part_is_read_and_is_what_a_run_without_validation_writes() -> None:
    written = json.loads(json.dumps(HEADER.to_json()))
    assert set(written) == {"identity", "global_batch", "config"}, "what versions before this part wrote"
    assert RunHeader.of_json(written) == HEADER


def test_what_a_newer_version_adds_is_passed_over_and_what_an_older_one_lacks_has_its_default() -> None:
    values = {**after(FRESH, [2.0]).to_json(), "of_the_future": [1]}
    del values["told"]
    assert Standing.of_json(values) == after(FRESH, [2.0])


@pytest.mark.parametrize("values", [[], {"steps": 3}, {"validated_on": "x", "steps": 3, "best": {"step": "x"}}])
def test_what_is_no_standing_is_refused(values: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Standing.of_json(values)  # type: ignore[arg-type]
