"""What `accelerate launch` or torchrun says in the environment: which process this is, the strategy, the precision.

Launches that would silently do something else than they say are refused. Without torch: a function of the environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.errors import ConfigError

START = "start with `accelerate launch --num_processes N launch.py ...`, `torchrun --nproc_per_node N launch.py ...`"
# Settings of an accelerate configuration that are not obeyed, since a flag of this trainer decides the same. For each
# environment variable: its values that ask for nothing special and are let pass, the setting's name, and what to use.
NOT_OBEYED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "gradient_accumulation_steps", "use --grad_acc"),
    "ACCELERATE_GRADIENT_CLIPPING": (("1", "1.0"), "gradient_clipping", "use --max_grad_norm"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "fsdp_activation_checkpointing", "use --gradient_checkpointing 1"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true",), "fsdp_reshard_after_forward", "leave it out, the plan decides"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "dynamo_backend", "leave it out, the trainer decides what is compiled"),
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which process of the run this is, and what the launcher's configuration names.

    rank, local_rank           this process's number among all, and among those of its node
    world_size                 processes of the run; local_world_size those of this node
    restarts                   how often torchrun starts a failed run again (--max_restarts)
    strategy, mixed_precision  None where the configuration names none. A plain launch of several processes names none,
                               and neither does a MULTI_GPU file, which leaves the same environment
    offload_optimizer          whether the configuration puts DeepSpeed's optimizer into host memory
    use_cpu                    GPUs that are there are not to be used (use_cpu: true, ACCELERATE_USE_CPU)
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    restarts: int = 0
    strategy: str | None = None
    offload_optimizer: bool = False
    mixed_precision: str | None = None
    use_cpu: bool = False

    @property
    def nodes(self) -> int:
        return self.world_size // self.local_world_size


def without_local_rank(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command line without the --local_rank that the deepspeed launcher and torch.distributed.launch add.

    Raises ConfigError where it is not the LOCAL_RANK that the same launchers set: this process would take the device of
    another one.
    """
    left, kept = list(argv), []
    while left:
        argument = left.pop(0)
        name, equals, value = argument.partition("=")
        if name.replace("-", "_") != "__local_rank":
            kept.append(argument)
            continue
        value = value if equals or not left else left.pop(0)
        known = environment.get("LOCAL_RANK")
        if value != known:
            state = "LOCAL_RANK is not set" if known is None else f"LOCAL_RANK is {known}"
            raise ConfigError(f"--local_rank {value} was added by a launcher, and {state}: {START}, which set it")
    return kept


def read_launch(environment: Mapping[str, str]) -> Launch:
    """The launch that `environment` describes.

    Raises ConfigError for launches that would not do what they say: several processes asked for and one
    started, FSDP on what Accelerate takes for plain CPUs, and strategies that this trainer does not have.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if by_accelerate and "WORLD_SIZE" not in environment and "MASTER_PORT" in environment:
        raise ConfigError(
            "`accelerate launch` was asked for several processes and started one (its CPU launcher does that for"
            " --cpu, use_cpu and MULTI_CPU): give it --multi_gpu in place of these, and launch.py --device cpu; or use"
            " torchrun"
        )
    world_size = int(environment.get("WORLD_SIZE", "1"))
    # The deepspeed launcher gives the number of processes of a node another name.
    local_world_size = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world_size)
    if world_size % local_world_size:
        raise ConfigError(f"{world_size} processes in groups of {local_world_size} per node: use equal nodes; {START}")
    strategy, offload = _strategy(environment)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f"the accelerate configuration says mixed_precision {precision}: use no, bf16 or fp16")
    return Launch(
        rank=int(environment.get("RANK", "0")),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        world_size=world_size,
        local_world_size=local_world_size,
        restarts=int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")),
        strategy=strategy,
        offload_optimizer=offload,
        mixed_precision=None if precision == "no" else precision,
        use_cpu=_on(environment, "ACCELERATE_USE_CPU"),
    )


def _strategy(environment: Mapping[str, str]) -> tuple[str | None, bool]:
    """The strategy that the configuration names, None for none, and whether it offloads the optimizer."""
    for name, (let_pass, setting, instead) in NOT_OBEYED.items():
        value = environment.get(name, "").lower()
        if value and value not in let_pass:
            raise ConfigError(f"the accelerate configuration says {setting} {value}, which is not used here: {instead}")
    if _on(environment, "ACCELERATE_USE_MEGATRON_LM"):
        raise ConfigError("the accelerate configuration names Megatron-LM: use DEEPSPEED, FSDP or MULTI_GPU")
    if _on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ConfigError("a parallelism_config in the accelerate configuration is not used here: --strategy hsdp")
    if _on(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed(environment)
    if _on(environment, "ACCELERATE_USE_FSDP"):
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise ConfigError(f"the accelerate configuration names FSDP version {version}: set fsdp_version: 2")
        if _on(environment, "FSDP_OFFLOAD_PARAMS"):
            raise ConfigError("fsdp_offload_params is not built: use zero2 with --offload_optimizer 1")
        return "fsdp", False
    return None, False


def _deepspeed(environment: Mapping[str, str]) -> tuple[str, bool]:
    """What `_strategy` returns, for a configuration that names DeepSpeed."""
    if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() not in ("", "none"):
        raise ConfigError(
            "a deepspeed_config_file is not read here, because the trainer sets clipping, accumulation and"
            " precision itself: name zero_stage in the accelerate configuration, as accelerate_configs/ does"
        )
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        raise ConfigError(f"the accelerate configuration names ZeRO stage {stage}: use 2 or 3")
    if environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none").lower() not in ("", "none"):
        raise ConfigError("offload_param_device is not built: offload the optimizer, or use more GPUs")
    device = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none").lower()
    if device not in ("", "none", "cpu"):
        raise ConfigError(f"offload_optimizer_device {device} is not built: use cpu")
    return f"zero{stage}", device == "cpu"


def _on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true")
