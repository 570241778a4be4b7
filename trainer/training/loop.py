"""The training loop: step after step from the order, with validation, reports and checkpoints between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from trainer.data.batches import Batch, Examples, prefetched
from trainer.data.order import Order, Row, filled_micro_batches, micro_batches, rows_of_step, valid_cells
from trainer.engine import Engine, StepResult
from trainer.errors import NotFiniteError
from trainer.model.delay_pattern import inputs_and_labels, steps_of
from trainer.plan.plan import Plan
from trainer.run.checkpoint import Checkpoint, RunHeader, Saver
from trainer.run.metrics import Tracker, Value
from trainer.run.signals import StopRequest
from trainer.training.schedule import Schedule, learning_rate


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """When things happen between steps; None is never."""

    log_steps: int
    validation_steps: int | None
    save_step: int | None
    checkpoint_minutes: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run's fixed parts, put together by launch.py."""

    plan: Plan
    order: Order
    schedule: Schedule
    train: Examples
    validation: Examples | None
    hours: float  # of audio, the sum over the training clips
    intervals: Intervals
    header: RunHeader  # what its checkpoints belong to
    on_save_step: Callable[[Checkpoint], None]


def train(run: Run, engine: Engine, saver: Saver, tracker: Tracker, stop: StopRequest, start_step: int) -> int:
    """Train from `start_step` to the end of the order or to a request to stop; returns the steps done.

    The last state is saved, complete and on disk, on return. Raises NotFiniteError, naming the step's
    clips, after saving the state before that step.
    """
    steps = run.order.steps
    batches = prefetched(_shares(run, engine.ranks.rank, start_step), run.train.batch, ahead=run.plan.accumulation + 1)
    meter = _Meter()
    last_save = time.monotonic()
    step = start_step
    stopping = False
    silent = not engine.ranks.is_first
    with tqdm(
        total=steps, initial=start_step, unit="step", desc="training", dynamic_ncols=True, disable=silent
    ) as bar:
        while step < steps and not stopping:
            since = time.perf_counter()
            rows = rows_of_step(run.order, step)
            micro = list(islice(batches, _filled(run.plan, rows)))
            due = engine.ranks.is_first and time.monotonic() - last_save > 60 * run.intervals.checkpoint_minutes
            result = _step(run, engine, saver, rows, micro, step, wishes=(stop.name is not None, due))
            stopping, save = result.wishes
            step += 1
            meter.add(rows, micro, time.perf_counter() - since)
            shown = {"loss": f"{result.loss:.4f}", "lr": f"{learning_rate(run.schedule, step - 1):.2e}"}
            bar.set_postfix(shown, refresh=False)  # `update` shows it, no oftener than TQDM_MININTERVAL
            bar.update()
            if step % run.intervals.log_steps == 0 or step == steps:
                tracker.log(_report(run, engine, result, meter.read(engine.matmul_rate), step))
            if run.validation is not None and (_every(run.intervals.validation_steps, step) or step == steps):
                tracker.log(validate(run, engine, step))
            exports = _every(run.intervals.save_step, step)
            if exports or save:
                saver.save(step, engine.state(), run.header, run.on_save_step if exports else None)
                last_save = time.monotonic()
            saver.check()
    if not saver.has(step):
        saver.save(step, engine.state(), run.header)
    saver.wait()
    return step


