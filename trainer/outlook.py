"""What is to be expected of a run, in words: what a dry run says of a folder that it does not decode, and what a step
costs on average where clips are shorter than the segment."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from trainer.data.cut import Cut, cut_for, micro_batches
from trainer.data.heard import heard_of
from trainer.data.order import Order, rows_of_step, steps_of
from trainer.data.outline import Outline, outline_of
from trainer.flags.config import Config
from trainer.plan.activations import row_places
from trainer.plan.disk import place_of, told
from trainer.plan.forecast import Clips, Disk, Steps, disk_of, seconds_in_words, time_in_words
from trainer.plan.layout import Layout
from trainer.plan.plan import Plan
from trainer.plan.time import USUAL_TEXT_TOKENS
from trainer.spec.flops import clip_flops
from trainer.spec.recipes import remarks
from trainer.spec.shapes import DEBUG_NAMES, FRAME_RATE_HZ, Shape

# Steps are looked at until they have so many rows: each is drawn from the seed, which takes some 40 microseconds.
ROWS_SAMPLED, LEAST_STEPS = 512, 4
CLIPS_WITHOUT_FOLDER = 1000  # clips of full length, by which a dry run reckons where it finds no folder of sounds
NAMES_IN_OUTPUT = ("checkpoints", "lm_final.pt", "huggingface", "audiocraft", "adapter", "text_embedding.safetensors")
NAMES_IN_CACHE = ("codes", "text", "melody")
SAMPLE_PROMPTS, SAMPLE_BYTES_PER_SECOND = 4, 32_000  # of --sample_every: prompts by default, and FLAC of 16 bit


def average_step(order: Order, layout: Layout, shape: Shape, tokens: int, start_step: int) -> float:
    """FLOPs that a process computes in one of the steps that are left, on average, padding and fillers included; in the
    last one where none is left, as in a run that only exports.

    tokens  of a caption, on average
    """
    left = max(1, order.steps - start_step)
    wanted = min(left, max(LEAST_STEPS, ROWS_SAMPLED // order.global_batch))
    steps = sorted({order.steps - left + round(place) for place in np.linspace(0, left - 1, wanted)})
    cut = cut_for(
        order,
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation,
        world_size=layout.world_size,
        row_places=row_places(shape, layout, tokens),
    )
    return sum(_step_flops(order, cut, layout, shape, tokens, step) for step in steps) / len(steps)


def full_step(layout: Layout, shape: Shape, frames: int, tokens: int) -> float:
    """FLOPs that a process computes in a step of as many clips as the layout takes, each of so many frames."""
    rows = layout.accumulation * layout.micro_batch
    return rows * clip_flops(shape, frames, tokens, layout.workload.selection)


def _step_flops(order: Order, cut: Cut, layout: Layout, shape: Shape, tokens: int, step: int) -> float:
    # The first process has the largest of the micro-batches that are computed at the same time, and the others wait.
    total = 0
    for rows in micro_batches(rows_of_step(order, step), cut, rank=0):
        longest = max(row.frames for row in rows)
        frames = steps_of(longest, shape.largest_delay, order.segment_frames)
        total += len(rows) * clip_flops(shape, frames, tokens, layout.workload.selection)
    return total


def of_dry_run(config: Config) -> Callable[[Plan, Shape], str]:
    """What a dry run adds to a plan: the time of epochs and of the run, and the disk that both need."""

    def in_words(plan: Plan, shape: Shape) -> str:
        found = outline_of(config.dataset_path)
        if found is None:
            return _without_folder(config, plan, shape)
        return _of_folder(config, plan, shape, found)

    return in_words


def _of_folder(config: Config, plan: Plan, shape: Shape, found: Outline) -> str:
    layout = plan.layout
    lengths = [seconds for seconds in found.seconds if seconds >= config.min_seconds] or list(found.seconds)
    sounds = max(1, round(found.sounds * len(lengths) / len(found.seconds)))
    order = imagined_order(config, plan, shape, lengths, max(1, round(sounds * (1 - config.validation_share))))
    tokens = 0 if config.no_label else round(found.caption_tokens)
    full = full_step(layout, shape, order.segment_frames, USUAL_TEXT_TOKENS)  # as the plan's time is counted
    share = average_step(order, layout, shape, tokens, 0) / full
    seconds = sounds * sum(lengths) / len(lengths)
    clips = _clips(config, sounds, seconds, tokens)
    disk = _disk(config, plan, shape, clips, order.steps)
    steps = _steps(config, order, share)
    return "\n".join([
        f"{config.dataset_path}: about {sounds:,} sound files, {seconds_in_words(seconds)} in all (by names and the"
        f" headers of {len(found.seconds)})",
        f"expected{_unless_known(plan)}: {time_in_words(plan.time, steps)}",
        *heard_in_words(config, order, shape, FRAME_RATE_HZ),
        *_disk_lines(config, disk),
    ])


def _without_folder(config: Config, plan: Plan, shape: Shape) -> str:
    """By 1,000 clips of full length, where nothing is known of the music."""
    clips = CLIPS_WITHOUT_FOLDER
    order = imagined_order(config, plan, shape, [config.segment_seconds], clips)
    seconds = clips * config.segment_seconds
    disk = _disk(config, plan, shape, _clips(config, clips, seconds, _tokens(config, plan)), order.steps)
    steps = _steps(config, order, 1.0)
    return "\n".join([
        f"no folder of sounds at {config.dataset_path}: by {clips:,} clips of {config.segment_seconds:g} s,",
        f"expected{_unless_known(plan)}: {time_in_words(plan.time, steps)}",
        *heard_in_words(config, order, shape, FRAME_RATE_HZ, known=False),
        *_disk_lines(config, disk),
    ])


def heard_in_words(
    config: Config, order: Order, shape: Shape, frame_rate_hz: float, *, start_step: int = 0, known: bool = True
) -> list[str]:
    """How often the music of this order is heard, and lines that name docs/recipes.md where that is far outside of it.

    start_step  steps that are done already
    known       whether the order is of real music, whose amount counts
    """
    heard = heard_of(order, frame_rate_hz)
    notes = remarks(
        config.selection, shape, learning_rate=config.lr, times=heard.times, steps=order.steps,
        hours=heard.seconds / 3600 if known else None,
    )  # fmt: skip
    return [heard.in_words(early_stop=config.early_stop is not None, start_step=start_step), *notes]


def _tokens(config: Config, plan: Plan) -> int:
    """Tokens of a caption where none was looked at."""
    return 0 if config.no_label else plan.layout.workload.caption_tokens // 4


def _unless_known(plan: Plan) -> str:
    if plan.time is not None:
        return ""
    if not plan.layout.on_gpu:
        return " (how long a step takes on a CPU, a run measures before the first step)"
    return " (how long a step takes is known for some GPUs, see --gpu_name; a run measures it before the first step)"


def imagined_order(config: Config, plan: Plan, shape: Shape, lengths: list[float], clips: int) -> Order:
    """The order of so many clips, whose lengths are these again and again."""
    segment = plan.layout.workload.segment_frames
    frames = np.resize(np.array([max(1, math.floor(FRAME_RATE_HZ * one)) for one in lengths]), (clips, 1))
    return Order(
        seed=config.seed, epochs=config.epochs, global_batch=plan.global_batch, segment_frames=segment,
        codebooks=shape.codebooks, channels=shape.audio_channels, caption_drop_rate=config.caption_drop_rate,
        frames=frames, max_steps=config.max_steps, by_duration=config.sample_by == "duration",
    )  # fmt: skip


def _steps(config: Config, order: Order, share: float) -> Steps:
    return Steps(
        left=order.steps,
        per_epoch=order.crops_per_epoch / order.global_batch,
        share=share,
        early_stop=config.early_stop is not None,
    )


def _clips(config: Config, clips: int, seconds: float, tokens: int) -> Clips:
    """Of the whole folder, the clips to validate on included; a caption is taken to be no other clip's."""
    drawn = config.word_dropout > 0 or config.merge_metadata
    texts = 0 if config.no_label or config.tune_text else clips * (config.caption_variants if drawn else 1)
    return Clips(
        clips=clips, seconds=seconds, views=config.code_views, frame_rate_hz=FRAME_RATE_HZ, texts=texts,
        tokens=texts * tokens,
    )  # fmt: skip


def _disk(config: Config, plan: Plan, shape: Shape, clips: Clips, steps: int) -> Disk:
    # A debug model's T5 is none of the hub's; a folder's is taken to be one, as that of a fine-tuned model is.
    return disk_of(
        shape, plan.layout.workload, clips, keep_best=config.keep_best,
        own_text_encoder=config.model_id in DEBUG_NAMES,
        step_files=0 if config.save_step is None else steps // config.save_step,
        sounds=sounds_bytes(config, shape, SAMPLE_PROMPTS, steps),
    )  # fmt: skip


def sounds_bytes(config: Config, shape: Shape, prompts: int, steps: int) -> int:
    """Bytes of the sounds of --sample_every in so many steps, those before the first and after the last included."""
    if config.sample_every is None:
        return 0
    times = 1 + steps // config.sample_every + (steps % config.sample_every > 0)
    return round(times * prompts * config.sample_seconds * SAMPLE_BYTES_PER_SECOND * shape.audio_channels)


def _disk_lines(config: Config, disk: Disk) -> list[str]:
    output, cache = place_of(config.output_dir, NAMES_IN_OUTPUT), place_of(config.cache_dir, NAMES_IN_CACHE)
    return told(disk, output, cache, cached=False)
