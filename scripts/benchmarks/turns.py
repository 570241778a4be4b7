"""Contestants in processes of their own that take turns, step by step: a slow minute of the machine hits them all."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.work import Work
from trainer.engine.matmul_rate import matmul_rate

READY, DONE, FAILED = "ready", "done", "failed"


class Turn:
    """A contestant's side: `while turn.begins(): step(); turn.ends()`."""

    def __init__(self, pipe: Connection, work: Work):
        self._pipe = pipe
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._precision = work.precision
        self._said_ready = False
        self._before = resident_bytes()

    @property
    def device(self) -> torch.device:
        return self._device

    def begins(self) -> bool:
        """Wait for the next turn; False once there is none."""
        if not self._said_ready:
            self._pipe.send((READY, None))
            self._said_ready = True
        if not self._pipe.recv():
            return False
        self._rate = matmul_rate(self._device, self._precision)
        _reset_peak(self._device)
        self._since = time.perf_counter()
        return True

    def ends(self) -> None:
        """Report the step just done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._since
        peak = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else _peak_bytes() - self._before
        self._pipe.send((DONE, (seconds, self._rate, peak)))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a contestant needed, turn by turn; `failure` in words where it could not run.

    first_seconds  of the step that is not counted: with compiled layers, mostly of compiling
    peak_bytes     device memory allocated; on a CPU what the process grew by
    """

    seconds: tuple[float, ...] = ()
    matmul_rates: tuple[float, ...] = ()
    first_seconds: float = 0.0
    peak_bytes: int = 0
    failure: str | None = None


def take_turns(
    contestants: Sequence[str], run: Callable[[str, Work, Turn], None], work: Work, rounds: int, *, together: bool
) -> dict[str, Timing]:
    """`rounds` timed steps of each, after one that is not counted.

    together  all exist at once and step in turn; otherwise one after the other, for memory that holds only one
    """
    groups = [list(contestants)] if together else [[name] for name in contestants]
    timings: dict[str, Timing] = {}
    for group in groups:
        timings |= _of_group(group, run, work, rounds)
    return timings


def _of_group(
    names: Sequence[str], run: Callable[[str, Work, Turn], None], work: Work, rounds: int
) -> dict[str, Timing]:
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(run, name, work, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        _hear(pipes, name, failures)  # one is built at a time
    for _ in range(rounds + 1):
        for name in list(pipes):
            pipes[name].send(True)
            answer = _hear(pipes, name, failures)
            if answer is not None:
                found[name].append(answer)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return {name: _timing(found[name], failures.get(name)) for name in names}


def _hear(pipes: dict[str, Connection], name: str, failures: dict[str, str]) -> tuple[float, float, int] | None:
    """The contestant's next message: what a step took, or None. One that failed gets no more turns."""
    try:
        kind, value = pipes[name].recv()
    except EOFError:
        kind, value = FAILED, "its process ended"
    if kind == FAILED:
        failures[name] = value
        del pipes[name]
        return None
    return value


def _timing(turns: Sequence[tuple[float, float, int]], failure: str | None) -> Timing:
    if failure is not None or len(turns) < 2:
        return Timing(failure=failure or "no step was timed")
    first, *timed = turns
    seconds, rates, peaks = zip(*timed, strict=True)
    return Timing(seconds=seconds, matmul_rates=rates, first_seconds=first[0], peak_bytes=max(peaks))


def _serve(run: Callable[[str, Work, Turn], None], name: str, work: Work, pipe: Connection) -> None:
    try:
        run(name, work, Turn(pipe, work))
    except (Exception, SystemExit) as error:  # whatever a contestant's library raises becomes its result
        last = traceback.extract_tb(error.__traceback__)[-1]
        with suppress(BrokenPipeError):
            pipe.send((FAILED, f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    return _status("VmHWM")


def resident_bytes() -> int:
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
