"""The models that are heard, one beside the other with --compare, and the page on which their sounds are."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError, StorageError
from trainer.exports.saved_models import open_saved, run_of
from trainer.exports.strength import at_strength
from trainer.model.new_word import read_text_embedding, with_embedding
from trainer.model.source import Source
from trainer.report.comparison_page import ComparedModel, write_comparison
from trainer.wiring.finished_run import base_and_tuned

PAGE = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A model whose sounds are made, where they go, and what the page calls it."""

    source: Source
    folder: Path
    title: str
    remark: str


def models_of(flags: argparse.Namespace, output: Path, prompts: Sequence[str]) -> list[Heard]:
    """The model of the flags; with --compare the base, with --strength that one, and what the training made, in order.

    No tensor of a language model is read. Raises TrainerErrors.
    """
    embedding = None if flags.text_embedding is None else read_text_embedding(Path(flags.text_embedding))
    if embedding is not None and not any(embedding.placeholder.word in prompt for prompt in prompts):
        print(f"note: no prompt has {embedding.placeholder.word} in it, so that the text embedding has no effect")
    if flags.strength is None and not flags.compare:
        source = open_saved(flags.model, base=flags.base)
        if embedding is not None:
            source = with_embedding(source, embedding)
        return [Heard(source=source, folder=output, title=source.name, remark="")]
    base, tuned = _base_and_tuned(flags)
    between = None if flags.strength is None else at_strength(base, tuned, flags.strength)
    if not flags.compare:
        assert between is not None
        return [Heard(source=between, folder=output, title=between.name, remark="")]
    models = [Heard(source=base, folder=output / "base", title="base", remark=_shown(base))]
    if between is not None:
        name, remark = f"strength-{flags.strength:g}", "of what was learned, of which tuned has 1"
        models.append(Heard(source=between, folder=output / name, title=name, remark=remark))
    models.append(Heard(source=tuned, folder=output / "tuned", title="tuned", remark=_shown(tuned)))
    return models


def _shown(source: Source) -> str:
    """Its name, of a folder the last two parts: the page may be sent to somebody."""
    path = Path(source.name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else source.name


def write_page(
    output: Path,
    models: Sequence[Heard],
    files: Mapping[str, Sequence[Path]],
    rows: Sequence[tuple[str, int]],
    flags: argparse.Namespace,
) -> Path:
    """Write OUTPUT/comparison.html of the sounds of each model, by its title; rows: prompt and seed of each sound.

    Raises StorageError.
    """
    page = output / PAGE
    columns = [ComparedModel(title=one.title, remark=one.remark, sounds=files[one.title]) for one in models]
    prompts = [prompt if flags.repeat == 1 else f"{prompt} (seed {of})".strip() for prompt, of in rows]
    try:
        write_comparison(page, columns, prompts, _settings(flags))
    except OSError as error:
        raise StorageError(f"the page {page} cannot be written ({error}): choose another --output") from error
    return page


def _base_and_tuned(flags: argparse.Namespace) -> tuple[Source, Source]:
    if flags.text_embedding is None:
        return base_and_tuned(flags.model, flags.base)
    asked = "--compare" if flags.compare else f"--strength {flags.strength:g}"
    if run_of(Path(flags.text_embedding)) is None:
        raise ConfigError(
            f"{asked} with --text_embedding {flags.text_embedding}: the word from which its training started is in the"
            " config.json of its run, and the file lies in no output_dir of a run. Give the file in its run's folder"
        )
    if flags.base is not None:
        raise ConfigError(f"{asked} with --text_embedding takes its base model as --model: leave --base out")
    return base_and_tuned(flags.text_embedding, flags.model)


def _settings(flags: argparse.Namespace) -> dict[str, str]:
    """What all sounds have in common, as the page shows it."""
    settings = {"seconds": f"{flags.seconds:g}", "guidance": f"{flags.guidance:g}"}
    if flags.greedy:
        settings["choice"] = "always the likeliest code"
    else:
        settings |= {"temperature": f"{flags.temperature:g}", "top k": str(flags.top_k)}
        if flags.repeat == 1:
            settings["seed"] = str(flags.seed)
    for name in ("continue_from", "melody"):
        if getattr(flags, name) is not None:
            settings[name.replace("_", " ")] = Path(getattr(flags, name)).name
    return settings
