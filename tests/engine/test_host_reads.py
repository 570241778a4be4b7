"""The host reads from the device once in a step, when AdamW is on its way; numbers are those of the plain order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plans import engine_for, plan_for
from tests.ranks.cases import differences, steps, undisturbed
from tests.ranks.harness import run_ranks
from tests.rounding import LOSS, NORM
from tests.synthetic import random_examples
from trainer.data.batches import Batch
from trainer.data.order import Row
from trainer.engine import Engine, StepResult
from trainer.errors import NotFiniteError
from trainer.flags.config import Config

RATE = 1e-3
# By these the host gets a value that the device has computed, and waits for it.
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
OPERATIONS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2")


class Watch:
    """Inside the block: what was done, in order, of the reads above and of AdamW's own pass."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._inside = False
        self._modes = (_Methods(self), _Operations(self.events))

    def reads(self) -> list[str]:
        return [event for event in self.events if event != "adamw"]

    def __enter__(self) -> Watch:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Methods(TorchFunctionMode):
    def __init__(self, watch: Watch):
        super().__init__()
        self._watch = watch

    def __torch_function__(self, function: Callable, types: Any, arguments: tuple = (), named: dict | None = None):
        name = getattr(function, "__name__", "")
        before = len(self._watch.events)
        result = function(*arguments, **(named or {}))
        if name in METHODS and isinstance(arguments[0], Tensor):
            self._watch.events[before:] = [name]  # the operation behind a method is the same read
        return result


class _Operations(TorchDispatchMode):
    def __init__(self, events: list[str]):
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None):
        name = function.overloadpacket.__name__
        if name in OPERATIONS:
            self._events.append(name)
        if name == "_fused_adamw_":
            self._events.append("adamw")
        return function(*arguments, **(named or {}))


def two_micro_batches() -> tuple[list[Batch], np.ndarray]:
    """Clips of unequal lengths, with captions and without, and how many valid cells they have."""
    examples = random_examples([40, 20, 30, 5], ["some words", None, "others", "a b c"], segment_frames=40)
    rows = [
        Row(clip=clip, epoch=0, view=0, start=0, frames=frames, drop_caption=False)
        for clip, frames in enumerate([40, 20, 30, 5])
    ]
    batches = [examples.batch(rows[:2]), examples.batch(rows[2:])]
    return batches, sum((batch.labels_BKT >= 0).sum(dim=(0, 2)) for batch in batches).numpy()


@pytest.fixture(scope="module")
def work():
    return two_micro_batches()


def engine_of(*, max_grad_norm: float = 1.0, precision: str = "no", ema: float | None = None) -> Engine:
    plan = plan_for(micro_batch=2, accumulation=2, global_batch=4, precision=precision, ema=ema is not None)
    config = Config(dataset_path="unused", lr=RATE, weight_decay=0.01, max_grad_norm=max_grad_norm, ema_decay=ema)
    return engine_for(plan, config)


def state_of(engine: Engine) -> dict[str, Tensor]:
    counts = {f"steps/{i}": state["step"] for i, state in enumerate(engine.backend._optimizer.state.values())}
    return {name: piece.values.clone() for name, piece in engine.state().items()} | {
        name: count.clone() for name, count in counts.items()
    }


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_reads_once_and_after_adamw_was_launched(precision, work):
    engine = engine_of(precision=precision, ema=0.9)
    for step in range(2):  # the first step of a process may look at more
        with Watch() as watch:
            engine.step(*work, step=step, learning_rate=RATE, requests=(True, False))
    assert watch.events == ["adamw", "tolist"]


def test_the_watch_sees_what_a_plain_order_reads(work):
    engine = engine_of()
    engine._step = partial(in_plain_order, engine)
    with Watch() as watch:
        engine.step(*work, step=0, learning_rate=RATE)
        assert bool(torch.ones(1)) and torch.ones(2).nonzero().numel() == 2
        assert torch.equal(torch.ones(1), torch.ones(1))
    assert watch.events == ["tolist", "adamw", "__bool__", "nonzero", "equal"]


def test_an_evaluation_reads_once(work):
    engine = engine_of()
    engine.evaluate(work[0])
    with Watch() as watch:
        engine.evaluate(work[0])
    assert set(watch.events) == {"cpu", "numpy"} and len(watch.events) == 2, "numpy() of what cpu() has brought"


def in_plain_order(
    engine: Engine, batches: Any, cells_K: Tensor, asked_R: Tensor, step: int, learning_rate: float
) -> StepResult:
    """Engine._step as one would write it down: read all values, divide all gradients, step."""
    sums = engine._backward(batches, cells_K, step)
    losses = engine.ranks.sum(sums / cells_K.clamp(min=1))
    square = engine.ranks.sum(engine.backend.finish(learning_rate))
    *values, norm = torch.cat([losses.double(), square.sqrt().reshape(1)]).tolist()
    optimizer = engine.backend._optimizer.optimizer
    divisor = (norm + 1e-6) / engine.backend._max_grad_norm
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and divisor > 1:
                parameter.grad.div_(divisor)
    optimizer.step()
    engine.backend._drop_gradients()
    return StepResult(losses_K=tuple(values), grad_norm=norm)


@pytest.mark.numbers
def test_steps_are_those_of_the_plain_order_bit_for_bit(work):
    ours, plain = engine_of(), engine_of()
    plain._step = partial(in_plain_order, plain)
    for step, max_grad_norm in enumerate([0.1, 0.1, 1e3, 0.1, 1e3]):
        for engine in (ours, plain):
            engine.backend._max_grad_norm = max_grad_norm
        results = [engine.step(*work, step=step, learning_rate=RATE) for engine in (ours, plain)]
        assert results[0] == results[1]
        assert (results[0].grad_norm > max_grad_norm) == (max_grad_norm < 1)
    found, expected = state_of(ours), state_of(plain)
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert found["steps/0"] == 5


