"""What the loop does by its validations, in runs that end, are stopped, are killed and go on.

Loop, checkpoints and decisions are the real ones; the model is one tensor, since only its being the right one counts
here. tests/whole_runs/test_best.py has whole runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.run.test_best import Killed, killed_at, named_best, steps_on_disk
from tests.runs import assert_bit_equal
from tests.synthetic import random_examples
from tests.training.test_loop import SEGMENT, run_of
from trainer import wiring
from trainer.engine import Ranks, StepResult
from trainer.evaluation import samples
from trainer.flags.config import Config
from trainer.run.checkpoint import Checkpoint, FlatSlice, Saver, newest
from trainer.run.checkpoint_folders import folder_name
from trainer.run.output_dir import OutputDir, open_output_dir
from trainer.training import loop
from trainer.training.judge import Judge

STEPS = 10
# By step: 1, 2, 3, 5 and 7 are each better than all before.
LOSSES = dict(enumerate((5.0, 4.0, 3.0, 3.5, 2.9, 3.0, 2.0, 2.1, 2.2, 2.3), 1))
HELD_OUT = random_examples([9], segment_frames=SEGMENT)


class SmallEngine:
    """Trains one tensor, by arithmetic in which every step leaves its trace; its training loss falls by 1 a step."""

    matmul_rate = 1.0

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.weight = torch.zeros(4, dtype=torch.float32)

    def step(self, batches, cells_K, *, step, learning_rate, requests) -> StepResult:
        self.weight = 0.7 * self.weight + step + learning_rate
        return StepResult(losses_K=(100.0 - step,) * 4, grad_norm=1.0, requests=tuple(requests))

    def state(self) -> dict[str, FlatSlice]:
        return {"weight/a": FlatSlice(shape=(4,), start=0, values=self.weight)}

    def load(self, checkpoint: Checkpoint) -> None:
        self.weight = checkpoint.read("weight/a")

    def peak_memory_bytes(self) -> None:
        return None


class Stop:
    """A request to stop that ends the run after a step; None for never."""

    def __init__(self, after: int | None, start: int):
        self.after, self.name = after, "SIGTERM" if after == start + 1 else None


class Noted:
    """Reports, at which the stop is asked for in time: it is heard with the next step."""

    def __init__(self, stop: Stop):
        self.stop = stop

    def log(self, values: Mapping[str, object]) -> None:
        if self.stop.after is not None and values["step"] == self.stop.after - 1:
            self.stop.name = "SIGTERM"


class Watched(Saver):
    """Notes the step of each save."""

    def __init__(self, root: Path):
        super().__init__(root / "checkpoints", best=root / "best.json")
        self.steps: list[int] = []

    def save(self, step: int, *arguments) -> None:
        self.steps.append(step)
        super().save(step, *arguments)


def judged(
    run: loop.Run, root: Path, checkpoint: Checkpoint | None, said: list[str], digest: str, ranks: Ranks, **flags
) -> Judge:
    """The judge that launch.py would have, whose lines go to `said`."""
    data = type("Data", (), {"validation": run.validation, "validation_digest": digest})
    ranks.say = said.append  # type: ignore[method-assign]
    config = Config(dataset_path="x", validation="0.5", **flags)
    judge = wiring.judge_of(config, run.order, data, checkpoint, OutputDir(root=root), ranks)  # type: ignore[arg-type]
    judge._say = said.append
    return judge


def trained(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    losses: Mapping[int, float] = LOSSES,
    stop_after: int | None = None,
    steps: int = STEPS,
    resume: str = "auto",
    digest: str = "clips",
    said: list[str] | None = None,
    intervals: Mapping[str, int | float] | None = None,
    **flags,
) -> tuple[int, Judge, list[int]]:
    """A run in `root`, which goes on from what is there: steps done, its judge, and the steps that were saved.

    losses  what validations find, by step
    """
    monkeypatch.setattr(
        loop, "validate", lambda run, engine, step: {"step": step, "validation_loss": losses[step]}
    )
    run = run_of(steps=steps, validation=HELD_OUT, **{"validation_steps": 1, **(intervals or {})})
    folder, checkpoint = open_output_dir(str(root), resume)
    ranks = Ranks(timeout_seconds=60)
    judge = judged(run, root, checkpoint, [] if said is None else said, digest, ranks, **flags)
    start = 0 if checkpoint is None else checkpoint.step
    engine, saver, stop = SmallEngine(ranks), Watched(root), Stop(stop_after, start)
    if checkpoint is not None:
        engine.load(checkpoint)
    wiring.mend(judge, folder)
    done = loop.train(run, engine, saver, Noted(stop), stop, start, judge=judge)  # type: ignore[arg-type]
    return done, judge, saver.steps


def state_of(root: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(root / "checkpoints" / folder_name(step))
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def assert_same_run(root: Path, other: Path, steps: Sequence[int]) -> None:
    """Both have the checkpoints of these steps and no others, bit for bit, with the same standing and the same best."""
    assert steps_on_disk(root) == steps_on_disk(other) == list(steps)
    assert named_best(root) == named_best(other)
    for step in steps:
        assert_bit_equal(state_of(root, step), state_of(other, step))
    headers = [newest(path / "checkpoints") for path in (root, other)]
    assert headers[0] is not None and headers[1] is not None
    assert headers[0].run == headers[1].run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        assert trained(root, patch, keep_best=True)[0] == STEPS
    return root


def test_the_best_step_is_saved_once_and_stays(tmp_path, monkeypatch):
    done, judge, saved = trained(tmp_path, monkeypatch, keep_best=True, intervals={"save_step": 3})
    assert done == STEPS and saved == [1, 2, 3, 5, 6, 7, 9, 10], "each step that is due is saved once"
    assert steps_on_disk(tmp_path) == [7, 9, 10] and named_best(tmp_path) == 7
    assert judge.standing.kept.step == 7 and judge.standing.without_improvement == 3


def test_without_keep_best_nothing_is_saved_for_it(tmp_path, monkeypatch):
    done, judge, saved = trained(tmp_path, monkeypatch)
    assert (done, saved, named_best(tmp_path)) == (STEPS, [10], None)
    assert judge.standing.best.step == 7 and judge.standing.kept is None


@pytest.mark.parametrize("at", ["rename_folder", "name_best", "rotate"])
def test_a_kill_in_the_save_of_the_best_changes_nothing_once_resumed(at, tmp_path, monkeypatch, undisturbed):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # Killed in the save of step 7. The former best, step 5, is none of the newest two then.
        trained(tmp_path, patch, keep_best=True, stop_after=6)
        assert steps_on_disk(tmp_path) == [5, 6]
        killed_at(patch, at)
        trained(tmp_path, patch, keep_best=True)
    assert trained(tmp_path, monkeypatch, keep_best=True)[0] == STEPS
    assert_same_run(tmp_path, undisturbed, [7, 10])


@pytest.mark.parametrize("stopped", [4, 8, 9])
def test_a_run_that_was_stopped_ends_early_at_the_step_of_one_that_was_not(stopped, tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = {"keep_best": True, "early_stop": 2}
    assert trained(whole, monkeypatch, **flags)[0] == 9
    assert trained(halves, monkeypatch, stop_after=stopped, **flags)[0] == stopped
    done, judge, _ = trained(halves, monkeypatch, **flags)
    assert done == 9 and judge.ends_run
    headers = [newest(root / "checkpoints").run.validations for root in (whole, halves)]
    assert headers[0] == headers[1]
    assert_bit_equal(state_of(whole, 9), state_of(halves, 9))
    assert_bit_equal(state_of(whole, 7), state_of(halves, 7))
    assert trained(halves, monkeypatch, **flags)[::2] == (9, []), "a run that had ended makes no step"


def test_an_early_end_is_gone_on_from_with_a_larger_count_or_none_or_more_steps(tmp_path, monkeypatch):
    assert trained(tmp_path, monkeypatch, early_stop=1)[0] == 4
    assert trained(tmp_path, monkeypatch, early_stop=2)[0] == 9
    losses = {**LOSSES, 11: 2.4, 12: 2.5, 13: 2.6, 14: 2.7, 15: 2.8}
    said: list[str] = []
    done, judge, _ = trained(tmp_path, monkeypatch, losses=losses, steps=15, early_stop=2, said=said)
    assert done == 11 and judge.ends_run and any("15 steps now instead of 10" in line for line in said)
    assert trained(tmp_path, monkeypatch, losses=losses, steps=15)[0] == 15


def test_keep_best_that_comes_later_counts_from_there_and_says_so(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, stop_after=3)
    said: list[str] = []
    _, judge, saved = trained(tmp_path, monkeypatch, keep_best=True, said=said, stop_after=5)
    assert "step 3, the best so far, was not kept" in said[0]
    assert saved == [4, 5] and judge.standing.kept.step == 5


def test_keep_best_that_goes_leaves_the_best_where_it_is_and_says_so(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, keep_best=True, stop_after=4)
    said: list[str] = []
    trained(tmp_path, monkeypatch, said=said, intervals={"save_step": 2})
    assert "step 3 (validation loss 3.0000), which --keep_best 1 kept, stays" in said[0]
    assert steps_on_disk(tmp_path) == [3, 8, 10] and named_best(tmp_path) == 3
    _, judge, _ = trained(tmp_path, monkeypatch, keep_best=True, steps=11, losses={11: 2.5})
    assert judge.standing.kept.step == 11 and steps_on_disk(tmp_path) == [10, 11]


def test_a_checkpoint_of_another_folder_that_was_the_best_there_is_kept_here_too(tmp_path, monkeypatch):
    trained(tmp_path / "a", monkeypatch, keep_best=True, stop_after=3)
    best = tmp_path / "a/checkpoints" / folder_name(3)
    trained(tmp_path / "b", monkeypatch, keep_best=True, resume=str(best), stop_after=4)
    assert steps_on_disk(tmp_path / "b") == [3, 4] and named_best(tmp_path / "b") == 3
    assert_bit_equal(state_of(tmp_path / "a", 3), state_of(tmp_path / "b", 3))
    # A later checkpoint, whose best stays behind.
    said: list[str] = []
    later = tmp_path / "b/checkpoints" / folder_name(4)
    trained(tmp_path / "c", monkeypatch, keep_best=True, resume=str(later), said=said)
    assert "step 3 (validation loss 3.0000), the best so far, is not in this output_dir" in said[0]
    assert named_best(tmp_path / "c") == 7 and steps_on_disk(tmp_path / "b") == [3, 4]


def test_other_clips_to_validate_on_count_anew_and_say_so(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, keep_best=True, stop_after=7)
    said: list[str] = []
    _, judge, _ = trained(tmp_path, monkeypatch, keep_best=True, digest="others", said=said)
    assert "others than before" in said[0] and "step 7 (validation loss 2.0000), the best on the former" in said[1]
    assert judge.standing.best.step == judge.standing.kept.step == 8


def test_a_checkpoint_from_before_all_this_is_gone_on_from(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, stop_after=3)
    header = tmp_path / "checkpoints" / folder_name(3) / "checkpoint.json"
    text = header.read_text()
    start = text.index(',\n  "validations"')
    header.write_text(text[:start] + text[text.index("\n }", start):])
    assert Checkpoint(header.parent).run.validations is None
    said: list[str] = []
    done, judge, _ = trained(tmp_path, monkeypatch, keep_best=True, early_stop=3, said=said)
    assert "from before validations were counted" in said[0]
    assert done == 10 and judge.standing.kept.step == 7


def test_learning_by_heart_is_said_once_for_each_time_that_it_begins(tmp_path, monkeypatch):
    rises = dict(enumerate((1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.2, 1.3, 1.4, 1.5), 1))
    said: list[str] = []
    trained(tmp_path, monkeypatch, losses=rises, said=said, stop_after=5)
    trained(tmp_path, monkeypatch, losses=rises, said=said)
    assert [line.split(":")[0] for line in said] == ["step 4", "step 10"]
    assert all("--keep_best 1" in line and "Best so far is step 1 with 1.0000" in line for line in said)
    assert all("--early_stop 3" in line and "fewer epochs" in line for line in said)


def test_a_best_step_waits_for_the_save_in_flight(tmp_path, monkeypatch):
    """Each step is due by the clock; the best steps are saved though others are being written when they come."""
    done, _, saved = trained(tmp_path, monkeypatch, keep_best=True, intervals={"checkpoint_minutes": 0.0})
    assert done == STEPS and {1, 2, 3, 7} <= set(saved) and len(saved) == len(set(saved))
    assert 7 in steps_on_disk(tmp_path) and named_best(tmp_path) == 7


def test_a_complete_run_stays_so_once_the_checkpoint_of_its_exported_best_is_deleted(tmp_path, monkeypatch):
    """Else the same command would put the last step in the place of the best one."""
    _, judge, _ = trained(tmp_path, monkeypatch, keep_best=True)
    run, folder = run_of(steps=STEPS, validation=HELD_OUT), OutputDir(root=tmp_path)
    config = Config(dataset_path="x", validation="0.5", keep_best=True)
    folder.write_json("finished.json", wiring.ending_of(config, judge, run.order, STEPS).to_json())
    shutil.rmtree(tmp_path / "checkpoints" / folder_name(7))
    last, ranks = newest(tmp_path / "checkpoints"), Ranks(timeout_seconds=60)
    again = judged(run, tmp_path, last, [], "clips", ranks, keep_best=True)
    assert "already complete" in (wiring.complete_in_words(config, again, run.order, STEPS, folder) or "")
    config = replace(config, export="last")
    assert wiring.complete_in_words(config, again, run.order, STEPS, folder) is None


def test_a_complete_run_goes_on_for_the_samples_of_its_last_step_alone(tmp_path, monkeypatch):
    """They lack where a stop has cut them short, or where --sample_every comes only now."""
    _, judge, _ = trained(tmp_path, monkeypatch)
    run, folder = run_of(steps=STEPS, validation=HELD_OUT), OutputDir(root=tmp_path)
    silent = Config(dataset_path="x", validation="0.5")
    heard = replace(silent, sample_every=4)
    folder.write_json("finished.json", wiring.ending_of(silent, judge, run.order, STEPS).to_json())
    assert wiring.complete_in_words(silent, judge, run.order, STEPS, folder) is not None
    assert wiring.complete_in_words(heard, judge, run.order, STEPS, folder) is None
    list_of_last = samples.step_folder(folder.samples, STEPS) / samples.LIST
    list_of_last.parent.mkdir(parents=True)
    list_of_last.touch()
    assert wiring.complete_in_words(heard, judge, run.order, STEPS, folder) is not None
    shutil.rmtree(folder.samples)
    folder.samples.write_text("a file where none can be put")
    assert wiring.complete_in_words(heard, judge, run.order, STEPS, folder) is not None


def test_the_step_to_export_is_the_kept_one_unless_the_last_is_asked_for(undisturbed):
    standing = newest(undisturbed / "checkpoints").run.validations
    config = Config(dataset_path="x", validation="0.5", keep_best=True)
    assert wiring.step_to_export(config, standing, 10) == 7
    assert wiring.step_to_export(replace(config, export="last"), standing, 10) == 10
    assert wiring.step_to_export(replace(config, keep_best=False), standing, 10) == 10
    assert wiring.step_to_export(config, None, 10) == 10
