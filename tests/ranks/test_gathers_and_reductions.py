"""fsdp and hsdp may gather weights once for a step, and reduce gradients once: fewer collectives, more memory, and the
same numbers. After every step and every evaluation all is sharded again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from tests.plans import plan_for
from tests.ranks.cases import GLOBAL_BATCH, LENGTHS, SEGMENT, Numbers, differences, part_of, steps, undisturbed
from tests.ranks.harness import run_ranks
from tests.rounding import LOSS, NORM
from tests.synthetic import random_examples
from trainer.data.order import Row
from trainer.spec.shapes import KNOWN

pytestmark = pytest.mark.numbers
COUNT = 11  # the last step has a single clip, and so one micro-batch
PARAMETERS = 2_689_408  # debug's decoder and projection
LAYERS = 2  # of debug, each a unit of FSDP; one more has all that lies outside of them
UNITS = LAYERS + 1
FLOAT32, HALF = 4, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A strategy on so many ranks, and when it communicates."""

    strategy: str = "fsdp"
    ranks: int = 2
    accumulation: int = 2
    gathers_once: bool = False
    reduces_once: bool = False
    precision: str = "no"

    def __str__(self) -> str:
        once = ["gathers_once" * self.gathers_once, "reduces_once" * self.reduces_once]
        precision = self.precision.replace("no", "")
        return "-".join(filter(None, [self.strategy, str(self.ranks), str(self.accumulation), *once, precision]))

    @property
    def nodes(self) -> int:
        return 2 if self.strategy == "hsdp" else 1

    @property
    def layout(self) -> dict[str, Any]:
        once = {"gathers_once": self.gathers_once, "reduces_once": self.reduces_once}
        return {"nodes": self.nodes, "precision": self.precision, **once}


CASES = [
    Case(strategy=strategy, ranks=ranks, accumulation=accumulation, gathers_once=gathers, reduces_once=reduces)
    for strategy, ranks in (("fsdp", 2), ("fsdp", 4), ("hsdp", 4))
    for accumulation in (2, 3)
    for gathers in (False, True)
    for reduces in (False, True)
]
BOTH = Case(gathers_once=True, reduces_once=True)
BF16 = replace(BOTH, precision="bf16")
QUICK = (BOTH,)


