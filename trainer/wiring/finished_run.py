"""A run's folder, read again by the scripts that judge, export or share what it trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.table_scan import TableSettings
from trainer.errors import ConfigError
from trainer.flags.config import Config, config_from_dict
from trainer.run.checkpoint import newest
from trainer.run.output_dir import HUB_DATASETS, OutputDir
from trainer.wiring.data import fetched_data, find_hub_datasets
from trainer.wiring.identity import STEMS

if TYPE_CHECKING:
    import torch

    from trainer.data.dataset import Dataset
    from trainer.model.source import Source


def config_of_run(run: Path, flag: str = "--run") -> Config:
    """The flags of the run, with what --stems auto came to. Raises ConfigError where the folder holds none.

    flag  by which the person named the folder
    """
    try:
        config = config_from_dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{flag} {run} is no output_dir of a run: its config.json cannot be read ({error})"
        ) from error
    return with_stems_of_run(run, config)


def with_stems_of_run(run: Path, config: Config) -> Config:
    """The flags with what --stems auto came to in the run, as its newest checkpoint says: on a machine without demucs
    it comes to other melodies than those that the model was trained with."""
    checkpoint = newest(run / "checkpoints") if config.stems == "auto" else None
    heard = None if checkpoint is None else checkpoint.run.identity.get(STEMS)
    if heard is None:
        return config
    return replace(config, stems="mix" if heard == "mix" else "demucs")


def base_of_run(config: Config) -> Source:
    """The model that a run with these flags starts from: that of --model_id, with the weights of --init_from, made
    stereo by --stereo 1. Raises ModelError where one of them is no longer there."""
    from trainer.exports.first_model import first_model
    from trainer.exports.init_from import find_starting_point
    from trainer.model.source import open_model

    start = None if config.init_from is None else find_starting_point(config.init_from)
    return first_model(open_model(config.model_id), start, config.embeddings_in_stereo, config.selection)


def data_of_run(
    run: Path, config: Config, base: Source, device: torch.device, *, held_out: Path | None = None
) -> Dataset:
    """The run's clips, training and validation, from its caches; what is missing there is encoded on `device`.

    held_out  a folder of clips that take the place of those that validated

    Raises TrainerErrors, as where the dataset is no longer there.
    """
    from trainer.data import dataset

    hub = find_hub_datasets(config, OutputDir(root=run).read_json(HUB_DATASETS))
    settings = fetched_data(config, hub)
    # With --validation SHARE the share stays out of the training clips.
    if held_out is not None:
        settings = replace(settings, validation_folder=held_out, validation_tables=TableSettings())
    return dataset.prepare(settings, base, device)
