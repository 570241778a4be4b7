"""What flags and launcher ask of the plan."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.memory import Strategy
from trainer.plan import BatchFlags
from trainer.strategies import Options

ACCELERATE_CONFIG = "the DeepSpeed or FSDP settings of accelerate's config file"
ZERO_STAGES: Mapping[str, Strategy] = {"2": "zero2", "3": "zero3"}
FSDP_SHARDINGS: Mapping[str, Strategy] = {"true": "fsdp", "full_shard": "fsdp", "hybrid_shard": "hsdp"}
# What such a file may also ask for, its values that mean no, and what is done here instead.
NOT_OBEYED = (
    ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "deepspeed_config_file", "name zero_stage in accelerate's file"),
    ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device", "use --offload_optimizer 1"),
    ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "offload_param_device", "use --offload_optimizer 1"),
    ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params", "use --offload_optimizer 1 with zero2 or zero3"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing", "use --gradient_checkpointing 1"),
)
NO = ("", "none", "false", "0")


def batch_flags(config: Config, typed: frozenset[str]) -> BatchFlags:
    """The flags that decide how many clips form a step."""
    return BatchFlags(
        batch_size=config.batch_size,
        grad_acc=config.grad_acc,
        global_batch=config.global_batch,
        grad_acc_typed="grad_acc" in typed,
    )


def options(
    config: Config,
    typed: frozenset[str],
    *,
    segment_frames: int,
    deepspeed_available: bool,
    environment: Mapping[str, str],
) -> Options:
    """What the run asks of its layout; a strategy of accelerate's config file counts as named.

    environment  os.environ, in which `accelerate launch` states its config file

    Raises ConfigError where --strategy and accelerate's config file name two strategies.
    """
    strategy, named_by = config.strategy, "--strategy"
    found = strategy_of_launcher(environment)
    if found is not None:
        if strategy not in ("auto", found):
            raise ConfigError(
                f"--strategy {strategy} contradicts {found}, which {ACCELERATE_CONFIG} name: leave out one of them"
            )
        if strategy == "auto":
            strategy, named_by = found, ACCELERATE_CONFIG
    return Options(
        strategy=strategy,
        strategy_named_by=named_by,
        offload_optimizer=config.offload_optimizer,
        offload_optimizer_typed="offload_optimizer" in typed,
        mixed_precision=config.mixed_precision,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_typed="gradient_checkpointing" in typed,
        segment_frames=segment_frames,
        deepspeed_available=deepspeed_available,
    )


def strategy_of_launcher(environment: Mapping[str, str]) -> Strategy | None:
    """The strategy that a config file of `accelerate launch` names; None for a plain launch, which names none.

    A MULTI_GPU file names none either: it leaves the same environment as no file at all.

    Raises ConfigError for settings of such a file that would have no effect here.
    Source: accelerate 1.15, utils/launch.py, which sets these variables.
    """
    deepspeed = _says(environment, "ACCELERATE_USE_DEEPSPEED") == "true"
    if not deepspeed and _says(environment, "ACCELERATE_USE_FSDP") != "true":
        return None
    for variable, setting, instead in NOT_OBEYED:
        if _says(environment, variable) not in NO:
            raise ConfigError(f"accelerate's config file has {setting}, which has no effect here: {instead}")
    if deepspeed:
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ZERO_STAGES:
            raise ConfigError(f"accelerate's config file asks for ZeRO stage {stage}: use zero_stage 2 or 3")
        return ZERO_STAGES[stage]
    version_2 = _says(environment, "FSDP_VERSION") == "2"
    sharding = _says(environment, "FSDP_RESHARD_AFTER_FORWARD" if version_2 else "FSDP_SHARDING_STRATEGY")
    if sharding and sharding not in FSDP_SHARDINGS:
        raise ConfigError(
            f"accelerate's config file asks FSDP for {sharding}: only full sharding is supported,"
            " fsdp_version 2 with fsdp_reshard_after_forward true (sharding within a node is --strategy hsdp)"
        )
    return FSDP_SHARDINGS[sharding or "true"]


def _says(environment: Mapping[str, str], variable: str) -> str:
    return environment.get(variable, "").lower()
