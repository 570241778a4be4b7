"""From the flags to what a run leaves for others: the exported model and its card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import ConfigError
from trainer.exports.export import ExportSettings, export_all, export_text
from trainer.exports.model_card import CardFacts, adapter_base, adapter_card, model_card
from trainer.model.new_word import embedding_of
from trainer.model.safetensors_file import files_kept_open
from trainer.report.run_facts import START
from trainer.run.checkpoint import newest
from trainer.training.loop import Run
from trainer.wiring.identity import STEMS

if TYPE_CHECKING:
    from trainer.flags.config import Config
    from trainer.model.source import Source
    from trainer.run.checkpoint import Checkpoint
    from trainer.run.output_dir import OutputDir


@files_kept_open()
def export(
    config: Config, source: Source, run: Run, saved: Checkpoint, folder: OutputDir, validation_loss: float | None = None
) -> None:
    """Write what the run trained, from a checkpoint, into output_dir.

    validation_loss  at the checkpoint's step; None where it is not known
    """
    stems, made_stereo = saved.run.identity.get(STEMS), folder.read_json(START).get("made_stereo") is True
    facts = card_facts(config, made_by(run, stems=stems, made_stereo=made_stereo), saved.step, validation_loss)
    settings = export_settings(config, facts)
    if config.new_word is not None:
        embedding = embedding_of(source, config.new_word.placeholder, saved.weights())
        export_text(source, embedding, folder.root, card=settings.card)
    else:
        export_all(source, saved.weights(), folder.root, settings)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a card tells of a run besides its flags.

    crops_per_epoch  of all clips together
    precision        of the computation, as the plan has it
    channels         of the sound
    melody           whether the model reads one
    stems            in what melodies were heard, as the run's identity says it; None for a text model
    made_stereo      whether the weights of --init_from were mono, and made stereo; without --init_from the base's were
    """

    clips: int
    hours: float
    global_batch: int
    crops_per_epoch: int
    precision: str
    channels: int
    melody: bool
    stems: object = None
    made_stereo: bool = False


def made_by(run: Run, *, stems: object = None, made_stereo: bool = False) -> Made:
    """What the card tells of a run that is in memory."""
    shape = run.train.shape
    return Made(
        clips=run.order.clips,
        hours=run.hours,
        global_batch=run.plan.global_batch,
        crops_per_epoch=run.order.crops_per_epoch,
        precision=run.plan.mixed_precision,
        channels=shape.audio_channels,
        melody=shape.melody,
        stems=stems,
        made_stereo=made_stereo,
    )


def made_in(folder: OutputDir) -> Made:
    """What the card tells of a finished run, from the files in its folder. Raises ConfigError where they lack it."""
    start, plan, checkpoint = folder.read_json(START), folder.read_json("plan.json"), newest(folder.checkpoints)
    try:
        batch = int(str(start["global_batch"]))
        return Made(
            clips=int(str(start["clips"])),
            hours=float(str(start["hours"])),
            global_batch=batch,
            crops_per_epoch=round(float(str(start["steps_per_epoch"])) * batch),
            precision=str(plan["mixed_precision"]),
            channels=int(str(start["channels"])),
            melody=start["melody"] is True,
            stems=None if checkpoint is None else checkpoint.run.identity.get(STEMS),
            made_stereo=start["made_stereo"] is True,
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{folder.root}: {START} or plan.json lacks what a card tells of a run ({error}), as those of older"
            " versions do: run the command of that run again with a larger --max_steps, which writes them anew"
        ) from error


def card_facts(config: Config, made: Made, step: int, validation_loss: float | None = None) -> CardFacts:
    """What the model card tells about the run, of which the weights after `step` steps are exported."""
    names = ("lr", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "segment_seconds", "seed")
    epochs = min(step * made.global_batch / made.crops_per_epoch, float(config.epochs))
    return CardFacts(
        base_model=config.model_id,
        started_from=config.init_from,
        trained=config.selection,
        placeholder=None if config.new_word is None else config.new_word.placeholder.word,
        trigger=config.caption_trigger,
        dataset=config.dataset_path,
        clips=made.clips,
        hours=made.hours,
        steps=step,
        validation_loss=validation_loss,
        channels=made.channels,
        melody=made.melody,
        stereo_init=config.embeddings_in_stereo if config.init_from is None or made.made_stereo else None,
        hyperparameters={
            "global batch (clips)": made.global_batch,
            "epochs": round(epochs, 2),
            "precision": made.precision,
            "captions dropped": config.caption_drop_rate,
            "words dropped": config.word_dropout,
            **({"melodies dropped": config.melody_drop_rate} if made.melody else {}),
            **({} if made.stems is None else {"melodies heard in": made.stems}),
            **{name: getattr(config, name) for name in names},
            **({} if config.optimizer == "adamw" else {"optimizer": config.optimizer}),
            **({} if config.ema_decay is None else {"ema_decay": config.ema_decay}),
            **({"crops per epoch": made.crops_per_epoch} if config.sample_by == "duration" else {}),
            **({"silence at both ends": "left out"} if config.trim_silence else {}),
            **({} if config.loudness is None else {"loudness of each file (LUFS)": config.loudness}),
            **({} if config.base_bits is None else {"bits of the base while training": config.base_bits}),
        },
    )


def export_settings(config: Config, facts: CardFacts) -> ExportSettings:
    """What exported files tell of the run."""
    return ExportSettings(
        card=model_card(facts),
        adapter_card=adapter_card(facts),
        segment_seconds=config.segment_seconds,
        cfg_dropout=config.caption_drop_rate,
        selection=config.selection,
        base_model=adapter_base(config.model_id, config.init_from),
        melody_rate=config.melody_drop_rate if facts.melody else 0.0,
    )
