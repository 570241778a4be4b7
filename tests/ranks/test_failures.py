"""Ranks that die, hang, run out of memory or are told to stop: the others end in time, and a rerun loses nothing."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ranks.harness import run_ranks
from tests.ranks.launches import ends, launch, saving, send, start, steps_reported, wait_until, with_the_cache_of
from tests.runs import assert_bit_equal, final_state, metrics
from trainer.errors import EXIT_FAILED, EXIT_OUT_OF_MEMORY, EXIT_RESUME
from trainer.run.checkpoint import newest
from trainer.run.checkpoint_folders import complete_checkpoints

STEPS = 20
STRATEGIES = ("zero2", "fsdp")
LIMIT_SECONDS = 30  # --timeout_minutes, without a sign of life


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[str], Path]:
    """Folders of whole runs on two ranks, by strategy."""
    made: dict[str, Path] = {}

    def folder(strategy: str) -> Path:
        if strategy not in made:
            made[strategy] = tmp_path_factory.mktemp(strategy)
            launch(made[strategy], "--strategy", strategy, "--max_steps", str(STEPS))
        return made[strategy]

    return folder


def assert_as_undisturbed(folder: Path, whole: Path) -> None:
    assert_bit_equal(final_state(folder), final_state(whole))
    assert metrics(folder) == metrics(whole)
    assert list(metrics(folder)) == list(range(1, STEPS + 1))
    assert not saving(folder)


def kill_once(folder: Path, strategy: str, draw: random.Random, *, victims: str, while_saving: bool) -> None:
    """Start the run, kill -9 one rank or all at a random moment, and see the others end with a message."""
    started_ns = time.time_ns()  # what is reported since then is this start's: a killed one leaves lines to be cut off
    limit = ("--timeout_minutes", str(LIMIT_SECONDS / 60))
    running = start(folder, "--strategy", strategy, "--max_steps", str(STEPS), *limit)
    base = newest(folder / "models/checkpoints")
    target = (base.step if base else 0) + draw.randrange(1, 3)
    wait_until(running, lambda: steps_reported(folder, started_ns) >= target)
    if while_saving:
        wait_until(running, lambda: saving(folder))
    else:
        time.sleep(draw.uniform(0, 0.1))
    killed = [0, 1] if victims == "all" else [draw.randrange(2)]
    for rank in killed:
        send(running, rank, signal.SIGKILL)
    since = time.monotonic()
    for rank, (code, output) in enumerate(ends(running, folder, LIMIT_SECONDS + 20)):
        if rank in killed:
            assert code == -signal.SIGKILL
        else:
            assert code == EXIT_FAILED, output
            assert "error: " in output and "the same command resumes" in output, output
            assert f"rank {1 - rank}" in output.split("error: ")[-1], output
            assert "Traceback" not in output, output
            # Mostly at once, by gloo's error; but a collective of gloo's may wait on, and heartbeats then end the rank.
            assert time.monotonic() - since < LIMIT_SECONDS + 12
    for path in complete_checkpoints(folder / "models/checkpoints"):
        assert path.suffix != ".partial"
    found = newest(folder / "models/checkpoints")
    assert found is None or all(len(found.read(name)) for name in found.names())


def survive(folder: Path, whole: Path, strategy: str, kills: list[tuple[str, bool]], seed: int) -> None:
    with_the_cache_of(whole, folder)
    draw = random.Random(seed)
    for victims, while_saving in kills:
        kill_once(folder, strategy, draw, victims=victims, while_saving=while_saving)
    launch(folder, "--strategy", strategy, "--max_steps", str(STEPS))
    assert_as_undisturbed(folder, whole)


QUICK_KILLS = {"zero2": [("one", False), ("all", True)], "fsdp": [("one", True), ("all", False)]}


@pytest.mark.parametrize("strategy", [pytest.param("zero2", marks=pytest.mark.full), "fsdp"])
def test_two_kills_change_nothing(strategy, undisturbed, tmp_path):
    survive(tmp_path, undisturbed(strategy), strategy, QUICK_KILLS[strategy], seed=1)


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("while_saving", [False, True])
@pytest.mark.parametrize("victims", ["one", "all"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ten_kills_change_nothing(strategy, victims, while_saving, undisturbed, tmp_path):
    for part in range(2):  # five kills a run, so that each finds steps to be killed in
        kills = [(victims, while_saving)] * 5
        (tmp_path / str(part)).mkdir()
        survive(tmp_path / str(part), undisturbed(strategy), strategy, kills, seed=2 + part)


@pytest.mark.parametrize(
    "strategy,stopped",
    [("fsdp", 1), pytest.param("fsdp", 0, marks=pytest.mark.full), pytest.param("zero2", 1, marks=pytest.mark.full)],
)
def test_a_rank_that_hangs_ends_the_others_within_the_time_limit(strategy, stopped, undisturbed, tmp_path):
    whole = undisturbed(strategy)
    with_the_cache_of(whole, tmp_path)
    running = start(tmp_path, "--strategy", strategy, "--max_steps", str(STEPS), "--timeout_minutes", "0.1")
    wait_until(running, lambda: steps_reported(tmp_path) >= 2)
    send(running, stopped, signal.SIGSTOP)
    since = time.monotonic()
    other = running.processes[1 - stopped]
    other.join(40)
    seconds = time.monotonic() - since
    send(running, stopped, signal.SIGCONT)  # and so does the hung one, once it wakes up
    ended = ends(running, tmp_path, 40)
    code, output = ended[1 - stopped]
    assert code == EXIT_FAILED and seconds < 60 * 0.1 + 12
    last = output.split("error: ")[-1]
    # Rank 0 holds the store here, so that nobody can ask whose beat stands still.
    assert (f"rank 1 on {os.uname().nodename}" if stopped else "rank 0 or the launcher") in last, output
    assert "Traceback" not in output, output
    assert ended[stopped][0] == EXIT_FAILED, ended[stopped][1]


def rank_1_hangs_inside_step_2() -> None:
    """As in a driver that does not come back: the heartbeats go on, and all ranks are in the same step."""
    from trainer.engine import Engine

    summed_losses = Engine._summed_losses

    def hanging(self, batch):
        if self.ranks.rank == 1 and self.ranks.steps_begun == 2:
            threading.Event().wait()
        return summed_losses(self, batch)

    Engine._summed_losses = hanging  # type: ignore[method-assign]


@pytest.mark.full
def test_a_step_that_never_ends_ends_all_though_every_rank_sends_heartbeats(undisturbed, tmp_path, monkeypatch):
    with_the_cache_of(undisturbed("fsdp"), tmp_path)
    flags = ("--strategy", "fsdp", "--max_steps", str(STEPS), "--timeout_minutes", "0.1")
    for code, output in ends(start(tmp_path, *flags, change=rank_1_hangs_inside_step_2), tmp_path, 90):
        assert code == EXIT_FAILED, output
        assert "step 2 has not ended for" in output and "main thread was at" in output, output
    assert (tmp_path / "models/exit_code").read_text() == f"{EXIT_FAILED}\n"


def out_of_memory_on_rank_1() -> None:
    from trainer.engine import Engine

    summed_losses = Engine._summed_losses

    def too_much(self, batch):
        if self.ranks.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")
        return summed_losses(self, batch)

    Engine._summed_losses = too_much  # type: ignore[method-assign]


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero2", marks=pytest.mark.full)])
def test_one_rank_out_of_memory_ends_all_with_its_code_and_the_flag_to_use(strategy, undisturbed, tmp_path):
    with_the_cache_of(undisturbed(strategy), tmp_path)
    running = start(tmp_path, "--strategy", strategy, change=out_of_memory_on_rank_1)
    for code, output in ends(running, tmp_path, 40):
        assert code == EXIT_OUT_OF_MEMORY, output
        assert "--batch_size" in output and "--gradient_checkpointing 1" in output, output
        assert "Traceback" not in output, output
    assert (tmp_path / "models/exit_code").read_text() == f"{EXIT_OUT_OF_MEMORY}\n"


@pytest.mark.parametrize(
    "strategy,told,number",
    [
        ("zero2", 1, signal.SIGTERM),
        pytest.param("fsdp", 1, signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("fsdp", 0, signal.SIGUSR1, marks=pytest.mark.full),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(strategy, told, number, undisturbed, tmp_path):
    whole = undisturbed(strategy)
    with_the_cache_of(whole, tmp_path)
    flags = ("--strategy", strategy, "--max_steps", str(STEPS))
    running = start(tmp_path, *flags, "--checkpoint_minutes", "60")
    wait_until(running, lambda: steps_reported(tmp_path) >= 3)
    send(running, told, number)
    ended = ends(running, tmp_path)
    assert [code for code, _ in ended] == [EXIT_RESUME] * 2, "\n".join(output for _, output in ended)
    stopped = max(metrics(tmp_path))
    assert f"saved after step {stopped} of {STEPS}" in ended[0][1]
    assert [path.name for path in complete_checkpoints(tmp_path / "models/checkpoints")] == [f"step-{stopped:08d}"]
    assert f"step {stopped} of {STEPS}" in launch(tmp_path, *flags)
    assert_as_undisturbed(tmp_path, whole)


def late(seconds: float, timeout_seconds: float) -> list[float]:
    """Wait for rank 1, which is late, and meet in a collective after that."""
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from trainer.engine import Ranks

    Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds))])
    with Ranks(timeout_seconds=timeout_seconds) as ranks:
        if ranks.rank == 1:
            time.sleep(seconds)
        since = time.monotonic()
        ranks.wait("the late one")
        return ranks.gather(time.monotonic() - since)


def test_waiting_outlasts_the_time_limit_of_collectives():
    waited, _ = run_ranks(2, late, 5.0, 2.0)[0]
    assert waited > 4
