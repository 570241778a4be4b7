"""Flags that contradict each other, or that were typed and have no effect, refused with what would work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import ConfigError
from trainer.spec.trainable import refuse_equal_channels
from trainer.spec.trigger import why_no_trigger

if TYPE_CHECKING:
    from trainer.flags.config import Config

LEAST_CONTINUED_BY_SECONDS = 0.1  # a few frames of any codec

SAMPLE_FLAGS = (
    *("sample_prompts", "sample_seconds", "sample_guidance", "sample_temperature", "sample_top_k"),
    "sample_continue",
)


def refuse_contradicting_values(config: Config) -> None:
    """Raise ConfigError for values that cannot be had together, whoever gave them."""
    if not re.fullmatch(r"<[A-Za-z0-9_-]+>", config.placeholder):
        raise ConfigError(
            f"--placeholder {config.placeholder} cannot be used: it takes letters a to z, digits, - and _ in angle "
            "brackets, as in '<my-style>' (with quotes, because of the shell)."
        )
    for name in ("freeze", "lora_rank"):
        if config.tune_text and getattr(config, name) is not None:
            raise ConfigError(
                f"--{name} cannot be used with --tune_text 1, which trains new embeddings alone: remove one."
            )
    _refuse_trigger(config)
    if config.stereo and config.init_from is None:  # a start that is stereo has two channels that differ
        refuse_equal_channels(config.selection)
    if config.base_bits is not None and config.lora_rank is None and not config.tune_text:
        raise ConfigError(
            f"--base_bits {config.base_bits} cannot be used here: a base in {config.base_bits} bits cannot be trained "
            "itself. Add adapters, as in --lora_rank 16, or learn a word (--tune_text 1); or remove it."
        )
    imagined = [name for name in ("gpus", "nodes", "gpu_memory_gib", "gpu_name") if getattr(config, name) is not None]
    if imagined and not config.dry_run:
        raise ConfigError(
            f"--{imagined[0]} has no effect without --dry_run 1: the launcher decides how many processes run, "
            "as in accelerate launch --num_processes 4 launch.py ..."
        )
    described = imagined + ["link_gbps"] * (config.link_gbps is not None)
    if described and config.device == "cpu":
        raise ConfigError(
            f"--{described[0]} has no effect with --device cpu: it describes GPUs, and the plan is for the CPU here."
        )
    if config.min_seconds > config.segment_seconds:
        raise ConfigError(
            f"--min_seconds {config.min_seconds:g} is longer than a crop of --segment_seconds "
            f"{config.segment_seconds:g}: lower the first or raise the second."
        )
    if config.validation_folder is None and not 0 <= config.validation_share < 1:
        raise ConfigError(
            f"--validation {config.validation} cannot be used: it takes a share of 0 or more and below 1, "
            "or a folder (./2024 for one whose name is a number)."
        )
    # Rounded to frames, lengths that are nearly the same are the same.
    continued = config.sample_continue
    if continued is not None and continued > config.sample_seconds - LEAST_CONTINUED_BY_SECONDS + 1e-9:
        raise ConfigError(
            f"--sample_continue {continued:g} leaves less than {LEAST_CONTINUED_BY_SECONDS} s to be made of"
            f" --sample_seconds {config.sample_seconds:g}, which is the length of all: lower the first or raise the"
            " second."
        )
    _refuse_best_without_validation(config)
    _refuse_contradicting_captions(config)
    _refuse_overlapping_folders(config)


def refuse_flags_without_effect(config: Config, typed: frozenset[str]) -> None:
    """A flag that was stated acts or is refused; a default that has no effect is nobody's mistake."""
    if "cfg_rate" in typed and not config.use_cfg:
        raise ConfigError(
            f"--cfg_rate {config.cfg_rate:g} has no effect without --use_cfg 1: add it, or remove --cfg_rate."
        )
    _refuse_captions_without_effect(config, typed)
    for name in SAMPLE_FLAGS:
        if name in typed and config.sample_every is None:
            raise ConfigError(f"--{name} has no effect without --sample_every: add it, as in --sample_every 100.")
    for name in ("lora_alpha", "lora_dropout", "lora_targets"):
        if name in typed and config.lora_rank is None:
            raise ConfigError(f"--{name} has no effect without --lora_rank: add it, as in --lora_rank 16.")
    for name in ("placeholder", "placeholder_vectors", "init_word"):
        if name in typed and not config.tune_text:
            raise ConfigError(f"--{name} has no effect without --tune_text 1: add it, or remove --{name}.")
    if "stereo_init" in typed and not config.stereo:
        raise ConfigError(
            f"--stereo_init {config.stereo_init} has no effect without --stereo 1: add it, or remove --stereo_init."
        )
    if "trigger_place" in typed and config.trigger is None:
        raise ConfigError(
            "--trigger_place has no effect without --trigger: add it, as in --trigger 'in my-style', or remove "
            "--trigger_place."
        )
    if "min_lr_ratio" in typed and config.lr_schedule == "constant":
        raise ConfigError(
            "--min_lr_ratio has no effect with --lr_schedule constant: use cosine or linear, or remove it."
        )
    if "public" in typed and config.push_to_hub is None:
        raise ConfigError("--public has no effect without --push_to_hub: add it, or remove --public.")
    if "wandb_project" in typed and not config.use_wandb:
        raise ConfigError(
            f"--wandb_project {config.wandb_project} has no effect without --use_wandb 1: add it, or remove"
            " --wandb_project."
        )
    if config.validation_split is not None and config.validation_folder is None:
        raise ConfigError(
            f"--validation_split {config.validation_split} has no effect without a data set to validate on: give it to"
            f" --validation, as in --validation {config.dataset_path}."
        )
    if "validation_steps" in typed and config.validation_folder is None and config.validation_share == 0:
        raise ConfigError(
            "--validation_steps has no effect without data to validate on: add --validation 0.1 or a folder."
        )
    if "export" in typed and not config.keep_best:
        raise ConfigError(
            f"--export {config.export} has no effect without --keep_best 1, since the last step is then the only one to"
            " export: add it, or remove --export."
        )
    if "warmup_steps" in typed and config.max_steps is not None and config.warmup_steps > config.max_steps:
        raise ConfigError(
            f"--warmup_steps {config.warmup_steps} is more than --max_steps {config.max_steps}, so that the "
            f"learning rate would never reach --lr: use at most {config.max_steps}."
        )


