"""What ranks tell each other when one fails, stops or falls behind: keys of the launcher's store, and words."""

from __future__ import annotations

import os
import sys
import threading
import traceback

import torch.distributed as dist

# What gloo, NCCL and the store say when the other side is gone or silent.
LOST = (
    "Connection closed by peer",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Timed out",
    "timed out",
    "gloo/transport",
    "remote process exited",
    "Failed to recv",
    "failed to recv",
)
RESUME = "Complete checkpoints stay valid: once all processes have ended, the same command resumes"
STOPPED = "stopped on request; the same command continues"
STACK_FRAMES = 8


def says_lost(error: BaseException | None) -> bool:
    if isinstance(error, KeyboardInterrupt):  # the launcher's signal, while the error was on its way
        error = error.__context__
    return isinstance(error, (RuntimeError, ConnectionError)) and any(words in str(error) for words in LOST)


def store_is_gone() -> str:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"rank 0 or the launcher, at which the processes met ({place}), is gone"


def beat_in(store: dist.TCPStore, rank: int) -> str:
    """A counter, the step that the rank has begun, and its host; empty before the first."""
    key = f"trainer/beat/{rank}"
    return store.get(key).decode() if store.check([key]) else ""


def one_line(text: object) -> str:
    return " ".join(str(text).split()) or "no message"


def announce(store: dist.TCPStore, code: int, rank: int, host: str, message: str) -> str:
    """Announce a failure, unless one is announced already: what follows from it must not hide it. The one that is."""
    announced = store.compare_set("trainer/failure", "", f"{code} {rank} {host} {one_line(message)}")
    return announced.decode() if isinstance(announced, bytes) else str(announced)


def because(rank: int, failure: str) -> str:
    _, failed, host, message = failure.split(" ", 3)
    return f"error: rank {rank} ends because rank {failed} on {host} failed: {message}"


def named(rank: int, beat: str) -> str:
    return f"rank {rank} on {host_of(beat)} ({place(beat)})"


def host_of(beat: str) -> str:
    """The host in a beat, as one word."""
    return beat.split(" ")[-1] or "an_unknown_host"


def place(beat: str) -> str:
    return f"at step {step_of(beat)}" if step_of(beat) else "before step 1"


def step_of(beat: str) -> int:
    return int(beat.split(" ")[1]) if beat else 0


def stack() -> str:
    """Where the main thread is, innermost last: the answer to what a hung rank was doing."""
    frames = traceback.format_stack(sys._current_frames()[threading.main_thread().ident or 0])[-STACK_FRAMES:]
    return "\nIts main thread was at\n" + "".join(frames).rstrip()