def validate(run: Run, engine: Engine, step: int) -> dict[str, Value]:
    """Cross entropy over the validation clips, middle crop of the first view, for the report."""
    assert run.validation is not None
    rows = [middle_crop(run.validation, clip) for clip in range(len(run.validation.captions))]
    rows.sort(key=lambda row: -row.frames)
    accumulation = -(-len(rows) // (run.plan.micro_batch * run.plan.world_size))
    shares = micro_batches(
        rows,
        micro_batch=run.plan.micro_batch,
        accumulation=accumulation,
        world_size=run.plan.world_size,
        rank=engine.ranks.rank,
    )
    sums_K, cells_K = engine.evaluate(prefetched(shares, run.validation.batch))
    losses = (sums_K / np.maximum(cells_K, 1)).tolist()
    return {"step": step, "validation_loss": float(np.mean(losses)), "validation_loss_per_codebook": losses}


def worst_case(run: Run) -> Batch:
    """The micro-batch that needs most memory: every clip is as long as the longest, with the longest caption."""
    text, segment = run.train, run.order.segment_frames
    frames = steps_of(int(run.order.frames.max()), run.order.codebooks, segment)
    longest = max(text.all_texts(), key=len, default=None)
    states = 1 if longest is None else len(text.text.states(longest))
    rows, codebooks = run.plan.micro_batch, run.order.codebooks
    codes = torch.zeros(rows, codebooks, frames, dtype=torch.int64)
    inputs, labels = inputs_and_labels(codes, text.special_token)
    return Batch(
        inputs_BKT=inputs,
        labels_BKT=labels,
        text_BSD=text.blank_text(rows, states),
        text_mask_BS=torch.ones(rows, states),
        attention_BS=torch.ones(rows, states, dtype=torch.bool),
        frames=rows * frames,
        padded_frames=rows * frames,
    )


def middle_crop(examples: Examples, clip: int) -> Row:
    """The fixed crop by which a clip is validated."""
    available = int(examples.codes.frames[clip, 0])
    frames = min(available, examples.segment_frames)
    return Row(clip=clip, epoch=0, view=0, start=(available - frames) // 2, frames=frames, drop_caption=False)


class _Meter:
    """What the steps since the last report computed, and how long they took; what happens between steps is left out."""

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._seconds, self._frames = 0.0, 0
        self._own_frames = self._own_padded = self._own_flops = 0

    def add(self, rows: Sequence[Row], batches: Sequence[Batch], seconds: float) -> None:
        """A step of `rows` on all ranks, of which this rank computed `batches`."""
        self._seconds += seconds
        self._frames += sum(row.frames for row in rows)
        self._own_frames += sum(batch.frames for batch in batches)
        self._own_padded += sum(batch.padded_frames for batch in batches)
        self._own_flops += sum(batch.flops for batch in batches)

    def read(self, matmul_rate: float) -> dict[str, float]:
        """Frames a second of the whole run; MFU and share of padding of this rank; then start anew."""
        values = {
            "frames_per_second": self._frames / self._seconds,
            "mfu": self._own_flops / self._seconds / matmul_rate,
            "padding_share": 1 - self._own_frames / self._own_padded,
        }
        self._start_anew()
        return values


def _shares(run: Run, rank: int, start_step: int) -> Iterator[Sequence[Row]]:
    """This rank's micro-batches from `start_step` to the end of the run."""
    for step in range(start_step, run.order.steps):
        yield from micro_batches(
            rows_of_step(run.order, step),
            micro_batch=run.plan.micro_batch,
            accumulation=run.plan.accumulation,
            world_size=run.plan.world_size,
            rank=rank,
        )


def _filled(plan: Plan, rows: Sequence[Row]) -> int:
    return filled_micro_batches(len(rows), micro_batch=plan.micro_batch, world_size=plan.world_size)


def _step(
    run: Run,
    engine: Engine,
    saver: Saver,
    rows: Sequence[Row],
    batches: Sequence[Batch],
    step: int,
    wishes: tuple[bool, bool],
) -> StepResult:
    cells_K = valid_cells(rows, run.order.codebooks, run.order.segment_frames)
    try:
        rate = learning_rate(run.schedule, step)
        return engine.step(batches, cells_K, step=step, learning_rate=rate, wishes=wishes)
    except NotFiniteError as error:
        saver.save(step, engine.state(), run.header)
        saver.wait()
        clips = ", ".join(sorted({run.train.names[row.clip] for row in rows}))
        raise NotFiniteError(
            f"{error}. Clips of this step: {clips}. The state before it is saved; a lower --lr, or leaving out"
            " a faulty file, in a new --output_dir are what usually helps"
        ) from error


def _report(run: Run, engine: Engine, result: StepResult, speed: Mapping[str, float], step: int) -> dict[str, Value]:
    return {
        "step": step,
        "epoch": round(run.order.epoch_of(step), 4),
        "loss": result.loss,
        "loss_per_codebook": list(result.losses_K),
        "grad_norm": result.grad_norm,
        "lr": learning_rate(run.schedule, step - 1),
        "time": time.time(),  # seconds since 1970, UTC
        **speed,
        "peak_memory_bytes": engine.peak_memory_bytes(),
    }


def _every(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
