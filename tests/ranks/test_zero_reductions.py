"""ZeRO-2 reduces each gradient to the rank that owns it, in float32, after every micro-batch or once for a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import allocations
from tests.plans import plan_for
from tests.ranks.cases import GLOBAL_BATCH, SEGMENT, Numbers, differences, part_of, steps, undisturbed
from tests.ranks.harness import run_ranks, start_ranks
from tests.rounding import LOSS, NORM
from trainer.errors import MemoryShortError
from trainer.plan import memory
from trainer.spec.shapes import KNOWN

pytestmark = pytest.mark.numbers
PARAMETERS = KNOWN["debug"].parameters
STEPS = 11
full = pytest.mark.full


@cache
def once(world_size: int, accumulation: int, **named: Any) -> list[Numbers]:
    return run_ranks(world_size, steps, "zero2", accumulation, reduces_once=True, count=STEPS, **named)


def assert_near(found: list[Numbers], wanted: Numbers) -> None:
    assert all((numbers.losses, numbers.norms) == (found[0].losses, found[0].norms) for numbers in found)
    assert len(found[0].losses) == len(wanted.losses)
    loss, norm = differences(found[0], wanted)
    assert loss <= LOSS and norm <= NORM


# The eleventh step has a single clip, so one micro-batch. Three ranks own parts that end in the middle of parameters,
# and 8 clips do not divide by them.
@pytest.mark.parametrize(
    "world_size,accumulation",
    [(2, 2), *(pytest.param(*case, marks=full) for case in [(2, 3), (3, 2), (4, 2), (4, 3), (1, 2)])],
)
def test_reduced_once_for_a_step_gradients_give_the_numbers_of_one_process(world_size, accumulation):
    assert_near(once(world_size, accumulation), undisturbed()[0])


@full
@pytest.mark.parametrize("world_size,accumulation", [(2, 3), (3, 1), (3, 2), (4, 3)])
def test_reduced_after_every_micro_batch_they_give_them_too(world_size, accumulation):
    assert_near(undisturbed("zero2", world_size, accumulation), undisturbed()[0])


PARTS: dict[str, dict[str, Any]] = {
    "an average": {"ema_decay": 0.9},
    "frozen layers": {"flags": {"freeze": "embeddings,layers.0"}},
    "adapters": {"flags": {"lora_rank": 4}},
    # The eleventh step's only clip has no caption, and so no gradient.
    "a new word": {"flags": {"tune_text": True, "placeholder_vectors": 4}, "count": 10},
    "a melody model": {"model": "debug-melody"},
    "recomputed": {"checkpointing": True},
}


@full
@pytest.mark.parametrize("part", PARTS)
def test_whatever_is_trained_it_gives_the_numbers_of_one_process(part):
    named = {"count": STEPS, **PARTS[part]}
    found = run_ranks(2, steps, "zero2", 2, reduces_once=True, **named)
    [wanted] = run_ranks(1, steps, "single", 1, **named)
    assert_near(found, wanted)
    assert all(numbers.moved == [] for numbers in found)


@full
def test_compiled_layers_give_them_too():
    found = once(2, 2, compiled=True)
    loss, norm = differences(found[0], undisturbed()[0])
    assert loss <= 3 * LOSS and norm <= 3 * NORM and found[0].graphs >= 1  # as in tests/ranks/test_compiled.py


@full
def test_an_offloaded_optimizer_gives_the_same_bits():
    assert once(2, 2, offload=True)[0].losses == once(2, 2)[0].losses


@full
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_continues_bit_for_bit(precision, tmp_path):
    named = {"precision": precision, "ema_decay": 0.9}
    run = {"reduces_once": True, "folder": str(tmp_path), **named}
    whole = run_ranks(2, steps, "zero2", 2, count=STEPS, save_at=5, **run)[0]
    found = run_ranks(2, steps, "zero2", 2, count=5, **run)[0]
    wanted = part_of(whole, 5, 10)
    assert (found.losses, found.norms) == (wanted.losses, wanted.norms)


class Sent(TorchDispatchMode):
    """Counts calls and bytes of what is given to the process group, by collective and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, torch.dtype]] = Counter()
        self.bytes: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
            for tensor in tensors:
                kind = function.name().removeprefix("c10d::"), tensor.dtype
                self.calls[kind] += 1
                self.bytes[kind] += tensor.nbytes
        return function(*args, **(kwargs or {}))


