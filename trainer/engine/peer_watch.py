"""Noticing that another rank has failed or is gone, and letting the others know when this one fails.

All of it goes through the launcher's key-value store and not through collectives. A rank that fails while the others
wait in a collective would leave them there until a time limit, with NCCL's message in place of the failed rank's. The
store is there before the first collective, and a thread can read it while the main thread waits.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from trainer.engine.failures import (
    RESUME_ADVICE,
    STOPPED_MESSAGE,
    Failure,
    announce,
    announced_failure,
    describe_lost_store,
    describe_main_thread,
)
from trainer.engine.heartbeat import HEARTBEAT_SECONDS, Heartbeat, read_heartbeat, write_heartbeat
from trainer.engine.request_watch import (
    SILENT_AFTER_REQUEST_SECONDS,
    SILENT_SECONDS,
    LostAfterRequest,
    last_moment_seconds,
)
from trainer.errors import EXIT_FAILED, EXIT_RESUME, PeerLostError
from trainer.run.console import settle
from trainer.run.signals import Asked, asked

# How long a failed rank stays after its announcement, so that the others read it before the launcher notices the exit
# and ends them.
LINGER_SECONDS = 3.0
# The same for rank 0 where it ends because of an announcement: it may hold the store, which all read each second.
READ_SECONDS = 1.5 * HEARTBEAT_SECONDS
# How long a rank may take to end by itself once another rank was told to stop, before its watching thread ends it.
GRACE_SECONDS = 10.0
# A rank that is seen to be behind, or silent, is named rather than all of them: the others see that within this time.
# Together with --timeout_minutes it must stay below the limit of NCCL's collectives (trainer/engine/meeting.py).
STUCK_GRACE_SECONDS = 15.0
# How long a process that ends itself waits for its message and its exit code to be written. With LINGER_SECONDS it must
# stay below MARGIN_SECONDS of trainer/engine/request_watch.py.
RECORD_SECONDS = 4.0


class PeerWatch:
    """Two threads that keep this rank's heartbeat going, and that end this process once another rank is lost.

    `_watch_peers` writes the heartbeat, reads announced failures, and watches the next rank's heartbeat; so each rank
    is watched by the one before it. `_watch_store` notices that `_watch_peers` itself hangs in a store that does not
    answer.

    Both count the seconds that they have slept, and never look at a clock. So a job that was suspended as a whole, and
    goes on later, does not take the time in between for silence of the others.

    They end the process with os._exit, because no exception can be raised in a main thread that waits inside gloo or
    NCCL.
    """

    def __init__(
        self,
        store: dist.TCPStore,
        *,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        steps_begun: Callable[[], int],
        computing: Callable[[], str],
        record: Callable[[int], None],
    ):
        """Starts both threads.

        store            the main thread's connection; each thread has its own
        timeout_seconds  a rank that others wait for at a later step for so long is lost, and one that is silent for
                         so long or for SILENT_SECONDS
        steps_begun      the number of optimizer steps that this rank has begun
        computing        what the main thread computes together with the other ranks, such as "step 12"; "" for nothing
        record           writes the run's exit code; see Ranks
        """
        self._store = store
        self._rank, self._world_size = rank, world_size
        self._timeout_seconds = timeout_seconds
        self._steps_begun = steps_begun
        self._computing = computing
        self._record = record
        self._count = 0  # of this rank's heartbeats
        self._closed = self._failing = False
        self.interrupted = False  # whether another rank was told to stop, and this one therefore too
        threading.Thread(target=self._watch_peers, args=(connect_to_store(),), daemon=True, name="peers").start()
        threading.Thread(target=self._watch_store, daemon=True, name="store").start()

    def close(self) -> None:
        """Let the threads end: all ranks have finished, and what they do from here on is no failure."""
        self._closed = True

    def tell_failure(self, message: str, code: int) -> None:
        """Tell the others that this rank fails. They end with `code` too, wherever they are."""
        self._failing = True
        self._record(code)  # before the others can know: the first code that is written stays
        try:
            announce(self._store, self._failure(code, message))
        except (RuntimeError, ConnectionError):
            return  # the store is gone, which the others notice as well
        time.sleep(LINGER_SECONDS)

    def tell_stop(self) -> None:
        """Tell the others that this rank was told to stop, outside the training steps.

        Launchers send the same signal to the other ranks once one of them is lost. Raises PeerLostError where that is
        why the signal came; where another rank has announced a failure, ends this process with its code.
        """
        self._failing = True
        try:
            self._store.set(_stopped_key(self._rank), "")
            announced = announce(self._store, self._failure(EXIT_RESUME, STOPPED_MESSAGE))
            if announced.code != EXIT_RESUME:  # the launcher sent the signal because of that failure
                self._end_process(announced.describe_end(self._rank), announced.code)
            silent = self._silent_ranks()
        except (RuntimeError, ConnectionError):
            silent = []  # the others have ended, and the store with them
        if silent:
            message = f"{', '.join(silent)} is gone, or does not answer. {RESUME_ADVICE}"
            self._record(PeerLostError.exit_code)
            raise PeerLostError(message)
        self._record(EXIT_RESUME)

    def describe_lost_ranks(self) -> str:
        """Which ranks are gone, for messages: the silent ones, or else those that are steps behind; takes 3 seconds."""
        try:
            silent = self._silent_ranks()
            heartbeats = self._heartbeats()
        except (RuntimeError, ConnectionError):
            return describe_lost_store()
        latest = max(heartbeat.step for heartbeat in heartbeats)
        behind = [heartbeat.describe(rank) for rank, heartbeat in enumerate(heartbeats) if heartbeat.step < latest]
        return f"{', '.join(silent or behind) or 'another rank'} is gone, or does not answer"

    def _silent_ranks(self) -> list[str]:
        """The other ranks whose heartbeat stands still, and that have not said that they were told to stop."""
        before = self._heartbeats()
        time.sleep(3 * HEARTBEAT_SECONDS)
        return [
            heartbeat.describe(rank)
            for rank, heartbeat in enumerate(self._heartbeats())
            if heartbeat == before[rank] and rank != self._rank and not self._store.check([_stopped_key(rank)])
        ]

    def _heartbeats(self, store: dist.TCPStore | None = None) -> list[Heartbeat]:
        return [read_heartbeat(store or self._store, rank) for rank in range(self._world_size)]

    def _failure(self, code: int, message: str) -> Failure:
        return Failure(code=code, rank=self._rank, host=socket.gethostname(), message=message)

    def _watch_peers(self, store: dist.TCPStore) -> None:
        """Each second: write this rank's heartbeat, end where a failure is announced, look at the next rank."""
        neighbour = (self._rank + 1) % self._world_size
        seen, silent_seconds, behind_seconds = Heartbeat(), 0.0, 0.0
        computing, computing_seconds = "", 0.0
        silent_limit = min(SILENT_SECONDS, self._timeout_seconds)
        steps = 0, 0  # begun by the neighbour, and by this rank
        after_request = LostAfterRequest()
        try:
            while not self._closed and not self._failing:
                self._count += 1
                own = Heartbeat(count=self._count, step=self._steps_begun(), host=socket.gethostname())
                write_heartbeat(store, self._rank, own)
                if failure := announced_failure(store):
                    self._end_because_of(failure, store)
                now = read_heartbeat(store, neighbour)
                silent_seconds = silent_seconds + HEARTBEAT_SECONDS if now == seen else 0.0
                former_steps, steps = steps, (now.step, self._steps_begun())
                # A rank may send heartbeats while its main thread hangs between two steps, for example in a disk that
                # does not answer. Collectives do not always notice that: this rank may be waiting outside of them.
                is_behind = steps == former_steps and steps[0] < steps[1]
                behind_seconds = behind_seconds + HEARTBEAT_SECONDS if is_behind else 0.0
                former, computing = computing, self._computing()
                computing_seconds = computing_seconds + HEARTBEAT_SECONDS if computing and computing == former else 0.0
                seen = now
                if silent_seconds > silent_limit:
                    _announce_lost(store, neighbour, seen, f"no sign of life for {silent_limit:.0f} s")
                elif behind_seconds > self._timeout_seconds:
                    what = f"step {steps[1]} waited for it for {self._timeout_seconds:.0f} s"
                    _announce_lost(store, neighbour, seen, what)
                elif computing_seconds > self._timeout_seconds + STUCK_GRACE_SECONDS:
                    what = f"{computing} has not ended for {computing_seconds:.0f} s; some rank, GPU or network hangs"
                    _announce_lost(store, self._rank, own, what)
                elif after_request.is_due(request := asked()):
                    self._announce_silent(store, after_request, request)
                time.sleep(HEARTBEAT_SECONDS)
        except (RuntimeError, ConnectionError):
            if not self._closed and not self._failing:
                message = f"error: rank {self._rank} ends: {describe_lost_store()}. {RESUME_ADVICE}"
                self._end_process(message, EXIT_FAILED)

    def _announce_silent(self, store: dist.TCPStore, after_request: LostAfterRequest, request: Asked | None) -> None:
        """Announce the first rank that has shown no sign of life since the request, unless it has said that it ends."""
        heartbeats = self._heartbeats(store)
        for rank in after_request.silent(heartbeats):
            if rank != self._rank and heartbeats[rank].count and not store.check([_stopped_key(rank)]):
                name = "the request" if request is None else request.name
                what = f"no sign of life for {SILENT_AFTER_REQUEST_SECONDS:.0f} s after {name}"
                return _announce_lost(store, rank, heartbeats[rank], what)

    def _watch_store(self) -> None:
        """End this process where its other threads cannot.

        Once `_watch_peers` has written no heartbeat for too long: it waits in a silent store. Or where the launcher is
        about to kill the process, and the main thread has not come back to answer its signal.
        """
        seen, silent_seconds, asked_seconds = 0, 0.0, 0.0
        while not self._closed and not self._failing:
            if (request := asked()) is not None:
                asked_seconds += HEARTBEAT_SECONDS
                limit = last_moment_seconds(request, os.environ)
                if limit is not None and asked_seconds > limit:
                    message = (
                        f"{request.name}: rank {self._rank} ends, because its main thread has waited for {limit:.0f} s"
                        " since then, for the GPU or for another rank, and the launcher would kill it now. What came"
                        f" after the last checkpoint is lost. {RESUME_ADVICE}"
                    )
                    if self._rank == 0:  # it may hold the store, whose end others would take for a failure
                        time.sleep(LINGER_SECONDS)
                    self._end_process(message + describe_main_thread(), EXIT_RESUME)
            silent_seconds = silent_seconds + HEARTBEAT_SECONDS if self._count == seen else 0.0
            seen = self._count
            if silent_seconds > self._timeout_seconds and not self.interrupted:
                lost = f"{describe_lost_store()}, or does not answer"
                self._end_process(f"error: rank {self._rank} ends: {lost}. {RESUME_ADVICE}", EXIT_FAILED)
            time.sleep(HEARTBEAT_SECONDS)

    def _end_because_of(self, failure: Failure, store: dist.TCPStore) -> None:
        """End this process because of an announced failure, unless this rank is ending by itself meanwhile."""
        if failure.code == EXIT_RESUME:
            self.interrupted = True
            store.set(_stopped_key(self._rank), "")
            # As if this rank had been sent the signal itself, so that what it has encoded so far is kept.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            time.sleep(GRACE_SECONDS)
        if self._rank == 0:
            time.sleep(READ_SECONDS)
        if not self._failing:
            # Only a lost rank's failure has the advice in it. This may be the rank that was given up, so that others
            # want to know where it hung.
            hung_at = describe_main_thread() if RESUME_ADVICE in failure.message else ""
            self._end_process(failure.describe_end(self._rank) + hung_at, failure.code)

    def _end_process(self, message: str, code: int) -> None:
        """Print the message, record the code, and end this process at once, whatever its main thread waits for."""
        # Each in a thread of its own, because a folder or a terminal that does not answer may be what all wait for.
        said = threading.Thread(target=sys.stderr.write, args=(f"{message}\n",), daemon=True)
        recorded = threading.Thread(target=self._record, args=(code,), daemon=True)
        for thread in (said, recorded):
            thread.start()
        deadline = time.monotonic() + RECORD_SECONDS
        for thread in (said, recorded):
            thread.join(max(0.0, deadline - time.monotonic()))
        settle(max(0.5, deadline - time.monotonic()))
        os._exit(code)


def connect_to_store() -> dist.TCPStore:
    """A new connection to the store at which the processes met.

    Each thread needs its own: a call that waits for an answer holds its connection, and with it all other callers.
    """
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )


def _announce_lost(store: dist.TCPStore, rank: int, heartbeat: Heartbeat, what: str) -> None:
    """In the lost rank's name. The next turn of `_watch_peers` reads the announcement and ends this rank too."""
    message = f"{what}, {heartbeat.position}. {RESUME_ADVICE}"
    announce(store, Failure(code=EXIT_FAILED, rank=rank, host=heartbeat.host_name, message=message))


def _stopped_key(rank: int) -> str:
    """In the store once the rank was told to stop: its heartbeat may end, and it is not lost."""
    return f"trainer/stopped/{rank}"
