"""The other processes of a run: agreeing with them, waiting for them, and noticing when one fails.

Waiting and failing go through the launcher's key-value store and not through collectives, so that an hour of
encoding times nothing out, and so that a rank that fails can say so while the others sit in a collective.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trainer.errors import EXIT_FAILED, ConfigError, TrainerError

BEAT_SECONDS = 2.0
# Long enough for the others to read the failure, before the launcher notices the exit and ends them.
LINGER_SECONDS = 3.0


class Ranks:
    """This process's view of all processes. With one process every method is trivial."""

    def __init__(self, *, timeout_seconds: float):
        """After the process group exists. timeout_seconds: without a sign of life for so long, a rank is lost."""
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if several else 0
        self.world_size = dist.get_world_size() if several else 1
        self._timeout_seconds = timeout_seconds
        self._waits: dict[str, int] = {}
        self._closed = False
        self._store = _connect() if several else None
        if several:
            threading.Thread(target=self._watch, args=(_connect(),), daemon=True, name="peers").start()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints, reports and exports."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on one process."""
        if self.is_first:
            print(text, flush=True)

    def wait(self, what: str) -> None:
        """Return once every rank has got here, however long it takes, while all are alive."""
        if self._store is None:
            return
        count = self._waits[what] = self._waits.get(what, 0) + 1
        key = f"trainer/wait/{what}/{count}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.world_size:
            time.sleep(0.02)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in order of ranks; for small things, after `wait`."""
        if self._store is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self._store is not None:
            dist.all_reduce(values)
        return values

    def check_equal(self, **values: object) -> None:
        """Raise ConfigError, on every rank, where a named value differs between ranks."""
        for name in values:
            found = self.gather(str(values[name]))
            if len(set(found)) > 1:
                each = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
                raise ConfigError(
                    f"the processes do not agree on {name}: {each}. All need the same flags, the same --dataset and"
                    " the same version of the program, on every machine"
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Leave together, or let the others know that this rank fails."""
        if error is None:
            self._close()
        else:
            expected = isinstance(error, TrainerError)
            message = str(error) if expected else f"{type(error).__name__}: {error}"
            self._announce(message, error.exit_code if isinstance(error, TrainerError) else EXIT_FAILED)

    def _announce(self, message: str, code: int) -> None:
        """Tell the others that this rank fails; they end with `code` too, wherever they are."""
        if self._store is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, once another rank has ended
            message = message.splitlines()[0] if message else "no message"
            self._store.set("trainer/failure", f"{code} {self.rank} {socket.gethostname()} {message}")
            time.sleep(LINGER_SECONDS)

    def _close(self) -> None:
        """Leave together; the rank that may hold the store goes last."""
        if self._store is None:
            return
        self.wait("end")
        self._closed = True
        gone = self._store.add("trainer/gone", 1)
        while self.is_first and gone < self.world_size:
            time.sleep(0.02)
            gone = self._store.add("trainer/gone", 0)
        dist.destroy_process_group()

    def _watch(self, store: dist.TCPStore) -> None:
        """Beat, look at the next rank's beat, and end this process once any rank has failed or is lost."""
        neighbour = (self.rank + 1) % self.world_size
        beat, seen, since = 0, "", time.monotonic()
        try:
            while not self._closed:
                beat += 1
                store.set(f"trainer/beat/{self.rank}", str(beat))
                if store.check(["trainer/failure"]):
                    self._end(store.get("trainer/failure").decode())
                key = f"trainer/beat/{neighbour}"
                now = store.get(key).decode() if store.check([key]) else ""
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > self._timeout_seconds:
                    lost = f"no sign of life for {self._timeout_seconds:.0f} s"
                    store.set("trainer/failure", f"{EXIT_FAILED} {neighbour} {socket.gethostname()} {lost}")
                time.sleep(BEAT_SECONDS / 2)
        except (RuntimeError, ConnectionError):
            # The store is gone, and with it the launcher or the rank that held it.
            if not self._closed:
                self._end(f"{EXIT_FAILED} 0 {os.environ.get('MASTER_ADDR')} is not reachable any more")

    def _end(self, failure: str) -> None:
        code, rank, host, message = failure.split(" ", 3)
        if int(rank) != self.rank:
            sys.stderr.write(f"rank {self.rank} ends because rank {rank} on {host} failed: {message}\n")
            sys.stderr.flush()
            os._exit(int(code))


def _connect() -> dist.TCPStore:
    """A connection of one's own to the store at which the processes met: one thread, one connection."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )

