"""A request of one rank reaches the others outside of collectives, while they work or wait."""

from __future__ import annotations

import itertools
import time

import torch

from tests.ranks.harness import run_ranks
from trainer.engine import Ranks, meet


def asked(asking: int) -> list[bool]:
    """Rank `asking` asks at its third look; the others look until they see it. One of them waits already."""
    meet(torch.device("cpu"), 1)
    with Ranks(timeout_seconds=60) as ranks:
        before = ranks.any_asks("a", False)
        ranks.wait("all have looked")
        if ranks.rank == asking:  # its signal comes while it waits for those that work
            looks = itertools.count()
            ranks.wait("done", meanwhile=lambda: ranks.any_asks("a", next(looks) >= 2))
        else:
            while not ranks.any_asks("a", False):
                time.sleep(0.001)
            ranks.wait("done")
        return [before, ranks.any_asks("a", False), ranks.any_asks("b", False)]


def test_a_rank_that_waits_passes_its_request_on_to_those_that_work():
    for asking in (0, 1):
        assert run_ranks(2, asked, asking) == [[False, True, False]] * 2


def test_one_process_asks_itself():
    with Ranks(timeout_seconds=60) as ranks:
        assert not ranks.any_asks("a", False) and ranks.any_asks("a", True)
