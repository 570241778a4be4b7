"""Everything that a run can be refused for without torch, a GPU or a network, in one place and before anything else.

What takes minutes or gigabytes comes later: a mistake in a flag or a folder must not wait for the model to be fetched.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from trainer.data.caption_sources import check_texts
from trainer.data.manifest import check_folder
from trainer.data.prepared import is_prepared, open_prepared
from trainer.errors import EXIT_RESUME, CheckpointError, ConfigError, ModelError
from trainer.flags.config import Config
from trainer.plan.dry_run import plan_of_shape
from trainer.plan.launcher import Launch
from trainer.plan.strategies import Cluster
from trainer.spec.dataset_path import is_hub_id
from trainer.spec.model_folder import is_only_a_path
from trainer.spec.shapes import FRAME_RATE_HZ, KNOWN, Shape, published


def refuse_early(config: Config, typed: frozenset[str], launch: Launch) -> None:
    """Raise TrainerError for a run that could not work anywhere, or not with what is here.

    What only the first of several processes looks at comes when they have met (`check_folders`): the others would wait
    for a process that is gone.
    """
    if launch.world_size == 1:
        check_folders(config)
    if config.resume not in ("auto", "no") and not Path(config.resume).is_dir():
        raise CheckpointError(f"--resume {config.resume}: there is no such folder. It takes auto, no or a checkpoint")
    if is_only_a_path(config.model_id) and not Path(config.model_id).is_dir():
        raise ModelError(f"--model_id {config.model_id}: there is no such folder")
    check_texts(config.caption_template, {"--caption": config.caption, "--default_caption": config.default_caption})
    _refuse_missing_packages(config)
    _refuse_restarts(config, launch)
    shape = _shape_known_by_name(config.model_id)
    if shape is not None:
        plan_of_shape(config, typed, _best_hardware(launch), launch, shape, FRAME_RATE_HZ)


def check_folders(config: Config) -> None:
    """Raise DataError where a folder of music is not there. For the first process: other machines need the folders only
    for what they encode. A name that can be a data set of the hub is looked for there, later."""
    paths = [path for path in (config.dataset_path, config.validation_folder) if path is not None]
    for path in paths:
        if not is_hub_id(path):
            check_folder(path)
    if config.dataset_revision is not None and not any(map(is_hub_id, paths)):
        raise ConfigError(
            f"--dataset_revision {config.dataset_revision} has no effect: --dataset {config.dataset_path} is here, and"
            " only data sets of the hub have revisions. Remove it"
        )
    _check_prepared(config)


def _check_prepared(config: Config) -> None:
    """Raise what a prepared folder is refused for, whatever the model."""
    for folder in filter(None, (config.dataset_path, config.validation_folder)):
        if is_prepared(Path(folder)):
            flags = config.to_dict() | {"captions": ",".join(config.caption_sources)}
            open_prepared(Path(folder)).check_flags(flags)


def _refuse_missing_packages(config: Config) -> None:
    """Raise ConfigError where an optional package that the flags ask for is missing."""
    wanted = {
        "--use_wandb 1": ("wandb", config.use_wandb),
        "--use_tensorboard 1": ("tensorboard", config.use_tensorboard),
        "--optimizer adamw8bit": ("bitsandbytes", config.optimizer == "adamw8bit"),
        f"--base_bits {config.base_bits}": ("bitsandbytes", config.base_bits is not None),
    }
    for flag, (name, asked) in wanted.items():
        if asked and importlib.util.find_spec(name) is None:  # Accelerate would leave a tracker out and say nothing
            version = "'bitsandbytes>=0.50'" if name == "bitsandbytes" else name
            raise ConfigError(f"{flag} needs the package {name}: pip install {version}, or leave it out")


def _refuse_restarts(config: Config, launch: Launch) -> None:
    if launch.restarts and launch.nodes > 1:
        raise ConfigError(
            f"--max_restarts {launch.restarts} of torchrun works on one machine here: on several, their launchers may"
            " count the starts differently, and the processes would not meet. Leave it out, and run the same command"
            " again after a failure, as scripts/slurm does"
        )
    if launch.restarts and config.max_minutes is not None:
        raise ConfigError(
            f"--max_minutes {config.max_minutes:g} ends the run with code {EXIT_RESUME}, which torchrun takes for a"
            f" failure and would start again {launch.restarts} time(s): use --max_restarts 0, or no --max_minutes"
        )


def _shape_known_by_name(model_id: str) -> Shape | None:
    """The shape of debug and of the published models; that of another is in its configuration, read later."""
    return KNOWN["debug"] if model_id == "debug" else published(model_id)


def _best_hardware(launch: Launch) -> Cluster:
    """What such a launch could have at best: what the plan refuses on it cannot run on any hardware."""
    return Cluster(
        nodes=launch.nodes,
        gpus_per_node=launch.local_world_size,
        device="cpu" if launch.use_cpu else "cuda",
        gpu_memory_bytes=None,
        host_memory_bytes=None,
        supports_bf16=True,
        compiles=True,
    )
