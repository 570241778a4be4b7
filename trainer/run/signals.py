"""Stopping on request: SIGTERM, SIGUSR1, SIGHUP (a closed terminal), SIGINT and the clock of --max_minutes.

While training, a request ends the run after the step in hand (`StopRequest`). Outside the training it raises
KeyboardInterrupt at once (`interruptible`).

Python runs a signal's handler in the main thread, between two of its own instructions. A main thread that waits in
CUDA, NCCL or gloo runs none until it comes back, which it never does where the rank that it waits for is gone. Threads
that must know of a request all the same ask `asked`.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType, TracebackType

TIME_IS_UP = "--max_minutes is over"
# Launchers and schedulers send these to all processes of a run, and often twice. A terminal that is closed sends SIGHUP
# to all that it has started, and torchrun passes that on.
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The first request by signal that came to this process.

    name      of the signal; SIGUSR1, which only asks, gives way to one after which launchers kill
    answered  whether the main thread has come to know of it
    """

    name: str
    answered: bool = False


class _Arrivals:
    """Gets a byte of each signal from Python's C code, in whatever code the main thread is."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._former = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._first: Asked | None = None
        self._answered = False
        self._reading = threading.Lock()  # what one thread has read, no other one gets

    def first(self) -> Asked | None:
        with self._reading:
            try:
                numbers = self._reader.recv(4096)
            except OSError:  # nothing has come, or it is closed already
                numbers = b""
            for number in numbers:
                only_asks = self._first is None or self._first.name == signal.SIGUSR1.name
                if number in REQUESTS and only_asks:
                    self._first = Asked(name=signal.Signals(number).name)
        return None if self._first is None else replace(self._first, answered=self._answered)

    def answer(self) -> None:
        self._answered = True

    def close(self) -> None:
        signal.set_wakeup_fd(self._former)
        self._reader.close()
        self._writer.close()


# Of the process, as its handlers are: while `interruptible` is entered.
_arrivals: _Arrivals | None = None


def asked() -> Asked | None:
    """The first request by signal since the program began; None before any. For threads, and for no handler."""
    arrivals = _arrivals  # which the main thread may take away meanwhile, at the end
    return None if arrivals is None else arrivals.first()


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block the requests raise KeyboardInterrupt, as SIGINT does; for all that is not training.

    They do so once: what is written after that is short, and the second signal of the same request must not cut it off.
    """
    global _arrivals
    previous = {number: signal.signal(number, _interrupt) for number in _heeded()}
    _arrivals = _Arrivals()
    try:
        yield
    finally:
        _arrivals.close()
        _arrivals = None
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Requests that come inside the block act at its end. In the main thread only.

    For C code that calls Python back, as libsndfile does where it writes to a Python file: what a handler raises there
    is printed and lost, and with it the bytes that were to be written.
    """
    came: list[int] = []
    previous = {number: signal.signal(number, lambda which, frame: came.append(which)) for number in _heeded()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


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
    """From here on only SIGINT interrupts: for when the run is ending already, and must write its last files whole.

    Within `interruptible` only, which puts the handlers back: children would inherit that a signal is ignored.
    """
    if _arrivals is None:
        return
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    if signal.getsignal(signal.SIGALRM) is _interrupt:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


def _heeded() -> list[signal.Signals]:
    """All signals but SIGHUP where it is ignored: by nohup, for a run that is to outlive its terminal."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in (*REQUESTS, signal.SIGINT) if number != signal.SIGHUP or not ignored]


def _interrupt(number: int, frame: FrameType | None) -> None:
    _answer()
    ignore_requests()
    if number == signal.SIGALRM:
        sys.stderr.write(f"{TIME_IS_UP}: stopping\n")
    raise KeyboardInterrupt


def _answer() -> None:
    if _arrivals is not None:
        _arrivals.answer()


class StopRequest:
    """While entered, notes that a signal asked for an end, and interrupts nothing; a second SIGINT interrupts at once.

    `name` is the signal's name, TIME_IS_UP for the clock, None before any. Once a signal has come, the requests have no
    effect after leaving either, because the run is ending.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[signal.Signals, signal.Handlers | int | object] = {}

    def __enter__(self) -> StopRequest:
        timed = signal.getsignal(signal.SIGALRM) is _interrupt  # within `time_limit`
        for number in (*_heeded(), signal.SIGALRM) if timed else _heeded():
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
        _answer()
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.name is None:
            self.name = TIME_IS_UP if number == signal.SIGALRM else signal.Signals(number).name
            sys.stderr.write(f"{self.name}: stopping after this step, with a checkpoint\n")
