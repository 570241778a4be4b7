"""From the flags to the sounds that a run makes while it trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import soundfile
from torch import Tensor

from trainer.data.prompt_states import SamplePrompts, prepare_prompts
from trainer.data.sample_prompts import SamplePrompt
from trainer.evaluation import samples
from trainer.evaluation.generation import Sampling
from trainer.evaluation.sampler import SampledModel, Sampler, SampleSettings
from trainer.evaluation.samples import StepSamples
from trainer.model.language_model import LanguageModel
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import load_codec
from trainer.preflight import check_melody_samples
from trainer.run.metrics import Sound
from trainer.spec.trigger import in_a_shell

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from trainer.data.dataset import Dataset, DataSettings
    from trainer.engine import Engine, Ranks
    from trainer.flags.config import Config
    from trainer.model.source import Source
    from trainer.plan.plan import Plan
    from trainer.run.checkpoint import Checkpoint
    from trainer.run.metrics import Tracker
    from trainer.run.output_dir import OutputDir
    from trainer.run.signals import StopRequest
    from trainer.training.loop import Run

# MusicGen was trained on crops of 30 s; longer pieces lose their thread.
TRAINED_SECONDS = 30.0


def refuse_sampling(config: Config, source: Source) -> None:
    """Raise ConfigError where the installed transformers cannot generate with this model, and sounds are asked for.

    Of models that are known by name, trainer/preflight.py has said so before.
    """
    if source.melody:
        check_melody_samples(config)


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


def sample_prompts_of(
    config: Config, settings: DataSettings, source: Source, data: Dataset, device: torch.device, ranks: Ranks
) -> SamplePrompts | None:
    """What the run will play, with T5's states of it in the cache; None without --sample_every. A collective."""
    if config.sample_every is None:
        return None
    if config.sample_seconds > TRAINED_SECONDS:
        ranks.say(f"note: the models were trained on {TRAINED_SECONDS:g} s; beyond that music loses its thread")
    given, continued = config.sample_prompts, config.sample_continue
    frames = round(config.sample_seconds * source.frame_rate_hz)
    return prepare_prompts(
        settings, source, device, data, given=given, continue_seconds=continued, frames=frames, peers=ranks
    )


def sampler_of(
    config: Config,
    source: Source,
    run: Run,
    engine: Engine,
    folder: OutputDir,
    tracker: Tracker,
    stop: StopRequest,
) -> Callable[[int], bool]:
    """What makes the sounds of a step, and says whether a stop has cut them short."""
    if run.prompts is None:
        return lambda step: False
    settings = SampleSettings(
        folder=folder.samples,
        prompts=run.prompts.prompts,
        frames=round(config.sample_seconds * source.frame_rate_hz),
        frame_rate_hz=source.frame_rate_hz,
        sample_rate_hz=source.sample_rate_hz,
        sampling=Sampling(
            guidance=config.sample_guidance, temperature=config.sample_temperature, top_k=config.sample_top_k
        ),
        weights="live" if config.ema_decay is None else "ema",
        device=engine.device,
        melody=source.melody,
    )
    model = SampledModel(
        language_model=engine.sampling_model,
        text_states=partial(_text_states, run.prompts),
        codec=partial(load_codec, source),
    )
    return Sampler(
        settings,
        model,
        engine.ranks,
        stopping=lambda: stop.name is not None,
        on_finished=partial(_track, tracker, folder.samples),
    )


def tell_how_to_listen(config: Config, plan: Plan) -> Callable[[int, Path], None]:
    """Says of each checkpoint how to hear it, where the plan has no room for samples and none were asked for."""

    def tell(step: int, checkpoint: Path) -> None:
        print(
            f"checkpoint of step {step}; to hear it: python scripts/generate.py --model {checkpoint}"
            f" --prompt {example} --seconds {config.sample_seconds:g}"
        )

    trigger = config.caption_trigger
    example = in_a_shell("..." if trigger is None else trigger.put_into("..."))
    # What a word learns is in no file that generate.py reads before the run's end or --save_step.
    silent = config.sample_every is not None or plan.samples_fit or config.tune_text
    return (lambda step, checkpoint: None) if silent else tell


def _text_states(prompts: SamplePrompts, model: LanguageModel, prompt: SamplePrompt) -> Tensor | None:
    """T5's states of a prompt: those of the cache, or by T5 with the rows of a learned word as they are now."""
    return prompts.states(prompt, model if isinstance(model, TextTunedModel) else None)


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
