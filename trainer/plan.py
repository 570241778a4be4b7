"""How a run is laid out on the hardware it finds: a pure decision, made before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from trainer.errors import ConfigError

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run has to work with."""

    world_size: int
    device: Literal["cpu", "cuda"]
    supports_bf16: bool


@dataclass(frozen=True, kw_only=True)
class BatchFlags:
    """The batch flags as given; a flag that was not typed may give way to one that was."""

    batch_size: int
    grad_acc: int
    global_batch: int | None
    grad_acc_typed: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layout, and the reason of each part of it in words."""

    strategy: Literal["single"]
    world_size: int
    global_batch: int
    micro_batch: int
    accumulation: int
    mixed_precision: Precision
    gradient_checkpointing: bool
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def describe(self) -> str:
        """The plan as lines for the console."""
        lines = [
            f"strategy {self.strategy}, {self.world_size} process(es), precision {self.mixed_precision},"
            f" activation checkpointing {'on' if self.gradient_checkpointing else 'off'}",
            f"global batch {self.global_batch} = {self.world_size} x {self.accumulation} x {self.micro_batch}"
            " (processes x accumulation x micro-batch, fillers of weight 0 included)",
        ]
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])


def make_plan(
    cluster: Cluster,
    batch: BatchFlags,
    *,
    mixed_precision: Literal["auto", "no", "bf16", "fp16"],
    gradient_checkpointing: bool,
    resumed_global_batch: int | None = None,
) -> Plan:
    """The plan for this cluster and these flags.

    A resumed run keeps the checkpoint's global batch; micro-batch and accumulation are derived anew.

    Raises ConfigError where flags contradict each other, the checkpoint or the hardware.
    """
    if cluster.world_size != 1:
        raise ConfigError(
            f"{cluster.world_size} processes were started, but training on several is not built yet:"
            " start one, with `python launch.py ...` or `accelerate launch --num_processes 1 launch.py ...`"
        )
    global_batch, batch_reason = _global_batch(cluster, batch, resumed_global_batch)
    micro_batch = min(batch.batch_size, math.ceil(global_batch / cluster.world_size))
    precision, precision_reason = _precision(cluster, mixed_precision)
    return Plan(
        strategy="single",
        world_size=cluster.world_size,
        global_batch=global_batch,
        micro_batch=micro_batch,
        accumulation=math.ceil(global_batch / (micro_batch * cluster.world_size)),
        mixed_precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        reasons=("one process: nothing is sharded", batch_reason, precision_reason),
    )


def _global_batch(cluster: Cluster, batch: BatchFlags, resumed: int | None) -> tuple[int, str]:
    product = batch.batch_size * batch.grad_acc * cluster.world_size
    if batch.global_batch is not None and batch.grad_acc_typed and batch.global_batch != product:
        raise ConfigError(
            f"--global_batch {batch.global_batch} contradicts --batch_size {batch.batch_size} x --grad_acc"
            f" {batch.grad_acc} x {cluster.world_size} process(es) = {product}: leave out --grad_acc"
        )
    if resumed is not None:
        if batch.global_batch is not None and batch.global_batch != resumed:
            raise ConfigError(
                f"--global_batch {batch.global_batch} contradicts the checkpoint's {resumed}:"
                " leave it out to resume, or choose another --output_dir"
            )
        return resumed, f"global batch {resumed} from the checkpoint"
    if batch.global_batch is not None:
        return batch.global_batch, f"global batch {batch.global_batch} from --global_batch"
    return product, f"global batch {product} = --batch_size {batch.batch_size} x --grad_acc {batch.grad_acc}"


def _precision(cluster: Cluster, wanted: str) -> tuple[Precision, str]:
    if wanted == "auto":
        if cluster.device == "cuda" and cluster.supports_bf16:
            return "bf16", "bf16 because the GPU has it; weights, optimizer and loss stay float32"
        return "no", "float32 because there is no GPU with bf16"
    if wanted == "fp16" and cluster.device == "cpu":
        raise ConfigError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    if wanted == "bf16" and cluster.device == "cuda" and not cluster.supports_bf16:
        raise ConfigError("--mixed_precision bf16: this GPU has no bf16; use fp16 or no")
    return wanted, f"precision {wanted} from --mixed_precision"  # type: ignore[return-value]
