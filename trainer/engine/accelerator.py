"""The Accelerator that a plan asks for, and the check that Accelerate made what was asked for.

Warning for a new version of accelerate: what ZeRO and FSDP need besides the documented way is in this module, and so
are the lines that let both run on CPUs. Where accelerate cannot do what it is asked, it may fall back to something else
and say nothing. `_check_matches_plan`, Engine._check_shards and tests/ranks/test_traps.py notice that.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trainer.engine.compiled import compiles
from trainer.engine.settings import EngineSettings
from trainer.engine.torch_build import why_gpus_are_unused
from trainer.errors import ConfigError, PeerLostError
from trainer.plan.host_memory import bytes_of_a_process, host_memory_bytes
from trainer.plan.launcher import START, Launch
from trainer.plan.memory import ZERO_BUCKET_ELEMENTS
from trainer.plan.plan import Plan
from trainer.plan.strategies import Cluster
from trainer.run.output_dir import OutputDir

# The most parameters that ZeRO-3 may keep gathered: two layers of `large` (67 M each), its embeddings and heads.
ZERO_LIVE_PARAMETERS = 200_000_000
LAYER_CLASS = "MusicgenDecoderLayer"  # of transformers; FSDP shards each by itself
# What Accelerate calls the strategies that it might replace by another one.
DISTRIBUTED_TYPE = {
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "fsdp": DistributedType.FSDP,
    "hsdp": DistributedType.FSDP,
}


def find_cluster(launch: Launch, *, compiler: bool = False) -> Cluster:
    """The hardware that this process was started on, as the plan needs it.

    compiler  whether to find out if torch.compile works here, which takes seconds; if not, `compiles` is False

    Raises ConfigError where a machine has more processes than GPUs.
    """
    cuda = torch.cuda.is_available()
    host = host_memory_bytes()
    if cuda and launch.local_world_size > torch.cuda.device_count():
        raise ConfigError(
            f"{launch.local_world_size} processes on a machine with {torch.cuda.device_count()} GPU(s): one process"
            f" needs one GPU; {START}"
        )
    return Cluster(
        nodes=launch.nodes,
        gpus_per_node=launch.local_world_size,
        device="cuda" if cuda else "cpu",
        gpu_memory_bytes=torch.cuda.get_device_properties(launch.local_rank).total_memory
        if cuda
        else bytes_of_a_process(host, launch.local_world_size),
        host_memory_bytes=host,
        supports_bf16=cuda and torch.cuda.is_bf16_supported(),
        compiles=cuda and compiler and compiles(torch.device("cuda", launch.local_rank)),
        unused_gpu="" if cuda or launch.use_cpu else why_gpus_are_unused(),
    )


def build_accelerator(plan: Plan, settings: EngineSettings, root: Path) -> Accelerator:
    """Join the other processes and build the plan's Accelerator.

    root  the folder where TensorBoard's files go

    Raises ConfigError where Accelerate made something else of the plan: another number of processes, or another
    strategy; PeerLostError where the other processes do not come.
    """
    logging: dict[str, Any] = {"log_with": list(settings.trackers) or None, "project_dir": str(root)}
    if plan.strategy != "single":
        _complete_environment()
    build = {"single": _single, "ddp": _ddp, "zero2": _zero, "zero3": _zero, "fsdp": _fsdp, "hsdp": _fsdp}
    try:
        accelerator = build[plan.strategy](plan, settings, logging)
    except dist.DistError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise PeerLostError(
            f"the {plan.world_size} processes of the run did not meet within {settings.timeout_minutes:g} minutes"
            f" (--timeout_minutes): {reason}. All need the same number of processes, address and port, and the same"
            " flags"
        ) from error
    _check_matches_plan(accelerator, plan)
    return accelerator


def start_trackers(
    accelerator: Accelerator, settings: EngineSettings, folder: OutputDir, flags: Mapping[str, object]
) -> Accelerator | None:
    """Start the trackers that the settings name; returns where to log, or None where they name none.

    A resumed run continues its wandb run. flags: the run's flags by name, which trackers show beside it. Raises
    ConfigError where wandb refuses, for example without a login.
    """
    if not settings.trackers:
        return None
    # Accelerate logs from the first process alone: only that one needs the id, and only it may write the file.
    wandb_id = folder.tracker_id() if accelerator.is_main_process else None
    wandb = {"id": wandb_id, "resume": "allow", "dir": str(folder.root)}
    values = {name: value for name, value in flags.items() if value is not None}
    try:
        accelerator.init_trackers(settings.tracker_project, config=values, init_kwargs={"wandb": wandb})
    except _wandb_errors(settings) as error:
        raise ConfigError(f"--use_wandb 1: {error} Or set WANDB_MODE=offline, or leave --use_wandb out") from error
    return accelerator


def _wandb_errors(settings: EngineSettings) -> tuple[type[Exception], ...]:
    """wandb's own errors, where it is used: otherwise it is not imported."""
    if "wandb" not in settings.trackers:
        return ()
    import wandb

    return (wandb.Error,)


