"""Which strategies a run may have on a cluster: the named one, or several, each sharding more than the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from trainer.errors import ConfigError
from trainer.plan.layout import Precision, Strategy
from trainer.plan.rates import slowest
from trainer.plan.request import Request
from trainer.spec.shapes import Shape

# From this many parameters on, every GPU holding all weights is too much: between medium (1.8 B) and large (3.3 B).
FULL_SHARD_PARAMETERS = 2_500_000_000
DEEPSPEED: tuple[Strategy, ...] = ("zero2", "zero3")  # they run by DeepSpeed, and alone can offload the optimizer
# The strategies that run in fp16, with moments of 8 bits, and with a base of 4 or 8 bits: those that shard nothing.
FP16: tuple[Strategy, ...] = ("single", "ddp")
EIGHT_BIT: tuple[Strategy, ...] = ("single", "ddp")
QUANTIZED: tuple[Strategy, ...] = ("single", "ddp")
# The least compute capability of a GPU that computes in bf16: Ampere. Older ones emulate it, slower than float32.
BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The hardware of a run; on CPUs `gpus_per_node` is the number of processes per node.

    gpu_memory_bytes   of the smallest GPU, on CPUs what a process may use of the host's memory; None where it is
                       unknown: no layout is refused for memory then
    host_memory_bytes  of a node; None for unknown
    compiles           whether torch.compile works on its GPUs
    gpu_name           as the driver names it ("NVIDIA H100 80GB HBM3"); empty where it is unknown, and on CPUs
    network_gbps       rate of a machine's network to the others, all its cards together, in Gbit/s; None where unknown
    unused_gpu         where the CPU is used though there is an NVIDIA GPU: why, and what to do; else empty
    """

    nodes: int
    gpus_per_node: int
    device: Literal["cpu", "cuda"]
    gpu_memory_bytes: int | None
    host_memory_bytes: int | None
    supports_bf16: bool
    compiles: bool = False
    gpu_name: str = ""
    network_gbps: float | None = None
    unused_gpu: str = ""

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


def common_cluster(found: Sequence[Cluster]) -> Cluster:
    """What all processes have, of the hardware that each of them found: the least memory, the slowest GPU and network,
    and what works on every one.

    GPUs of one model differ by some bytes, and a machine may lack a compiler. All processes need one plan.
    """
    return replace(
        found[0],
        gpu_memory_bytes=_least([cluster.gpu_memory_bytes for cluster in found]),
        host_memory_bytes=_least([cluster.host_memory_bytes for cluster in found]),
        supports_bf16=all(cluster.supports_bf16 for cluster in found),
        compiles=all(cluster.compiles for cluster in found),
        gpu_name=slowest(cluster.gpu_name for cluster in found),
        network_gbps=_least([cluster.network_gbps for cluster in found]),
        unused_gpu=next((cluster.unused_gpu for cluster in found if cluster.unused_gpu), ""),
    )


Number = TypeVar("Number", int, float)


