"""Runs of launch.py on two ranks that share one GPU: their end, by itself and by signals, and what comes after.

Without a GPU the same runs over gloo. Figures say how long it took until the other rank had ended.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.gpu.one_card import backend, most, say_figure, start
from tests.ranks.launches import ends, send, steps_reported, wait_until, with_the_cache_of
from tests.rounding import LOSS
from tests.runs import metrics
from trainer.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUME
from trainer.run.checkpoint import complete_checkpoints

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STEPS = 12
# Float32, so that strategies and numbers of ranks differ by rounding alone.
FLAGS = ("--mixed_precision", "no", "--max_steps", str(STEPS))
TIMEOUT_MINUTES = 0.5


def finish(folder: Path, *flags: str, world_size: int, seconds: float = 240) -> str:
    """Rank 0's output of a run that has to be complete."""
    ended = ends(start(folder, *FLAGS, *flags, world_size=world_size), folder, seconds)
    assert [code for code, _ in ended] == [EXIT_DONE] * world_size, "\n".join(output for _, output in ended)
    return ended[0][1]


def exit_code(folder: Path) -> int:
    """What the run left in its folder for a script that starts it again."""
    return int((folder / "models/exit_code").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, "--strategy", "single", world_size=1)
    return folder


def assert_same_losses(folder: Path, whole: Path) -> float:
    """Every step stands once, with the loss of one process; returns the largest difference."""
    found, expected = metrics(folder), metrics(whole)
    assert list(found) == list(range(1, STEPS + 1))
    apart = max(abs(found[step] - expected[step]) for step in expected)
    assert apart <= LOSS
    return apart


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_a_run_from_start_to_exports(strategy: str, whole: Path, tmp_path: Path) -> None:
    if strategy == "zero2":
        pytest.importorskip("deepspeed")
    with_the_cache_of(whole, tmp_path)
    since = time.monotonic()
    finish(tmp_path, "--strategy", strategy, world_size=2)
    apart = assert_same_losses(tmp_path, whole)
    assert (tmp_path / "models/lm_final.pt").exists() and exit_code(tmp_path) == EXIT_DONE
    say_figure(f"{backend()}: losses within {apart:.1e} nats, {time.monotonic() - since:.0f} s from start to exports")


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_rank_ends_both_with_a_checkpoint_and_another_strategy_goes_on(
    told: int, whole: Path, tmp_path: Path
) -> None:
    with_the_cache_of(whole, tmp_path)
    running = start(tmp_path, *FLAGS, "--strategy", "fsdp", "--checkpoint_minutes", "60")
    wait_until(running, lambda: steps_reported(tmp_path) >= 3, 240)
    send(running, told, signal.SIGTERM)
    since = time.monotonic()
    ended = ends(running, tmp_path, 60)
    seconds = time.monotonic() - since
    assert [code for code, _ in ended] == [EXIT_RESUME] * 2, "\n".join(output for _, output in ended)
    assert exit_code(tmp_path) == EXIT_RESUME
    stopped = max(metrics(tmp_path))
    [checkpoint] = complete_checkpoints(tmp_path / "models/checkpoints")
    assert checkpoint.name == f"step-{stopped:08d}"
    assert f"step {stopped} of {STEPS}" in finish(tmp_path, "--strategy", "single", world_size=1)
    apart = assert_same_losses(tmp_path, whole)
    say_figure(
        f"{backend()}: both ended with {EXIT_RESUME} in {seconds:.1f} s, after step {stopped}; continued by one"
        f" process, losses within {apart:.1e} nats"
    )


