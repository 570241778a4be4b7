"""What flags and launcher ask of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.errors import ConfigError
from trainer.flags.config import Config
from trainer.plan.launcher import Launch
from trainer.plan.memory import Checkpointing, Precision, Strategy
from trainer.spec.trainable import EVERYTHING, Selection

CHECKPOINTING: dict[str, Checkpointing] = {"0": False, "1": True, "selective": "selective"}
LAUNCHER = "the accelerate configuration"


@dataclass(frozen=True, kw_only=True)
class BatchFlags:
    """The batch flags as given; a flag that was not typed may give way to one that was."""

    batch_size: int
    grad_acc: int
    global_batch: int | None
    grad_acc_typed: bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks of the layout.

    strategy_named_by    what named it, in words; no meaning for auto
    segment_frames       decoder steps of the longest crop
    deepspeed_available  whether it is installed where the run will be
    selection            what of the model is trained
    averages             whether an average of the weights is kept (--ema_decay)
    eight_bit            whether moments have 8 bits (--optimizer adamw8bit)
    base_bits            of the frozen linear layers of the decoder's layers; None for the compute precision
    """

    strategy: Literal["auto"] | Strategy = "auto"
    strategy_named_by: str = "--strategy"
    offload_optimizer: bool = False
    offload_optimizer_typed: bool = False
    mixed_precision: Literal["auto"] | Precision = "auto"
    gradient_checkpointing: Checkpointing = False
    gradient_checkpointing_typed: bool = False
    compile: Literal["auto", "0", "1"] = "auto"
    segment_frames: int
    deepspeed_available: bool = True
    selection: Selection = EVERYTHING
    averages: bool = False
    eight_bit: bool = False
    base_bits: Literal[4, 8] | None = None


def batch_flags(config: Config, typed: frozenset[str]) -> BatchFlags:
    """The flags that decide how many clips form a step."""
    return BatchFlags(
        batch_size=config.batch_size,
        grad_acc=config.grad_acc,
        global_batch=config.global_batch,
        grad_acc_typed="grad_acc" in typed,
    )


def options(
    config: Config, typed: frozenset[str], launch: Launch, *, segment_frames: int, deepspeed_available: bool
) -> Options:
    """What the run asks of its layout; what the launcher's configuration names counts like a flag.

    segment_frames       decoder steps of the longest crop
    deepspeed_available  whether DeepSpeed is installed where the run will be

    Raises ConfigError where a typed flag and the launcher's configuration contradict each other.
    """
    for name in ("strategy", "mixed_precision"):
        flag, named = getattr(config, name), getattr(launch, name)
        if named is not None and flag not in ("auto", named):
            raise ConfigError(f"--{name} {flag} contradicts {named}, which {LAUNCHER} names: leave out one of them")
    if launch.offload_optimizer and "offload_optimizer" in typed and not config.offload_optimizer:
        raise ConfigError(f"--offload_optimizer 0 contradicts {LAUNCHER}, which names cpu: leave out one of them")
    from_launcher = config.strategy == "auto" and launch.strategy is not None
    return Options(
        strategy=launch.strategy if from_launcher else config.strategy,  # type: ignore[arg-type]
        strategy_named_by=LAUNCHER if from_launcher else "--strategy",
        offload_optimizer=config.offload_optimizer or launch.offload_optimizer,
        offload_optimizer_typed="offload_optimizer" in typed or launch.offload_optimizer,
        mixed_precision=launch.mixed_precision or config.mixed_precision,  # type: ignore[arg-type]
        gradient_checkpointing=CHECKPOINTING[config.gradient_checkpointing],
        gradient_checkpointing_typed="gradient_checkpointing" in typed,
        compile=config.compile,
        segment_frames=segment_frames,
        deepspeed_available=deepspeed_available,
        selection=config.selection,
        averages=config.ema_decay is not None,
        eight_bit=config.optimizer == "adamw8bit",
        base_bits=config.base_bits,
    )
