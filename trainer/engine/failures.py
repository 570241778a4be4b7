"""Failures that ranks announce to each other through the launcher's key-value store, and the messages about them."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from dataclasses import dataclass

import torch.distributed as dist

# Parts of the messages by which gloo, NCCL and the store say that the other side of a connection is gone or silent.
# They come as plain RuntimeErrors, so that only the text tells them from defects; a new version of torch may change it.
LOST_CONNECTION_MESSAGES = (
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
RESUME_ADVICE = "Complete checkpoints stay valid: once all processes have ended, the same command resumes"
STOPPED_MESSAGE = "stopped on request; the same command continues"
STACK_FRAMES = 8  # shown of a main thread that hangs
FAILURE_KEY = "trainer/failure"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failure as it is announced: the rank that failed, its host, and the exit code for all ranks."""

    code: int
    rank: int
    host: str
    message: str

    def describe_end(self, rank: int) -> str:
        """What `rank` prints when it ends because of this failure."""
        return f"error: rank {rank} ends because rank {self.rank} on {self.host} failed: {self.message}"


def announce(store: dist.TCPStore, failure: Failure) -> Failure:
    """Announce a failure to all ranks, unless another one is announced already; returns the one that is announced.

    The first failure stays, because later ones mostly follow from it and must not hide it.
    """
    text = f"{failure.code} {failure.rank} {failure.host} {single_line(failure.message)}"
    announced = store.compare_set(FAILURE_KEY, "", text)
    return _parse(announced.decode() if isinstance(announced, bytes) else str(announced))


def announced_failure(store: dist.TCPStore) -> Failure | None:
    """The failure that some rank has announced; None where none has."""
    return _parse(store.get(FAILURE_KEY).decode()) if store.check([FAILURE_KEY]) else None


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether `error` is what a collective or the store raises when another process is gone or silent."""
    if isinstance(error, KeyboardInterrupt):  # the launcher's signal came while the error was on its way
        error = error.__context__
    if not isinstance(error, (RuntimeError, ConnectionError)):
        return False
    return any(message in str(error) for message in LOST_CONNECTION_MESSAGES)


def describe_lost_store() -> str:
    """For messages: what is gone where the store is. Whichever made the store holds it, rank 0 or the launcher."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"rank 0 or the launcher, at which the processes met ({address}), is gone"


def single_line(text: object) -> str:
    """The text with its white space as single spaces; never empty."""
    return " ".join(str(text).split()) or "no message"


def describe_main_thread() -> str:
    """Where the main thread is, innermost call last: what a rank that hangs was doing."""
    frames = traceback.format_stack(sys._current_frames()[threading.main_thread().ident or 0])[-STACK_FRAMES:]
    return "\nIts main thread was at\n" + "".join(frames).rstrip()


def _parse(text: str) -> Failure:
    code, rank, host, message = text.split(" ", 3)
    return Failure(code=int(code), rank=int(rank), host=host, message=message)
