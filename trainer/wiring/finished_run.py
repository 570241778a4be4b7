"""A run's folder, read again by the scripts that judge, export or share what it trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.table_scan import TableSettings
from trainer.errors import CheckpointError, ConfigError, ModelError
from trainer.flags.config import Config, config_from_dict
from trainer.flags.run_config import read_config
from trainer.run.checkpoint import Checkpoint, newest
from trainer.run.checkpoint_folders import HEADER
from trainer.run.output_dir import HUB_DATASETS, OutputDir
from trainer.wiring.data import fetched_data, find_hub_datasets
from trainer.wiring.identity import STEMS
from trainer.wiring.saved_steps import find_step

if TYPE_CHECKING:
    import torch

    from trainer.data.dataset import Dataset
    from trainer.model.source import Source
    from trainer.spec.trainable import NewWord


def config_of_run(run: Path, flag: str = "--run") -> Config:
    """The flags of the run, with what --stems auto came to. Raises ConfigError where the folder holds none.

    flag  by which the person named the folder
    """
    return with_stems_of_run(run, read_config(run, flag))


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


def base_and_tuned(model: str, base: str | None, *, step: int | None = None) -> tuple[Source, Source]:
    """What a run started from, and what it made; no tensor of a language model is read.

    model  whatever --model of a script names: an output_dir, its huggingface/, audiocraft/ or adapter/, an lm_*.pt, a
           text_embedding*.safetensors or a checkpoint's folder, and the same in an export; with `base` any other model
    base   what --base names, a hub id, a short name or a folder; None where the run that `model` lies in says it. A
           mono one is made stereo where the run did so
    step   with an output_dir: that step of the run; None for what is exported

    The second has the weights that are exported, the average where the run keeps one. Where a word was learned, the
    first knows it as well, by the rows that it started from. Raises TrainerErrors: where there is no such model or
    step, and where the base is not named or no longer there.
    """
    from trainer.exports.saved_models import open_saved, run_of, takes_base, with_trained
    from trainer.model.lora import ADAPTER_CONFIG

    path = Path(model).expanduser()
    run = run_of(path)
    if step is not None:
        if run is None or run != path:
            raise ConfigError(f"--step {step} is for the output_dir of a run, which --model {model} is not")
        path = find_step(run, step).path
    config = _config_beside(path, run)
    start = start_of(path, config, base)
    word = None if config is None else config.new_word
    if path.suffix == ".safetensors" or (word is not None and (path / HEADER).is_file()):
        tuned = _with_word_in(path, start, word)
    elif any((path / name).is_file() for name in (HEADER, ADAPTER_CONFIG)):
        tuned = with_trained(path, start)
    else:
        name = model if step is None else str(path)
        tuned = open_saved(name, base=base if takes_base(name) else None)
    return start if word is None else _before_learning(start, word), tuned


def _config_beside(path: Path, run: Path | None) -> Config | None:
    """The flags of the run that a file or folder is of; None where nothing says them."""
    if run is not None:
        return config_of_run(run, "--model")
    if not (path / HEADER).is_file():
        return None
    try:  # a checkpoint that was copied elsewhere
        return config_from_dict(Checkpoint(path).run.flags)
    except (CheckpointError, ConfigError) as error:
        raise ModelError(f"--model {path}: {error}") from error


def start_of(path: Path, config: Config | None, base: str | None) -> Source:
    """The model that a training started from: `base`, or what the run's flags say, or what an adapter names.

    path    what the training made; for messages, and for an adapter's own word
    config  the run's flags; None where they are not known
    base    see base_and_tuned

    Raises ModelError where nothing names that model, or where it is no longer there.
    """
    from trainer.exports.saved_models import open_named, run_of
    from trainer.model.lora import base_named_by
    from trainer.model.stereo import in_stereo

    if base is None and config is None:
        base = base_named_by(path)
    if base is not None:
        folder = Path(base).expanduser()
        source = open_named(str(folder / "huggingface") if run_of(folder) == folder else base, "--base")
        stereo = None if config is None else config.embeddings_in_stereo
        return in_stereo(source, stereo) if stereo is not None and source.channels == 1 else source
    if config is None:
        raise ModelError(
            f"nothing says what {path} was trained from: it lies in no output_dir of a run, whose config.json would"
            " name it. Add --base with that model (small, medium, large, a hub id or a folder)"
        )
    try:
        return base_of_run(config)
    except ModelError as error:
        raise ModelError(
            f"what {path} was trained from cannot be opened: {error}. Or give that model, as it was at the start, by"
            " --base"
        ) from error


def _with_word_in(path: Path, start: Source, word: NewWord | None) -> Source:
    """`start` with the learned word of a checkpoint or of a text_embedding*.safetensors."""
    from trainer.model.new_word import embedding_of, read_text_embedding, with_embedding

    if word is None:
        raise ModelError(
            f"nothing says what the word in {path} started from: it lies in no output_dir of a run. Give that folder"
        )
    if path.is_file():
        embedding = read_text_embedding(path)
    else:
        embedding = embedding_of(start, word.placeholder, Checkpoint(path).weights())
    return replace(with_embedding(start, embedding), name=str(path))


def _before_learning(start: Source, word: NewWord) -> Source:
    """`start` with the word, before anything of it was learned."""
    from trainer.model.new_word import TextEmbedding, start_rows, with_embedding

    rows, digest = start_rows(start, word), start.text_identity()
    first = TextEmbedding(placeholder=word.placeholder, rows_ND=rows, base_model=start.name, text_encoder=digest)
    return replace(with_embedding(start, first), name=start.name)


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
