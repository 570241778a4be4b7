"""What the data needs to know of the run's other processes; trainer.engine.Ranks is one that has some."""

from __future__ import annotations

from typing import Any, Protocol


class Peers(Protocol):
    """The processes that prepare a data set together. Each must call the same methods in the same order."""

    rank: int
    world_size: int

    def wait(self, what: str) -> None:
        """Return once every process has called this, however long that takes."""

    def gather(self, value: Any) -> list[Any]:
        """The small `value` of every process, in order of ranks. Only after `wait`: it may time out."""


class Alone:
    """A process without others."""

    rank, world_size = 0, 1

    def wait(self, what: str) -> None:
        """Return at once."""

    def gather(self, value: Any) -> list[Any]:
        """This process's value alone."""
        return [value]
