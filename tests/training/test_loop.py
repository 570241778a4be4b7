"""The loop and its engine against the same training written out by hand."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.plans import engine_for, plan_for
from tests.rounding import assert_same_training
from tests.synthetic import HEADER, random_examples
from trainer import wiring
from trainer.data.cut import micro_batches
from trainer.data.order import Order, Row, rows_of_step, valid_cells
from trainer.engine import Engine
from trainer.errors import NotFiniteError
from trainer.flags.config import Config
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.loss import step_loss
from trainer.model.source import open_model
from trainer.run.checkpoint import Saver, newest
from trainer.run.signals import StopRequest
from trainer.spec.flops import clip_flops
from trainer.training.loop import Intervals, Run, _Meter, most_places, train, validate, worst_case
from trainer.training.schedule import Schedule, learning_rate

LENGTHS = [30, 8, 45, 20, 20]
SEGMENT = 24


class Reports:
    """What the loop reported, and the learning rate that its optimizer had then."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.values, self.rates = engine, [], []

    def log(self, values) -> None:
        self.values.append(dict(values))
        self.rates.append(self.engine.backend._optimizer.param_groups[0]["lr"])


def run_of(*, clips=LENGTHS, steps=6, global_batch=4, micro_batch=2, validation=None, **intervals) -> Run:
    examples = random_examples(clips, segment_frames=SEGMENT)
    order = Order(
        seed=2, epochs=100, global_batch=global_batch, segment_frames=SEGMENT, codebooks=4, caption_drop_rate=0.2,
        frames=examples.codes.frames, max_steps=steps,
    )  # fmt: skip
    plan = plan_for(
        micro_batch=micro_batch, accumulation=math.ceil(global_batch / micro_batch), global_batch=global_batch
    )
    wanted = {"log_steps": 1, "validation_steps": None, "save_step": None, "checkpoint_minutes": 99.0} | intervals
    return Run(
        plan=plan, order=order, schedule=Schedule(peak=3e-3, steps=steps, warmup_steps=2), train=examples,
        validation=validation, intervals=Intervals(**wanted), hours=0.0, header=HEADER, on_save_step=lambda saved: None,
    )  # fmt: skip


def engine_of(run: Run, dropout: float = 0.0, **flags) -> Engine:
    config = Config(dataset_path="unused", dropout=dropout, **flags)
    return engine_for(run.plan, config)


def rows_of(run: Run) -> list[Row]:
    return [row for step in range(run.order.steps) for row in rows_of_step(run.order, step)]


def trained(run: Run, engine: Engine, folder: Path) -> Reports:
    reports = Reports(engine)
    with StopRequest() as stop:
        assert train(run, engine, Saver(folder), reports, stop, 0) == run.order.steps
    return reports