@pytest.mark.parametrize("number,lost", [("SIGKILL", 1), ("SIGKILL", 0), ("SIGSTOP", 1), ("SIGSTOP", 0)])
def test_a_lost_rank_ends_the_other_in_time_with_a_message(number: str, lost: int, whole: Path, tmp_path: Path) -> None:
    with_the_cache_of(whole, tmp_path)
    limit = ("--timeout_minutes", str(TIMEOUT_MINUTES))
    running = start(tmp_path, *FLAGS, *limit, "--strategy", "fsdp", "--epochs", "100000", "--max_steps", "100000")
    wait_until(running, lambda: steps_reported(tmp_path) >= 3, 240)
    send(running, lost, signal.Signals[number])
    since = time.monotonic()
    other = running.processes[1 - lost]
    other.join(60 * TIMEOUT_MINUTES + 60)
    seconds, ended = time.monotonic() - since, other.exitcode is not None
    running.processes[lost].kill()  # a stopped one too
    output = (tmp_path / f"rank-{1 - lost}.log").read_text()
    _, code = running.results(10)[1 - lost]  # what its main returned, or that of a process which was ended meanwhile
    last = output.split("error: ")[-1]
    say_figure(f"{backend()}: rank {1 - lost} ended with {code} after {seconds:.1f} s: {' '.join(last.split())[:200]}")
    assert ended and code == EXIT_FAILED, output
    assert seconds <= 60 * TIMEOUT_MINUTES + 15, output
    assert "rank" in last and "Traceback" not in output, output
    assert exit_code(tmp_path) == EXIT_FAILED


def waiting_in_cuda_at_step_3() -> None:
    """All main threads wait in CUDA, where nothing raises and no handler of a signal runs."""
    from trainer.training import loop

    step_of_loop = loop._step

    def at_step_3(run, engine, saver, judge, work, requests):
        if work.step == 2:
            engine.ranks.steps_begun = 3
            torch.cuda._sleep(10**13)  # cycles: more than an hour
            Path(f"rank-{engine.ranks.rank}-waits").touch()
            torch.cuda.synchronize()
        return step_of_loop(run, engine, saver, judge, work, requests)

    loop._step = at_step_3


def waiting_in_cuda_under_torchrun() -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "16"}
    waiting_in_cuda_at_step_3()


@needs_a_gpu
@pytest.mark.parametrize("lost", [False, True])
def test_ranks_that_wait_in_cuda_end_before_the_launcher_kills(lost: bool, whole: Path, tmp_path: Path) -> None:
    """`lost`: one is killed and the other is told to stop, as torchrun does; else both are told to."""
    with_the_cache_of(whole, tmp_path)
    change = waiting_in_cuda_at_step_3 if lost else waiting_in_cuda_under_torchrun
    running = start(tmp_path, *FLAGS, "--strategy", "ddp", change=change)
    wait_until(running, lambda: len(list(tmp_path.glob("rank-*-waits"))) == 2, 240)
    send(running, 1, signal.SIGKILL if lost else signal.SIGTERM)
    send(running, 0, signal.SIGTERM)
    since = time.monotonic()
    running.processes[0].join(40)
    seconds, ended = time.monotonic() - since, running.processes[0].exitcode is not None
    for process in running.processes:
        process.kill()
    running.results(10)
    output = (tmp_path / "rank-0.log").read_text()
    last = output.split("error: ")[-1]
    say_figure(f"rank 0 ended after {seconds:.1f} s: {' '.join(last.split())[:200]}")
    assert ended and seconds <= 25, output
    assert exit_code(tmp_path) == (EXIT_FAILED if lost else EXIT_RESUME), output
    assert ("no sign of life" if lost else "main thread") in output, output


def test_checkpoints_of_two_ranks_are_the_values_of_one_process(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from tests.runs import final_state

    with_the_cache_of(whole, tmp_path)
    finish(tmp_path, "--strategy", "zero2", world_size=2)
    found, expected = final_state(tmp_path), final_state(whole)
    assert found.keys() == expected.keys()
    apart = [
        float((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
        for name in expected
        if name.startswith("weight/")
    ]
    say_figure(f"{backend()}: weights within {most(apart)} of their norm")
    assert max(apart) < 1e-3
