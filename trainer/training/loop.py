"""The training loop: step after step, with reports, validation and checkpoints in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from tqdm import tqdm

from trainer.data.batches import Batch, Examples, prefetched
from trainer.data.cut import Cut, cut_for, filled_micro_batches, micro_batches
from trainer.data.order import Order, Row, steps_of
from trainer.data.prompt_states import SamplePrompts
from trainer.engine import Engine, StepResult
from trainer.errors import NotFiniteError
from trainer.model.delay_pattern import inputs_and_labels
from trainer.plan.activations import row_places
from trainer.plan.plan import Plan
from trainer.run.checkpoint import Checkpoint, RunHeader, Saver
from trainer.run.metrics import Tracker, Value
from trainer.run.signals import StopRequest
from trainer.run.standing import Standing
from trainer.training.judge import Judge
from trainer.training.schedule import Schedule, learning_rate
from trainer.training.step_work import StepWork, work_of


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """How often things happen between steps; None is never.

    log_steps           optimizer steps from one report to the next
    validation_steps    optimizer steps from one validation to the next; it happens at the end too
    save_step           optimizer steps from one call of Run.on_save_step to the next
    checkpoint_minutes  from one checkpoint to the next; each `save_step` makes one too
    sample_steps        from one call of `sample` to the next; it is called before the first step and at the end too
    """

    log_steps: int
    validation_steps: int | None
    save_step: int | None
    checkpoint_minutes: float
    sample_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What does not change during a run.

    train, validation  the clips to train on, and those held out; None where none are
    hours              of audio in the training clips
    header             the run that its checkpoints belong to
    on_save_step       called with a complete checkpoint each `save_step`, on rank 0, in the thread that writes it
    prompts            of the sounds that are made between steps; None where none are
    """

    plan: Plan
    order: Order
    schedule: Schedule
    train: Examples
    validation: Examples | None
    hours: float
    intervals: Intervals
    header: RunHeader
    on_save_step: Callable[[Checkpoint], None]
    prompts: SamplePrompts | None = None

    @cached_property
    def most_tokens(self) -> int:
        """Of a text of the training clips."""
        return _most_tokens(self.train)

    @cached_property
    def most_validation_tokens(self) -> int:
        """Of a text of the validation clips; 0 where none are."""
        return 0 if self.validation is None else _most_tokens(self.validation)

    @cached_property
    def cut(self) -> Cut:
        """How the rows of its steps are cut into micro-batches."""
        return _cut_of(self.plan, self.order, self.train, self.most_tokens)


def _nobody(step: int) -> bool:
    raise AssertionError(f"samples of step {step} are due, and nobody makes them")


def train(
    run: Run, engine: Engine, saver: Saver, tracker: Tracker, stop: StopRequest, start_step: int,
    sample: Callable[[int], bool] = _nobody, judge: Judge | None = None,
) -> int:  # fmt: skip
    """Train from `start_step` to the end of the order, or until the judge ends the run, or any rank is asked to stop.

    sample  makes the sounds of a step, where they are not there yet; called on every rank after the same steps. Returns
            whether a request to stop has cut them short, the same on all ranks

    Returns the steps done. Then the last state is in a complete checkpoint on disk. Every rank runs this loop, and
    takes every decision in it from what is the same on all of them. Raises NotFiniteError, which names the clips of the
    step, after saving the state before it.
    """
    steps, intervals, judge = run.order.steps, run.intervals, judge or Judge(_standing(run))
    step, stopping, last_save = start_step, False, time.monotonic()
    meter, work = _Meter(), work_of(run.order, run.cut, run.train, engine.ranks.rank, start_step)
    _save_if_kept(run, engine, saver, judge, step)
    with _progress_bar(steps, start_step, shown=engine.ranks.is_first) as bar:
        while step < steps and not stopping and not judge.ends_run:
            # Sample, once a save is on its way: sounds may take minutes. After a resume too, where they were cut short.
            # A stop among them ends the run here and not a step later: the run that goes on then makes them whole.
            if _every(intervals.sample_steps, step) and sample(step):
                break

            # Step. What this rank asks for travels with the losses; what comes back is the same on every rank.
            since, step_work = time.perf_counter(), next(work)
            # By rank 0's clock alone, since the clocks of two machines differ.
            save_is_due = engine.ranks.is_first and time.monotonic() - last_save > 60 * intervals.checkpoint_minutes
            requests = (stop.name is not None, save_is_due, saver.busy)
            result = _step(run, engine, saver, judge, step_work, requests)
            stopping, save, saving = result.requests
            step += 1
            judge.add_step(result.loss)
            meter.add(step_work.rows, step_work.batches, time.perf_counter() - since)
            _show(bar, result, learning_rate(run.schedule, step - 1))

            # Log.
            if _every(intervals.log_steps, step) or step == steps:
                tracker.log(_report(run, engine, result, meter.read(engine.matmul_rate, steps - step), step))

            # Validate.
            if run.validation is not None and (_every(intervals.validation_steps, step) or step == steps):
                tracker.log(_judged(judge, validate(run, engine, step)))

            # Save. Every rank writes its own file, in a thread beside the next steps.
            if _save_where_due(run, engine, saver, judge, step, by_clock=save, saving=saving):
                last_save = time.monotonic()
    # Stop, at the end or on request, with a checkpoint of the last step.
    if not saver.has(step):
        _save(run, engine, saver, judge, step)
    saver.wait()
    # Sample, at the end, where the last state is safe already.
    if (step == steps or judge.ends_run) and intervals.sample_steps is not None:
        sample(step)
    return step


