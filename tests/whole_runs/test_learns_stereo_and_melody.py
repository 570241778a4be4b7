"""Stereo and melody models learn: clips come back code by code, by their melodies where their captions are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.plans import engine_for, plan_for
from tests.synthetic import HEADER, RandomCodes, random_examples
from trainer.data.batches import Batch, Examples
from trainer.data.order import Order, Row
from trainer.evaluation.generation import Sampling, generate_codes
from trainer.flags.config import Config
from trainer.model.delay_pattern import IGNORED, delay
from trainer.model.language_model import LanguageModel
from trainer.model.source import open_model
from trainer.run.checkpoint import Saver
from trainer.run.signals import StopRequest
from trainer.training.loop import Intervals, Run, train
from trainer.training.schedule import Schedule

pytestmark = pytest.mark.numbers
CAPTION = "a slow tune"


class Silent:
    def log(self, values: object) -> None: ...


def learned(
    model_id: str, folder: Path, *, clips: int, frames: int, steps: int
) -> tuple[Examples, LanguageModel]:
    """Clips of random codes with one caption, and a model that the loop and its engine have trained on them."""
    examples = random_examples([frames] * clips, [CAPTION] * clips, segment_frames=frames, model=model_id)
    shape = examples.shape
    examples = replace(examples, codes=RandomCodes([frames] * clips, views=1, codebooks=shape.codebooks))
    order = Order(
        seed=2, epochs=steps, global_batch=clips, segment_frames=frames, codebooks=shape.codebooks,
        channels=shape.audio_channels, caption_drop_rate=0.0, frames=examples.codes.frames,
    )  # fmt: skip
    plan = plan_for(micro_batch=clips, global_batch=clips)
    intervals = Intervals(log_steps=steps, validation_steps=None, save_step=None, checkpoint_minutes=99.0)
    run = Run(
        plan=plan, order=order, schedule=Schedule(peak=5e-3, steps=steps, warmup_steps=8), train=examples,
        validation=None, intervals=intervals, hours=0.0, header=HEADER, on_save_step=lambda saved: None,
    )  # fmt: skip
    engine = engine_for(plan, Config(dataset_path="unused"), open_model(model_id))
    with StopRequest() as stop:
        assert train(run, engine, Saver(folder), Silent(), stop, 0) == steps
    return examples, engine.backend.model.eval()


def conditions(examples: Examples, clip: int) -> Batch:
    """The clip alone, uncropped, with its caption and melody."""
    frames = int(examples.codes.frames[clip, 0])
    return examples.batch([Row(clip=clip, epoch=0, view=0, start=0, frames=frames, drop_caption=False)])


def greedy(model: LanguageModel, batch: Batch, channels: int) -> Tensor:
    """The delayed codes (K, T) that `generate_codes` makes of a batch's caption and melody.

    They are -100 where the delay pattern has no code. Nothing of the batch's own codes is read.
    """
    melody_C = None if batch.melody_BC is None else batch.melody_BC[0]
    sampling, frames = Sampling(guidance=1.0, greedy=True), batch.labels_BKT.shape[-1]
    made_KT = generate_codes(model, batch.text_BSD[0], frames=frames, sampling=sampling, melody_C=melody_C)
    assert made_KT is not None
    return delay(made_KT[None], IGNORED, channels)[0]


def assert_played_back(examples: Examples, model: LanguageModel) -> None:
    batches = [conditions(examples, clip) for clip in range(len(examples.captions))]
    made = [greedy(model, batch, examples.shape.audio_channels) for batch in batches]
    for clip, batch in enumerate(batches):
        right = (made[clip] == batch.labels_BKT[0]).float().mean()
        assert torch.equal(made[clip], batch.labels_BKT[0]), f"clip {clip}: {right:.2%} right"
    if len(batches) == 1:
        return
    # The captions are the same, so that the melody has chosen; and the clips differ, or this would prove nothing.
    assert torch.equal(batches[0].text_BSD, batches[1].text_BSD)
    assert (made[0] == made[1])[batches[0].labels_BKT[0] >= 0].float().mean() < 0.1


def assert_channels_differ(examples: Examples) -> None:
    left, right = np.split(examples.codes.clips[0][0].reshape(4, 2, -1), 2, axis=1)
    assert (left == right).mean() < 0.1


def test_two_clips_of_one_caption_are_played_back_by_their_melodies(tmp_path: Path) -> None:
    examples, model = learned("debug-melody", tmp_path, clips=2, frames=16, steps=90)
    assert_played_back(examples, model)


def test_a_stereo_clips_channels_are_played_back(tmp_path: Path) -> None:
    examples, model = learned("debug-stereo", tmp_path, clips=1, frames=24, steps=90)
    assert_played_back(examples, model)
    assert_channels_differ(examples)


@pytest.mark.full
@pytest.mark.parametrize("model_id", ["debug-melody", "debug-stereo-melody"])
def test_three_seconds_of_two_clips_are_played_back_by_their_melodies(model_id: str, tmp_path: Path) -> None:
    examples, model = learned(model_id, tmp_path, clips=2, frames=150, steps=150)
    assert_played_back(examples, model)
    if "stereo" in model_id:
        assert_channels_differ(examples)
