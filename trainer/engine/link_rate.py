"""What the links between the GPUs of a run reach, measured once and told beside what the plan expects.

It decides nothing: what is free on a shared network differs from start to start, and a plan that followed it would too.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from trainer.engine.ranks import Ranks
from trainer.plan.strategies import Cluster
from trainer.plan.time import link_gb_per_second

BYTES = 2**28  # of the tensor: large enough for the links' full rate, small beside what a model takes
# NCCL connects its processes in the first of the warm-ups, which are of a 16th. Where that takes longer than this, the
# network is so slow that a 16th shows its rate too, and the whole would take some ten seconds at every start.
WARM_UPS, ROUNDS = 2, 3
SLOW_SECONDS = 0.05


def say_link_rate(cluster: Cluster, device: torch.device, ranks: Ranks) -> None:
    """Say what the links reach, where there are several GPUs. A collective, which leaves no memory taken."""
    if device.type == "cpu" or cluster.world_size == 1:
        return
    with ranks.computing("measuring the links between GPUs"):
        rate = link_rate(device, ranks)
    torch.cuda.empty_cache()
    expected = link_gb_per_second(cluster)
    of = "" if expected is None else f" of {expected:.3g} expected"
    ranks.say(f"links: {rate / 1e9:.3g} GB/s measured{of}")


def link_rate(device: torch.device, ranks: Ranks, size: int = BYTES) -> float:
    """Bytes per second that each process sends in the fastest of a few all-reduces, the same on every rank.

    A ring's: 2 (n-1)/n times the tensor, n processes, over the time of the slowest (nccl-tests call it busbw). A
    collective, for several processes.
    """
    tensor = torch.zeros(size // 4, dtype=torch.float32, device=device)
    part = tensor[: max(1, len(tensor) // 16)]
    if _of_the_slowest([_seconds(part, ranks) for _ in range(WARM_UPS)][-1:], device) > SLOW_SECONDS:
        tensor = part
    fastest = _of_the_slowest([_seconds(tensor, ranks) for _ in range(ROUNDS)], device)
    return 2 * (ranks.world_size - 1) / ranks.world_size * 4 * tensor.numel() / fastest


def _of_the_slowest(seconds: list[float], device: torch.device) -> float:
    """The least of the rounds' seconds, each of which is that of the slowest process. A collective."""
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest.min())


def _seconds(tensor: torch.Tensor, ranks: Ranks) -> float:
    """Of one all-reduce, from when all ranks are there."""
    ranks.sum(torch.zeros(1, device=tensor.device)).item()  # waits for all, and for the GPU
    since = time.perf_counter()
    ranks.sum(tensor)
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - since