def _least(sizes: Sequence[Number | None]) -> Number | None:
    """The smallest of the sizes; None where one of them is unknown."""
    known = [size for size in sizes if size is not None]
    return min(known) if len(known) == len(sizes) else None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A strategy that the run may have, with the optimizer offloaded or not, and why, in words."""

    strategy: Strategy
    offload: bool
    reason: str


def candidates(cluster: Cluster, shape: Shape, request: Request, precision: Precision) -> list[Candidate]:
    """The strategies to try in this order, each of which needs less memory than the one before.

    Raises ConfigError where flags contradict each other or the cluster.
    """
    if request.offload_optimizer and cluster.device == "cpu":
        raise ConfigError("--offload_optimizer 1 has no effect on a CPU: its optimizer is in host memory anyway")
    if request.offload_optimizer and request.workload.eight_bit_moments:
        raise ConfigError("--optimizer adamw8bit cannot be offloaded: leave out --offload_optimizer, or use adamw")
    if request.workload.base_bits is not None:
        _refuse_base_bits(cluster, request)
    if request.strategy != "auto":
        return [_named(cluster, request, precision, request.strategy)]
    if cluster.world_size == 1:
        return _of_one_process(cluster, request, precision)
    return _of_several(cluster, shape, request, precision)


def is_compiled(cluster: Cluster, request: Request, strategy: Strategy) -> bool:
    """Whether the decoder's layers are compiled: with --compile auto on GPUs where torch.compile works.

    zero3's layers are never compiled, because it gathers weights by hooks. Raises ConfigError where --compile 1 asks
    for what does not work, and where selective checkpointing, which the compiler does, would have no compiler.
    """
    if request.compile == "1" and strategy == "zero3":
        raise ConfigError("--compile 1 does not work with zero3, which gathers weights by hooks: use fsdp")
    if request.compile == "1" and cluster.device == "cuda" and not cluster.compiles:
        raise ConfigError(
            "--compile 1: torch.compile does not work here, for the reason above; it usually lacks a C compiler or"
            " Python's headers (Debian: gcc and python3-dev). Or use --compile 0"
        )
    works = cluster.device == "cuda" and cluster.compiles and strategy != "zero3"
    compiled = request.compile == "1" or (request.compile == "auto" and works)
    if request.gradient_checkpointing == "selective" and not compiled:
        raise ConfigError(
            "--gradient_checkpointing selective is done by the compiler, and these layers are not compiled: use"
            " --compile 1 without zero3, or --gradient_checkpointing 1"
        )
    return compiled


def _named(cluster: Cluster, request: Request, precision: Precision, strategy: Strategy) -> Candidate:
    """The strategy that a flag or the launcher names, or ConfigError where it cannot do what else is asked for."""
    named, world_size = f"{strategy}, named by {request.strategy_named_by},", cluster.world_size
    if strategy == "single" and world_size > 1:
        raise ConfigError(f"{named} is for one process, and {world_size} were started: use ddp, zero2 or fsdp")
    if strategy == "hsdp" and world_size == 1:
        raise ConfigError(f"{named} shards over the GPUs of a node, and there is one process: use single or fsdp")
    if strategy == "hsdp" and cluster.gpus_per_node == 1:
        raise ConfigError(f"{named} shards over the GPUs of a node, and each node has one: use fsdp or zero2")
    if strategy in DEEPSPEED and not request.deepspeed_available:
        raise ConfigError(f"{named} needs DeepSpeed, which is not installed: pip install deepspeed, or use fsdp")
    if precision == "fp16" and strategy not in FP16:
        raise ConfigError(f"{named} does not run in fp16: use --mixed_precision bf16 or no, or --strategy ddp")
    if request.workload.eight_bit_moments and strategy not in EIGHT_BIT:
        raise ConfigError(f"{named} cannot shard --optimizer adamw8bit: use --strategy ddp, or --optimizer adamw")
    if request.workload.base_bits is not None and strategy not in QUANTIZED:
        raise ConfigError(
            f"{named} cannot shard a base of {request.workload.base_bits} bits: use --strategy"
            f" {'single' if world_size == 1 else 'ddp'}, or leave out --base_bits"
        )
    if request.offload_optimizer and strategy not in DEEPSPEED:
        raise ConfigError(f"{named} cannot offload the optimizer: use zero2 or zero3, or --offload_optimizer 0")
    alone = "; on one node the same as fsdp" if strategy == "hsdp" and cluster.nodes == 1 else ""
    reason = f"strategy {strategy} from {request.strategy_named_by}{alone}"
    return Candidate(strategy=strategy, offload=request.offload_optimizer, reason=reason)


def _of_one_process(cluster: Cluster, request: Request, precision: Precision) -> list[Candidate]:
    if request.offload_optimizer:
        _refuse_impossible_offload(request, precision)
        return [Candidate(strategy="zero2", offload=True, reason="zero2 on one GPU, because it can offload")]
    single = Candidate(strategy="single", offload=False, reason="one process: nothing is sharded")
    may_offload = cluster.device == "cuda" and request.deepspeed_available and precision != "fp16"
    cannot_shard = request.workload.eight_bit_moments or request.workload.base_bits
    if cannot_shard or request.offload_optimizer_typed or not may_offload:
        return [single]
    reason = "the optimizer is offloaded because memory is short, by zero2, which can do it on one GPU"
    return [single, Candidate(strategy="zero2", offload=True, reason=reason)]


def _of_several(cluster: Cluster, shape: Shape, request: Request, precision: Precision) -> list[Candidate]:
    size, workload = f"{shape.parameters / 1e6:.0f} M parameters on {cluster.world_size} processes", request.workload
    if request.offload_optimizer:
        _refuse_impossible_offload(request, precision)
        reason = "because it can offload"
        return [Candidate(strategy=name, offload=True, reason=f"{name}, {reason}") for name in DEEPSPEED]
    if workload.eight_bit_moments or workload.base_bits or precision == "fp16":
        what = "adamw8bit" if workload.eight_bit_moments else "--base_bits" if workload.base_bits else "fp16"
        return [Candidate(strategy="ddp", offload=False, reason=f"ddp, the one strategy on several GPUs with {what}")]
    if workload.selection.lora or workload.selection.new_rows:
        reason = f"ddp, because {'adapters' if workload.selection.lora else 'new embeddings'} alone are trained"
        return [
            Candidate(strategy="ddp", offload=False, reason=reason),
            Candidate(strategy="fsdp", offload=False, reason=f"{size}: fsdp, because ddp does not fit"),
        ]
    if shape.parameters > FULL_SHARD_PARAMETERS:
        return [Candidate(strategy="fsdp", offload=False, reason=f"{size}: fsdp, every part sharded")]
    if not request.deepspeed_available:
        return [Candidate(strategy="fsdp", offload=False, reason=f"{size}: fsdp, as DeepSpeed is not installed")]
    return [
        Candidate(strategy="zero2", offload=False, reason=f"{size}: zero2, gradients and optimizer sharded"),
        Candidate(strategy="fsdp", offload=False, reason=f"{size}: fsdp, because zero2 does not fit"),
    ]


def _refuse_base_bits(cluster: Cluster, request: Request) -> None:
    """Raise ConfigError where a base of 4 or 8 bits cannot be used, whatever the strategy."""
    named = f"--base_bits {request.workload.base_bits}"
    if cluster.device == "cpu":
        raise ConfigError(
            f"{named} needs a CUDA GPU, and this run has none: leave it out; --mixed_precision bf16 halves the base"
        )
    if request.offload_optimizer:
        raise ConfigError(f"{named} does not run with an offloaded optimizer: leave out one of the two")


def _refuse_impossible_offload(request: Request, precision: Precision) -> None:
    """Raise ConfigError where the optimizer cannot be offloaded: without DeepSpeed, and in fp16."""
    if not request.deepspeed_available:
        raise ConfigError("--offload_optimizer 1 needs DeepSpeed, which is not installed: pip install deepspeed")
    if precision == "fp16":
        raise ConfigError("--offload_optimizer 1 does not run in fp16: use --mixed_precision bf16 or no")
