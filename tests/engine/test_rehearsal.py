"""The rehearsed step is run twice and timed, and leaves no trace in any number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.plans import engine_for, plan_for
from tests.synthetic import random_examples
from trainer.data.cut import cut_for, micro_batches
from trainer.data.order import Order, rows_of_step, valid_cells
from trainer.engine import Ranks, rehearsal
from trainer.engine.rehearsal import TimedBatches, measured
from trainer.flags.config import Config
from trainer.plan.time import StepTime

SEGMENT = 24
EXAMPLES = random_examples([30, 8, 24, 20], segment_frames=SEGMENT)
LARGEST = EXAMPLES.batch([row for row in rows_of_step(
    Order(seed=0, epochs=1, global_batch=4, segment_frames=SEGMENT, codebooks=4, caption_drop_rate=0.0,
          frames=EXAMPLES.codes.frames), 0)][:2])  # fmt: skip


def three_steps(passes: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and state of three steps of four clips, with dropout and EMA, after a rehearsal of so many passes."""
    order = Order(
        seed=1, epochs=3, global_batch=4, segment_frames=SEGMENT, codebooks=4, caption_drop_rate=0.3,
        frames=EXAMPLES.codes.frames,
    )  # fmt: skip
    plan = plan_for(micro_batch=2, accumulation=2, global_batch=4, ema=True)
    engine = engine_for(plan, Config(dataset_path="unused", lr=1e-2, ema_decay=0.9, dropout=0.1))
    counted = [0]
    step = engine.step

    def counting(*arguments, **named):
        counted[0] += 1
        return step(*arguments, **named)

    engine.step = counting  # type: ignore[method-assign]
    if passes:
        engine.rehearse(LARGEST, plan.accumulation)
    assert counted == [passes]
    losses = []
    cut = cut_for(order, micro_batch=2, accumulation=2, world_size=1, row_places=5)
    for number in range(order.steps):
        rows = rows_of_step(order, number)
        shares = micro_batches(rows, cut, rank=0)
        batches = [EXAMPLES.batch(share) for share in shares]
        losses.append(step(batches, valid_cells(rows, 4, SEGMENT), step=number, learning_rate=1e-2).loss)
    return losses, {name: piece.values.clone() for name, piece in engine.state().items()}


def test_losses_weights_moments_and_averages_are_the_same_bits_after_one_two_and_no_passes(monkeypatch):
    twice = three_steps(2)
    monkeypatch.setattr(rehearsal, "SLOW_SECONDS", -1.0)
    for losses, state in (three_steps(1), three_steps(0)):
        assert losses == twice[0] and state.keys() == twice[1].keys()
        for name, values in state.items():
            assert torch.equal(values, twice[1][name]), name


def test_the_time_of_a_real_step_has_all_its_parts():
    engine = engine_for(plan_for(micro_batch=2, accumulation=3, global_batch=6), Config(dataset_path="unused"))
    time = engine.rehearse(LARGEST, 3)
    assert time.compute > 0 and time.update > 0 and time.communication == time.exposed == 0


def clock(*moments: float) -> Iterator[float]:
    yield from moments


@pytest.mark.parametrize("accumulation,moments,compute,update", [
    (1, (10.0, 12.0, 12.5), 2.0, 0.5),
    (2, (10.0, 12.0, 15.0, 15.5), 5.0, 0.5),
    (5, (10.0, 12.0, 15.0, 15.5), 4 * 2.0 + 3.0, 0.5),  # the last one reduces gradients
])  # fmt: skip
def test_a_full_step_is_all_micro_batches_and_one_update(accumulation, moments, compute, update, monkeypatch):
    times = clock(*moments)
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: next(times))
    batches = TimedBatches(LARGEST, accumulation, torch.device("cpu"))
    assert list(batches) == [LARGEST] * min(2, accumulation) == [batches[0]] * len(batches)
    found = batches.time()
    assert (found.compute, found.update, found.seconds) == (compute, update, compute + update)


def test_of_a_step_that_is_computed_again_the_last_attempt_counts(monkeypatch):
    times = clock(10.0, 12.0, 20.0, 21.0, 21.5)
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: next(times))
    batches = TimedBatches(LARGEST, 1, torch.device("cpu"))
    list(batches), list(batches)
    assert batches.time().seconds == 1.5


@pytest.mark.parametrize(
    "slow,compiled,passes", [(False, False, 2), (False, True, 2), (True, False, 1), (True, True, 2)]
)
def test_only_a_first_pass_that_was_slow_without_compiling_is_not_run_again(slow, compiled, passes, monkeypatch):
    monkeypatch.setattr(rehearsal, "SLOW_SECONDS", -1.0 if slow else 1e9)
    made = iter(StepTime(compute=one, update=0, communication=0, exposed=0, source="") for one in (9.0, 1.0))
    ranks = Ranks(timeout_seconds=60)
    found = measured(lambda: next(made), ranks, torch.device("cpu"), None, compiled=compiled)
    assert found.compute == (9.0 if passes == 1 else 1.0)


def test_the_loss_scale_is_left_as_the_first_pass_leaves_it():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)

    def once() -> StepTime:
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        return StepTime(compute=1, update=0, communication=0, exposed=0, source="")

    measured(once, Ranks(timeout_seconds=60), torch.device("cpu"), scaler, compiled=False)
    # Two steps without an overflow double it; after the first one it would take one more.
    assert scaler.get_scale() == 8.0 and scaler._growth_tracker.item() == 1
