"""Stopping on request: SIGTERM, SIGUSR1, SIGINT and the clock of --max_minutes.

While training, a request ends the run after the step in hand (`StopRequest`). Outside the training it raises
KeyboardInterrupt at once (`interruptible`).
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

TIME_IS_UP = "--max_minutes is over"
# Launchers and schedulers send these to all processes of a run, and often twice.
REQUESTS = (signal.SIGTERM, signal.SIGUSR1)
SIGNALS = (*REQUESTS, signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block SIGTERM and SIGUSR1 raise KeyboardInterrupt, as SIGINT does; for all that is not training.

    They do so once: what is written after that is short, and the second signal of the same request must not cut it off.
    """
    previous = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def time_limit(minutes: float | None, *, since: float) -> Iterator[None]:
    """Inside the block SIGALRM comes when `minutes` have passed since time.monotonic() was `since`; None for never.

    It acts as a request by signal does: it interrupts, or ends the training after the step in hand.
    """
    if minutes is None:
        yield
        return
    previous = signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, 60 * minutes - (time.monotonic() - since)))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def ignore_requests() -> None:
    """From here on only SIGINT interrupts: for when the run is ending already, and must write its last files whole."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    if signal.getsignal(signal.SIGALRM) is _interrupt:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    ignore_requests()
    if number == signal.SIGALRM:
        sys.stderr.write(f"\n{TIME_IS_UP}: stopping\n")
    raise KeyboardInterrupt


class StopRequest:
    """While entered, notes that a signal asked for an end, and interrupts nothing; a second SIGINT interrupts at once.

    `name` is the signal's name, TIME_IS_UP for the clock, None before any. Once a signal has come, SIGTERM and SIGUSR1
    have no effect after leaving either, because the run is ending.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[signal.Signals, signal.Handlers | int | object] = {}

    def __enter__(self) -> StopRequest:
        timed = signal.getsignal(signal.SIGALRM) is _interrupt  # within `time_limit`
        for number in (*SIGNALS, signal.SIGALRM) if timed else SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.name is not None:
            ignore_requests()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.name is None:
            self.name = TIME_IS_UP if number == signal.SIGALRM else signal.Signals(number).name
            sys.stderr.write(f"\n{self.name}: stopping after this step, with a checkpoint\n")