def _single(plan: Plan, settings: EngineSettings, logging: dict[str, Any]) -> Accelerator:
    return Accelerator(mixed_precision=plan.mixed_precision, cpu=_on_cpu(), **logging)


def _ddp(plan: Plan, settings: EngineSettings, logging: dict[str, Any]) -> Accelerator:
    handlers = [
        InitProcessGroupKwargs(timeout=_timeout(settings)),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    return Accelerator(mixed_precision=plan.mixed_precision, cpu=_on_cpu(), kwargs_handlers=handlers, **logging)


def _fsdp(plan: Plan, settings: EngineSettings, logging: dict[str, Any]) -> Accelerator:
    if _on_cpu():
        # Accelerate (1.x) enables FSDP for GPUs only, and on CPUs silently falls back to DDP. These lines let the same
        # code run on gloo. They reach into its shared state: tests/ranks/test_traps.py fails when a new accelerate
        # changes what they rely on, or no longer needs them.
        PartialState(cpu=True, timeout=_timeout(settings))
        PartialState._shared_state.update(distributed_type=DistributedType.MULTI_GPU, device=torch.device("cpu"))
    half = torch.bfloat16 if plan.mixed_precision == "bf16" else None
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[LAYER_CLASS],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
        # Float32 shards and float32 sums over ranks, bf16 in between. Accelerate's default sums in bf16 as well, and
        # the losses come out in steps of bf16 (7.625, 7.6875).
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32),
    )
    mesh = None
    if plan.strategy == "hsdp" and plan.nodes > 1:
        mesh = ParallelismConfig(dp_replicate_size=plan.nodes, dp_shard_size=plan.world_size // plan.nodes)
    return Accelerator(
        mixed_precision=plan.mixed_precision,
        fsdp_plugin=plugin,
        parallelism_config=mesh,
        kwargs_handlers=[] if _on_cpu() else [InitProcessGroupKwargs(timeout=_timeout(settings))],
        **logging,
    )


def _zero(plan: Plan, settings: EngineSettings, logging: dict[str, Any]) -> Accelerator:
    import deepspeed.ops  # here, because it takes seconds that the other strategies need not wait

    backend = "gloo" if _on_cpu() else "nccl"
    if _on_cpu():
        # At the first start DeepSpeed would compile an operation for shared memory, which only inference uses. A
        # process that is killed meanwhile leaves a lock file behind, and every later start waits for it without end.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Set where an accelerate config file has DeepSpeed settings. What they ask for is in the plan already
    # (trainer/plan/launcher.py), and Accelerate refuses to be given both them and a configuration.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    accelerator = Accelerator(
        gradient_accumulation_steps=plan.accumulation,  # obeyed from the next line alone; another number is warned of
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero_config(plan, settings.max_grad_norm)),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=_timeout(settings))],
        **logging,
    )
    # Under ZeRO-3 the plugin makes transformers build every later model partitioned, and EnCodec's weight norm does not
    # survive that. Only the trained model is to be partitioned.
    unset_hf_deepspeed_config()
    return accelerator


def zero_config(plan: Plan, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration for a plan. Nothing in it is "auto", so that Accelerate fills in nothing."""
    zero: dict[str, Any] = {
        "stage": 2 if plan.strategy == "zero2" else 3,
        "overlap_comm": not _on_cpu(),
        "contiguous_gradients": True,
        "reduce_bucket_size": ZERO_BUCKET_ELEMENTS,
        "allgather_bucket_size": ZERO_BUCKET_ELEMENTS,
    }
    if plan.strategy == "zero3":
        # Every parameter is partitioned, however small (threshold 0), so that each rank owns one slice of each.
        # What is gathered is given back soon: by default up to 1e9 values stay, memory that the plan does not count.
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": ZERO_BUCKET_ELEMENTS,
            "stage3_max_live_parameters": ZERO_LIVE_PARAMETERS,
            "stage3_max_reuse_distance": 0,
        }
        del zero["allgather_bucket_size"]
    if plan.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not _on_cpu()}
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": plan.mixed_precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _check_matches_plan(accelerator: Accelerator, plan: Plan) -> None:
    """Raise ConfigError where Accelerate found another number of processes, or took another strategy."""
    if accelerator.num_processes != plan.world_size:
        raise ConfigError(
            f"the launcher started {plan.world_size} process(es), Accelerate found {accelerator.num_processes}: {START}"
        )
    wanted = DISTRIBUTED_TYPE.get(plan.strategy)
    if wanted is not None and accelerator.distributed_type != wanted:
        raise ConfigError(
            f"the plan says {plan.strategy}, but Accelerate made {accelerator.distributed_type} of it: {START}, with"
            " the tested versions of constraints.txt"
        )


def _complete_environment() -> None:
    """Without a launcher, make this process a group of one: for strategies that need a process group."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    elif dist.is_available() and not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


def _timeout(settings: EngineSettings) -> timedelta:
    """How long a collective may wait."""
    return timedelta(minutes=settings.timeout_minutes)


def _on_cpu() -> bool:
    return not torch.cuda.is_available()
