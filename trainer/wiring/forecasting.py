"""From the flags and the data to what is told of a run before it trains: its time and its disk.

trainer/outlook.py has the same of a dry run, which knows less.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from trainer.exports.audiocraft_config import text_encoder_name
from trainer.model.source import CODEC, TEXT_ENCODER
from trainer.outlook import (
    NAMES_IN_CACHE,
    NAMES_IN_OUTPUT,
    average_step,
    full_step,
    heard_in_words,
    sounds_bytes,
)
from trainer.plan.disk import place_of, told
from trainer.plan.forecast import Clips, Steps, disk_of, seconds_in_words, step_seconds, time_in_words
from trainer.plan.time import USUAL_TEXT_TOKENS
from trainer.report.run_facts import START
from trainer.training.loop import worst_case

if TYPE_CHECKING:
    from trainer.data.batches import Batch, Examples
    from trainer.flags.config import Config
    from trainer.model.source import Source
    from trainer.model.weights import Weights
    from trainer.plan.forecast import Disk
    from trainer.plan.time import StepTime
    from trainer.run.output_dir import OutputDir
    from trainer.spec.shapes import Shape
    from trainer.training.loop import Run

PUBLISHED_ROWS = 32_128  # of the embedding of every T5 on the hub, for 32,100 tokens
TEXTS_COUNTED = 256  # whose tokens are taken for those of all captions


def expected_in_words(config: Config, run: Run, source: Source, folder: OutputDir, start_step: int) -> str:
    """What a run is expected to take from `start_step` on, how often it hears its music, and the disk that it needs, as
    lines; before it trains."""
    layout, shape = run.plan.layout, run.train.shape
    full = full_step(layout, shape, layout.workload.segment_frames, USUAL_TEXT_TOKENS)
    disk = disk_of_run(config, run, source, start_step)
    output, cache = place_of(str(folder.root), NAMES_IN_OUTPUT), place_of(config.cache_dir, NAMES_IN_CACHE)
    words = time_in_words(run.plan.time, steps_of_run(config, run, start_step, full))
    measured = "" if run.plan.time is not None else " (how long a step takes is measured before the first step)"
    heard = heard_in_words(config, run.order, shape, source.frame_rate_hz, start_step=start_step)
    return "\n".join([f"expected{measured}: {words}", *heard, *told(disk, output, cache, cached=True)])


def measured_in_words(config: Config, run: Run, time: StepTime, start_step: int) -> str:
    """What a run takes from `start_step` on by what a full step took in the rehearsal, beside what was expected."""
    expected = "" if run.plan.time is None else f" (expected {seconds_in_words(run.plan.time.seconds)})"
    words = time_in_words(_not_below_the_host(time, run), _measured_steps(config, run, start_step))
    return f"measured: {seconds_in_words(time.seconds)} for a full step{expected}; on average {words}"


def record_forecast(
    config: Config, run: Run, source: Source, folder: OutputDir, measured: StepTime, start_step: int
) -> None:
    """Add to run.json what was expected and measured before this start's first step."""
    steps = _measured_steps(config, run, start_step)
    each = step_seconds(_not_below_the_host(measured, run), steps.share)
    disk = disk_of_run(config, run, source, start_step)
    folder.write_json(START, folder.read_json(START) | {"forecast": {
        "full_step_seconds_expected": None if run.plan.time is None else run.plan.time.seconds,
        "full_step_seconds_measured": measured.seconds,
        "step_seconds": each,
        "epoch_seconds": each * steps.per_epoch,
        "steps_left": steps.left,
        "seconds_left": each * steps.left,
        "end": time.time() + each * steps.left,
        "cache_bytes": disk.cache,
        "checkpoint_bytes": disk.checkpoint,
        "checkpoints": disk.checkpoints,
        "export_bytes": sum(disk.exports.values()),
    }})  # fmt: skip


def steps_of_run(config: Config, run: Run, start_step: int, full: float) -> Steps:
    """What is left of a run. full: FLOPs of a step that `Steps.share` is a share of"""
    tokens = round(_mean_tokens(run.train))
    mean = average_step(run.order, run.plan.layout, run.train.shape, tokens, start_step)
    return Steps(
        left=run.order.steps - start_step,
        per_epoch=run.order.crops_per_epoch / run.order.global_batch,
        share=mean / full,
        early_stop=config.early_stop is not None,
    )


def _measured_steps(config: Config, run: Run, start_step: int) -> Steps:
    """The same by the rehearsed step."""
    largest: Batch = worst_case(run)
    frames, tokens = largest.inputs_BKT.shape[2], largest.text_mask_BS.shape[1]
    return steps_of_run(config, run, start_step, full_step(run.plan.layout, run.train.shape, frames, tokens))


def _not_below_the_host(measured: StepTime, run: Run) -> StepTime:
    """With what the host needs for a step of short clips, where the GPU is one for which that is known."""
    return measured if run.plan.time is None else replace(measured, least_compute=run.plan.time.least_compute)


def disk_of_run(config: Config, run: Run, source: Source, start_step: int) -> Disk:
    """What a run puts onto disk, by the sizes of its own EnCodec and T5."""
    steps = run.order.steps
    return disk_of(
        _own_shape(source, run.train.shape),
        run.plan.layout.workload,
        _cached(run, source),
        keep_best=config.keep_best,
        own_text_encoder=_has_own_text_encoder(source),
        step_files=0 if config.save_step is None else steps // config.save_step - start_step // config.save_step,
        sounds=sounds_bytes(
            config, run.train.shape, 0 if run.prompts is None else len(run.prompts.prompts), steps - start_step
        ),
    )


def _has_own_text_encoder(source: Source) -> bool:
    """Whether T5 is exported into audiocraft/ too, by what is known without loading its tokenizer."""
    text_encoder = source.config.text_encoder
    return text_encoder._name_or_path != text_encoder_name(source.config) or text_encoder.vocab_size != PUBLISHED_ROWS


def _own_shape(source: Source, shape: Shape) -> Shape:
    """The shape with the sizes of the model's own EnCodec and T5, as they are exported."""
    text = source.weights.starting_with(TEXT_ENCODER)
    text_encoder = _values(text, but="embed_tokens.weight")  # which is `shared.weight`, or in its place
    return replace(shape, text_encoder=text_encoder, frozen=text_encoder + _values(source.weights.starting_with(CODEC)))


def _values(weights: Weights, but: str | None = None) -> int:
    return sum(math.prod(weights.shape(name)) for name in weights if but is None or not name.endswith(but))


def _cached(run: Run, source: Source) -> Clips:
    """The clips of training and validation, and the texts that are encoded for them."""
    parts = [part for part in (run.train, run.validation) if part is not None]
    texts = set() if run.train.token_ids else set(itertools.chain.from_iterable(part.all_texts() for part in parts))
    mean = _mean_tokens(run.train)
    return Clips(
        clips=sum(len(part.captions) for part in parts),
        seconds=sum(float(part.codes.frames.mean(axis=1).sum()) for part in parts) / source.frame_rate_hz,
        views=run.train.codes.frames.shape[1],
        frame_rate_hz=source.frame_rate_hz,
        texts=len(texts),
        tokens=round(len(texts) * mean),
    )


def _mean_tokens(examples: Examples) -> float:
    """Tokens of a caption, on average over some; 0 where there are none."""
    counts = [examples.text.tokens(text) for text in itertools.islice(examples.all_texts(), TEXTS_COUNTED)]
    return sum(counts) / len(counts) if counts else 0.0
