"""What flags and launcher ask of the plan."""

from __future__ import annotations

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.launcher import Launch
from trainer.memory import Checkpointing
from trainer.plan import BatchFlags
from trainer.strategies import Options

CHECKPOINTING: dict[str, Checkpointing] = {"0": False, "1": True, "selective": "selective"}
LAUNCHER = "the accelerate configuration"


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
