"""From the flags to what the engine and the training loop need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trainer.data.order import Order
from trainer.data.stems import Mix
from trainer.engine.settings import EngineSettings
from trainer.exports.export import write_lm
from trainer.model.new_word import embedding_of, write_text_embedding
from trainer.model.safetensors_file import files_kept_open
from trainer.model.trained_model import ModelSettings, merged
from trainer.plan.plan import Plan
from trainer.run.checkpoint import RunHeader
from trainer.training.loop import Intervals, Run
from trainer.training.schedule import Schedule

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset
    from trainer.data.prompt_states import SamplePrompts
    from trainer.flags.config import Config
    from trainer.model.source import Source
    from trainer.run.checkpoint import Checkpoint
    from trainer.run.output_dir import OutputDir

# Above this share of starting weights in the final average, --ema_decay is likely to be too large for the run.
LARGE_STARTING_SHARE = 0.05


def engine_settings(config: Config) -> EngineSettings:
    """How the model is trained, on whatever hardware."""
    trackers = {"wandb": config.use_wandb, "tensorboard": config.use_tensorboard}
    return EngineSettings(
        model=model_settings(config),
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        ema_decay=config.ema_decay,
        base_bits=config.base_bits,
        timeout_minutes=config.timeout_minutes,
        trackers=tuple(name for name, wanted in trackers.items() if wanted),
        tracker_project=config.wandb_project,
    )


def model_settings(config: Config) -> ModelSettings:
    """What of the model is trained, and how it is built for that."""
    return ModelSettings(selection=config.selection, dropout=config.dropout, new_word=config.new_word, seed=config.seed)


def order_of(config: Config, plan: Plan, data: Dataset) -> Order:
    """The order of all clips of the run."""
    return Order(
        seed=config.seed,
        epochs=config.epochs,
        global_batch=plan.global_batch,
        segment_frames=data.train.segment_frames,
        codebooks=data.train.shape.codebooks,
        channels=data.train.shape.audio_channels,
        caption_drop_rate=config.caption_drop_rate,
        melody_drop_rate=config.melody_drop_rate if data.train.shape.melody else 0.0,
        frames=data.train.codes.frames,
        texts=None if data.train.texts is None else np.array([len(texts) for texts in data.train.texts]),
        max_steps=config.max_steps,
        by_duration=config.sample_by == "duration",
    )


def crops_in_words(order: Order) -> str:
    """What an epoch has of clips that are longer than a crop, where it has more than one crop of each."""
    return (
        f"an epoch has {order.crops_per_epoch:,} crops of the {order.clips:,} clips, as many of each as segments fit"
        " into it (--sample_by duration)"
    )


def melodies_in_words(melody_drop_rate: float, data: Dataset) -> str:
    """Where the melodies of a melody model's training clips are from, and how many clips are trained without theirs."""
    given = sum(map(bool, data.table["melody_content"]))
    heard = f"is heard in its {'full mix' if data.stems == Mix.key else 'voice and other instruments'}"
    whose = f"that of {given:,} of {data.clips:,} clips is a file of its own, that of each other {heard}"
    if given == data.clips:
        whose = "each clip's is a file of its own"
    elif given == 0:
        whose = f"each clip's {heard}"
    without = "none is"
    if melody_drop_rate > 0:
        without = f"{100 * melody_drop_rate:.3g} % of the clips, drawn anew each epoch, are"
    return f"melodies: {whose}; {without} trained without (--melody_rate)"


def ema_in_words(ema_decay: float, order: Order) -> str:
    """What the average of the weights will hold when the run ends."""
    starting_share = ema_decay**order.steps
    advice = "; a lower --ema_decay, or more steps, would leave less" if starting_share > LARGE_STARTING_SHARE else ""
    return (
        f"exports and validation use the average of the weights over some {1 / (1 - ema_decay):.0f} steps"
        f" (--ema_decay {ema_decay:g}), of which {starting_share:.0%} are the starting weights at the end{advice}"
    )


def run_of(
    config: Config,
    plan: Plan,
    order: Order,
    data: Dataset,
    identity: dict[str, object],
    folder: OutputDir,
    source: Source,
    prompts: SamplePrompts | None = None,
) -> Run:
    """What the training loop needs that does not change during a run."""
    steps_per_epoch = max(1, round(order.crops_per_epoch / order.global_batch))
    return Run(
        plan=plan,
        order=order,
        schedule=Schedule(
            peak=config.lr,
            steps=order.steps,
            warmup_steps=config.warmup_steps,
            decay=config.lr_schedule,
            min_ratio=config.min_lr_ratio,
        ),
        train=data.train,
        validation=data.validation,
        hours=data.seconds / 3600,
        intervals=Intervals(
            log_steps=config.log_steps,
            validation_steps=config.validation_steps or steps_per_epoch,
            save_step=config.save_step,
            checkpoint_minutes=config.checkpoint_minutes,
            sample_steps=config.sample_every,
        ),
        header=RunHeader(identity=identity, global_batch=plan.global_batch, flags=config.to_dict()),
        on_save_step=lambda saved: write_step(config, source, saved, folder),
        prompts=prompts,
    )


@files_kept_open()
def write_step(config: Config, source: Source, saved: Checkpoint, folder: OutputDir) -> None:
    """lm_<step>.pt, or text_embedding_<step>.safetensors where that is what is trained."""
    if config.new_word is not None:
        embedding = embedding_of(source, config.new_word.placeholder, saved.weights())
        write_text_embedding(embedding, folder.root / f"text_embedding_{saved.step}.safetensors")
    else:
        write_lm(merged(source, saved.weights(), config.selection), folder.root / f"lm_{saved.step}.pt")
