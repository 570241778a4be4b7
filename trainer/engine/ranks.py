"""The other processes of a run: waiting for them, exchanging values with them, and ending together.

Waiting goes through the launcher's key-value store and not through collectives, so that an hour of encoding on one rank
times out on none. How failures are noticed is in trainer/engine/peer_watch.py.
"""

from __future__ import annotations

import math
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trainer.atomic import appears
from trainer.engine.failures import RESUME_ADVICE, is_lost_connection, single_line
from trainer.engine.peer_watch import PeerWatch, connect_to_store
from trainer.errors import EXIT_FAILED, ConfigError, PeerLostError, TrainerError
from trainer.run.signals import ignore_requests

POLL_SECONDS = 0.02
# How long a network file system may take to show a file that another machine has made.
SHOWN_SECONDS = 5.0
# How often `Ranks.any_asks` looks into the store: four times a second are nothing to it, and soon enough for a person.
LOOK_SECONDS = 0.25
# How long the rank that may hold the store stays for those that have come to their end and not yet said that they left.
LEAVING_SECONDS = 10.0


class Ranks:
    """This process's view of all processes of the run. With one process every method is trivial.

    Every rank must call `wait`, `gather`, `sum`, `check_equal` and `check_shared` in the same order: never inside
    `if ranks.is_first`, because the other ranks would not come, and this one would wait until --timeout_minutes.
    """

    def __init__(self, *, timeout_seconds: float, record: Callable[[int], None] = lambda code: None):
        """To be made after the process group.

        timeout_seconds  a rank that shows no sign of life for so long is lost
        record           called with the run's exit code: before the others can know of a failure of this rank, and
                         before this process ends because of another rank's failure
        """
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if several else 0
        self.world_size = dist.get_world_size() if several else 1
        self.steps_begun = 0  # optimizer steps; set by the engine, sent with each heartbeat
        self._computing = ""  # see `computing`
        self._waits: dict[str, int] = {}
        self._asked: dict[str, bool] = {}  # what `any_asks` has seen
        self._looked = -math.inf  # when it has looked last
        self._store: dist.TCPStore | None = None
        self._watch: PeerWatch | None = None
        if several:
            self._store = connect_to_store()
            self._watch = PeerWatch(
                self._store,
                rank=self.rank,
                world_size=self.world_size,
                timeout_seconds=timeout_seconds,
                steps_begun=lambda: self.steps_begun,
                computing=lambda: self._computing,
                record=record,
            )

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, the one that prints, reports and exports."""
        return self.rank == 0

    @contextmanager
    def computing(self, what: str) -> Iterator[None]:
        """Inside the block all ranks compute `what` together, which ends the run where it lasts for the time limit."""
        self._computing = what
        try:
            yield
        finally:
            self._computing = ""

    def say(self, text: str) -> None:
        """Print on rank 0 alone. Not a collective."""
        if self.is_first:
            print(text, flush=True)

    def wait(
        self, what: str, *, limit_seconds: float = math.inf, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        """Return once every rank has called this with the same `what`, however long it takes, while all are alive.

        meanwhile  called again and again while this rank waits

        Raises PeerLostError where they have not after `limit_seconds`.
        """
        if self._store is None:
            return
        count = self._waits[what] = self._waits.get(what, 0) + 1
        key = f"trainer/wait/{what}/{count}"
        self._store.add(key, 1)
        since = time.monotonic()
        while (there := self._store.add(key, 0)) < self.world_size:
            if time.monotonic() - since > limit_seconds:
                raise PeerLostError(
                    f"{self.world_size - there} of {self.world_size} processes were not done with {what} after"
                    f" {limit_seconds / 3600:.1f} hours. {RESUME_ADVICE}"
                )
            meanwhile()
            time.sleep(POLL_SECONDS)

    def any_asks(self, what: str, asks: bool) -> bool:
        """Whether this rank asks, or another one has called this for the same `what` and asked. Not a collective.

        For work between whose parts ranks do not meet. Others see it within LOOK_SECONDS; cheap enough to be called
        for every part, however small.
        """
        if self._store is None or self._asked.get(what, False):
            return asks or self._asked.get(what, False)
        key = f"trainer/asked/{what}"
        if asks:
            self._store.set(key, "")
            self._asked[what] = True
        elif time.monotonic() - self._looked > LOOK_SECONDS:
            self._asked[what] = self._store.check([key])
            self._looked = time.monotonic()
        return self._asked.get(what, False)

    def once_per_machine(self, what: str, action: Callable[[], object], *, limit_seconds: float) -> None:
        """Do it on rank 0, then on the first rank of each other machine; returns on every rank once all have.

        For what the processes of a machine need once, and machines that share a folder once for all of them. Raises
        PeerLostError where one turn takes longer than `limit_seconds`.
        """
        hosts = self.gather(socket.gethostname())
        first_here = hosts.index(hosts[self.rank]) == self.rank
        for turn in (self.is_first, first_here and not self.is_first):
            if turn:
                action()
            self.wait(what, limit_seconds=limit_seconds)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in the order of the ranks. For small values.

        A collective, with its time limit: call `wait` first where a rank may come late.
        """
        if self._store is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place; a collective."""
        if self._store is not None:
            dist.all_reduce(values)
        return values

    def check_equal(self, **values: object) -> None:
        """Raise ConfigError, on every rank, where a value differs between ranks.

        values  by a name for the message; of a mapping each entry is compared and named by its key. They are compared
                as texts
        """
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
        """Raise ConfigError, on every rank, where a folder is not the same one on all machines.

        folders  by the flag that names them, for the message. A missing one is made. One that cannot be written is
                 skipped: whoever writes there first gives a better message
        """
        if self._store is None:
            return
        for name, folder in folders.items():
            mark = self.gather(_make_mark(folder) if self.is_first else None)[0]
            if mark is None:
                continue
            hosts = set(self.gather("" if appears(folder / mark, SHOWN_SECONDS) else socket.gethostname())) - {""}
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
        """End together with the others, or let them know that this rank fails.

        Raises PeerLostError in place of the RuntimeError of a collective that broke because another rank is gone.
        """
        late_error: BaseException | None = None  # raised while ending together
        if error is None:
            try:
                return self._end_together()
            except (RuntimeError, ConnectionError, KeyboardInterrupt) as caught:
                error = late_error = caught
        ignore_requests()  # launchers send a signal once they see another rank's end, and this end must be whole
        if self._watch is not None:
            self._tell_others(self._watch, error)
        if late_error is not None:
            raise late_error

    def _tell_others(self, watch: PeerWatch, error: BaseException) -> None:
        """Let the others know why this rank ends; raise what it should end with where that is not `error`."""
        if watch.interrupted and not isinstance(error, (KeyboardInterrupt, TrainerError)):
            # Another rank was told to stop and has left the collective that this one waited in, which raised `error`.
            raise KeyboardInterrupt from error
        if is_lost_connection(error):
            message = f"{watch.describe_lost_ranks()} ({single_line(error)}). {RESUME_ADVICE}"
            watch.tell_failure(message, PeerLostError.exit_code)
            raise PeerLostError(message) from error
        if isinstance(error, TrainerError):
            watch.tell_failure(str(error), error.exit_code)
        elif isinstance(error, KeyboardInterrupt):
            watch.tell_stop()
        else:
            watch.tell_failure(f"{type(error).__name__}: {error}", EXIT_FAILED)

    def _end_together(self) -> None:
        """Return once every rank has come to its end. The rank that may hold the store leaves last."""
        if self._store is None or self._watch is None:
            return
        if not self.is_first:  # rank 0 may still be exporting, and it alone decides whether a signal ends that
            ignore_requests()
        self.wait("end")
        self._watch.close()
        gone = self._store.add("trainer/gone", 1)
        # Not for ever: nobody watches any more whether a rank dies here, and all work is done.
        deadline = time.monotonic() + LEAVING_SECONDS
        while self.is_first and gone < self.world_size and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            gone = self._store.add("trainer/gone", 0)
        dist.destroy_process_group()


def _make_mark(folder: Path) -> str | None:
    """The name of a new file in `folder`; None where none can be made."""
    name = f".shared-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError:
        return None
    return name
