"""How the processes of a run meet: by the launcher's key-value store, and then in a process group of our own making.

Accelerate and DeepSpeed take a group that is there. Made here, it is made in one way on GPUs and on CPUs and under
every strategy, before anything else has a reason to fail.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from trainer.engine.failures import single_line
from trainer.engine.hardware import card_of
from trainer.errors import ConfigError, PeerLostError
from trainer.plan.launcher import START

# How much longer a collective may wait than a rank may be silent. At the limit of a collective NCCL ends the process
# from a thread of C++: without our message, without an exit code. trainer/engine/peer_watch.py has to be first.
COLLECTIVE_GRACE = timedelta(minutes=2)
POLL_SECONDS = 0.1
# How many ranks have read where all others compute, and how long rank 0 waits for that.
READ, READ_SECONDS = "trainer/places read", 10.0
BACKEND = {"cuda": "nccl", "cpu": "gloo"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank computes.

    host  as NCCL tells machines apart: its name, or what NCCL_HOSTID says
    card  identifies the GPU; empty on a CPU
    """

    host: str
    device: str
    card: str


def meet(device: torch.device, timeout_minutes: float) -> None:
    """Join the other processes, so that torch's collectives work on `device`; at once where this was done already.

    Without a launcher this process is a group of one. Raises PeerLostError where the others do not come or cannot be
    reached, ConfigError where some have a GPU and some have none, or where two share one.
    """
    if dist.is_initialized():
        return
    _complete_environment()
    limit = timedelta(minutes=timeout_minutes)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=limit))
        store.set_timeout(limit)
        check_places(_places(store, limit, device, rank, world_size))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _limit_later_groups(limit + COLLECTIVE_GRACE)
        dist.init_process_group(
            BACKEND[device.type],
            store=dist.PrefixStore("trainer/group", store),
            rank=rank,
            world_size=world_size,
            timeout=limit + COLLECTIVE_GRACE,
            # With it NCCL connects the processes here and now, instead of in the first collective, and later groups
            # are split from this one.
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistBackendError as error:
        raise PeerLostError(
            f"the {world_size} processes of the run met, but {BACKEND[device.type]} could not connect them:"
            f" {single_line(error)}. NCCL_DEBUG=INFO shows what it tried"
        ) from error
    except dist.DistError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise PeerLostError(
            f"the {world_size} processes of the run did not meet within {timeout_minutes:g} minutes"
            f" (--timeout_minutes): {reason}. All need the same number of processes, address and port, and the same"
            " flags"
        ) from error


def check_places(places: Sequence[Place]) -> None:
    """Raise ConfigError where not all ranks have a GPU, or none has; or where two of one machine have the same GPU.

    places  in the order of the ranks
    """
    without = [rank for rank, place in enumerate(places) if place.device == "cpu"]
    if without and len(without) < len(places):
        hosts = sorted({places[rank].host for rank in without})
        raise ConfigError(
            f"{len(without)} of {len(places)} processes find no GPU that torch can use (the first is rank {without[0]};"
            f" on {', '.join(hosts)}), the others do. There, `nvidia-smi` and `python -c 'import torch;"
            " torch.zeros(1).cuda()'` show why; or leave those machines out; or use no GPU anywhere, with"
            " --device cpu"
        )
    seen: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(places):
        other = seen.setdefault((place.host, place.card), rank)
        if place.card and other != rank:
            raise ConfigError(
                f"ranks {other} and {rank} on {place.host} were given the same GPU ({place.card}): one process needs"
                f" one GPU. Start as many processes on a machine as it has GPUs; {START}"
            )


def _places(store: dist.Store, limit: timedelta, device: torch.device, rank: int, world_size: int) -> list[Place]:
    """Where every rank computes, in the order of the ranks. Waits for all of them, until `limit` is over."""
    host = os.environ.get("NCCL_HOSTID") or socket.gethostname()
    own = Place(host=host, device=device.type, card=card_of(device))
    keys = [f"trainer/place/{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps(asdict(own)))
    deadline = time.monotonic() + limit.total_seconds()
    for other, key in enumerate(keys):
        # Asked again and again, because no handler of a signal runs inside a call of the store that waits. A rank that
        # is refused before it comes here tells nobody: its launcher's SIGTERM has to end those that wait for it.
        while not store.check([key]):
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"rank {other} did not come")
            time.sleep(POLL_SECONDS)
    places = [Place(**json.loads(text)) for text in store.multi_get(keys)]
    store.add(READ, 1)
    deadline = time.monotonic() + READ_SECONDS
    # Rank 0 may hold the store. Every rank is to tell what is wrong with the places, and not that the store is gone.
    while rank == 0 and store.add(READ, 0) < world_size and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return places


def _limit_later_groups(limit: timedelta) -> None:
    """Give groups that libraries make later the same limit as the first.

    DeepSpeed reduces in a group of its own, hsdp in those of a node. torch (2.13) takes a constant for them, and offers
    no argument that would come through both libraries; tests/ranks/test_meeting.py looks at every group's limit.
    """
    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit


def _complete_environment() -> None:
    """Without a launcher, make this process a group of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    else:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