def validate(run: Run, engine: Engine, step: int) -> dict[str, Value]:
    """Cross entropy in nats over the validation clips, for the report; each clip by its `middle_crop`."""
    assert run.validation is not None
    rows = [middle_crop(run.validation, clip) for clip in range(len(run.validation.captions))]
    rows.sort(key=lambda row: -row.frames)
    own = micro_batches(rows, _validation_cut(run, rows), engine.ranks.rank)
    sums_K, cells_K = engine.evaluate(prefetched(own, run.validation.batch))
    losses = (sums_K / np.maximum(cells_K, 1)).tolist()
    return {"step": step, "validation_loss": float(np.mean(losses)), "validation_loss_per_codebook": losses}


def worst_case(run: Run) -> Batch:
    """The micro-batch that needs most memory: every clip as long as the longest, with the caption of most tokens.

    A micro-batch of shorter clips may have more of them, and never more places (trainer/data/cut.py).

    Its codes and texts are zeros, because memory does not depend on the values. For Engine.rehearse.
    """
    examples, segment = run.train, run.order.segment_frames
    frames = steps_of(int(run.order.frames.max()), examples.shape.largest_delay, segment)
    tokens = run.most_tokens
    rows, codebooks = run.plan.micro_batch, run.order.codebooks
    codes = torch.zeros(rows, codebooks, frames, dtype=torch.int64)
    inputs, labels = inputs_and_labels(codes, examples.special_token, examples.shape.audio_channels)
    return Batch(
        inputs_BKT=inputs,
        labels_BKT=labels,
        text_BSD=examples.blank_text(rows, tokens),
        text_mask_BS=torch.ones(rows, tokens),
        attention_BS=torch.ones(rows, tokens, dtype=torch.bool),
        frames=rows * frames,
        padded_frames=rows * frames,
        melody_BC=examples.blank_melody(rows),
    )


def most_places(run: Run) -> int:
    """The most places that a row of training or validation has: of its codes, and in a melody model of what is in front
    of them. For Engine.rehearse."""
    shape, segment = run.train.shape, run.order.segment_frames
    tokens, frames = max(run.most_tokens, run.most_validation_tokens), int(run.order.frames.max())
    if run.validation is not None:
        frames = max(frames, int(run.validation.codes.frames.max()))
    return shape.prefix_places(tokens) + steps_of(frames, shape.largest_delay, segment)


def _cut_of(plan: Plan, order: Order, examples: Examples, tokens: int) -> Cut:
    return cut_for(
        order,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        world_size=plan.world_size,
        row_places=row_places(examples.shape, plan.layout, tokens),
    )


def _validation_cut(run: Run, rows: Sequence[Row]) -> Cut:
    """That of the training, but with as many micro-batches as validation needs, and with the most of its own clips and
    captions where those have more: without a backward pass they take less memory than the rehearsed ones."""
    assert run.validation is not None
    cut, tokens = run.cut, max(run.most_tokens, run.most_validation_tokens)
    return replace(
        cut,
        accumulation=filled_micro_batches(len(rows), micro_batch=cut.micro_batch, world_size=cut.world_size),
        row_places=row_places(run.train.shape, run.plan.layout, tokens),
        most_steps=max(cut.most_steps, steps_of(rows[0].frames, cut.largest_delay, cut.segment_frames)),
    )


def _most_tokens(examples: Examples) -> int:
    # Not those of the caption of most letters: what T5 does not know is spelled in many tokens, long words may be one.
    return max(map(examples.text.tokens, examples.all_texts()), default=1)


