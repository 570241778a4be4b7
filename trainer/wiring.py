"""What the flags mean for each part of a run: pure functions from Config to the parts' own settings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.dataset import segment_frames
from trainer.data.order import Order
from trainer.exports.export import write_lm
from trainer.exports.model_card import Training, adapter_card, model_card, name_of_base
from trainer.model.new_word import embedding_of, write_text_embedding
from trainer.model.trained_model import merged
from trainer.plan.plan import Plan, make_plan
from trainer.plan.request import batch_flags, options
from trainer.plan.strategies import Cluster
from trainer.training.loop import Intervals, Run
from trainer.training.schedule import Schedule

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset
    from trainer.flags.config import Config
    from trainer.model.source import Source
    from trainer.plan.launcher import Launch
    from trainer.run.checkpoint import Checkpoint
    from trainer.run.output_dir import RunFolder

# Above this share of starting weights in the final average, --ema_decay is likely to be too large for the run.
STARTING_SHARE = 0.05


def plan_of(
    config: Config,
    typed: frozenset[str],
    cluster: Cluster,
    launch: Launch,
    source: Source,
    checkpoint: Checkpoint | None,
) -> Plan:
    """The plan for this cluster; a resumed run keeps its global batch."""
    return make_plan(
        cluster,
        source.shape,
        batch_flags(config, typed),
        options(
            config,
            typed,
            launch,
            segment_frames=segment_frames(source, config.segment_seconds),
            deepspeed_available=importlib.util.find_spec("deepspeed") is not None,
        ),
        None if checkpoint is None else int(str(checkpoint.run["global_batch"])),
    )


def identity_of(config: Config, source: Source, data: Dataset) -> dict[str, object]:
    """What must be the same for a checkpoint to be continued: the numbers depend on all of it.

    Settings that are off have no entry, so that checkpoints from before they existed can be continued.
    """
    identity: dict[str, object] = {
        "dataset": f"{data.clips} clips, digest {data.digest}",
        "codec": source.codec_identity(),
        "text encoder": source.text_identity(),
        "decoder": source.decoder_shape(),
        "--seed": config.seed,
        "--segment_seconds": config.segment_seconds,
        "--code_views": config.code_views,
        "share of captions dropped (--use_cfg, --cfg_rate)": config.caption_drop_rate,
    }
    if config.init_from is not None:
        identity["--init_from"] = config.init_from
    if config.ema_decay is not None:
        identity["--ema_decay"] = config.ema_decay
    if config.word_dropout > 0:
        rate, variants = config.word_dropout, config.caption_variants
        identity["words dropped (--word_dropout, --caption_variants)"] = f"{rate} in {variants} variants"
    if not config.selection.everything:
        identity["trained"] = config.selection.describe()
        identity["frozen weights"] = source.probe()
    if config.tune_text:
        identity["--placeholder, --init_word"] = f"{config.placeholder} from {config.init_word}"
    return identity


def order_of(config: Config, plan: Plan, data: Dataset) -> Order:
    """The order of all clips of the run."""
    return Order(
        seed=config.seed,
        epochs=config.epochs,
        global_batch=plan.global_batch,
        segment_frames=data.train.segment_frames,
        codebooks=data.train.shape.codebooks,
        caption_drop_rate=config.caption_drop_rate,
        frames=data.train.codes.frames,
        texts=None if data.train.texts is None else np.array([len(texts) for texts in data.train.texts]),
        max_steps=config.max_steps,
    )


def words_on_average(config: Config, order: Order) -> str:
    """What the average of the weights will hold when the run ends; empty where none is kept."""
    if config.ema_decay is None:
        return ""
    left = config.ema_decay**order.steps
    advice = "; a lower --ema_decay, or more steps, would leave less" if left > STARTING_SHARE else ""
    return (
        f"exports and validation use the average of the weights over some {1 / (1 - config.ema_decay):.0f} steps"
        f" (--ema_decay {config.ema_decay:g}), of which {left:.0%} are the starting weights at the end{advice}"
    )


def run_of(
    config: Config,
    plan: Plan,
    order: Order,
    data: Dataset,
    identity: dict[str, object],
    folder: RunFolder,
    source: Source,
) -> Run:
    """The run's fixed parts for the loop."""
    steps_per_epoch = max(1, round(order.clips / order.global_batch))
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
        intervals=Intervals(
            log_steps=config.log_steps,
            validation_steps=config.validation_steps or steps_per_epoch,
            save_step=config.save_step,
            checkpoint_minutes=config.checkpoint_minutes,
        ),
        description={"identity": identity, "global_batch": plan.global_batch, "config": config.to_dict()},
        on_save_step=lambda saved: _write_step(config, source, saved, folder),
    )


def _write_step(config: Config, source: Source, saved: Checkpoint, folder: RunFolder) -> None:
    """lm_<step>.pt, or text_embedding_<step>.safetensors where that is what is trained."""
    embedding = embedding_of(config, source, saved.weights())
    if embedding is not None:
        write_text_embedding(embedding, folder.root / f"text_embedding_{saved.step}.safetensors")
    else:
        write_lm(merged(source, saved.weights(), config.selection), folder.root / f"lm_{saved.step}.pt")


def training_of(config: Config, plan: Plan, order: Order, data: Dataset, step: int) -> Training:
    """What the model card tells about the run."""
    names = ("lr", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "segment_seconds", "seed")
    return Training(
        base_model=config.model_id,
        started_from=config.init_from,
        trained=config.selection,
        placeholder=config.placeholder if config.tune_text else None,
        dataset=config.dataset_path,
        clips=data.clips,
        hours=data.seconds / 3600,
        steps=step,
        hyperparameters={
            "global batch (clips)": plan.global_batch,
            "epochs": round(order.epoch_of(step), 2),
            "precision": plan.mixed_precision,
            "captions dropped": config.caption_drop_rate,
            "words dropped": config.word_dropout,
            **{name: getattr(config, name) for name in names},
            **({} if config.optimizer == "adamw" else {"optimizer": config.optimizer}),
            **({} if config.ema_decay is None else {"ema_decay": config.ema_decay}),
            **({} if config.base_bits is None else {"bits of the base while training": config.base_bits}),
        },
    )


def export_of(config: Config, training: Training) -> dict[str, Any]:
    """What the export is told about the run."""
    # An adapter fits the weights that it was trained on, which are not the base's if others were at the start.
    base = config.model_id if config.init_from is None else Path(config.init_from).name
    return {
        "card": model_card(training),
        "adapter_card": adapter_card(training),
        "segment_seconds": config.segment_seconds,
        "cfg_dropout": config.caption_drop_rate,
        "selection": config.selection,
        "base_model": name_of_base(base),
    }
