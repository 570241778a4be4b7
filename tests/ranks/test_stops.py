"""Requests to stop and failures outside the training steps, on several ranks: the code, and what is kept."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.ranks.launches import ends, launch, send, start, wait_until
from tests.ranks.test_encoding import CLIPS, keys_of_parts
from tests.runs import assert_bit_equal, few_clips, final_state, metrics
from trainer.errors import EXIT_FAILED, EXIT_NOT_FINITE, EXIT_RESUME

ONE_STEP = ("--max_steps", "1", "--strategy", "ddp")


def slow_after_the_first_clip() -> None:
    """Each rank holds one encoded clip that is not written yet, and takes long over its second."""
    from trainer.data import cache

    encode_tracks = cache.encode_tracks

    def slowly(*arguments, **named):
        for number, track in enumerate(encode_tracks(*arguments, **named)):
            if number == 1:
                Path(f"rank-{os.environ['RANK']}-holds-one").touch()
                time.sleep(60)
            yield track

    cache.encode_tracks = slowly  # type: ignore[assignment]


def exit_code(folder: Path) -> int:
    return int((folder / "models/exit_code").read_text())


@pytest.mark.parametrize(
    "told",
    [
        pytest.param([(1, signal.SIGUSR1)], id="one rank, whose word reaches the other"),
        pytest.param([(0, signal.SIGTERM), (1, signal.SIGTERM)] * 2, id="all, twice", marks=pytest.mark.full),
        pytest.param([(0, signal.SIGINT), (1, signal.SIGINT)], id="ctrl-c", marks=pytest.mark.full),
        pytest.param([], id="the clock", marks=pytest.mark.full),
    ],
)
def test_a_stop_while_encoding_keeps_what_every_rank_has_encoded(told, tmp_path):
    few_clips(tmp_path / "data", CLIPS)
    flags = (*ONE_STEP, *(() if told else ("--max_minutes", "0.25")))
    running = start(tmp_path, *flags, change=slow_after_the_first_clip)
    wait_until(running, lambda: len(list(tmp_path.glob("rank-*-holds-one"))) == 2)
    assert not list((tmp_path / "cache/codes").rglob("*.arrow"))
    for rank, number in told:
        send(running, rank, number)
    for code, output in ends(running, tmp_path, 30):
        assert code == EXIT_RESUME and "Traceback" not in output, output
    assert exit_code(tmp_path) == EXIT_RESUME
    assert [len(part) for part in keys_of_parts(tmp_path, "codes")] == [1, 1]
    launch(tmp_path, *ONE_STEP)
    assert [len(part) for part in keys_of_parts(tmp_path, "codes")] == [1, 1, 1, 1]
    assert exit_code(tmp_path) == 0


def test_a_launchers_signal_because_of_a_lost_rank_does_not_count_as_a_request(tmp_path):
    few_clips(tmp_path / "data", CLIPS)
    running = start(tmp_path, *ONE_STEP, change=slow_after_the_first_clip)
    wait_until(running, lambda: len(list(tmp_path.glob("rank-*-holds-one"))) == 2)
    send(running, 1, signal.SIGKILL)
    send(running, 0, signal.SIGTERM)  # what accelerate launch and torchrun do then
    code, output = ends(running, tmp_path, 30)[0]
    assert code == EXIT_FAILED and "rank 1 on" in output and "before step 1" in output, output
    assert exit_code(tmp_path) == EXIT_FAILED


def not_finite_on_rank_1() -> None:
    from trainer.engine import Engine

    summed_losses = Engine._summed_losses

    def at_step_4(self, batch):
        sums = summed_losses(self, batch)
        return sums * float("nan") if self.ranks.rank == 1 and self.ranks.steps_begun == 4 else sums

    Engine._summed_losses = at_step_4  # type: ignore[method-assign]


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_saves_the_state_before_it_on_all(strategy, tmp_path):
    flags = ("--strategy", strategy, "--max_steps", "6", "--checkpoint_minutes", "60")
    (tmp_path / "whole").mkdir()
    launch(tmp_path / "whole", *flags)
    running = start(tmp_path, *flags, change=not_finite_on_rank_1)
    for code, output in ends(running, tmp_path):
        assert code == EXIT_NOT_FINITE and "step 4: " in output and ".wav" in output, output
    assert exit_code(tmp_path) == EXIT_NOT_FINITE
    assert "step 3 of 6" in launch(tmp_path, *flags)
    assert metrics(tmp_path) == metrics(tmp_path / "whole")
    assert_bit_equal(final_state(tmp_path), final_state(tmp_path / "whole"))


def stuck_on_rank_1() -> None:
    """A main thread that waits for ever between two steps, as for a disk that does not answer."""
    from trainer.training import loop

    step_of_loop = loop._step

    def at_step_3(run, engine, saver, judge, work, requests):
        if engine.ranks.rank == 1 and work.step == 2:
            a_disk_that_does_not_answer()
        return step_of_loop(run, engine, saver, judge, work, requests)

    loop._step = at_step_3


def a_disk_that_does_not_answer() -> None:
    time.sleep(120)


@pytest.mark.full
def test_a_rank_that_is_stuck_is_named_with_its_step_and_says_where_it_was(tmp_path):
    flags = ("--strategy", "zero2", "--max_steps", "6", "--timeout_minutes", "0.1")
    first, second = ends(start(tmp_path, *flags, change=stuck_on_rank_1), tmp_path, 60)
    assert first[0] == second[0] == exit_code(tmp_path) == EXIT_FAILED
    words = f"rank 1 on {os.uname().nodename} failed: step 3 waited for it for 6 s, at step 2"
    assert words in first[1], first[1]
    assert "a_disk_that_does_not_answer" in second[1], second[1]


def waiting_in_c_at_step_3() -> None:
    """All main threads wait as in CUDA for a rank that is gone: nothing raises, and no handler of a signal runs."""
    from tests.waiting_in_c import wait_in_c
    from trainer.training import loop

    step_of_loop = loop._step

    def at_step_3(run, engine, saver, judge, work, requests):
        if work.step == 2:
            engine.ranks.steps_begun = 3
            Path(f"rank-{engine.ranks.rank}-waits").touch()
            wait_in_c(200)
        return step_of_loop(run, engine, saver, judge, work, requests)

    loop._step = at_step_3


def waiting_in_c_under_torchrun() -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "16"}
    waiting_in_c_at_step_3()


def wait_until_all_wait(running, folder: Path) -> None:
    wait_until(running, lambda: len(list(folder.glob("rank-*-waits"))) == 2)


@pytest.mark.full
def test_a_lost_rank_is_named_before_the_launcher_kills_though_main_threads_wait_in_c(tmp_path):
    running = start(tmp_path, "--strategy", "ddp", "--max_steps", "6", change=waiting_in_c_at_step_3)
    wait_until_all_wait(running, tmp_path)
    send(running, 1, signal.SIGKILL)
    send(running, 0, signal.SIGTERM)  # torchrun does so when it sees the loss, and kills after 30 s
    code, output = ends(running, tmp_path, 25)[0]
    assert code == exit_code(tmp_path) == EXIT_FAILED
    # Its last heartbeat may be one of before the first step, of which it sends one a second.
    assert re.search(r"rank 1 on .*no sign of life .*(at|before) step", output), output
    assert "no sign of life" in (tmp_path / "models/log.txt").read_text()


@pytest.mark.full
def test_ranks_whose_main_threads_wait_in_c_end_as_stopped_before_the_launcher_kills(tmp_path):
    running = start(tmp_path, "--strategy", "ddp", "--max_steps", "6", change=waiting_in_c_under_torchrun)
    wait_until_all_wait(running, tmp_path)
    for rank in range(2):
        send(running, rank, signal.SIGTERM)
    for code, output in ends(running, tmp_path, 16):
        assert code == EXIT_RESUME and "main thread" in output and "wait_in_c" in output, output
    assert exit_code(tmp_path) == EXIT_RESUME
