"""From the flags to what a run leaves for others: the exported model and its card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.exports.export import ExportSettings, export_all, export_text
from trainer.exports.model_card import CardFacts, adapter_base, adapter_card, model_card
from trainer.model.new_word import embedding_of
from trainer.model.safetensors_file import files_kept_open
from trainer.report.run_facts import START
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
    facts = card_facts(config, run, saved.step, validation_loss, stems=stems, made_stereo=made_stereo)
    settings = export_settings(config, facts)
    if config.new_word is not None:
        embedding = embedding_of(source, config.new_word.placeholder, saved.weights())
        export_text(source, embedding, folder.root, card=settings.card)
    else:
        export_all(source, saved.weights(), folder.root, settings)


def card_facts(
    config: Config,
    run: Run,
    step: int,
    validation_loss: float | None = None,
    *,
    stems: object = None,
    made_stereo: bool = False,
) -> CardFacts:
    """What the model card tells about the run, of which the weights after `step` steps are exported.

    stems        in what the melodies were heard, as the run's identity says it; None for a text model
    made_stereo  whether the weights of --init_from were mono, and made stereo; without --init_from the base's were
    """
    shape = run.train.shape
    names = ("lr", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "segment_seconds", "seed")
    return CardFacts(
        base_model=config.model_id,
        started_from=config.init_from,
        trained=config.selection,
        placeholder=None if config.new_word is None else config.new_word.placeholder.word,
        trigger=config.caption_trigger,
        dataset=config.dataset_path,
        clips=run.order.clips,
        hours=run.hours,
        steps=step,
        validation_loss=validation_loss,
        channels=shape.audio_channels,
        melody=shape.melody,
        stereo_init=config.embeddings_in_stereo if config.init_from is None or made_stereo else None,
        hyperparameters={
            "global batch (clips)": run.plan.global_batch,
            "epochs": round(run.order.epoch_of(step), 2),
            "precision": run.plan.mixed_precision,
            "captions dropped": config.caption_drop_rate,
            "words dropped": config.word_dropout,
            **({"melodies dropped": config.melody_drop_rate} if shape.melody else {}),
            **({} if stems is None else {"melodies heard in": stems}),
            **{name: getattr(config, name) for name in names},
            **({} if config.optimizer == "adamw" else {"optimizer": config.optimizer}),
            **({} if config.ema_decay is None else {"ema_decay": config.ema_decay}),
            **({"crops per epoch": run.order.crops_per_epoch} if run.order.by_duration else {}),
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
