"""Several ranks keep the same best step and end early at the same one, and one process goes on with their decisions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.plans import plan_for
from tests.ranks.harness import run_ranks
from tests.ranks.launches import ends, launch, start
from tests.run.test_best import named_best, steps_on_disk
from tests.runs import assert_bit_equal, few_clips, final_state, metrics
from tests.whole_runs.test_best import OTHERS, exported, killed_before_naming, told_best, weights_of
from trainer.run.standing import Standing

STEPS = 24


def judged_steps(strategy: str, folder: str, stop_after: int | None = None) -> tuple[int, bool, Standing, list[str]]:
    """A run that goes on from what is in `folder`, keeps the best step, and ends after 3 validations without a better.

    Returns the steps done, whether the run ended early, its standing, and the checkpoints that are there. It saves all
    the time, so that best steps come while others are being written.
    """
    import os

    from tests.synthetic import random_examples
    from tests.training.test_best import Noted, Stop, judged
    from tests.training.test_loop import SEGMENT, run_of
    from trainer.engine import Engine, Ranks, build_accelerator
    from trainer.flags.config import Config
    from trainer.model.source import open_model
    from trainer.run.checkpoint import Saver
    from trainer.run.checkpoint_folders import complete_checkpoints
    from trainer.run.output_dir import open_output_dir
    from trainer.training.loop import train
    from trainer.wiring import engine_settings, mend

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    settings = engine_settings(Config(dataset_path="unused"))
    plan = plan_for(strategy, world_size=world_size, micro_batch=1, accumulation=4 // world_size, global_batch=4)
    # The first clip is one of those that are trained on, the others are new: at first it gets better, then worse.
    held_out = random_examples([30, 30, 30], segment_frames=SEGMENT)
    run = run_of(steps=STEPS, validation=held_out, validation_steps=2, checkpoint_minutes=0.0)
    run = replace(run, plan=plan)
    accelerator = build_accelerator(plan, settings, Path("."))
    with Ranks(timeout_seconds=60) as ranks:
        output, checkpoint = open_output_dir(folder, "auto", first=ranks.is_first)
        judge = judged(run, Path(folder), checkpoint, [], "held out", ranks, keep_best=True, early_stop=3)
        engine = Engine(accelerator, ranks, open_model("debug"), plan, settings)
        start = 0 if checkpoint is None else checkpoint.step
        if checkpoint is not None:
            engine.load(checkpoint)
        if ranks.is_first:
            mend(judge, output)
        saver = Saver(output.checkpoints, rank=ranks.rank, world_size=world_size, best=output.best)
        stop: Any = Stop(stop_after, start)
        noted: Any = Noted(stop)
        step = train(run, engine, saver, noted, stop, start, judge=judge)
        ranks.wait("all saved")
        assert judge.standing is not None
        there = [path.name for path in complete_checkpoints(output.checkpoints)]
        return step, judge.ends_run, judge.standing, there


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, bool, Standing, list[str]]:
    [found] = run_ranks(1, judged_steps, "single", str(tmp_path_factory.mktemp("alone")))
    step, early, standing, _ = found
    assert early and standing.kept.step == step - 6 and standing.kept.step > 4, "it learned by heart, after some steps"
    return found


@pytest.mark.full
@pytest.mark.parametrize("before", ["ddp", "fsdp", "zero2"])
def test_what_two_ranks_kept_and_counted_one_process_goes_on_with(before, alone, tmp_path):
    step, _, standing, there = alone
    cut = standing.kept.step + 3  # between two validations, with one that was no better behind it
    first, second = run_ranks(2, judged_steps, before, str(tmp_path), stop_after=cut)
    assert first == second and first[0] == cut and not first[1]
    assert first[2].kept.step == standing.kept.step and first[2].without_improvement == 1
    [found] = run_ranks(1, judged_steps, "single", str(tmp_path))
    assert found[:2] == (step, True)
    assert found[2].kept.step == found[2].best.step == standing.kept.step
    assert found[2].kept.loss == pytest.approx(standing.kept.loss, abs=1e-3)
    assert found[2].without_improvement == 3
    names = {f"step-{number:08d}" for number in (step, standing.kept.step)}
    assert names <= set(found[3]) and names <= set(there) and len(found[3]) == 3


@pytest.mark.full
def test_two_ranks_end_early_at_the_step_of_one_process(alone, tmp_path):
    first, second = run_ranks(2, judged_steps, "ddp", str(tmp_path))
    assert first == second
    assert first[:2] == alone[:2] and first[2].kept.step == alone[2].kept.step


LAUNCHED = ("--validation", "held_out", "--validation_steps", "2", "--max_steps", "60", "--warmup_steps", "1")
LAUNCHED += ("--keep_best", "1", "--early_stop", "3", "--strategy", "ddp")


@pytest.mark.full
def test_a_launch_of_two_ranks_killed_before_the_best_is_named_ends_as_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        few_clips(folder / "held_out", OTHERS)
    output = launch(whole, *LAUNCHED)
    step, loss = told_best(whole)
    last = max(metrics(whole, "validation_loss"))
    assert last == step + 6 < 60 and f"Exported is step {step}, validation loss {loss:.4f}" in output
    assert_bit_equal(exported(whole), weights_of(whole, step))
    codes = [code for code, _ in ends(start(killed, *LAUNCHED, change=killed_before_naming), killed, 120)]
    assert codes[0] == -9 and codes[1] != 0
    launch(killed, *LAUNCHED)
    assert metrics(killed, "validation_loss") == metrics(whole, "validation_loss")
    assert steps_on_disk(killed / "models")[-1] == last and named_best(killed / "models") == step
    assert_bit_equal(final_state(killed), final_state(whole))
    assert_bit_equal(exported(killed), exported(whole))
    assert "already complete" in launch(killed, *LAUNCHED)
    # Another number of processes goes on, with the count at zero because there are more steps.
    more = launch(killed, *LAUNCHED, "--max_steps", "70", "--strategy", "single", world_size=1)
    assert "70 steps now instead of 60" in more and f"step {last} of 70" in more