def by_hand(run: Run, *, weight_decay: float, max_grad_norm: float) -> LanguageModel:
    """The weights after the run: one batch a step, torch's own AdamW and clipping."""
    model = load_language_model(open_model("debug"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay)
    for step in range(run.order.steps):
        rows = rows_of_step(run.order, step)
        batch = run.train.batch(rows)
        sums = model(
            batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS, labels_BKT=batch.labels_BKT
        )
        optimizer.zero_grad()
        step_loss(sums, (batch.labels_BKT >= 0).sum(dim=(0, 2))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(run.schedule, step)
        optimizer.step()
    return model


@pytest.mark.numbers
def test_a_run_ends_with_the_weights_of_the_same_steps_by_hand(tmp_path):
    run = run_of()
    engine = engine_of(run, weight_decay=0.5, max_grad_norm=0.3)
    reports = trained(run, engine, tmp_path)
    assert all(values["grad_norm"] > 0.3 for values in reports.values), "nothing was clipped"
    by_loop, expected = (
        {name: parameter.detach() for name, parameter in model.named_parameters()}
        for model in (engine.backend.model, by_hand(run, weight_decay=0.5, max_grad_norm=0.3))
    )
    assert_same_training(by_loop, expected, [learning_rate(run.schedule, step) for step in range(run.order.steps)])


def test_the_rate_in_use_is_the_one_reported_and_the_schedules(tmp_path):
    run = run_of()
    reports = trained(run, engine_of(run), tmp_path)
    expected = [learning_rate(run.schedule, step) for step in range(6)]
    assert reports.rates == expected == [values["lr"] for values in reports.values]


def test_log_and_validation_intervals_are_kept_and_the_end_is_always_reported(tmp_path):
    run = run_of(steps=7, log_steps=3, validation_steps=2, validation=random_examples([9], segment_frames=SEGMENT))
    values = trained(run, engine_of(run), tmp_path).values
    assert [one["step"] for one in values if "loss" in one] == [3, 6, 7]
    assert [one["step"] for one in values if "validation_loss" in one] == [2, 4, 6, 7]


@pytest.mark.numbers
def test_validation_is_the_loss_of_middle_crops_without_dropout_and_leaves_training_on():
    held_out = random_examples([40, 11, 24, 7, 60], segment_frames=SEGMENT, seed=5)
    run = run_of(validation=held_out)
    engine = engine_of(run, dropout=0.5)
    found = validate(run, engine, 3)
    model = load_language_model(open_model("debug")).eval()
    sums, cells = np.zeros(4), np.zeros(4)
    for clip, length in enumerate([40, 11, 24, 7, 60]):
        frames = min(length, SEGMENT)
        start = (length - frames) // 2
        codes_KT = torch.from_numpy(held_out.codes.clips[clip][0, :, start : start + frames].astype(np.int64))
        states = None if held_out.captions[clip] is None else held_out.text.states(held_out.captions[clip])
        text = torch.zeros(1, 1, 512) if states is None else torch.from_numpy(states)[None]
        mask = torch.full(text.shape[:2], float(states is not None))
        delayed = torch.full((1, 4, frames + 3), 2048)
        for k in range(4):
            delayed[0, k, k : k + frames] = codes_KT[k]
        inputs = torch.cat([torch.full((1, 4, 1), 2048), delayed[..., :-1]], dim=-1)
        with torch.no_grad():
            logits = model(inputs, text, mask)
        for k in range(4):
            last = min(k + frames, SEGMENT)
            sums[k] += functional.cross_entropy(logits[0, k, k:last], delayed[0, k, k:last], reduction="sum").item()
            cells[k] += last - k
    assert found["validation_loss_per_codebook"] == pytest.approx(sums / cells, abs=1e-5)
    assert found["validation_loss"] == pytest.approx((sums / cells).mean(), abs=1e-5)
    assert all(module.training for module in engine.backend.model.modules())


def test_validation_computes_no_micro_batch_of_more_places_than_the_rehearsed_one():
    run = run_of(micro_batch=4, validation=random_examples([30, 20, 4, 4, 4, 4, 4, 4], segment_frames=SEGMENT))
    engine, shapes = engine_of(run), []
    engine.backend.model.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    validate(run, engine, 0)
    rehearsed = worst_case(run)
    tokens = rehearsed.text_mask_BS.shape[1]
    rows, _, steps = rehearsed.inputs_BKT.shape
    assert sum(shape[0] for shape in shapes) == 8 and max(shape[0] for shape in shapes) > 4
    assert all(shape[0] * (shape[2] + tokens) <= rows * (steps + tokens) for shape in shapes)


def test_steps_go_on_beside_a_slow_save_and_its_successor_comes_a_step_after_it(tmp_path):
    """A checkpoint is due after every step; the one of step 3 is being exported until step 5 has been reported."""
    run, reported, awaited = run_of(steps=8, save_step=3, checkpoint_minutes=0.0), threading.Event(), []
    engine = engine_of(run)

    class Watched(Reports):
        def log(self, values) -> None:
            super().log(values)
            if values["step"] == 5:
                reported.set()

    class Noted(Saver):
        def save(self, step, *arguments) -> None:
            saved.append((step, self.busy))
            super().save(step, *arguments)

    def export(checkpoint) -> None:
        if checkpoint.step == 3:
            awaited.append(reported.wait(20))

    saved: list[tuple[int, bool]] = []
    with StopRequest() as stop:
        train(replace(run, on_save_step=export), engine, Noted(tmp_path), Watched(engine), stop, 0)
    assert awaited == [True], "the step after the save waited for it"
    assert not {4, 5} & {step for step, _ in saved} and {3, 6} <= {step for step, _ in saved}
    assert not any(busy for step, busy in saved if step < 8), "only the last save may wait for another one"


def times_of_samples(run: Run, folder: Path, start_step: int = 0, ask_at: int | None = None) -> list[tuple]:
    """Each step whose samples were asked for: what was reported by then, and the checkpoints that were there or on
    their way. `ask_at`: the step at whose samples the run is asked to end."""
    engine, found = engine_of(run), []
    reports, saver = Reports(engine), Saver(folder)
    if newest(folder) is not None:
        engine.load(newest(folder))
    with StopRequest() as stop:

        def sample(step: int) -> bool:
            if step == ask_at:
                stop.name = "SIGTERM"
            saved = [other for other in range(run.order.steps + 1) if saver.has(other)]
            found.append((step, len(reports.values), max(saved, default=None)))
            return step == ask_at

        train(run, engine, saver, reports, stop, start_step, sample)
    return found


def test_samples_come_before_step_1_after_a_steps_save_and_once_the_last_state_is_on_disk(tmp_path):
    run = run_of(steps=7, sample_steps=3, save_step=3)
    assert times_of_samples(run, tmp_path) == [(0, 0, None), (3, 3, 3), (6, 6, 6), (7, 7, 7)]


def test_samples_that_a_stop_cuts_short_are_asked_for_again_by_the_run_that_goes_on(tmp_path):
    """Those before step 1 too, which no later run could make: the run ends with a checkpoint of that very step."""
    run = run_of(steps=5, sample_steps=2)
    assert times_of_samples(run, tmp_path, ask_at=0) == [(0, 0, None)]
    assert newest(tmp_path).step == 0
    assert times_of_samples(run, tmp_path, start_step=0, ask_at=2) == [(0, 0, 0), (2, 2, 0)]
    assert newest(tmp_path).step == 2
    assert times_of_samples(run, tmp_path, start_step=2) == [(2, 0, 2), (4, 2, 2), (5, 3, 5)]
    assert times_of_samples(run, tmp_path, start_step=5) == [(5, 0, 5)]


def test_a_loss_that_is_not_finite_stops_the_run_names_its_clips_and_changes_nothing(tmp_path):
    run = run_of(global_batch=2)
    engine = engine_of(run)
    with torch.no_grad():
        engine.backend.model.enc_to_dec_proj.bias[0] = float("inf")
    before = {name: parameter.detach().clone() for name, parameter in engine.backend.model.named_parameters()}
    rows = [row for step in range(6) for row in rows_of_step(run.order, step)]
    first = next(i for i, row in enumerate(rows) if not row.drop_caption and run.train.captions[row.clip]) // 2
    with StopRequest() as stop, pytest.raises(NotFiniteError, match=f"step {first + 1}: ") as caught:
        train(run, engine, Saver(tmp_path), Reports(engine), stop, 0)
    for row in rows[2 * first : 2 * first + 2]:
        assert f"clip{row.clip}.wav" in str(caught.value)
    saved = newest(tmp_path)
    assert saved is not None and saved.step == first
    if first == 0:
        assert all(torch.equal(saved.weights()[name], before[name]) for name in before)
    for name, parameter in engine.backend.model.named_parameters():
        assert torch.equal(saved.weights()[name], parameter.detach())


def seeds_of_dropout(folder: Path, **flags) -> list[int]:
    """torch's seed at each forward pass of a run of 3 steps with 2 micro-batches each."""
    run, found = run_of(steps=3), []
    engine = engine_of(run, dropout=0.1, **flags)
    engine.backend.model.register_forward_pre_hook(lambda module, inputs: found.append(torch.initial_seed()))
    trained(run, engine, folder)
    return found


def test_dropout_is_drawn_anew_for_each_step_and_micro_batch_and_repeats_itself(tmp_path):
    first, again, other = (
        seeds_of_dropout(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert len(set(first)) == len(first) == 6
    assert first == again and not set(first) & set(other)


def test_a_step_with_few_rows_computes_no_batch_of_fillers_alone(tmp_path):
    run = run_of(clips=[20, 20, 20], steps=None, global_batch=1000)
    run = Run(**{**vars(run), "order": Order(**{**vars(run.order), "epochs": 1})})
    engine, computed = engine_of(run), []
    engine.backend.model.register_forward_hook(lambda module, inputs, output: computed.append(len(inputs[0])))
    trained(run, engine, tmp_path)
    assert sorted(computed) == [1, 2]
    assert newest(tmp_path).step == 1


def test_shares_of_short_steps_are_equally_many_on_every_rank():
    run = run_of(global_batch=12)
    rows = rows_of_step(run.order, 0)[:5]
    cut = replace(run.cut, micro_batch=2, accumulation=3, world_size=2)
    shares = [micro_batches(rows, cut, rank) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    counted = [row for share in shares for batch in share for row in batch if row.weight]
    assert sorted(row.clip for row in counted) == sorted(row.clip for row in rows)
    assert valid_cells(counted, 4, SEGMENT).tolist() == valid_cells(rows, 4, SEGMENT).tolist()


def test_each_flag_of_schedule_and_intervals_reaches_its_place(tmp_path):
    run = run_of()
    flags = {
        "lr": 0.25, "warmup_steps": 3, "lr_schedule": "linear", "min_lr_ratio": 0.125, "log_steps": 4,
        "validation_steps": 9, "save_step": 5, "checkpoint_minutes": 7.5, "sample_every": 11,
    }  # fmt: skip
    data = type("Data", (), {"train": run.train, "validation": None, "seconds": 0.0})
    made = wiring.run_of(Config(dataset_path="x", **flags), run.plan, run.order, data, {}, None, None)
    assert made.schedule == Schedule(peak=0.25, steps=6, warmup_steps=3, decay="linear", min_ratio=0.125)
    assert made.intervals == Intervals(
        log_steps=4, validation_steps=9, save_step=5, checkpoint_minutes=7.5, sample_steps=11
    )
    unset = wiring.run_of(Config(dataset_path="x"), run.plan, run.order, data, {}, None, None)
    assert unset.intervals.validation_steps == 1 and unset.intervals.save_step is None  # 5 clips, 4 a step


@pytest.mark.parametrize("clips", [LENGTHS, [8, 5, 7], [24, 3]])
def test_the_rehearsed_micro_batch_is_as_large_as_the_runs_largest_and_no_larger(clips):
    run = run_of(clips=clips, micro_batch=1, global_batch=1, steps=20)
    largest = max(run.train.batch(rows_of_step(run.order, step)).inputs_BKT.shape[-1] for step in range(20))
    assert worst_case(run).inputs_BKT.shape == (1, 4, largest)


@pytest.mark.parametrize("new_tokens", [0, 2])
def test_the_rehearsed_micro_batch_has_the_caption_of_most_tokens_and_not_of_most_letters(new_tokens):
    captions = ["extraordinarily melancholic", "a b c d e", "rock"]
    examples = random_examples([20, 20, 20], captions, segment_frames=SEGMENT, new_tokens=new_tokens)
    run = replace(run_of(clips=[20, 20, 20], micro_batch=2), train=examples)
    largest = max(examples.batch([row]).text_BSD.shape[1] for row in rows_of(run) if not row.drop_caption)
    assert largest == 5 + (1 + new_tokens if new_tokens else 0)
    assert worst_case(run).text_BSD.shape[:2] == (2, largest)


@pytest.mark.parametrize("model", ["debug", "debug-melody"])
def test_the_most_places_are_those_of_the_largest_row_of_training_and_validation(model):
    captions = ["a b c", "a b c d e", None]
    train = random_examples([20, 8, 5], captions, segment_frames=SEGMENT, model=model)
    validation = random_examples([15, 22], ["a b", "a b c d e f g"], segment_frames=SEGMENT, model=model)
    run = replace(run_of(clips=[20, 8, 5]), train=train, validation=None)
    in_front = 235 if model == "debug-melody" else None
    assert most_places(run) == 23 + (in_front + 5 if in_front else 0)  # with the delays' tail of 3
    assert most_places(replace(run, validation=validation)) == 24 + (in_front + 7 if in_front else 0)  # the segment


def test_a_report_counts_the_whole_runs_frames_and_this_ranks_flops():
    run = run_of(clips=[20, 30], steps=2, global_batch=2, micro_batch=1)
    rows = rows_of_step(run.order, 0)
    own = [run.train.batch(rows[:1])]
    meter = _Meter()
    for _ in range(3):
        meter.add(rows, own, 0.5)
    read = meter.read(matmul_rate=1e9)
    assert read["frames_per_second"] == pytest.approx(sum(row.frames for row in rows) / 0.5)
    caption = run.train.captions[rows[0].clip]
    text = 0 if caption is None or rows[0].drop_caption else len(run.train.text.states(caption))
    assert read["mfu"] == pytest.approx(clip_flops(run.train.shape, rows[0].frames, text) / 0.5 / 1e9)
    assert read["padding_share"] == pytest.approx(1 - rows[0].frames / own[0].padded_frames)
    meter.add(rows, own, 0.25)
    assert meter.read(1e9)["frames_per_second"] == pytest.approx(sum(row.frames for row in rows) / 0.25)


def test_the_seconds_that_are_left_are_those_of_the_steps_since_the_last_report():
    run = run_of(clips=[20, 30], steps=2, global_batch=2, micro_batch=1)
    rows = rows_of_step(run.order, 0)
    own, meter = [run.train.batch(rows[:1])], _Meter()
    for seconds in (0.5, 1.0):
        meter.add(rows, own, seconds)
    assert meter.read(1e9, steps_left=10)["seconds_left"] == pytest.approx(7.5)
    meter.add(rows, own, 0.25)
    assert meter.read(1e9, steps_left=4)["seconds_left"] == pytest.approx(1.0)


def test_every_report_says_how_long_the_rest_takes_and_the_last_one_that_nothing_is_left(tmp_path):
    run = run_of(steps=5, log_steps=2)
    values = trained(run, engine_of(run), tmp_path).values
    assert [one["step"] for one in values] == [2, 4, 5]
    assert values[0]["seconds_left"] > 0 and values[1]["seconds_left"] > 0 and values[2]["seconds_left"] == 0
