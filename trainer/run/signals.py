"""Stopping on request: SIGTERM, SIGUSR1, SIGINT and the clock end the run after the step in hand."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

TIME_IS_UP = "--max_minutes is over"
REQUESTS = (signal.SIGTERM, signal.SIGUSR1)  # launchers and schedulers send them to all processes, and often twice
SIGNALS = (*REQUESTS, signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it SIGTERM and SIGUSR1 raise KeyboardInterrupt, as SIGINT does; for all that is not training.

    They do so once: what is left after that is short, and must not be cut off by the same request's second signal.
    """
    previous = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def time_limit(minutes: float | None, *, since: float) -> Iterator[None]:
    """Within it SIGALRM arrives once so many minutes have passed since time.monotonic() was `since`.

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
    """From here on only SIGINT interrupts: the run is ending already, and what it still writes must be whole."""
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
    """While entered, remembers which signal asked for an end; a second SIGINT interrupts at once.

    Once a signal has asked, SIGTERM and SIGUSR1 stay without effect after leaving too: what follows is the end.
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
