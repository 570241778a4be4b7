"""How ranks meet: one group of our own making under every strategy, its limit in every later group, one download."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.plans import plan_for
from tests.ranks.cases import steps
from tests.ranks.harness import run_ranks, start_ranks
from tests.ranks.launches import ends, start
from trainer.engine import meet
from trainer.errors import EXIT_FAILED, PeerLostError
from trainer.plan.memory import GIB
from trainer.run.signals import interruptible

MINUTES = 2.0  # --timeout_minutes of tests/ranks/cases.py


class Groups:
    """The groups that there are once the engine is built, as (name of the backend, limit in seconds), into a file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, engine) -> None:
        from torch.distributed import distributed_c10d

        found = [
            f"{group.name()} {group._get_backend(torch.device('cpu')).options._timeout.total_seconds()}"
            for group in distributed_c10d._world.pg_map
        ]
        (self.folder / f"groups-{engine.ranks.rank}").write_text("\n".join(found))


@pytest.mark.full
@pytest.mark.parametrize(
    ("strategy", "ranks", "nodes"),
    [*((name, 2, 1) for name in ("ddp", "zero2", "zero3", "fsdp", "hsdp")), ("hsdp", 4, 2)],
)
def test_every_group_is_planned_for_and_waits_longer_than_a_silent_rank_may(strategy, ranks, nodes, tmp_path):
    run_ranks(ranks, steps, strategy, 1, count=1, nodes=nodes, watch=Groups(tmp_path))
    planned = plan_for(strategy, world_size=ranks, nodes=nodes, on_gpu=True).layout.communicators
    for rank in range(ranks):
        found = (tmp_path / f"groups-{rank}").read_text().splitlines()
        assert len(found) == planned, found
        assert {line.split()[1] for line in found} == {str(60 * MINUTES + 120)}, found


def met(card: str | None) -> str:
    """What meeting raised on this rank, which says that it has this GPU; None: its own."""
    from trainer.engine import meet, meeting

    meeting.card_of = lambda device: card or f"GPU-{os.environ['RANK']}"
    try:
        meet(torch.device("cpu"), 1.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "met"


@pytest.mark.full  # tests/engine/test_hardware.py has the same without processes
def test_two_ranks_with_one_gpu_are_refused_when_they_meet():
    for message in run_ranks(2, met, "GPU-7"):
        assert message.startswith("ConfigError: ranks 0 and 1 on ") and "the same GPU (GPU-7)" in message
    assert run_ranks(2, met, None) == ["met", "met"]


def test_a_request_ends_a_rank_that_waits_for_the_others(monkeypatch):
    """As when rank 0 was refused before it came, and torchrun, which holds the store, ends the others."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in {**place, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    ended, hung = threading.Event(), []

    def ask() -> None:
        store.wait(["trainer/place/1"])
        os.kill(os.getpid(), signal.SIGTERM)
        if not ended.wait(20):
            hung.append(True)
            store.set("trainer/place/0", "no place")

    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(KeyboardInterrupt), interruptible():
        meet(torch.device("cpu"), 1.0)
    ended.set()
    thread.join()
    assert not hung


def fetched_once(folder: str) -> list[str]:
    """What was done on two machines of two ranks each, in order, as this rank sees it when it goes on."""
    from trainer.engine import Ranks, meet

    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: f"machine-{rank // 2}"  # type: ignore[assignment]
    meet(torch.device("cpu"), 1.0)
    log = Path(folder) / "log"

    def fetch() -> None:
        for word in ("begins", "ends"):
            with log.open("a") as file:
                file.write(f"{rank} {word}\n")
            time.sleep(0.1)

    with Ranks(timeout_seconds=60) as ranks:
        ranks.once_per_machine("it", fetch, limit_seconds=60)
        return log.read_text().splitlines()


def test_one_process_of_all_fetches_then_one_of_each_other_machine(tmp_path):
    assert run_ranks(4, fetched_once, str(tmp_path)) == [["0 begins", "0 ends", "2 begins", "2 ends"]] * 4


def fetched_too_slowly() -> str:
    from trainer.engine import Ranks, meet

    meet(torch.device("cpu"), 1.0)
    try:
        with Ranks(timeout_seconds=60) as ranks:
            ranks.once_per_machine("fetching", threading.Event().wait, limit_seconds=0.5)
    except PeerLostError as error:
        return str(error)
    return "nothing"


@pytest.mark.full
def test_a_fetch_that_never_ends_ends_all_by_the_limit_of_those_that_wait():
    first, second = start_ranks(2, fetched_too_slowly).results()
    assert first == ("died", EXIT_FAILED)
    assert second[0] == "returned" and second[1].startswith("1 of 2 processes were not done with fetching after")


def ended_beside_a_rank_that_dies() -> str:
    from trainer.engine import Ranks, meet, ranks
    from trainer.engine.peer_watch import PeerWatch

    ranks.LEAVING_SECONDS = 0.5
    if os.environ["RANK"] == "1":
        PeerWatch.close = lambda watch: os._exit(0)  # type: ignore[method-assign]
    meet(torch.device("cpu"), 1.0)
    with Ranks(timeout_seconds=60):
        pass
    return "ended"


@pytest.mark.full
def test_a_rank_that_dies_at_the_very_end_keeps_nobody():
    assert start_ranks(2, ended_beside_a_rank_that_dies).results() == [("returned", "ended"), ("died", 0)]


def a_byte_less_and_no_compiler() -> None:
    """GPUs of 80 GiB as the plan sees them; the second rank's has a byte less, and its machine no compiler."""
    from dataclasses import replace

    from trainer import engine

    find, second = engine.find_cluster, int(os.environ["RANK"])

    def found(*arguments, **named):
        return replace(find(*arguments, **named), gpu_memory_bytes=80 * GIB - second, compiles=not second)

    engine.find_cluster = found


@pytest.mark.full  # tests/plan/test_cluster.py has the same without a run
def test_ranks_that_differ_by_a_byte_and_a_compiler_train(tmp_path):
    ended = ends(start(tmp_path, "--max_steps", "1", change=a_byte_less_and_no_compiler), tmp_path, 120)
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"of {(80 * GIB - 1) / GIB:.1f} GiB" in ended[0][1]
