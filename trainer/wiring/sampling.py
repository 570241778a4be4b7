"""From the flags to the sounds that a run makes while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import soundfile
import torch
from torch import Tensor

from trainer.data import sample_prompts
from trainer.data.sample_prompts import SamplePrompt
from trainer.evaluation import samples
from trainer.evaluation.generation import Sampling
from trainer.evaluation.sampler import SampledModel, Sampler, SampleSettings
from trainer.evaluation.samples import StepSamples
from trainer.model.language_model import LanguageModel
from trainer.model.new_word import extended_tokenizer
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import load_codec
from trainer.run.metrics import Sound

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.engine import Engine, Ranks
    from trainer.flags.config import Config
    from trainer.model.source import Source
    from trainer.run.checkpoint import Checkpoint
    from trainer.run.metrics import Tracker
    from trainer.run.output_dir import OutputDir
    from trainer.run.signals import StopRequest
    from trainer.training.loop import Run


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What sounds are made of. `states` has T5's states (S, D) float32 by a prompt's text; none where T5 learns."""

    prompts: tuple[SamplePrompt, ...]
    states: Mapping[str, Tensor | None]


def put_aside(folder: OutputDir, checkpoint: Checkpoint | None, ranks: Ranks) -> None:
    """Move the sounds of steps that this run computes anew out of their way; on the first process."""
    if not ranks.is_first:
        return
    try:
        moved = samples.move_later(folder.samples, -1 if checkpoint is None else checkpoint.step)
    except OSError as error:
        print(f"warning: the samples of later steps in {folder.samples} cannot be moved aside: {error}")
        return
    if moved:
        print(f"samples of {len(moved)} later steps, which are computed again, are in {folder.samples}/replaced-*")


def sample_prompts_of(config: Config, source: Source, run: Run, device: torch.device) -> Prompts | None:
    """The prompts of --sample_prompts or of the dataset; None without --sample_every.

    Before the engine is built, since T5 may have to be on the device for them.
    """
    if config.sample_every is None:
        return None
    prompts = sample_prompts.temp_choose(
        run.train, seed=config.seed, given=config.sample_prompts,
        continued_frames=round((config.sample_continue or 0) * source.frame_rate_hz),
    )  # fmt: skip
    states = {} if config.tune_text else sample_prompts.temp_states(source, prompts, device)
    return Prompts(prompts=prompts, states=states)


def sampler_of(
    config: Config,
    source: Source,
    prompts: Prompts,
    engine: Engine,
    folder: OutputDir,
    tracker: Tracker,
    stop: StopRequest,
) -> Sampler:
    """What makes the sounds of a step."""
    settings = SampleSettings(
        folder=folder.samples,
        prompts=prompts.prompts,
        frames=round(config.sample_seconds * source.frame_rate_hz),
        frame_rate_hz=source.frame_rate_hz,
        sample_rate_hz=source.sample_rate_hz,
        sampling=Sampling(
            guidance=config.sample_guidance, temperature=config.sample_temperature, top_k=config.sample_top_k
        ),
        weights="live" if config.ema_decay is None else "ema",
        device=engine.device,
    )
    model = SampledModel(
        language_model=engine.sampling_model,
        text_states=_text_states(config, source, prompts),
        codec=partial(load_codec, source),
    )
    return Sampler(
        settings,
        model,
        engine.ranks,
        stopping=lambda: stop.name is not None,
        on_finished=partial(_track, tracker, folder.samples),
    )


def _text_states(
    config: Config, source: Source, prompts: Prompts
) -> Callable[[LanguageModel, SamplePrompt], Tensor | None]:
    """T5's states of a prompt: those that are there already, or by T5 with the rows of a word as they are now."""
    if config.new_word is None:
        return lambda model, prompt: prompts.states[prompt.text]
    tokenizer = extended_tokenizer(source.load_tokenizer(), config.new_word.placeholder)

    def by_rows_of_now(model: LanguageModel, prompt: SamplePrompt) -> Tensor | None:
        if not prompt.text.strip():
            return None
        assert isinstance(model, TextTunedModel)
        tokens = tokenizer(prompt.text, truncation=False, verbose=False).input_ids
        return model.text_states(torch.tensor([tokens], device=model.text_rows.device), None)[0]

    return by_rows_of_now


def _track(tracker: Tracker, folder: Path, made: StepSamples) -> None:
    """Send a step's sounds to the trackers, each under the name and prompt that it has at every step."""
    at = samples.step_folder(folder, made.step)
    sounds = [
        Sound(name=f"samples/{sample.file.removesuffix('.flac')}", caption=sample.prompt, path=at / sample.file)
        for sample in made.samples
        if sample.file is not None
    ]
    try:
        tracker.log_sounds(made.step, sounds)
    except (OSError, soundfile.LibsndfileError) as error:
        print(f"warning: the samples of step {made.step} could not be sent to the trackers: {error}")
