"""The other processes of a run: agreeing with them, waiting for them, and noticing when one fails.

Waiting and failing go through the launcher's key-value store and not through collectives, so that an hour of
encoding times nothing out, and so that a rank that fails can say so while the others sit in a collective.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trainer.engine.failures import (
    RESUME,
    STOPPED,
    announce,
    beat_in,
    because,
    host_of,
    named,
    one_line,
    place,
    says_lost,
    stack,
    step_of,
    store_is_gone,
)
from trainer.errors import EXIT_FAILED, EXIT_RESUME, ConfigError, PeerLostError, TrainerError
from trainer.run.signals import ignore_requests

BEAT_SECONDS = 1.0
# Long enough for the others to read the failure, before the launcher notices the exit and ends them.
LINGER_SECONDS = 3.0
SHOWN_SECONDS = 5.0
# For a rank to end by itself once another was told to stop; for its exit code to be written.
GRACE_SECONDS = 10.0
RECORD_SECONDS = 5.0


class Ranks:
    """This process's view of all processes. With one process every method is trivial."""

    def __init__(self, *, timeout_seconds: float, record: Callable[[int], None] = lambda code: None):
        """After the process group exists.

        timeout_seconds  without a sign of life for so long, a rank is lost
        record           called with the exit code before the others can know of a failure, and before this
                         process ends because of another's
        """
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if several else 0
        self.world_size = dist.get_world_size() if several else 1
        self._timeout_seconds = timeout_seconds
        self._record = record
        self._waits: dict[str, int] = {}
        self._closed = self._failing = self._interrupted = False
        self._beat = 0
        self.steps_begun = 0  # set by the engine, for messages about this rank
        self._store = _connect() if several else None
        if several:
            threading.Thread(target=self._watch, args=(_connect(),), daemon=True, name="peers").start()
            threading.Thread(target=self._watch_the_store, daemon=True, name="store").start()

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
        """Raise ConfigError, on every rank, where a named value differs between ranks; of mappings, each entry."""
        for name, value in values.items():
            entries = value if isinstance(value, Mapping) else {name: value}
            found = self.gather({str(key): str(entry) for key, entry in entries.items()})
            for key in map(str, entries):
                if len({of_rank.get(key) for of_rank in found}) > 1:
                    each = "; ".join(f"rank {rank}: {of_rank.get(key)}" for rank, of_rank in enumerate(found))
                    raise ConfigError(
                        f"the processes do not agree on {key}: {each}. All need the same flags, the same --dataset and"
                        " the same version of the program, on every machine"
                    )

    def check_shared(self, **folders: Path) -> None:
        """Raise ConfigError, on every rank, where a folder, named by its flag, is not one for all machines.

        It is made if missing. One that cannot be written is left to those who find out what that means.
        """
        if self._store is None:
            return
        for name, folder in folders.items():
            mark = self.gather(_marked(folder) if self.is_first else None)[0]
            if mark is None:
                continue
            hosts = set(self.gather("" if _appears(folder / mark) else socket.gethostname())) - {""}
            if self.is_first:
                (folder / mark).unlink()
            if hosts:
                raise ConfigError(
                    f"--{name} {folder} is not the same folder on all machines: {', '.join(sorted(hosts))} does not see"
                    " what the first process wrote there. Give a folder on a shared file system"
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Leave together, or let the others know that this rank fails.

        Raises PeerLostError in place of what a collective raises when another rank is gone.
        """
        closing = error is None
        try:
            if closing:
                return self._close()
        except (RuntimeError, ConnectionError, KeyboardInterrupt) as late:
            error = late
        ignore_requests()  # the launcher's, once it sees another rank's end
        if self._interrupted and not isinstance(error, (KeyboardInterrupt, TrainerError)):
            raise KeyboardInterrupt from error  # another was told to stop, and has left what this one waited in
        if self._store is not None and says_lost(error):
            message = f"{self._missing()} ({one_line(error)}). {RESUME}"
            self._announce(message, PeerLostError.exit_code)
            raise PeerLostError(message) from error
        if isinstance(error, TrainerError):
            self._announce(str(error), error.exit_code)
        elif isinstance(error, KeyboardInterrupt):
            self._interrupt()
        else:
            self._announce(f"{type(error).__name__}: {error}", EXIT_FAILED)
        if closing and error is not None:
            raise error

    def _announce(self, message: str, code: int) -> None:
        """Tell the others that this rank fails; they end with `code` too, wherever they are."""
        if self._store is None:
            return
        self._failing = True
        self._record(code)
        try:
            announce(self._store, code, self.rank, socket.gethostname(), message)
        except (RuntimeError, ConnectionError):
            return  # the store is gone, which the others see as well
        time.sleep(LINGER_SECONDS)

    def _interrupt(self) -> None:
        """Tell the others that this rank was told to stop; raise PeerLostError if it was because one was lost."""
        if self._store is None:
            return
        self._failing = True
        try:
            self._store.set(f"trainer/stopped/{self.rank}", "")
            announced = announce(self._store, EXIT_RESUME, self.rank, socket.gethostname(), STOPPED)
            if not announced.startswith(f"{EXIT_RESUME} "):  # the launcher's signal, because of that failure
                self._leave(because(self.rank, announced), int(announced.split(" ")[0]))
            lost = self._still()
        except (RuntimeError, ConnectionError):
            lost = []  # the others have ended
        if lost:
            message = f"{', '.join(lost)} is gone, or does not answer. {RESUME}"
            self._record(PeerLostError.exit_code)
            raise PeerLostError(message)
        self._record(EXIT_RESUME)

    def _missing(self) -> str:
        """Which ranks are gone, in words: those whose beat stands still, or else those that are steps behind."""
        try:
            still = self._still()
            beats = [self._beat_of(rank) for rank in range(self.world_size)]
        except (RuntimeError, ConnectionError):
            return store_is_gone()
        steps = [step_of(beat) for beat in beats]
        behind = [named(rank, beat) for rank, beat in enumerate(beats) if step_of(beat) < max(steps)]
        return f"{', '.join(still or behind) or 'another rank'} is gone, or does not answer"

    def _still(self) -> list[str]:
        """The other ranks whose beat stands still, and that have not said that they were told to stop."""
        assert self._store is not None
        before = [self._beat_of(rank) for rank in range(self.world_size)]
        time.sleep(3 * BEAT_SECONDS)
        after = [self._beat_of(rank) for rank in range(self.world_size)]
        return [
            named(rank, beat)
            for rank, beat in enumerate(after)
            if beat == before[rank] and rank != self.rank and not self._store.check([f"trainer/stopped/{rank}"])
        ]

    def _close(self) -> None:
        """Leave together; the rank that may hold the store goes last."""
        if self._store is None:
            return
        if not self.is_first:  # while the first exports, it alone decides
            ignore_requests()
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
        seen, silent, steps, behind = "", 0.0, (0, 0), 0.0
        try:
            while not self._closed and not self._failing:
                self._beat += 1
                beat = f"{self._beat} {self.steps_begun} {socket.gethostname()}"
                store.set(f"trainer/beat/{self.rank}", beat)
                if store.check(["trainer/failure"]):
                    self._end(store, store.get("trainer/failure").decode())
                now = beat_in(store, neighbour)
                silent = silent + BEAT_SECONDS if now == seen else 0.0
                were, steps = steps, (step_of(now), self.steps_begun)
                # Its threads live, but what it does between steps does not end; collectives do not always see it.
                behind = behind + BEAT_SECONDS if steps == were and steps[0] < steps[1] else 0.0
                seen = now
                if max(silent, behind) > self._timeout_seconds:
                    what = "no sign of life" if silent > behind else f"step {steps[1]} waited for it"
                    lost = f"{what} for {self._timeout_seconds:.0f} s, {place(seen)}. {RESUME}"
                    announce(store, EXIT_FAILED, neighbour, host_of(seen), lost)
                time.sleep(BEAT_SECONDS)
        except (RuntimeError, ConnectionError):
            if not self._closed and not self._failing:
                self._leave(f"error: rank {self.rank} ends: {store_is_gone()}. {RESUME}", EXIT_FAILED)

    def _watch_the_store(self) -> None:
        """End this process once the store has not answered for too long: `_watch` then waits inside it.

        Here as there, time is counted in naps, so that a job that was suspended as a whole is not taken for lost.
        """
        seen, silent = 0, 0.0
        while not self._closed and not self._failing:
            silent = silent + BEAT_SECONDS if self._beat == seen else 0.0
            seen = self._beat
            if silent > self._timeout_seconds and not self._interrupted:
                words = f"error: rank {self.rank} ends: {store_is_gone()}, or does not answer. {RESUME}"
                self._leave(words, EXIT_FAILED)
            time.sleep(BEAT_SECONDS)

    def _beat_of(self, rank: int) -> str:
        assert self._store is not None
        return beat_in(self._store, rank)

    def _end(self, store: dist.TCPStore, failure: str) -> None:
        """End this process because of `failure`, unless it is this rank that announced it."""
        code = int(failure.split(" ")[0])
        if code == EXIT_RESUME:
            self._interrupted = True
            store.set(f"trainer/stopped/{self.rank}", "")
            # As if it had been asked itself: what it has encoded is kept.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            time.sleep(GRACE_SECONDS)
        if not self._failing:
            self._leave(because(self.rank, failure) + (stack() if RESUME in failure else ""), code)

    def _leave(self, words: str, code: int) -> None:
        """End from a thread, whatever the main thread waits for."""
        sys.stderr.write(f"\n{words}\n")
        sys.stderr.flush()
        # In a thread of its own, as the folder may be what everything waits for.
        recording = threading.Thread(target=self._record, args=(code,), daemon=True)
        recording.start()
        recording.join(RECORD_SECONDS)
        os._exit(code)


def _marked(folder: Path) -> str | None:
    """The name of a new file in `folder`; None where none can be made."""
    name = f".shared-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError:
        return None
    return name


def _appears(path: Path) -> bool:
    """Whether the file is there, or comes within what a network file system may take to show it."""
    deadline = time.monotonic() + SHOWN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _connect() -> dist.TCPStore:
    """A connection of one's own to the store at which the processes met: one thread, one connection."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )
