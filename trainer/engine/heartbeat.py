"""Heartbeats: what each rank writes into the launcher's key-value store every second, to show that it is alive."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

HEARTBEAT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """A sign of life. Two that are equal, seconds apart, mean that the rank's watching thread has stopped.

    count  grows by 1 with each heartbeat; 0 where the rank has not written any yet
    step   the optimizer step that the rank has begun last, counted from 1; 0 before the first
    host   the rank's host name; empty where the rank has not written any yet
    """

    count: int = 0
    step: int = 0
    host: str = ""

    @property
    def position(self) -> str:
        """Where in the run the rank is, for messages."""
        return f"at step {self.step}" if self.step else "before step 1"

    @property
    def host_name(self) -> str:
        """The host, never empty, because it stands between spaces in an announced failure."""
        return self.host or "an_unknown_host"

    def describe(self, rank: int) -> str:
        """The rank that wrote this heartbeat, for messages."""
        return f"rank {rank} on {self.host_name} ({self.position})"


def write_heartbeat(store: dist.TCPStore, rank: int, heartbeat: Heartbeat) -> None:
    """Make `heartbeat` the rank's newest."""
    store.set(_key(rank), f"{heartbeat.count} {heartbeat.step} {heartbeat.host}")


def read_heartbeat(store: dist.TCPStore, rank: int) -> Heartbeat:
    """The newest heartbeat of a rank; the default one where it has not written any yet.

    Never waits for a rank: `store.get` alone would, until the key is there.
    """
    if not store.check([_key(rank)]):
        return Heartbeat()
    count, step, host = store.get(_key(rank)).decode().split(" ")
    return Heartbeat(count=int(count), step=int(step), host=host)


def _key(rank: int) -> str:
    return f"trainer/beat/{rank}"