def _refuse_best_without_validation(config: Config) -> None:
    if config.validation_folder is not None or config.validation_share > 0:
        return
    for name, value in (("keep_best", int(config.keep_best)), ("early_stop", config.early_stop)):
        if value:
            raise ConfigError(
                f"--{name} {value} cannot be used without data to validate on, by which steps are compared: add"
                " --validation 0.1 or a folder of other clips."
            )


def _refuse_trigger(config: Config) -> None:
    if config.trigger is None:
        return
    if reason := why_no_trigger(config.trigger):
        raise ConfigError(f"--trigger {config.trigger!r} {reason}.")
    if config.tune_text:
        raise ConfigError(
            f"--trigger cannot be used with --tune_text 1, whose --placeholder {config.placeholder} stands in every "
            "caption already: remove one."
        )


def _refuse_contradicting_captions(config: Config) -> None:
    sources = config.caption_sources  # raises ConfigError for a list that it does not understand
    for name in ("caption_column", "caption_template", "default_caption", "merge_metadata", "caption_lines"):
        if config.caption is not None and getattr(config, name):
            raise ConfigError(
                f"--{name} cannot be used with --caption, which replaces the captions of all files: remove one of them."
            )
    if config.caption_template is not None and "template" not in sources:
        raise ConfigError(
            f"--caption_template cannot be used with --captions {config.captions}, which does not name template: add "
            "template to the list, or remove one of them."
        )
    if config.caption_column is not None and "metadata" not in sources:
        raise ConfigError(
            f"--caption_column cannot be used with --captions {config.captions}, which does not name metadata: add "
            "metadata to the list, or remove one of them."
        )
    if config.merge_metadata and not {"metadata", "json"} & set(sources):
        raise ConfigError(
            f"--merge_metadata cannot be used with --captions {config.captions}, which names neither metadata nor "
            "json: add one of them to the list, or remove --merge_metadata."
        )


def _refuse_captions_without_effect(config: Config, typed: frozenset[str]) -> None:
    if "caption_variants" in typed and config.word_dropout == config.merge_metadata == 0:
        raise ConfigError(
            f"--caption_variants {config.caption_variants} has no effect without --word_dropout or --merge_metadata: "
            "add one, as in --word_dropout 0.3, or remove --caption_variants."
        )
    for name in ("merge_drop_caption", "merge_drop_field"):
        if name in typed and config.merge_metadata == 0:
            raise ConfigError(f"--{name} has no effect without --merge_metadata: add it, as in --merge_metadata 0.25.")
    if "captions" in typed and "template" in config.caption_sources and config.caption_template is None:
        raise ConfigError(
            f"--captions {config.captions} names template, which has no effect without --caption_template: add it, as "
            "in --caption_template '{genre}, {title}', or take template out of the list."
        )
    if "captions" in typed and config.caption is not None:
        raise ConfigError("--captions has no effect with --caption, which replaces the captions of all files.")
    of_captions = ("captions", "caption_column", "caption_template", "default_caption", "caption", "merge_metadata")
    for name in ("word_dropout", "caption_lines", *of_captions):
        if config.no_label and name in typed and getattr(config, name):
            raise ConfigError(f"--{name} has no effect with --no_label 1, which reads no captions: remove one of them.")


def _refuse_overlapping_folders(config: Config) -> None:
    """What a run writes must not be read as data, and validation data must not be trained on."""
    dataset = Path(config.dataset_path).resolve()
    for name, path in (("output_dir", config.output_dir), ("cache_dir", config.cache_dir)):
        if Path(path).resolve().is_relative_to(dataset):
            raise ConfigError(
                f"--{name} {path} is inside --dataset {config.dataset_path}, so that what is written there "
                "would count as data: choose a folder outside."
            )
    folder = config.validation_folder
    another_split = config.validation_split not in (None, config.dataset_split)
    if folder is not None and not another_split:
        validation = Path(folder).resolve()
        if validation.is_relative_to(dataset) or dataset.is_relative_to(validation):
            raise ConfigError(
                f"--validation {folder} and --dataset {config.dataset_path} overlap, so that files would be "
                "both trained and validated on: move one out of the other, or give a share, as in "
                "--validation 0.1, or another split of the data set (--validation_split)."
            )
