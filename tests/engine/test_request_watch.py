"""What threads conclude once a rank was asked to stop: who is lost, and when the process must end itself."""

from __future__ import annotations

import pytest

from trainer.engine.heartbeat import Heartbeat
from trainer.engine.request_watch import MARGIN_SECONDS, LostAfterRequest, last_moment_seconds
from trainer.run.signals import Asked

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
SIGTERM = Asked(name="SIGTERM")


def test_no_rank_is_lost_before_a_request_and_only_the_silent_one_after_it():
    watch, lost = LostAfterRequest(), []
    for second in range(30):
        heartbeats = [Heartbeat(count=second), Heartbeat(count=min(second, 6)), Heartbeat(count=second)]
        if watch.is_due(SIGTERM if second >= 5 else None):
            lost.append((second, watch.silent(heartbeats)))
    assert lost == [(5, []), (13, []), (21, [1]), (29, [1])]


@pytest.mark.parametrize(
    "request_,environment,seconds",
    [
        (SIGTERM, TORCHRUN, 30 - MARGIN_SECONDS),
        (Asked(name="SIGHUP"), {**TORCHRUN, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}, 300 - MARGIN_SECONDS),
        (Asked(name="SIGUSR1"), TORCHRUN, None),  # only asks: nobody kills after it
        (SIGTERM, {}, None),  # no launcher
        (Asked(name="SIGTERM", answered=True), TORCHRUN, None),  # the main thread is about to save
    ],
)
def test_a_process_ends_itself_before_its_launcher_kills_it_and_only_then(request_, environment, seconds):
    assert last_moment_seconds(request_, environment) == seconds
