"""A run's weights after any step that is on disk, at any strength, exported as the run's end exports them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import ConfigError, StorageError
from trainer.exports.audiocraft_files import read_audiocraft
from trainer.exports.export import export_all, export_text
from trainer.exports.init_from import FINAL
from trainer.exports.saved_models import run_of
from trainer.exports.strength import check_strength, embedding_at_strength
from trainer.model.lora import ADAPTER_CONFIG, read_adapter
from trainer.model.new_word import embedding_of, read_text_embedding
from trainer.model.safetensors_file import files_kept_open
from trainer.model.weights import Weights, weights_in_memory
from trainer.report.run_metrics import Metrics
from trainer.run.checkpoint import Checkpoint
from trainer.run.output_dir import OutputDir
from trainer.spec.trainable import EVERYTHING, Selection
from trainer.wiring.exporting import card_facts, export_settings, made_in
from trainer.wiring.finished_run import base_and_tuned, config_of_run, start_of
from trainer.wiring.saved_steps import EXPORTED, SavedStep, find_step

if TYPE_CHECKING:
    from trainer.flags.config import Config
    from trainer.model.source import Source


@files_kept_open()
def export_step(
    run: Path, *, step: int | None = None, strength: float = 1.0, base: str | None = None, output: Path | None = None
) -> tuple[SavedStep, Path]:
    """Write what the run's end writes, of one step and at a strength; returns what was taken, and the folder.

    step    None for the one that was exported or, of a run that has not ended, the last one saved
    base    what the run started from, where that is not where the run found it (see base_and_tuned)
    output  the folder; None for one of the step and the strength below `run`/exports

    Of a LoRA run's lm_<step>.pt, which has the adapter merged, no adapter/ comes. Raises TrainerErrors, where the step
    or the base is not there, and where the disk takes no more; files and folders are whole or the former ones then.
    """
    check_strength(strength)
    config, folder = config_of_run(run, "RUN"), OutputDir(root=run)
    saved = find_step(run, step)
    place = _folder_of(run, saved.step, strength) if output is None else output
    if run_of(place) == place:
        raise ConfigError(
            f"--output {place} is the output_dir of a run, whose page, sounds and figures are of what the run exported"
            " itself: give another folder, or leave --output out"
        )
    # No validation has seen weights of another strength.
    loss = _validation_loss(folder, saved.step) if strength == 1 else None
    facts = card_facts(config, made_in(folder), saved.step, loss)
    if strength != 1:
        facts = replace(facts, strength=strength)
    settings = replace(export_settings(config, facts), strength=strength)
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / EXPORTED).unlink(missing_ok=True)
        if config.new_word is not None:
            _export_word(config, saved, start_of(saved.path, config, base), place, settings.card, strength)
        else:
            start, _ = base_and_tuned(str(run), base, step=saved.step)  # which compares the two
            trained, selection = _trained_in(run, config, saved)
            export_all(start, trained, place, replace(settings, selection=selection))
        said = {"step": saved.step, "strength": strength, "validation_loss": loss}
        OutputDir(root=place).write_json(EXPORTED, said)
    except OSError as error:
        raise StorageError(f"{place} cannot be written ({error}): choose another --output") from error
    except StorageError as error:
        raise StorageError(str(error).replace("--output_dir", "--output")) from error
    return saved, place


def _folder_of(run: Path, step: int, strength: float) -> Path:
    return run / "exports" / (f"step-{step}" if strength == 1 else f"step-{step}-strength-{strength:g}")


def _export_word(
    config: Config, saved: SavedStep, start: Source, place: Path, card: str, strength: float
) -> None:
    """text_embedding.safetensors and huggingface/ with the rows of the word as they were after the step."""
    word = config.new_word
    assert word is not None
    if saved.is_checkpoint:
        learned = embedding_of(start, word.placeholder, Checkpoint(saved.path).weights())
    else:
        learned = read_text_embedding(saved.path)
    export_text(start, embedding_at_strength(start, word, learned, strength), place, card=card)


def _trained_in(run: Path, config: Config, saved: SavedStep) -> tuple[Weights, Selection]:
    """The trained parameters of the step, or the whole language model where they are merged, and which they are."""
    if saved.is_checkpoint:
        return Checkpoint(saved.path).weights(), config.selection
    adapter = run / "adapter"
    if config.selection.lora and saved.path.name == FINAL and (adapter / ADAPTER_CONFIG).is_file():
        return weights_in_memory(read_adapter(adapter)[1]), config.selection
    return weights_in_memory(read_audiocraft(saved.path).state), EVERYTHING


def _validation_loss(folder: OutputDir, step: int) -> float | None:
    """Of that step; None where the run did not validate there."""
    metrics = Metrics(folder.metrics)
    metrics.read_on()
    validations = zip(metrics.validation["step"], metrics.validation["validation_loss"], strict=True)
    return next((float(loss) for at, loss in validations if at == step), None)
