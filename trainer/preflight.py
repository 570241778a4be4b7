"""Everything that a run can be refused for without torch, a GPU or a network, in one place and before anything else.

What takes minutes or gigabytes comes later: a mistake in a flag or a folder must not wait for the model to be fetched.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from trainer.data.caption_sources import check_texts
from trainer.data.demucs_files import refuse_missing
from trainer.data.hub_dataset import HubDataset, folder_of
from trainer.data.manifest import check_folder
from trainer.data.prepared import Prepared, is_prepared, open_prepared, read_about
from trainer.data.sample_prompts import read_prompts
from trainer.data.split_files import TRAIN
from trainer.errors import EXIT_RESUME, CheckpointError, ConfigError, ModelError
from trainer.flags.config import Config
from trainer.plan.dry_run import plan_of_shape
from trainer.plan.launcher import Launch
from trainer.plan.strategies import Cluster
from trainer.spec.dataset_path import is_hub_id
from trainer.spec.melody_generation import check_melody_generation
from trainer.spec.model_folder import is_only_a_path
from trainer.spec.shapes import DEBUG_NAMES, FRAME_RATE_HZ, KNOWN, Shape, published, shape_to_train


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
        if shape.melody:
            check_melody_samples(config)
        shape = shape_to_train(shape, stereo=config.stereo)
        plan_of_shape(config, typed, _best_hardware(launch), launch, shape, FRAME_RATE_HZ)
    if config.stems == "demucs":
        refuse_missing()


def check_melody_samples(config: Config) -> None:
    """Raise ConfigError where a run with a melody model is to make sounds that the installed transformers cannot."""
    if config.sample_every is not None:
        asked = f"--sample_every {config.sample_every} with --model_id {config.model_id}"
        check_melody_generation(asked, ", or leave --sample_every out: training works with this version too")


def check_folders(config: Config) -> None:
    """Raise DataError where a folder of music is not there. For the first process: other machines need the folders only
    for what they encode. A name that can be a data set of the hub is looked for there, later. The first process alone
    reads the file of --sample_prompts too, so that what it cannot be used for is raised here."""
    if config.sample_prompts is not None:
        read_prompts(config.sample_prompts)
    paths = [path for path in (config.dataset_path, config.validation_folder) if path is not None]
    for path in paths:
        if not is_hub_id(path):
            check_folder(path)
    if config.dataset_revision is not None and not any(map(is_hub_id, paths)):
        raise ConfigError(
            f"--dataset_revision {config.dataset_revision} has no effect: --dataset {config.dataset_path} is here, and"
            " only data sets of the hub have revisions. Remove it"
        )
    check_prepared(config)


def check_prepared(config: Config, hub: Mapping[str, HubDataset] | None = None) -> None:
    """Raise what a prepared folder is refused for, whatever the model.

    hub  what was found on the hub, by dataset and validation; none of it need be fetched yet
    """
    hub = hub or {}
    flags = config.to_dict() | {"captions": ",".join(config.caption_sources)}
    prepared = prepared_ones(config, hub)
    for name, path in prepared.items():
        if name in hub:
            folder = folder_of(hub[name])
            Prepared(folder=folder, about=read_about(folder)).check_flags(flags)
        else:
            open_prepared(Path(path)).check_flags(flags)
    _refuse_flags_of_tables(config, prepared)


def prepared_ones(config: Config, hub: Mapping[str, HubDataset]) -> dict[str, str]:
    """Which of what --dataset and --validation name is a prepared folder, as it was typed, by dataset and validation;
    of data sets of the hub, of those in `hub`."""
    named = {"dataset": config.dataset_path, "validation": config.validation_folder}
    return {
        name: path for name, path in named.items()
        if path is not None and (hub[name].is_prepared if name in hub else is_prepared(Path(path)))
    }  # fmt: skip


def _refuse_flags_of_tables(config: Config, prepared: Mapping[str, str]) -> None:
    """Raise ConfigError for a flag that would choose among tables, where it has nothing but prepared folders to choose
    from. What is on the hub, and was not yet asked for, may be tables."""
    validation = config.validation_folder is not None and "validation" not in prepared
    of_split = validation and config.validation_split is None
    # By flag: its value, that of a flag that was not given, and whether it acts on what is validated on.
    flags: dict[str, tuple[str | None, str | None, bool]] = {
        "dataset_config": (config.dataset_config, None, validation),
        "dataset_split": (config.dataset_split, TRAIN, of_split),
        "audio_column": (config.audio_column, None, validation),
    }
    for name, (value, default, acts) in flags.items():
        if "dataset" in prepared and value != default and not acts:
            raise ConfigError(_no_effect(name, value, prepared["dataset"]))
    if "validation" in prepared and config.validation_split is not None:
        raise ConfigError(_no_effect("validation_split", config.validation_split, prepared["validation"]))


def _no_effect(name: str, value: str | None, path: str) -> str:
    return (
        f"--{name} {value} has no effect on the prepared folder {path}, all clips of which are used: it has no splits,"
        " no configurations and no columns of sounds. Remove it"
    )


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
    """The shape of debug and published models; that of another is in its configuration, read later."""
    return KNOWN[model_id] if model_id in DEBUG_NAMES else published(model_id)


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
