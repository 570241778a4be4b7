"""Several ranks on one GPU, over NCCL itself; where there is no GPU, over gloo.

NCCL refuses two ranks on one device, which it knows by the host and the bus that they name (2.28 and 2.29, which come
with torch 2.11 and 2.13). So each rank gets a host id of its own. NCCL then takes them for separate machines and
carries the data through sockets on the loopback device: slow, with the same operations in the same order. The trainer
takes each rank for a machine with one GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_checks.check import FIGURE

from tests.ranks import launches
from tests.ranks.harness import RankProcesses

SHARED = {
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_RAS_ENABLE": "0",
    # Few and simple kernels: a collective's kernels wait for each other on the device that both ranks share.
    "NCCL_MAX_CTAS": "4",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
}


def environments(world_size: int) -> list[Mapping[str, str]]:
    """Variables of each rank on the card; [] without one, for which the usual ranks over gloo need none."""
    if not torch.cuda.is_available():
        return []
    return [SHARED | {"NCCL_HOSTID": f"host{rank}"} for rank in range(world_size)]


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
    """What `function(*arguments, **named)` returned on each rank; a rank that raised fails the test with its trace."""
    results = RankProcesses(world_size, function, arguments, named, environments(world_size)).results()
    for rank, (kind, value) in enumerate(results):
        assert kind == "returned", f"rank {rank} of {world_size}:\n{value}"
    return [value for _, value in results]


def start(
    folder: Path, *flags: str, world_size: int = 2, change: Callable[[], None] | None = None
) -> RankProcesses:
    """A run of launch.py in `folder`, started (see tests/ranks/launches.py)."""
    return launches.start(
        folder, *flags, world_size=world_size, change=change, environments=environments(world_size)
    )


def backend() -> str:
    """What carries the data, for figures."""
    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if torch.cuda.is_available() else "gloo"


def say_figure(text: str) -> None:
    """Tell scripts/gpu_check.py what was measured."""
    print(f"\n{FIGURE}{text}", flush=True)


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def most(values: Sequence[float]) -> str:
    return f"{max(values):.1e}"
