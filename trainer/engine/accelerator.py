"""The Accelerator that a plan asks for, and the check that Accelerate made what was asked for.

Warning for a new version of accelerate: what ZeRO and FSDP need besides the documented way is in this module, and so
are the lines that let both run on CPUs. Where accelerate cannot do what it is asked, it may fall back to something else
and say nothing. `_check_matches_plan`, Engine._check_shards and tests/ranks/test_traps.py notice that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
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

from trainer.engine.hardware import own_device
from trainer.engine.meeting import BACKEND, meet
from trainer.engine.settings import EngineSettings
from trainer.errors import ConfigError
from trainer.model.language_model import LanguageModel
from trainer.plan.communication import ZERO_LIVE_PARAMETERS
from trainer.plan.launcher import START, read_launch
from trainer.plan.memory import ZERO_BUCKET_ELEMENTS
from trainer.plan.plan import Plan
from trainer.run.output_dir import OutputDir

# What Accelerate calls the strategies that it might replace by another one.
DISTRIBUTED_TYPE = {
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "fsdp": DistributedType.FSDP,
    "hsdp": DistributedType.FSDP,
}


def build_accelerator(plan: Plan, settings: EngineSettings, root: Path) -> Accelerator:
    """The plan's Accelerator, on the process group that `meet` made, which is made here where it is not there yet.

    root  the folder where TensorBoard's files go

    Raises ConfigError where Accelerate made something else of the plan: another number of processes, or another
    strategy; and what `meet` raises.
    """
    logging: dict[str, Any] = {"log_with": list(settings.trackers) or None, "project_dir": str(root)}
    if plan.strategy != "single":
        meet(own_device(read_launch(os.environ)), settings.timeout_minutes)
    build = {"single": _single, "ddp": _ddp, "zero2": _zero, "zero3": _zero, "fsdp": _fsdp, "hsdp": _fsdp}
    accelerator = build[plan.strategy](plan, settings, logging)
    _check_matches_plan(accelerator, plan)
    return accelerator


def shard_by_layers(accelerator: Accelerator, model: LanguageModel) -> None:
    """Have FSDP shard each of the decoder's layers by itself. To be called before `prepare`.

    The layers of text and melody models are of two classes, and Accelerate 1.15 raises for a class that is not there.
    """
    layers = model.decoder.model.decoder.layers
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [type(layers[0]).__name__]


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
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    return Accelerator(mixed_precision=plan.mixed_precision, cpu=_on_cpu(), kwargs_handlers=handlers, **logging)


def _fsdp(plan: Plan, settings: EngineSettings, logging: dict[str, Any]) -> Accelerator:
    if _on_cpu():
        # Accelerate (1.x) enables FSDP for GPUs only, and on CPUs silently falls back to DDP. These lines let the same
        # code run on gloo. They reach into its shared state: tests/ranks/test_traps.py fails when a new accelerate
        # changes what they rely on, or no longer needs them.
        PartialState(cpu=True)
        PartialState._shared_state.update(distributed_type=DistributedType.MULTI_GPU, device=torch.device("cpu"))
    half = torch.bfloat16 if plan.mixed_precision == "bf16" else None
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[],  # which `shard_by_layers` names, once there is a model
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
        **logging,
    )


def _zero(plan: Plan, settings: EngineSettings, logging: dict[str, Any]) -> Accelerator:
    import deepspeed.ops  # here, because it takes seconds that the other strategies need not wait

    backend = BACKEND["cpu" if _on_cpu() else "cuda"]
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
        # Where there is no GPU, Accelerate would otherwise take this process for the only one.
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
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
        "overlap_comm": plan.strategy == "zero3" and not _on_cpu(),
        "contiguous_gradients": True,
        "reduce_bucket_size": ZERO_BUCKET_ELEMENTS,
        "allgather_bucket_size": ZERO_BUCKET_ELEMENTS,
    }
    if plan.strategy == "zero2":
        # Each rank's part of a bucket is reduced to that rank alone. By default the whole bucket is all-reduced, which
        # moves twice the bytes: DeepSpeed 0.19 has no reduce-scatter for stage 2, whatever `reduce_scatter` says. With
        # overlap_comm it would wait for the device before each of these reductions (`allreduce_and_copy`).
        zero["use_multi_rank_bucket_allreduce"] = False
    else:
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
        # Without the check, a step whose gradients are not finite would be applied. It is off by default before
        # DeepSpeed 0.19.8.
        "bf16": {"enabled": plan.mixed_precision == "bf16", "check_grad_overflow": True},
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


def _on_cpu() -> bool:
    return not torch.cuda.is_available()
