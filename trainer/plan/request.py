"""What the flags, and the launcher's configuration beside them, ask of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.errors import ConfigError
from trainer.flags.config import Config
from trainer.plan.launcher import Launch
from trainer.plan.layout import Checkpointing, Precision, Samples, Strategy, Workload
from trainer.spec.shapes import FRAME_RATE_HZ, MELODY_SECONDS, Shape, segment_frames

# What each value of --gradient_checkpointing asks for.
CHECKPOINTING: dict[str, Checkpointing] = {"0": False, "1": True, "selective": "selective"}
LAUNCHER = "the accelerate configuration"
TEN_SECONDS = Samples(sound_frames=10 * FRAME_RATE_HZ)  # as the flags have it by default


@dataclass(frozen=True, kw_only=True)
class BatchFlags:
    """The batch flags as given.

    grad_acc_typed    whether --grad_acc was typed; if not, it gives way to a --global_batch that was
    batch_size_typed  whether --batch_size was typed; if not, micro-batches may be larger where a GPU's memory allows
    """

    batch_size: int
    grad_acc: int
    global_batch: int | None
    grad_acc_typed: bool
    batch_size_typed: bool = True


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user wants, before anything is known of the hardware; "auto" leaves a choice to the plan.

    workload             what is trained and kept in memory; the plan takes it over as it is
    samples              the sounds that --sample_every would make, or makes: then the workload has them too
    strategy_named_by    the flag or file that names the strategy, for messages; no meaning for "auto"
    ..._typed            whether the flag was typed: the plan may overrule a default where memory is short, and never
                         what was typed
    deepspeed_available  whether DeepSpeed is installed where the run will be
    dropout              whether the model drops values at random (--dropout, --lora_dropout): then numbers depend on
                         the micro-batch
    """

    workload: Workload
    samples: Samples = TEN_SECONDS
    strategy: Literal["auto"] | Strategy = "auto"
    strategy_named_by: str = "--strategy"
    offload_optimizer: bool = False
    offload_optimizer_typed: bool = False
    mixed_precision: Literal["auto"] | Precision = "auto"
    gradient_checkpointing: Checkpointing = False
    gradient_checkpointing_typed: bool = False
    compile: Literal["auto", "0", "1"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deepspeed_available: bool = True
    dropout: bool = False


def batch_flags(config: Config, typed: frozenset[str]) -> BatchFlags:
    """The flags that decide how many clips form a step."""
    return BatchFlags(
        batch_size=config.batch_size,
        grad_acc=config.grad_acc,
        global_batch=config.global_batch,
        grad_acc_typed="grad_acc" in typed,
        batch_size_typed="batch_size" in typed,
    )


def refuse_for_shape(config: Config, typed: frozenset[str], shape: Shape) -> None:
    """Raise ConfigError for flags of melodies that were typed for a text model, and for crops that no melody spans."""
    for name in ("melody_rate", "stems"):
        if name in typed and not shape.melody:
            raise ConfigError(
                f"--{name} {getattr(config, name)} has no effect with --model_id {config.model_id}, which reads no"
                " melody: use a melody model, or remove it"
            )
    if shape.melody and config.segment_seconds > MELODY_SECONDS:
        raise ConfigError(
            f"--segment_seconds {config.segment_seconds:g} cannot be used with --model_id {config.model_id}, whose"
            f" melodies last {MELODY_SECONDS:g} s at most: use {MELODY_SECONDS:g} or less"
        )


def request_of(
    config: Config, typed: frozenset[str], launch: Launch, *, frame_rate_hz: float, deepspeed_available: bool
) -> Request:
    """What the run asks of its plan; what the launcher's configuration names counts like a typed flag.

    frame_rate_hz        of the model's codec
    deepspeed_available  whether DeepSpeed is installed where the run will be

    Raises ConfigError where a typed flag and the launcher's configuration contradict each other.
    """
    for name in ("strategy", "mixed_precision"):
        flag, named = getattr(config, name), getattr(launch, name)
        if named is not None and flag not in ("auto", named):
            raise ConfigError(f"--{name} {flag} contradicts {named}, which {LAUNCHER} names: leave out one of them")
    if launch.offload_optimizer and "offload_optimizer" in typed and not config.offload_optimizer:
        raise ConfigError(f"--offload_optimizer 0 contradicts {LAUNCHER}, which names cpu: leave out one of them")
    if launch.use_cpu and config.device == "cuda":
        raise ConfigError(f"--device cuda contradicts {LAUNCHER}, which names the CPU: leave out one of them")
    from_launcher = config.strategy == "auto" and launch.strategy is not None
    return Request(
        workload=workload_of(config, frame_rate_hz),
        samples=samples_of(config, frame_rate_hz),
        strategy=launch.strategy if from_launcher else config.strategy,  # type: ignore[arg-type]
        strategy_named_by=LAUNCHER if from_launcher else "--strategy",
        offload_optimizer=config.offload_optimizer or launch.offload_optimizer,
        offload_optimizer_typed="offload_optimizer" in typed or launch.offload_optimizer,
        mixed_precision=launch.mixed_precision or config.mixed_precision,  # type: ignore[arg-type]
        gradient_checkpointing=CHECKPOINTING[config.gradient_checkpointing],
        gradient_checkpointing_typed="gradient_checkpointing" in typed,
        compile=config.compile,
        device="cpu" if launch.use_cpu else config.device,
        deepspeed_available=deepspeed_available,
        dropout=config.dropout > 0 or config.lora_dropout > 0,
    )


def workload_of(config: Config, frame_rate_hz: float) -> Workload:
    """What the flags train and keep in memory, with a codec of this frame rate."""
    return Workload(
        segment_frames=segment_frames(config.segment_seconds, frame_rate_hz),
        selection=config.selection,
        ema=config.ema_decay is not None,
        eight_bit_moments=config.optimizer == "adamw8bit",
        base_bits=config.base_bits,
        samples=None if config.sample_every is None else samples_of(config, frame_rate_hz),
    )


def samples_of(config: Config, frame_rate_hz: float) -> Samples:
    """The sounds that are made with --sample_every, where a codec has this frame rate."""
    return Samples(
        sound_frames=segment_frames(config.sample_seconds, frame_rate_hz),
        continued_frames=segment_frames(config.sample_continue or 0, frame_rate_hz),
        guided=config.sample_guidance > 1,
    )
