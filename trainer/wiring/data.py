"""From the flags to what the clips are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.caption_settings import CaptionSettings
from trainer.data.dataset import DataSettings
from trainer.data.hub_dataset import HubDataset, fetch, find_dataset
from trainer.data.hub_parts import place_of
from trainer.data.hub_parts import recorded as recorded_parts
from trainer.data.music_fields import MergeRates
from trainer.data.table_scan import TableSettings
from trainer.data.treatment import Treatment
from trainer.spec.dataset_path import is_hub_id

if TYPE_CHECKING:
    from trainer.flags.config import Config


def data_settings(
    config: Config, train: HubDataset | None = None, validation: HubDataset | None = None
) -> DataSettings:
    """What the run's clips are made of.

    train, validation  what was fetched from the hub for --dataset and --validation; None for what is no data set of it
    """
    folder, cache_dir = config.validation_folder, Path(config.cache_dir)
    if validation is not None:
        folder = str(place_of(validation, cache_dir))
    return DataSettings(
        folder=Path(config.dataset_path) if train is None else place_of(train, cache_dir),
        cache_dir=cache_dir,
        validation_share=config.validation_share,
        validation_folder=None if folder is None else Path(folder),
        captions=caption_settings(config),
        tables=table_settings(config, files=None if train is None else train.files),
        validation_tables=validation_tables(config, files=None if validation is None else validation.files),
        min_seconds=config.min_seconds,
        treatment=treatment(config),
        segment_seconds=config.segment_seconds,
        code_views=config.code_views,
        word_dropout=config.word_dropout,
        caption_variants=config.caption_variants,
        placeholder=None if config.new_word is None else config.new_word.placeholder,
        trigger=config.caption_trigger,
        trained=config.selection,
        seed=config.seed,
        rehash=config.rehash,
        stems=config.stems,
    )


def fetched_data(config: Config, hub: Mapping[str, HubDataset]) -> DataSettings:
    """`data_settings`, once what was found on the hub is fetched, and said on the console. For a program that is one
    process: of several, one fetches (launch.py)."""
    for name, found in hub.items():
        print(found.describe())
        fetch(found, f"--{name}")
    return data_settings(config, hub.get("dataset"), hub.get("validation"))


def caption_settings(config: Config) -> CaptionSettings:
    """Where the clips' captions come from."""
    return CaptionSettings(
        sources=config.caption_sources,
        column=config.caption_column,
        template=config.caption_template,
        default=config.default_caption,
        instead=config.caption,
        lines=config.caption_lines,
        no_label=config.no_label,
        merge=MergeRates(
            merge=config.merge_metadata, drop_caption=config.merge_drop_caption, drop_field=config.merge_drop_field
        ),
    )


def treatment(config: Config) -> Treatment:
    """What is done to each sound before it is encoded."""
    return Treatment(trim_silence=config.trim_silence, loudness_lufs=config.loudness)


def find_hub_datasets(config: Config, recorded: Mapping[str, object]) -> dict[str, HubDataset]:
    """The data sets of the hub that --dataset and --validation name, by dataset and validation; asks the hub.

    recorded  what the run that is resumed used; without --dataset_revision its commits are kept
    """
    wanted = {"dataset": (config.dataset_path, config.dataset_split)}
    if config.validation_folder is not None:
        wanted["validation"] = (config.validation_folder, config.validation_split or config.dataset_split)
    found = {}
    for name, (path, split) in wanted.items():
        if is_hub_id(path):
            before = recorded.get(name)
            kept = before.get("revision") if isinstance(before, dict) and before.get("repo") == path else None
            revision = config.dataset_revision or kept
            of_config, cache_dir = config.dataset_config, Path(config.cache_dir)
            in_cache = recorded_parts(path, revision=revision, config=of_config, split=split, cache_dir=cache_dir)
            found[name] = in_cache or find_dataset(
                path, revision=revision, config=of_config, split=split, flag=f"--{name}"
            )
    return found


def table_settings(config: Config, files: Sequence[str] | None = None) -> TableSettings:
    """Which rows and columns of tables are used, and, of a data set of the hub, which `files`."""
    return TableSettings(
        config=config.dataset_config,
        split=config.dataset_split,
        audio_column=config.audio_column,
        caption_column=config.caption_column,
        files=None if files is None else frozenset(files),
    )


def validation_tables(config: Config, files: Sequence[str] | None = None) -> TableSettings:
    """The same of what --validation names."""
    return replace(table_settings(config, files), split=config.validation_split or config.dataset_split)