def sent_in_a_step(accumulation: int, precision: str, reduces_once: bool) -> Sent:
    """What this rank gave in its second step."""
    sent = Sent()

    def watch(engine: Any) -> None:
        step = engine.step

        def counted(*arguments: Any, **named: Any) -> Any:
            sent.calls.clear()
            sent.bytes.clear()
            with sent:
                return step(*arguments, **named)

        engine.step = counted

    steps("zero2", accumulation, count=1, precision=precision, reduces_once=reduces_once, watch=watch)
    return sent


@pytest.mark.parametrize(
    "world_size,precision,reduces_once",
    [(2, "bf16", True), *(pytest.param(*case, marks=full) for case in [(2, "bf16", False), (4, "no", True)])],
)
def test_gradients_are_sent_in_float32_to_the_rank_that_owns_them(world_size, precision, reduces_once):
    for bytes_, calls in run_ranks(world_size, counts_of_a_step, 2, precision, reduces_once):
        reductions = 1 if reduces_once else 2
        assert {kind for kind in bytes_ if kind[0] == "reduce_"} == {("reduce_", "torch.float32")}
        # A bucket has room for all of debug's gradients: one reduction for each rank that owns a part.
        assert calls["reduce_", "torch.float32"] == reductions * world_size
        assert bytes_["reduce_", "torch.float32"] == pytest.approx(4 * PARAMETERS * reductions, rel=1e-3)
        # All-reduced are the norm, the losses and flags alone.
        assert sum(count for (name, _), count in bytes_.items() if name.startswith("allreduce")) < 100


def counts_of_a_step(*arguments: Any) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    sent = sent_in_a_step(*arguments)
    as_text = [{(name, str(dtype)): value for (name, dtype), value in of.items()} for of in (sent.bytes, sent.calls)]
    return as_text[0], as_text[1]


class GradientOfAStep:
    """Keeps this rank's part of the first step's gradient, as it is before clipping."""

    def __init__(self) -> None:
        self.found: np.ndarray | None = None

    def __call__(self, engine: Any) -> None:
        backend, finish = engine.backend, engine.backend.finish

        def kept(learning_rate: float) -> Any:
            if self.found is None:
                # One group of parameters, whose last values are padding.
                parts = backend._zero.averaged_gradients[0]
                self.found = torch.cat([part.reshape(-1) for part in parts]).double().numpy()
            return finish(learning_rate)

        if self.found is None:
            backend.finish = kept


def gradient(accumulation: int, precision: str, reduces_once: bool) -> np.ndarray:
    watch = GradientOfAStep()
    steps("zero2", accumulation, count=1, precision=precision, reduces_once=reduces_once, watch=watch)
    assert watch.found is not None
    return watch.found


@full
def test_micro_batches_of_bf16_are_added_in_float32():
    """What was added in float32 is rounded to bf16 once, by 2**-8 of a value at most, before it is reduced."""
    [each] = run_ranks(1, gradient, GLOBAL_BATCH, "bf16", False)
    [added] = run_ranks(1, gradient, GLOBAL_BATCH, "bf16", True)
    apart = np.abs(added - each)
    assert np.linalg.norm(apart) > 0
    # Sums of eight values in bf16 are rounded seven times, each by as much.
    assert (apart <= 2**-8 * 1.01 * np.abs(each) + 1e-12).all()


