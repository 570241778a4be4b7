"""The sounds of a step while a run trains: each process makes its share of them, and nothing of the training changes.

What fails here is a warning and never the end of a run: training goes on without this sound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import soundfile
import torch
from torch import Tensor
from transformers import EncodecModel

from trainer.atomic import is_there
from trainer.data.sample_prompts import SamplePrompt
from trainer.errors import MemoryShortError, ModelError
from trainer.evaluation import samples
from trainer.evaluation.generation import Sampling, decode, generate_codes
from trainer.evaluation.samples import Sample, StepSamples
from trainer.model.language_model import LanguageModel
from trainer.model.source import free_unused

# What can befall a sound without a defect of the program. Of the store and of collectives come plain RuntimeErrors and
# ConnectionErrors, which end the run as ever; the first are not among these, the second not where these are caught.
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class Peers(Protocol):
    """The processes of the run; trainer.engine.Ranks is one that has some. All call the same methods in one order."""

    rank: int
    world_size: int

    def wait(self, what: str, *, meanwhile: Callable[[], object] = ...) -> None:
        """Return once every process has called this, however long that takes; call `meanwhile` until then."""

    def gather(self, value: Any) -> list[Any]:
        """The small `value` of every process, in order of ranks. Only after `wait`: it may time out."""

    def any_asks(self, what: str, asks: bool) -> bool:
        """Whether any process asks; not a collective."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What is made at each step, and how.

    folder    samples/ of the run
    frames    of the codec, of each sound; where it goes on from a clip, those of the clip included
    sampling  how codes are chosen; its seed is replaced by that of each prompt
    weights   which weights are heard
    melody    whether the model reads melodies
    device    where EnCodec decodes
    """

    folder: Path
    prompts: Sequence[SamplePrompt]
    frames: int
    frame_rate_hz: float
    sample_rate_hz: int
    sampling: Sampling
    weights: Literal["live", "ema"]
    device: torch.device
    melody: bool = False


@dataclass(frozen=True, kw_only=True)
class SampledModel:
    """The model of the moment.

    language_model  gives the language model while it is entered; see Engine.sampling_model. All processes enter it
                    together and leave it together
    text_states     T5's states of a prompt, (S, D) float32, or None for no prompt; it gets that language model
    codec           loads EnCodec
    """

    language_model: Callable[[], AbstractContextManager[LanguageModel]]
    text_states: Callable[[LanguageModel, SamplePrompt], Tensor | None]
    codec: Callable[[], EncodecModel]


class Sampler:
    """Makes the sounds of one step after the other. What it must keep in mind is which warnings it has given."""

    def __init__(
        self,
        settings: SampleSettings,
        model: SampledModel,
        peers: Peers,
        *,
        stopping: Callable[[], bool],
        on_finished: Callable[[StepSamples], None],
    ):
        """stopping: whether this process was asked to end. on_finished: called on the first process with a step's
        sounds, unless the run was killed after this step before."""
        self._settings, self._model, self._peers = settings, model, peers
        self._stopping, self._on_finished = stopping, on_finished
        self._warned: set[str] = set()
        self._announced = False

    def __call__(self, step: int) -> bool:
        """Make the sounds of `step`, unless they are there; every process calls this after the same step.

        Returns whether they are unfinished because a process was asked to end, the same on all of them. Those that were
        not done are left out then.
        """
        what = f"samples of step {step}"
        self._peers.wait(what)  # not in a collective: a rank may come from a disk that is slow
        asked = self._peers.gather((self._peers.rank == 0 and self._begin(step), self._stopping()))
        if not asked[0][0]:
            return False
        if any(stops for _, stops in asked):  # before the weights of a large model are put together
            return True
        self._announce(step)
        since = time.monotonic()
        stop = _Stop(self._peers, f"end of the {what}", self._stopping)
        own = self._make(step, stop)
        self._peers.wait(f"{what}, made", meanwhile=stop)
        made = self._peers.gather(None if stop() else own)
        if None in made:
            return True
        if self._peers.rank == 0:
            self._finish(step, dict(part for of_rank in made for part in of_rank.items()), time.monotonic() - since)
        return False

    def _announce(self, step: int) -> None:
        """Say, the first time, why nothing seems to happen for a while."""
        if self._peers.rank == 0 and not self._announced:
            length = self._settings.frames / self._settings.frame_rate_hz
            print(f"making {len(self._settings.prompts)} sounds of {length:g} s of step {step} ...", flush=True)
        self._announced = True

    def _begin(self, step: int) -> bool:
        """Whether there is something to make, with a folder to put it in."""
        folder = self._settings.folder
        try:
            if samples.is_finished(folder, step):
                return False
            samples.begin(folder, step)
        except OSError as error:
            self._warn(f"samples of step {step} are not made: {samples.step_folder(folder, step)}", _in_words(error))
            return False
        return True

    def _make(self, step: int, stop: Callable[[], bool]) -> dict[int, Sample]:
        """This process's sounds, by the number of their prompt from 1; without those that a stop cut short."""
        numbers = range(1 + self._peers.rank, 1 + len(self._settings.prompts), self._peers.world_size)
        prompts = {number: self._settings.prompts[number - 1] for number in numbers}
        done: dict[int, Sample] = {}
        try:
            with self._model.language_model() as model:
                codes = self._codes(model, prompts, done, stop)
                # The others are waited for here, where a request is passed on; leaving the block waits too.
                self._peers.wait(f"codes of step {step}", meanwhile=stop)
        except (MemoryShortError, ModelError) as error:  # raised on entering it, on every rank
            return {number: self._sample(prompt, error=_in_words(error)) for number, prompt in prompts.items()}
        if codes and not stop():
            self._decode(step, prompts, codes, done, stop)
            free_unused(self._settings.device)
        return done

    def _codes(
        self, model: LanguageModel, prompts: dict[int, SamplePrompt], done: dict[int, Sample], stop: Callable[[], bool]
    ) -> dict[int, Tensor]:
        """The codes of each prompt, up to a stop; what fails goes into `done`. Nothing collective happens here."""
        codes: dict[int, Tensor] = {}
        for number, prompt in prompts.items():
            try:
                found = generate_codes(
                    model,
                    self._model.text_states(model, prompt),
                    frames=self._settings.frames,
                    sampling=replace(self._settings.sampling, seed=prompt.seed),
                    prefix_KT=prompt.prefix_KT,
                    should_stop=stop,
                    melody_C=prompt.melody_C,
                )
            except (*OUT_OF_MEMORY, ModelError) as error:
                done[number] = self._sample(prompt, error=_in_words(error))
                continue
            if found is None:
                break
            codes[number] = found
        return codes

    def _decode(
        self,
        step: int,
        prompts: dict[int, SamplePrompt],
        codes: dict[int, Tensor],
        done: dict[int, Sample],
        stop: Callable[[], bool],
    ) -> None:
        """Write the sounds of these codes, and add them to `done`. EnCodec is on the device only meanwhile."""
        try:
            with torch.random.fork_rng(devices=[]):  # transformers draws the first values of what it then loads
                codec = self._model.codec().to(self._settings.device)
        except (*OUT_OF_MEMORY, ModelError, OSError) as error:
            done.update({number: self._sample(prompts[number], error=_in_words(error)) for number in codes})
            return
        for number, codes_KT in codes.items():
            if stop():
                break
            prompt = prompts[number]
            name = samples.file_name(number, prompt.text, "flac")
            try:
                audio = decode(codec, codes_KT)
                path = samples.step_folder(self._settings.folder, step) / name
                samples.write_sound(path, audio, self._settings.sample_rate_hz)
                clip_file, seconds = self._clip(prompt, codec), len(audio) / self._settings.sample_rate_hz
                done[number] = replace(self._sample(prompt, file=name, seconds=seconds), clip_file=clip_file)
            except (*OUT_OF_MEMORY, ModelError, OSError, soundfile.LibsndfileError) as error:
                done[number] = self._sample(prompt, error=_in_words(error))

    def _clip(self, prompt: SamplePrompt, codec: EncodecModel) -> str | None:
        """The name of the file with the beginning of the prompt's clip, which is made once; None without a clip."""
        if prompt.clip is None or prompt.clip_KT is None:
            return None
        path = samples.clip_path(self._settings.folder, prompt.clip, prompt.clip_KT.shape[1])
        if not is_there(path):
            path.parent.mkdir(exist_ok=True)
            samples.write_sound(path, decode(codec, prompt.clip_KT), self._settings.sample_rate_hz, shared=True)
        return path.name

    def _sample(
        self, prompt: SamplePrompt, *, file: str | None = None, seconds: float = 0.0, error: str | None = None
    ) -> Sample:
        continued = 0 if prompt.prefix_KT is None else prompt.prefix_KT.shape[1]
        return Sample(
            file=file,
            prompt=prompt.text,
            seed=prompt.seed,
            seconds=seconds,
            origin=prompt.origin,
            clip=prompt.clip,
            continued_seconds=continued / self._settings.frame_rate_hz,
            error=error,
            melody=prompt.melody_C is not None if self._settings.melody else None,
        )

    def _finish(self, step: int, made: dict[int, Sample], seconds: float) -> None:
        """Write the list of the step's sounds, and tell of them."""
        settings = self._settings
        result = StepSamples(
            step=step,
            time=time.time(),
            sample_rate_hz=settings.sample_rate_hz,
            guidance=settings.sampling.guidance,
            temperature=settings.sampling.temperature,
            top_k=settings.sampling.top_k,
            weights=settings.weights,
            samples=tuple(made[number] for number in sorted(made)),
        )
        folder = samples.step_folder(settings.folder, step)
        for number, sample in sorted(made.items()):
            if sample.error is not None:
                self._warn(f"sample {number} of step {step} ({sample.prompt or 'no prompt'})", sample.error)
        try:
            sent_before = samples.was_replaced(settings.folder, step)
            samples.finish(settings.folder, result)
        except OSError as error:
            self._warn(f"{folder / samples.LIST} could not be written", _in_words(error))
            return
        there = [sample for sample in result.samples if sample.file is not None]
        if there:
            length = settings.frames / settings.frame_rate_hz
            print(f"samples of step {step}: {folder} ({len(there)} sounds of {length:g} s in {seconds:.0f} s)")
        if not sent_before:
            self._on_finished(result)

    def _warn(self, what: str, reason: str) -> None:
        """Say it, unless the same reason was given before: a disk that is full stays so for many steps."""
        if reason not in self._warned:
            print(f"warning: {what}: {reason}. The training goes on; the same reason is not told again")
        self._warned.add(reason)


class _Stop:
    """Whether any process was asked to end; once it is true it stays so."""

    def __init__(self, peers: Peers, what: str, stopping: Callable[[], bool]):
        self._peers, self._what, self._stopping = peers, what, stopping

    def __call__(self) -> bool:
        return self._peers.any_asks(self._what, self._stopping())


def _in_words(error: BaseException) -> str:
    """On one line, without the path that differs from step to step; never empty."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
