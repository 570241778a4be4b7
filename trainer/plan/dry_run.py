"""`--dry_run 1`: print the plan for the GPUs found here or for imagined ones, without torch and without using a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from dataclasses import replace

from trainer.errors import EXIT_DONE
from trainer.flags.config import Config
from trainer.plan.host_memory import bytes_of_a_process, host_memory_bytes
from trainer.plan.launcher import Launch
from trainer.plan.memory import GIB
from trainer.plan.plan import Plan, make_plan
from trainer.plan.request import batch_flags, refuse_for_shape, request_of
from trainer.plan.strategies import BF16_CAPABILITY, Cluster
from trainer.spec.shapes import FRAME_RATE_HZ, Shape, shape_of, shape_to_train
from trainer.spec.trainable import count

IMAGINED_GPU_GIB = 24  # of the one GPU that is imagined where none is found and no flag describes one
QUERY = ["nvidia-smi", "--query-gpu=memory.total,compute_cap", "--format=csv,noheader,nounits"]


def dry_run(
    config: Config, typed: frozenset[str], outlook: Callable[[Plan, Shape], str] | None = None
) -> int:
    """Print the plan of the run that these flags ask for; returns the exit code.

    outlook  what else is said of the plan, for this model

    Raises ConfigError or MemoryShortError where there is no such run.
    """
    shape = shape_to_train(shape_of(config.model_id), stereo=config.stereo)
    cluster, origin = cluster_of(config, found_cluster())
    plan = plan_of(config, typed, cluster, shape)
    trained = count(shape, config.selection).trained
    count_in_words = f"{trained / 1e6:.1f} M" if trained > 1e5 else str(trained)
    print(f"{shape.name}: {count_in_words} parameters to train, on {origin}")
    print(plan.describe())
    if outlook is not None:
        print(outlook(plan, shape))
    return EXIT_DONE


def plan_of(config: Config, typed: frozenset[str], cluster: Cluster, shape: Shape) -> Plan:
    """The plan of a new run on this cluster, started without a launcher's configuration.

    Raises ConfigError or MemoryShortError where there is no such run.
    """
    return plan_of_shape(config, typed, cluster, Launch(), shape, FRAME_RATE_HZ)


def plan_of_shape(
    config: Config,
    typed: frozenset[str],
    cluster: Cluster,
    launch: Launch,
    shape: Shape,
    frame_rate_hz: float,
    resumed_global_batch: int | None = None,
) -> Plan:
    """The plan on this cluster of a run that was launched so.

    Raises ConfigError or MemoryShortError where there is no such run.
    """
    refuse_for_shape(config, typed, shape)
    deepspeed = _deepspeed_available(config)
    request = request_of(config, typed, launch, frame_rate_hz=frame_rate_hz, deepspeed_available=deepspeed)
    return make_plan(cluster, shape, batch_flags(config, typed), request, resumed_global_batch)


def cluster_of(config: Config, found: Cluster | None) -> tuple[Cluster, str]:
    """The cluster to plan for, and its size and origin in words.

    Flags describe it (--gpus, --nodes, --gpu_memory_gib); what they leave out is as it was found here, or where nothing
    was found, imagined.
    """
    if config.device == "cpu":
        host = host_memory_bytes()
        return _this_cpu(host), f"the CPU of this machine, with {host / GIB:.1f} GiB"
    imagined = (config.gpus, config.nodes, config.gpu_memory_gib) != (None, None, None)
    base = found or Cluster(
        nodes=1,
        gpus_per_node=1,
        device="cuda",
        gpu_memory_bytes=IMAGINED_GPU_GIB * GIB,
        host_memory_bytes=None,
        supports_bf16=True,
        compiles=True,
    )
    memory = base.gpu_memory_bytes if config.gpu_memory_gib is None else round(config.gpu_memory_gib * GIB)
    cluster = replace(
        base,
        nodes=config.nodes or 1,
        gpus_per_node=config.gpus or base.gpus_per_node,
        gpu_memory_bytes=memory,
        host_memory_bytes=None if imagined else base.host_memory_bytes,
        supports_bf16=imagined or base.supports_bf16,
    )
    size = f"{cluster.nodes} x {cluster.gpus_per_node} GPU(s) of {(memory or 0) / GIB:.1f} GiB"
    if imagined:
        return cluster, f"{size}, imagined"
    return cluster, f"{size}, {'found here' if found else 'imagined, as none was found here'}"


def _this_cpu(host_bytes: int) -> Cluster:
    return Cluster(
        nodes=1,
        gpus_per_node=1,
        device="cpu",
        gpu_memory_bytes=bytes_of_a_process(host_bytes, 1),
        host_memory_bytes=host_bytes,
        supports_bf16=False,
    )


def found_cluster() -> Cluster | None:
    """The GPUs of this machine as nvidia-smi tells them; None where it is missing, fails or lists none."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return cluster_of_listing(done.stdout) if done.returncode == 0 else None


def cluster_of_listing(listing: str) -> Cluster | None:
    """The cluster in nvidia-smi's lines of memory in MiB and compute capability: "81559, 9.0"."""
    rows = [line.split(",") for line in listing.splitlines() if line.strip()]
    try:
        gpus = [(int(memory) * 2**20, tuple(map(int, capability.split(".")))) for memory, capability in rows]
    except ValueError:  # "[N/A]", where a driver cannot tell
        return None
    if not gpus:
        return None
    return Cluster(
        nodes=1,
        gpus_per_node=len(gpus),
        device="cuda",
        gpu_memory_bytes=min(memory for memory, _ in gpus),
        host_memory_bytes=host_memory_bytes(),
        supports_bf16=min(capability for _, capability in gpus) >= BF16_CAPABILITY,
        compiles=True,  # torch, which could tell, is not imported
    )


def _deepspeed_available(config: Config) -> bool:
    """Whether DeepSpeed would be there: imagined GPUs are on Linux, where this project installs it."""
    return config.gpus is not None or importlib.util.find_spec("deepspeed") is not None