class Broken:
    """Rank 1 runs out of memory in the forward of its second micro-batch, or is interrupted between the two."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __call__(self, engine: Any) -> None:
        self.engine, self.calls = engine, 0
        if engine.ranks.rank == 0:
            return
        if self.error is KeyboardInterrupt:
            # The host waits here in the rehearsal, where requests to stop interrupt at once.
            engine._reseed = self.fail
        else:
            engine.backend.model.register_forward_pre_hook(self.fail)

    def fail(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            raise self.error("no memory is left")


def error_of_a_broken_step(error: type[BaseException]) -> tuple[str, int, bool]:
    """What the rank's step raised, how many reductions it had sent until then, and whether it would still send some:
    DeepSpeed's block, if nobody leaves it, is left when Python clears away what remains of the process."""
    watch, sent = Broken(error), Sent()
    try:
        with sent:
            steps("zero2", 2, count=1, reduces_once=True, watch=watch)
    except (MemoryShortError, KeyboardInterrupt) as raised:
        reductions = sum(count for (name, _), count in sent.calls.items() if name == "reduce_")
        return type(raised).__name__, reductions, watch.engine.backend._engine.inside_no_sync_ctxt
    return "", 0, False


@full
@pytest.mark.parametrize(
    "error,raised", [(torch.OutOfMemoryError, "MemoryShortError"), (KeyboardInterrupt, "KeyboardInterrupt")]
)
def test_a_rank_that_fails_within_a_step_says_so_and_reduces_nothing(error, raised):
    ranks = start_ranks(2, error_of_a_broken_step, error)
    try:
        receiver, _ = ranks._pipes[1]
        assert receiver.poll(60), "it waits for the other, which has met no error"
        kind, value = receiver.recv()
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
    assert (kind, *value) == ("returned", raised, 0, False)


BUCKET = 600_000  # values, of the 2.7 million of debug: buckets of the size that a real model's have beside its weights


def peak_of_a_step(accumulation: int, precision: str, reduces_once: bool) -> tuple[int, int]:
    """The most that this rank held in its second step, weights and optimizer included; and what the plan expects."""
    from trainer.engine import accelerator

    accelerator.ZERO_BUCKET_ELEMENTS = memory.ZERO_BUCKET_ELEMENTS = BUCKET
    peaks: list[int] = []

    def watch(engine: Any) -> None:
        if peaks:
            return
        step = engine.step

        def measured(*arguments: Any, **named: Any) -> Any:
            results: list[Any] = []
            most = allocations.peak_bytes(lambda: results.append(step(*arguments, **named)))
            peaks.append(engine.backend.weight_bytes() + engine.backend.optimizer_bytes() + most)
            return results[0]

        engine.step = measured

    steps("zero2", accumulation, count=2, precision=precision, reduces_once=reduces_once, watch=watch)
    layout = plan_for(
        "zero2",
        world_size=2,
        micro_batch=GLOBAL_BATCH // (2 * accumulation),
        accumulation=accumulation,
        precision=precision,
        reduces_once=reduces_once,
    ).layout
    layout = replace(layout, workload=replace(layout.workload, segment_frames=SEGMENT, caption_tokens=8))
    return peaks[-1], memory.expected_bytes(KNOWN["debug"], layout).allocated


@full
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulation,reduces_once,least", [(1, False, 0.75), (2, False, 0.75), (2, True, 0.88)])
def test_a_step_peaks_where_the_plan_says(accumulation, reduces_once, least, precision):
    """Of a bucket, the plan counts all as the part of one rank. With two ranks and small buckets it seldom is; and the
    fullest bucket is not the one that is reduced while there are most activations."""
    found = run_ranks(2, peak_of_a_step, accumulation, precision, reduces_once)
    most, expected = max(peak for peak, _ in found), found[0][1]
    assert least * expected <= most <= 1.01 * expected


def test_whole_gradients_are_counted_where_they_are_reduced_once() -> None:
    each = plan_for("zero2", world_size=2, accumulation=2).memory
    at_once = plan_for("zero2", world_size=2, accumulation=2, reduces_once=True).memory
    assert at_once.gradients - each.gradients == 4 * PARAMETERS
    assert at_once.reused > 0 and each.reused == 0