class PlainOrder:
    """Called with an engine, lets its steps go in the plain order."""

    def __call__(self, engine: Engine) -> None:
        engine._step = partial(in_plain_order, engine)  # type: ignore[method-assign]


@pytest.mark.full
@pytest.mark.numbers
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_give_the_numbers_of_the_plain_order(strategy):
    plain = run_ranks(2, steps, strategy, 2, count=11, watch=PlainOrder())[0]
    found = undisturbed(strategy, 2, 2)[0]
    loss, norm = differences(found, plain)
    assert loss <= LOSS and norm <= NORM
    if strategy == "ddp":  # FSDP's gradients were divided by another kernel than AdamW's
        assert (found.losses, found.norms) == (plain.losses, plain.norms)


def spoiled(engine: Engine, what: str) -> Callable[[], None]:
    """Make the losses, or the gradients, of the engine's next steps NaN; returns what ends that."""
    backward, sums = engine.backend.backward, engine._backward

    def with_nan_gradients(loss: Tensor, *, last: bool) -> None:
        backward(loss * float("nan"), last=last)

    if what == "gradients":
        engine.backend.backward = with_nan_gradients  # type: ignore[method-assign]
    else:
        value = float("nan") if what == "NaN losses" else float("inf")
        engine._backward = lambda *arguments: sums(*arguments) * value  # type: ignore[method-assign]

    def end() -> None:
        engine.backend.backward, engine._backward = backward, sums  # type: ignore[method-assign]

    return end


SPOILED = ("gradients", "NaN losses", "infinite losses")


def test_a_step_that_is_not_finite_leaves_no_trace(work):
    engine, other = engine_of(ema=0.9), engine_of(ema=0.9)
    for step, what in enumerate(SPOILED):
        results = [each.step(*work, step=step, learning_rate=RATE) for each in (engine, other)]
        assert results[0] == results[1]
        before = state_of(engine)
        end = spoiled(engine, what)
        with pytest.raises(NotFiniteError, match=f"^step {step + 2}: .*no weight was changed"):
            engine.step(*work, step=step + 1, learning_rate=RATE)
        end()
        after, expected = state_of(engine), state_of(other)
        assert all(torch.equal(after[name], values) for name, values in before.items())
        assert all(torch.equal(after[name], values) for name, values in expected.items())
    results = [each.step(*work, step=len(SPOILED), learning_rate=RATE) for each in (engine, other)]
    assert results[0] == results[1]


@pytest.mark.full
def test_moments_of_8_bits_are_left_alone_by_a_step_that_is_not_finite(work):
    pytest.importorskip("bitsandbytes")
    plan = plan_for(micro_batch=2, accumulation=2, global_batch=4, eight_bit_moments=True)
    engine = engine_for(plan, Config(dataset_path="unused", lr=RATE, optimizer="adamw8bit"))
    engine.step(*work, step=0, learning_rate=RATE)
    before = {name: piece.values.clone() for name, piece in engine.state().items()}
    spoiled(engine, "NaN losses")
    with pytest.raises(NotFiniteError):
        engine.step(*work, step=1, learning_rate=RATE)
    after = engine.state()
    assert all(torch.equal(after[name].values, values) for name, values in before.items())


class SpoiledOnOneRank:
    """Called with an engine before its first step, lets it take steps of which rank 1 has NaN in gradients or losses.

    changed      what they changed of this rank's weights, moments, EMA and counts of steps
    collectives  sums over all ranks that Python asked for in a step, one number for each step
    """

    def __init__(self) -> None:
        self.changed: list[str] = []
        self.collectives: list[int] = []

    def __call__(self, engine: Engine) -> None:
        if self.collectives:
            return
        batches, cells = two_micro_batches()
        engine.step(batches[:1], cells, step=0, learning_rate=RATE)
        before = state_of(engine)
        for what in SPOILED:
            end = spoiled(engine, what) if engine.ranks.rank == 1 else lambda: None
            with pytest.raises(NotFiniteError), sums_over_all_ranks() as sums:
                engine.step(batches[:1], cells, step=1, learning_rate=RATE)
            end()
            self.collectives.append(len(sums))
            now = state_of(engine)
            self.changed += [f"{what}: {name}" for name in before if not torch.equal(now[name], before[name])]


@contextmanager
def sums_over_all_ranks() -> Iterator[list[Tensor]]:
    """The tensors that are summed over all ranks inside the block; groups of some ranks are left out."""
    found, original = [], dist.all_reduce

    def counted(values: Tensor, *arguments: Any, **named: Any) -> Any:
        if not arguments and not named:
            found.append(values)
        return original(values, *arguments, **named)

    dist.all_reduce = counted
    try:
        yield found
    finally:
        dist.all_reduce = original


def spoiled_on_one_rank(strategy: str, nodes: int) -> tuple[list[str], list[int]]:
    watch = SpoiledOnOneRank()
    steps(strategy, 1, count=1, nodes=nodes, ema_decay=0.9, watch=watch)
    return watch.changed, watch.collectives


@pytest.mark.full
@pytest.mark.parametrize("strategy,world_size,nodes", [("ddp", 2, 1), ("fsdp", 2, 1), ("hsdp", 4, 2)])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(strategy, world_size, nodes):
    """And whatever the engine sums over the ranks travels in one collective."""
    found = run_ranks(world_size, spoiled_on_one_rank, strategy, nodes)
    assert found == [([], [1, 1, 1])] * world_size
