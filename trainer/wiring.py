"""From the flags (Config) to the settings that each part of a run owns.

Besides this module only trainer/preflight.py, trainer/plan/request.py and trainer/plan/dry_run.py know the flags as a
whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.caption_settings import CaptionSettings
from trainer.data.dataset import DataSettings
from trainer.data.hub_dataset import HubDataset, fetch, find_dataset
from trainer.data.hub_parts import place_of
from trainer.data.hub_parts import recorded as recorded_parts
from trainer.data.music_fields import MergeRates
from trainer.data.order import Order
from trainer.data.table_scan import TableSettings
from trainer.data.treatment import Treatment
from trainer.engine.settings import EngineSettings
from trainer.exports.export import ExportSettings, export_all, export_text, write_lm
from trainer.exports.model_card import CardFacts, adapter_base, adapter_card, model_card
from trainer.model.new_word import embedding_of, write_text_embedding
from trainer.model.safetensors_file import files_kept_open
from trainer.model.trained_model import ModelSettings, merged
from trainer.plan.dry_run import plan_of_shape
from trainer.plan.plan import Plan
from trainer.plan.strategies import Cluster
from trainer.report.settings import ReportSettings
from trainer.run.checkpoint import RunHeader
from trainer.spec.caption_sources import SOURCES
from trainer.spec.dataset_path import is_hub_id
from trainer.spec.shapes import FRAME_RATE_HZ, published, why_not_trained
from trainer.training.loop import Intervals, Run
from trainer.training.schedule import Schedule

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset
    from trainer.flags.config import Config
    from trainer.model.source import Source
    from trainer.plan.launcher import Launch
    from trainer.run.checkpoint import Checkpoint
    from trainer.run.output_dir import OutputDir

# Above this share of starting weights in the final average, --ema_decay is likely to be too large for the run.
LARGE_STARTING_SHARE = 0.05


def plan_of(
    config: Config,
    typed: frozenset[str],
    cluster: Cluster,
    launch: Launch,
    source: Source,
    checkpoint: Checkpoint | None,
) -> Plan:
    """The plan for this cluster; a resumed run keeps its global batch."""
    global_batch = None if checkpoint is None else checkpoint.run.global_batch
    return plan_of_shape(config, typed, cluster, launch, source.shape, source.frame_rate_hz, global_batch)


def refuse_before_fetching(
    config: Config, typed: frozenset[str], cluster: Cluster, launch: Launch, checkpoint: Checkpoint | None
) -> None:
    """Raise what the plan will raise, where the model's size is known before gigabytes of it are fetched.

    cluster  as this process alone finds it, without asking whether torch.compile works
    """
    shape = published(config.model_id)
    if shape is not None and why_not_trained(shape) is None:
        global_batch = None if checkpoint is None else checkpoint.run.global_batch
        plan_of_shape(config, typed, replace(cluster, compiles=True), launch, shape, FRAME_RATE_HZ, global_batch)


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


def report_settings(config: Config, *, embed: bool = False) -> ReportSettings:
    """What the report of the dataset must know of the run, and whether it holds excerpts of the sounds."""
    return ReportSettings(
        validation_share=config.validation_share,
        seed=config.seed,
        captions=caption_settings(config),
        treatment=treatment(config),
        segment_seconds=config.segment_seconds,
        model=config.model_id,
        embed=embed,
    )


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
    return ModelSettings(
        selection=config.selection, dropout=config.dropout, new_word=config.new_word, seed=config.seed
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
    if config.trim_silence:
        identity["--trim_silence"] = 1
    if config.loudness is not None:
        identity["--loudness"] = config.loudness
    if config.sample_by != "file":
        identity["--sample_by"] = config.sample_by
    if config.init_from is not None:
        identity["--init_from"] = config.init_from
    if config.ema_decay is not None:
        identity["--ema_decay"] = config.ema_decay
    if config.word_dropout > 0:
        rate, variants = config.word_dropout, config.caption_variants
        identity["words dropped (--word_dropout, --caption_variants)"] = f"{rate} in {variants} variants"
    if (trigger := config.caption_trigger) is not None:
        identity["--trigger, --trigger_place"] = f'"{trigger.text}" {trigger.place} each caption'
    identity.update(identity_of_captions(config))
    if not config.selection.everything:
        identity["trained"] = config.selection.describe()
        identity["frozen weights"] = source.probe()
    if config.tune_text:
        identity["--placeholder, --init_word"] = f"{config.placeholder} from {config.init_word}"
    return identity


def identity_of_captions(config: Config) -> dict[str, object]:
    """Where captions come from, as far as it is stated. The digest of the data set holds the captions that are trained
    on; those of the clips that validate are in no digest, and what is drawn of merged captions is in none either."""
    names = ("caption_column", "caption_template", "default_caption", "caption")
    identity: dict[str, object] = {f"--{name}": value for name in names if (value := getattr(config, name)) is not None}
    if config.caption_sources != SOURCES:
        identity["--captions"] = ",".join(config.caption_sources)
    merge = caption_settings(config).merge
    if merge.on:
        flags = "--merge_metadata, --merge_drop_caption, --merge_drop_field, --caption_variants"
        identity[f"metadata merged into captions ({flags})"] = f"{merge.describe()}, {config.caption_variants} variants"
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
        by_duration=config.sample_by == "duration",
    )


def crops_in_words(order: Order) -> str:
    """What an epoch has of clips that are longer than a crop, where it has more than one crop of each."""
    return (
        f"an epoch has {order.crops_per_epoch:,} crops of the {order.clips:,} clips, as many of each as segments fit"
        " into it (--sample_by duration)"
    )


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
        ),
        header=RunHeader(identity=identity, global_batch=plan.global_batch, flags=config.to_dict()),
        on_save_step=lambda saved: _write_step(config, source, saved, folder),
    )


@files_kept_open()
def _write_step(config: Config, source: Source, saved: Checkpoint, folder: OutputDir) -> None:
    """lm_<step>.pt, or text_embedding_<step>.safetensors where that is what is trained."""
    if config.new_word is not None:
        embedding = embedding_of(source, config.new_word.placeholder, saved.weights())
        write_text_embedding(embedding, folder.root / f"text_embedding_{saved.step}.safetensors")
    else:
        write_lm(merged(source, saved.weights(), config.selection), folder.root / f"lm_{saved.step}.pt")


@files_kept_open()
def export(config: Config, source: Source, run: Run, saved: Checkpoint, folder: OutputDir) -> None:
    """Write what the run trained, from a checkpoint, into output_dir."""
    settings = export_settings(config, card_facts(config, run, saved.step))
    if config.new_word is not None:
        embedding = embedding_of(source, config.new_word.placeholder, saved.weights())
        export_text(source, embedding, folder.root, card=settings.card)
    else:
        export_all(source, saved.weights(), folder.root, settings)


def card_facts(config: Config, run: Run, step: int) -> CardFacts:
    """What the model card tells about the run."""
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
        hyperparameters={
            "global batch (clips)": run.plan.global_batch,
            "epochs": round(run.order.epoch_of(step), 2),
            "precision": run.plan.mixed_precision,
            "captions dropped": config.caption_drop_rate,
            "words dropped": config.word_dropout,
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
    )