def middle_crop(examples: Examples, clip: int) -> Row:
    """The crop by which a clip is validated: the middle of its first cached view, the same each time."""
    available = int(examples.codes.frames[clip, 0])
    frames = min(available, examples.segment_frames)
    return Row(clip=clip, epoch=0, view=0, start=(available - frames) // 2, frames=frames, drop_caption=False)


class _Meter:
    """Counts what the steps since the last report computed, and how long they took.

    The time between steps, for example for a validation, is left out.
    """

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._seconds, self._frames, self._steps = 0.0, 0, 0
        self._own_frames = self._own_padded = self._own_flops = 0

    def add(self, rows: Sequence[Row], batches: Sequence[Batch], seconds: float) -> None:
        """Count a step of `rows` on all ranks, of which this rank computed `batches`."""
        self._seconds += seconds
        self._steps += 1
        self._frames += sum(row.frames for row in rows)
        self._own_frames += sum(batch.frames for batch in batches)
        self._own_padded += sum(batch.padded_frames for batch in batches)
        self._own_flops += sum(batch.flops for batch in batches)

    def read(self, matmul_rate: float, steps_left: int = 0) -> dict[str, float]:
        """Values for the report; then start anew.

        seconds_left is what the steps that are left would take like those since the last report.
        frames_per_second is of the whole run; mfu (model FLOPs per second, as a fraction of `matmul_rate`) and
        padding_share (fraction of computed frames that are padding) are of this rank.
        """
        values = {
            "frames_per_second": self._frames / self._seconds,
            "mfu": self._own_flops / self._seconds / matmul_rate,
            "padding_share": 1 - self._own_frames / self._own_padded,
            "seconds_left": self._seconds / self._steps * steps_left,
        }
        self._start_anew()
        return values


def _standing(run: Run) -> Standing | None:
    """That of a run of which nobody wants to know which step was best; None where it does not validate."""
    return None if run.validation is None else Standing(validated_on="", steps=run.order.steps)


def _judged(judge: Judge, report: dict[str, Value]) -> dict[str, Value]:
    """A validation's report, of which the judge has taken note."""
    step, loss = report["step"], report["validation_loss"]
    assert isinstance(step, int) and isinstance(loss, float)
    judge.add_validation(step, loss)
    return report


def _save(
    run: Run,
    engine: Engine,
    saver: Saver,
    judge: Judge,
    step: int,
    then: Callable[[Checkpoint], None] | None = None,
) -> None:
    """Save the state after `step` steps, with what the validations have shown so far."""
    saver.save(step, engine.state(), replace(run.header, validations=judge.standing), then)


def _save_where_due(
    run: Run, engine: Engine, saver: Saver, judge: Judge, step: int, *, by_clock: bool, saving: bool
) -> bool:
    """Start a checkpoint where one is due; returns whether it was started.

    While a rank still writes (`saving`), one that the clock asked for is left to a later step, and one of this very
    step is waited for: one that an export needs, or that of the best validation so far.
    """
    export_is_due = _every(run.intervals.save_step, step)
    starts = export_is_due or judge.keeps(step) or (by_clock and not saving)
    if starts:
        if saving:
            _wait_for_save(engine, saver)
        _save(run, engine, saver, judge, step, run.on_save_step if export_is_due else None)
    saver.check()  # a save that has failed ends the run now, and not when the next one is due
    return starts


def _save_if_kept(run: Run, engine: Engine, saver: Saver, judge: Judge, step: int) -> None:
    """Save what a run starts from where that is the best step and lies in the output_dir that it goes on from."""
    if judge.keeps(step) and not saver.has(step):
        _save(run, engine, saver, judge, step)


def _wait_for_save(engine: Engine, saver: Saver) -> None:
    """Return once no rank writes a checkpoint any more.

    All ranks wait, and not in a collective, whose time limit a slow disk may exceed: the first rank is the last to end
    a save, because it waits for the others' files and makes what is exported.
    """
    saver.wait()
    engine.ranks.wait("saved")


def _step(
    run: Run, engine: Engine, saver: Saver, judge: Judge, work: StepWork, requests: tuple[bool, ...]
) -> StepResult:
    """One optimizer step; where it is not finite, save the state before it and name its clips."""
    rate = learning_rate(run.schedule, work.step)
    try:
        return engine.step(work.batches, work.cells_K, step=work.step, learning_rate=rate, requests=requests)
    except NotFiniteError as error:
        _save(run, engine, saver, judge, work.step)
        saver.wait()
        clips = ", ".join(sorted({run.train.names[row.clip] for row in work.rows}))
        raise NotFiniteError(
            f"{error}. Clips of this step: {clips}. The state before it is saved; a lower --lr, or leaving out"
            " a faulty file, in a new --output_dir are what usually helps"
        ) from error


def _report(run: Run, engine: Engine, result: StepResult, speed: Mapping[str, float], step: int) -> dict[str, Value]:
    """What metrics.jsonl and the trackers get after `step` steps."""
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


def _progress_bar(steps: int, start_step: int, *, shown: bool) -> tqdm:
    return tqdm(total=steps, initial=start_step, unit="step", desc="training", dynamic_ncols=True, disable=not shown)


def _show(bar: tqdm, result: StepResult, rate: float) -> None:
    """Move the progress bar on by a step; the terminal is written no oftener than TQDM_MININTERVAL."""
    bar.set_postfix({"loss": f"{result.loss:.4f}", "lr": f"{rate:.2e}"}, refresh=False)
    bar.update()


def _every(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