def marked(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, marks=() if case in QUICK else pytest.mark.full, id=str(case)) for case in cases]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one case gave: the numbers of the first rank, and what each rank wrote down."""

    numbers: Numbers
    notes: list[dict[str, Any]]


class Watch:
    """Writes down, for each step of this rank: collectives by kind, the most bytes that FSDP held whole when a forward
    had ended, the types of whole gradients then, what was still whole after the step, and after an evaluation."""

    def __init__(self, folder: str):
        self._folder, self._counts, self._notes = folder, Counter[str](), {"steps": [], "left": []}  # type: ignore[var-annotated]
        self._most: Counter[str] = Counter()
        self._dtypes: set[str] = set()

    def __call__(self, engine: Any) -> None:
        if not self._notes["left"]:
            self._start(engine)
        else:
            self._notes["steps"].append(dict(self._counts))
        self._notes["left"].append(sum(held(engine.backend.model).values()))
        self._notes["most"], self._notes["dtypes"] = dict(self._most), sorted(self._dtypes)
        if len(self._notes["steps"]) == 2:
            self._evaluate(engine)
        self._counts.clear()
        Path(self._folder, str(engine.ranks.rank)).write_text(json.dumps(self._notes))

    def _start(self, engine: Any) -> None:
        for kind, plain in (("all_gather", "all_gather_into_tensor"), ("reduce_scatter", "reduce_scatter_tensor")):
            newer = f"{kind}_single"  # what torch 2.13 calls it
            name = newer if hasattr(dist, newer) else plain
            setattr(dist, name, self._counting(kind, getattr(dist, name)))
        # Of all nodes' shares alone: the engine's own sums are over all ranks, and name no group.
        dist.all_reduce = self._counting("all_reduce", dist.all_reduce, of_a_group=True)
        engine.backend.model.register_forward_hook(lambda *_: self._look(engine.backend.model))

    def _counting(self, name: str, function: Any, of_a_group: bool = False) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            if not of_a_group or named.get("group") is not None:
                self._counts[name] += 1
            return function(*arguments, **named)

        return counted

    def _look(self, model: Any) -> None:
        """After a forward, whose backward is still to come."""
        for part, count in held(model).items():
            self._most[part] = max(self._most[part], count)
        self._dtypes |= {str(gradient.dtype) for gradient in whole_gradients(model)}

    def _evaluate(self, engine: Any) -> None:
        examples = random_examples(LENGTHS, None, segment_frames=SEGMENT, new_tokens=0, model="debug")
        rows = [Row(clip=clip, epoch=0, view=0, start=0, frames=LENGTHS[clip], drop_caption=False) for clip in (0, 1)]
        batches = [examples.batch(rows), examples.batch(rows[:1])]
        self._notes["evaluated"] = engine.evaluate(batches)[0].tolist()
        self._notes["left"].append(sum(held(engine.backend.model).values()))
        with engine.sampling_model():
            self._notes["left"].append(sum(held(engine.backend.model).values()))


def groups(model: Any) -> list[Any]:
    """What FSDP gathers and reduces at once, as it knows it."""
    return [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]


def whole_gradients(model: Any) -> list[torch.Tensor]:
    found = []
    for parameter in (parameter for group in groups(model) for parameter in group.fsdp_params):
        whole = getattr(parameter, "_unsharded_param", None)  # made by the first gathering
        found += [parameter.unsharded_accumulated_grad, None if whole is None else whole.grad]
    return [gradient for gradient in found if gradient is not None]


def held(model: Any) -> Counter[str]:
    """Bytes of whole weights and of whole gradients, and of sums of one node alone."""
    found: Counter[str] = Counter()
    for group in groups(model):
        for parameter in group.fsdp_params:
            if (whole := getattr(parameter, "_unsharded_param", None)) is not None:
                found["weights"] += whole.untyped_storage().nbytes()
        if group._partial_reduce_output is not None:
            found["sums of a node"] += group._partial_reduce_output.nbytes
    found["gradients"] += sum(gradient.nbytes for gradient in whole_gradients(model))
    return found


@cache
def found(case: Case) -> Found:
    with TemporaryDirectory() as folder:
        numbers = run_ranks(
            case.ranks,
            steps,
            case.strategy,
            case.accumulation,
            count=COUNT,
            ema_decay=0.5,  # which evaluation computes with
            watch=Watch(folder),
            **case.layout,
        )
        notes = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(case.ranks)]
    return Found(numbers=numbers[0], notes=notes)


@pytest.mark.parametrize("case", marked(CASES))
def test_whenever_they_communicate_losses_and_norms_are_those_of_one_process(case: Case) -> None:
    assert len(found(case).numbers.losses) == COUNT
    loss, norm = differences(found(case).numbers, undisturbed()[0])
    assert loss <= LOSS and norm <= NORM


@pytest.mark.parametrize("case", marked(CASES))
def test_a_step_has_the_collectives_of_its_choice_and_no_others(case: Case) -> None:
    # A step has no more micro-batches than its rows fill: 8 rows on 4 ranks fill 2 of 1, where the plan has 3.
    rows_at_once = case.ranks * -(-GLOBAL_BATCH // (case.ranks * case.accumulation))
    of_a_step = -(-GLOBAL_BATCH // rows_at_once)
    for note in found(case).notes:
        for micro_batches, counts in zip([of_a_step] * 10 + [1], note["steps"], strict=True):
            # A layer is gathered for its forward and again for its backward; what lies outside stays in between.
            gathers = UNITS if case.gathers_once else (UNITS + LAYERS) * micro_batches
            reductions = UNITS if case.reduces_once else UNITS * micro_batches
            across = {"all_reduce": UNITS} if case.strategy == "hsdp" else {}
            assert counts == {"all_gather": gathers, "reduce_scatter": reductions, **across}


@pytest.mark.full
def test_two_micro_batches_communicate_no_more_than_one_with_both() -> None:
    one = found(replace(BOTH, accumulation=1, reduces_once=False))
    assert [note["steps"] for note in one.notes] == [note["steps"] for note in found(BOTH).notes]


@pytest.mark.parametrize("case", marked([*CASES, BF16]))
def test_a_rank_holds_whole_what_the_plan_counts_and_nothing_after_a_step_or_an_evaluation(case: Case) -> None:
    compute = HALF if case.precision == "bf16" else FLOAT32
    memory = plan_for(case.strategy, world_size=case.ranks, accumulation=case.accumulation, **case.layout).memory
    for note in found(case).notes:
        most = Counter(note["most"])
        outside = PARAMETERS - LAYERS * KNOWN["debug"].layer_parameters
        weights = compute * (PARAMETERS if case.gathers_once else outside)
        # A little more, because rows that do not divide are filled up.
        assert weights <= most["weights"] <= 1.01 * weights
        assert most["gradients"] == (FLOAT32 * PARAMETERS if case.reduces_once else 0)
        partial = FLOAT32 * PARAMETERS / (case.ranks // case.nodes)
        expected = partial if case.strategy == "hsdp" and not case.reduces_once else 0
        assert most["sums of a node"] == pytest.approx(expected, rel=0.02)
        if case.reduces_once:
            assert memory.gradients == most["gradients"]
        if case.gathers_once:
            assert memory.buffers >= weights
        # Before the first step, after each, after the evaluation, and while sounds are made.
        assert note["left"] == [0] * (COUNT + 3)


@pytest.mark.full
@pytest.mark.parametrize("case", [replace(BOTH, gathers_once=False), BOTH, replace(CASES[-1], accumulation=2)], ids=str)
def test_an_evaluation_computes_with_the_average_whatever_was_gathered_before(case: Case) -> None:
    plain = replace(case, gathers_once=False, reduces_once=False)
    for ours, wanted in zip(found(case).notes, found(plain).notes, strict=True):
        assert ours["evaluated"] == pytest.approx(wanted["evaluated"], rel=1e-6)


@pytest.mark.full
def test_in_bf16_whole_gradients_are_summed_in_float32_and_losses_stay_near_those_of_float32() -> None:
    assert [note["dtypes"] for note in found(BF16).notes] == [["torch.float32"]] * 2
    # bf16 has 8 bits of mantissa: 0.4 % a product, as in test_equal_numbers.py.
    loss, norm = differences(found(BF16).numbers, undisturbed()[0])
    assert loss <= 2e-3 and norm <= 1e-2
    # What is rounded is the same, and added in float32 both times: the choice costs no precision.
    loss, norm = differences(found(BF16).numbers, found(replace(BF16, reduces_once=False)).numbers)
    assert loss <= 1e-4 and norm <= 1e-3


@pytest.mark.full
@pytest.mark.parametrize("case", [BOTH, Case(strategy="hsdp", ranks=4), replace(CASES[-1], accumulation=2)], ids=str)
def test_a_run_goes_on_bit_for_bit_in_the_same_layout(case: Case, tmp_path: Path) -> None:
    named = {"folder": str(tmp_path), **case.layout}
    first, *_ = run_ranks(case.ranks, steps, case.strategy, case.accumulation, count=5, save_at=5, **named)
    second, *_ = run_ranks(case.ranks, steps, case.strategy, case.accumulation, count=5, **named)
    whole = found(case).numbers
    for part, numbers in ((part_of(whole, 0, 5), first), (part_of(whole, 5, 10), second)):
        assert (part.losses, part.norms) == (numbers.losses, numbers.norms)


@pytest.mark.full
@pytest.mark.parametrize(
    "named",
    [
        {"checkpointing": True},
        {"flags": {"lora_rank": 4}},
        {"flags": {"lora_rank": 4}, "precision": "bf16"},
        {"flags": {"freeze": "embeddings,layers.0"}},
        {"flags": {"tune_text": True, "placeholder_vectors": 4}, "count": 10},
        {"model": "debug-stereo-melody"},
    ],
    ids=str,
)
def test_with_recomputing_and_of_a_part_of_any_model_they_are_those_of_one_process(named: dict[str, Any]) -> None:
    named = {"count": COUNT, **named}
    alone = {name: value for name, value in named.items() if name not in ("precision", "checkpointing")}
    ours = run_ranks(2, steps, "fsdp", 2, gathers_once=True, reduces_once=True, **named)
    reference = run_ranks(1, steps, "single", 1, **alone)[0]
    assert all(numbers.losses == ours[0].losses and numbers.moved == [] for numbers in ours)
    loss, norm = differences(ours[0], reference)
    most_loss, most_norm = (2e-3, 1e-2) if "precision" in named else (LOSS, NORM)
    assert loss <= most_loss and norm <= most_norm
