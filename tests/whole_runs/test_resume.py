"""Interrupted runs end with the weights of undisturbed ones, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.ranks.harness import RankProcesses, start_ranks
from tests.ranks.launches import ends, launched, send, wait_until
from tests.runs import a_step_is_reported, assert_bit_equal, command, final_state, launch_here, metrics

STEPS = 24
# Saves almost all the time, so that kills hit saves too.
FLAGS = ("--max_steps", str(STEPS), "--epochs", "1000", "--lr", "3e-3", "--batch_size", "2", "--grad_acc", "1")
FLAGS += ("--use_cfg", "1", "--cfg_rate", "0.3", "--ema_decay", "0.9", "--checkpoint_minutes", "0.0001")


def start(folder: Path, *flags: str) -> RankProcesses:
    """A run in `folder` by a process that has the imports done, which take longer than these runs."""
    return start_ranks(1, launched, str(folder), [command(folder, *flags)[2:]], None)


def finish(running: RankProcesses, folder: Path, expect: int = 0) -> str:
    """The output of the run, whose exit code must be `expect`."""
    [(code, output)] = ends(running, folder)
    assert code == expect, f"exit code {code}, not {expect}:\n{output}"
    return output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(folder, *FLAGS), folder)
    return folder


def continued(folder: Path, undisturbed: Path) -> Path:
    """A folder for a run on the same data with the same cache."""
    for name in ("data", "cache"):
        shutil.copytree(undisturbed / name, folder / name)
    return folder


def kill_while(folder: Path, draw: random.Random, *, saving: bool) -> None:
    """Start the run and kill -9 it at a random moment of training, or while a checkpoint is half-written."""
    [process] = start(folder, *FLAGS).processes
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        partial = list(folder.glob("models/checkpoints/*.partial"))
        started = (folder / "models/metrics.jsonl").exists()
        if partial if saving else started:
            time.sleep(0.0 if saving else draw.uniform(0, 3))
            break
        time.sleep(0.001)
    process.kill()
    process.join()


def survive(tmp_path: Path, undisturbed: Path, kills: int, seed: int) -> None:
    folder = continued(tmp_path, undisturbed)
    draw = random.Random(seed)
    for index in range(kills):
        kill_while(folder, draw, saving=index % 2 == 0)
    finish(start(folder, *FLAGS), folder)
    assert_bit_equal(final_state(folder), final_state(undisturbed))
    assert metrics(folder) == metrics(undisturbed)
    assert list(metrics(folder)) == list(range(1, STEPS + 1))


def test_three_kills_change_nothing(tmp_path, undisturbed):
    survive(tmp_path, undisturbed, kills=3, seed=1)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_ten_kills_change_nothing(tmp_path, undisturbed):
    survive(tmp_path, undisturbed, kills=10, seed=2)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.full) for other in (signal.SIGUSR1, signal.SIGINT))],
)
def test_a_signal_stops_after_a_step_with_a_checkpoint_and_its_own_exit_code(tmp_path, undisturbed, number):
    folder = continued(tmp_path, undisturbed)
    running = start(folder, *FLAGS[:-1], "60")
    wait_until(running, lambda: a_step_is_reported(folder))
    send(running, 0, number)
    output = finish(running, folder, expect=75)
    assert f"{number.name}: saved after step" in output
    stopped = max(metrics(folder))
    assert 0 < stopped < STEPS
    again = finish(start(folder, *FLAGS), folder)
    assert f"step {stopped} of {STEPS}" in again
    assert_bit_equal(final_state(folder), final_state(undisturbed))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_signal_while_encoding_keeps_what_is_done_and_says_resume_me(tmp_path, undisturbed, number):
    folder = continued(tmp_path, undisturbed)
    running = start(folder, *FLAGS, "--code_views", "640")  # a long encoding
    wait_until(running, lambda: list(folder.glob("cache/codes/*-640")))
    send(running, 0, number)
    output = finish(running, folder, expect=75)
    assert "run the same command to continue" in output and "Traceback" not in output
    assert list(folder.glob("cache/codes/*-2/*.arrow")), "the cache of another run is gone"


def test_a_finished_run_says_so_and_writes_nothing(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "models").rglob("*") if path.is_file()}
    output = launch_here(undisturbed, *FLAGS)
    assert f"already complete: {STEPS} steps" in output
    after = {path: path.stat().st_mtime_ns for path in (undisturbed / "models").rglob("*") if path.is_file()}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"dataset.csv", "exit_code", "log.txt"}


def test_a_kill_while_exporting_is_made_good(tmp_path, undisturbed):
    folder = continued(tmp_path, undisturbed)
    shutil.copytree(undisturbed / "models", folder / "models")
    (folder / "models/finished.json").unlink()
    shutil.rmtree(folder / "models/huggingface")
    launch_here(folder, *FLAGS)
    assert (folder / "models/huggingface/model.safetensors").is_file()
    assert_bit_equal(final_state(folder), final_state(undisturbed))


@pytest.mark.parametrize(
    "flags,words,code",
    [
        ("--seed 5", "--seed: 0 then, 5 now", 1),
        ("--segment_seconds 3", "--segment_seconds: 4.0 then, 3.0 now", 1),
        ("--code_views 1", "--code_views: 2 then, 1 now", 1),
        pytest.param("--trim_silence 1", "--trim_silence: None then, 1 now", 1, marks=pytest.mark.full),
        pytest.param("--loudness -14", "--loudness: None then, -14.0 now", 1, marks=pytest.mark.full),
        pytest.param("--sample_by duration", "--sample_by: None then, duration now", 1, marks=pytest.mark.full),
        ("--cfg_rate 0.2", "0.3 then, 0.2 now", 1),
        ("--no_label 1", "dataset: 3 clips, digest", 1),
        ("--global_batch 4", "--global_batch 4 contradicts the checkpoint's 2", 2),
        ("--resume no", "holds a run: choose another folder", 2),
    ],
)
def test_another_run_is_refused_with_both_values(undisturbed, flags, words, code):
    before = final_state(undisturbed)
    without = FLAGS[: FLAGS.index("--grad_acc")] + FLAGS[FLAGS.index("--grad_acc") + 2 :]  # contradicts --global_batch
    output = launch_here(undisturbed, *without, *flags.split(), expect=code)
    assert words in output
    assert_bit_equal(final_state(undisturbed), before)


def test_more_epochs_continue_a_finished_run(tmp_path, undisturbed):
    folder = continued(tmp_path, undisturbed)
    shutil.copytree(undisturbed / "models", folder / "models")
    output = launch_here(folder, *FLAGS, "--max_steps", str(STEPS + 3))
    assert f"step {STEPS} of {STEPS + 3}" in output
    assert list(metrics(folder)) == list(range(1, STEPS + 4))
