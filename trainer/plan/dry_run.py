"""`--dry_run 1`: print the plan for the GPUs found here or for imagined ones, without torch and without using a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from dataclasses import replace

from trainer.errors import EXIT_DONE, ConfigError
from trainer.flags.config import Config
from trainer.plan.host_memory import bytes_of_a_process, host_memory_bytes
from trainer.plan.launcher import Launch
from trainer.plan.memory import GIB
from trainer.plan.network import network_gbps
from trainer.plan.plan import Plan, make_plan
from trainer.plan.rates import gpu_of, named_gpu, slowest
from trainer.plan.request import batch_flags, refuse_for_shape, request_of
from trainer.plan.strategies import BF16_CAPABILITY, Cluster
from trainer.spec.shapes import FRAME_RATE_HZ, Shape, shape_of, shape_to_train
from trainer.spec.trainable import count

IMAGINED_GPU_GIB = 24  # of the one GPU that is imagined where none is found and no flag describes one
QUERY = ["nvidia-smi", "--query-gpu=memory.total,compute_cap,name", "--format=csv,noheader,nounits"]


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
    """The plan on this cluster of a run that was launched so, with the network of --link_gbps.

    Raises ConfigError or MemoryShortError where there is no such run.
    """
    refuse_for_shape(config, typed, shape)
    cluster = with_link(config, cluster)
    deepspeed = _deepspeed_available(config)
    request = request_of(config, typed, launch, frame_rate_hz=frame_rate_hz, deepspeed_available=deepspeed)
    return make_plan(cluster, shape, batch_flags(config, typed), request, resumed_global_batch)


def cluster_of(config: Config, found: Cluster | None) -> tuple[Cluster, str]:
    """The cluster to plan for, and its size and origin in words.

    Flags describe it (--gpus, --nodes, --gpu_memory_gib, --gpu_name); what they leave out is as it was found here, or
    where nothing was found, imagined. GPUs of another memory than those here are others, of a name that is not known.

    Raises ConfigError for a --gpu_name that is not known.
    """
    if config.device == "cpu":
        host = host_memory_bytes()
        return _this_cpu(host), f"the CPU of this machine, with {host / GIB:.1f} GiB"
    imagined = (config.gpus, config.nodes, config.gpu_memory_gib, config.gpu_name) != (None,) * 4
    base = found or Cluster(
        nodes=1,
        gpus_per_node=1,
        device="cuda",
        gpu_memory_bytes=IMAGINED_GPU_GIB * GIB,
        host_memory_bytes=None,
        supports_bf16=True,
        compiles=True,
    )
    if imagined:
        base = _imagined_gpus(config, base)
    cluster = replace(
        base,
        nodes=config.nodes or 1,
        gpus_per_node=config.gpus or base.gpus_per_node,
        host_memory_bytes=None if imagined else base.host_memory_bytes,
    )
    named = f" ({cluster.gpu_name})" if cluster.gpu_name else ""
    gib = (cluster.gpu_memory_bytes or 0) / GIB
    size = f"{cluster.nodes} x {cluster.gpus_per_node} GPU(s){named} of {gib:.1f} GiB"
    if imagined:
        return cluster, f"{size}, imagined"
    return cluster, f"{size}, {'found here' if found else 'imagined, as none was found here'}"


def _imagined_gpus(config: Config, base: Cluster) -> Cluster:
    """The cluster with the GPUs that the flags describe, in place of those of `base` where they are others."""
    gpu = None if config.gpu_name is None else named_gpu(config.gpu_name)
    if config.gpu_memory_gib is not None:
        base = replace(base, gpu_memory_bytes=round(config.gpu_memory_gib * GIB))
    elif gpu is not None:
        base = replace(base, gpu_memory_bytes=gpu.memory_gib * GIB)
    if gpu is not None:
        return replace(base, gpu_name=gpu.name, network_gbps=None, supports_bf16=gpu.bf16)
    others = config.gpu_memory_gib is not None
    return replace(base, gpu_name="" if others else base.gpu_name, supports_bf16=others or base.supports_bf16)


def with_link(config: Config, cluster: Cluster) -> Cluster:
    """The cluster with the network that --link_gbps names. Raises ConfigError where there is none to be named."""
    if config.link_gbps is None:
        return cluster
    flag = f"--link_gbps {config.link_gbps:g}"
    if cluster.nodes == 1:
        raise ConfigError(f"{flag} has no effect on one machine: it is the rate of its network to others. Remove it")
    if cluster.device == "cpu":
        raise ConfigError(f"{flag} has no effect on CPUs, for which no time is expected. Remove it")
    if gpu_of(cluster.gpu_name) is None:
        if config.dry_run:
            raise ConfigError(f"{flag} has no effect without the GPU's name, since no time is expected: add --gpu_name")
        raise ConfigError(f"{flag} has no effect on {cluster.gpu_name}, whose rates are not known here. Remove it")
    return replace(cluster, network_gbps=config.link_gbps)


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
    """The cluster in nvidia-smi's lines of memory in MiB, compute capability and name: "23034, 8.9, NVIDIA L4"."""
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in listing.splitlines() if line.strip()]
    try:
        gpus = [(int(memory) * 2**20, tuple(map(int, capability.split(".")))) for memory, capability, _ in rows]
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
        gpu_name=slowest(name for _, _, name in rows),
        network_gbps=network_gbps(),
    )


def _deepspeed_available(config: Config) -> bool:
    """Whether DeepSpeed would be there: imagined GPUs are on Linux, where this project installs it."""
    return config.gpus is not None or importlib.util.find_spec("deepspeed") is not None
