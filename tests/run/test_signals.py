"""Requests to stop: by signal and by the clock."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.waiting_in_c import main_thread_waits_in_c, wait_in_c
from trainer.run.signals import TIME_IS_UP, StopRequest, asked, interruptible, time_limit

REQUESTS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(autouse=True)
def without_nohup() -> Iterator[None]:
    """Whatever the tests were started by."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize("number", [*REQUESTS, signal.SIGINT])
def test_outside_the_training_a_signal_interrupts(number):
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), number)
        time.sleep(5)


def test_a_second_signal_does_not_cut_off_what_the_first_one_made_end():
    """The launcher forwards SIGTERM, and the scheduler has sent it already."""
    written = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            for number in REQUESTS:
                os.kill(os.getpid(), number)
                written.append(number)
    assert len(written) == 3


@pytest.mark.parametrize("number", [*REQUESTS, signal.SIGINT])
def test_within_the_training_it_is_remembered(number, capsys):
    with interruptible(), StopRequest() as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.name == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == number.name


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), interruptible(), StopRequest():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_after_a_request_the_same_signal_cannot_cut_off_the_end():
    with interruptible():
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def test_the_clock_counts_from_the_start_and_interrupts():
    started = time.monotonic() - 59.8
    with pytest.raises(KeyboardInterrupt), interruptible(), time_limit(1.0, since=started):
        time.sleep(5)
    assert 0.15 < time.monotonic() - started - 59.8 < 3


def test_within_the_training_the_clock_is_remembered():
    with interruptible(), time_limit(0.2 / 60, since=time.monotonic()), StopRequest() as stop:
        assert stop.name is None
        time.sleep(0.5)
        assert stop.name == TIME_IS_UP


def test_a_limit_that_has_passed_already_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), interruptible(), time_limit(0.1, since=time.monotonic() - 60):
        time.sleep(5)


def test_without_a_limit_no_alarm_is_touched():
    before = signal.getsignal(signal.SIGALRM)
    with interruptible(), time_limit(None, since=0.0), StopRequest():
        assert signal.getsignal(signal.SIGALRM) is before


def test_a_closed_terminal_is_no_request_where_nohup_has_said_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruptible():
        os.kill(os.getpid(), signal.SIGHUP)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name is None
        assert asked() is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_request_is_known_to_other_threads_while_the_main_thread_waits_in_c():
    """No handler runs meanwhile, so that the main thread has not answered; once it is back, it has."""
    seen = []

    def ask() -> None:
        while not main_thread_waits_in_c():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        while not seen:
            if (request := asked()) is not None:
                seen.append(request)

    with interruptible(), StopRequest() as stop:
        thread = threading.Thread(target=ask)
        thread.start()
        wait_in_c(0.5)
        thread.join()
        assert seen[0].name == "SIGTERM" and not seen[0].answered
        assert stop.name == "SIGTERM"
        now = asked()
        assert now is not None and now.answered
    assert asked() is None
