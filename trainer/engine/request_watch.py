"""What the watching threads of a rank do once the rank was asked to stop, while its main thread may be waiting.

Launchers send SIGTERM to all ranks once one of them is gone, and SIGKILL a while later. Over NCCL nothing raises in the
ranks that wait for the lost one: they sit in CUDA, where no handler of a signal runs. So the watching threads find out
who is gone, and end the process in time, with its message and exit code.

Seconds are counted by the sleeps of the watching threads, for the reason given in PeerWatch.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence

from trainer.engine.heartbeat import HEARTBEAT_SECONDS, Heartbeat
from trainer.run.signals import Asked

# A rank whose heartbeat stands still for so long is lost. Heartbeats come from a thread that waits for no GPU and no
# other rank, so that no step and no save, however long, stops them. What does is a process that was killed or
# suspended, or a machine or network that is gone.
SILENT_SECONDS = 75.0
# The same once a rank was asked to stop, because launchers leave no time for more.
SILENT_AFTER_REQUEST_SECONDS = 8.0
# How long before the launcher's SIGKILL a process ends itself whose main thread does not answer.
MARGIN_SECONDS = 8.0
# torchrun and accelerate launch send SIGKILL so many seconds after SIGTERM or SIGHUP (torch 2.11; before there was this
# variable, always after 30 s).
LAUNCHERS_LIMIT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
LAUNCHERS_LIMIT_SECONDS = 30.0


class LostAfterRequest:
    """Compares the heartbeats of all ranks, SILENT_AFTER_REQUEST_SECONDS apart, from the request on.

    Not each second: every rank reads those of all others, from one store.
    """

    def __init__(self) -> None:
        self._turns = 0
        self._before: Sequence[Heartbeat] = ()

    def is_due(self, request: Asked | None) -> bool:
        """Whether `silent` is to be called; this is called each HEARTBEAT_SECONDS."""
        if request is None:
            return False
        due = self._turns % round(SILENT_AFTER_REQUEST_SECONDS / HEARTBEAT_SECONDS) == 0
        self._turns += 1
        return due

    def silent(self, heartbeats: Sequence[Heartbeat]) -> list[int]:
        """The ranks whose heartbeat is that of the call before; none at the first call."""
        before, self._before = self._before, heartbeats
        return [rank for rank, (then, now) in enumerate(zip(before, heartbeats, strict=False)) if then == now]


def last_moment_seconds(request: Asked, environment: Mapping[str, str]) -> float | None:
    """How long after a request the process has to end by itself where its main thread does not answer; None: never.

    Only a launcher's SIGKILL sets a time. None comes after SIGUSR1, and none without a launcher.
    """
    if request.answered or request.name == signal.SIGUSR1.name or "TORCHELASTIC_RUN_ID" not in environment:
        return None
    return max(MARGIN_SECONDS, float(environment.get(LAUNCHERS_LIMIT, LAUNCHERS_LIMIT_SECONDS)) - MARGIN_SECONDS)
