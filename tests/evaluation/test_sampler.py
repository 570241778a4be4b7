"""The sounds of a step: those of scripts/generate.py, and what fails among them is a warning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from tests.living import left_behind
from tests.plans import plan_for
from tests.synthetic import HEADER
from trainer import wiring
from trainer.data.peers import Alone
from trainer.data.sample_prompts import SamplePrompt
from trainer.data.text_states import text_states
from trainer.errors import MemoryShortError, ModelError
from trainer.evaluation import sampler, samples
from trainer.evaluation.generation import Sampling, decode, generate, load_for_generation, write_wav
from trainer.evaluation.sampler import SampledModel, Sampler, SampleSettings
from trainer.evaluation.samples import StepSamples
from trainer.flags.config import Config
from trainer.model.language_model import load_language_model
from trainer.model.source import load_codec, open_model
from trainer.run.checkpoint import FlatSlice, Saver

FRAMES = 12
SOURCE = open_model("debug")
WHOLE = load_for_generation(SOURCE, torch.device("cpu"))
PROMPTS = (
    SamplePrompt(text="slow rock", seed=7, origin="caption", clip="a.wav", prefix_KT=None),
    SamplePrompt(text="", seed=8, origin="unknown", clip=None, prefix_KT=None),
    SamplePrompt(
        text="jazz", seed=9, origin="continuation", clip="b.wav", prefix_KT=torch.arange(20).reshape(4, 5)
    ),
)  # fmt: skip


class OneProcess(Alone):
    """What trainer.engine.Ranks is for a run of one process."""

    def wait(self, what: str, *, meanwhile: Callable[[], object] = lambda: None) -> None:
        meanwhile()

    def any_asks(self, what: str, asks: bool) -> bool:
        return asks


@contextlib.contextmanager
def whole_model() -> Iterator[Any]:
    with torch.no_grad():
        yield WHOLE.language_model


def sampler_into(folder: Path, *, stopping: Callable[[], bool] = lambda: False, **changes: Any) -> Sampler:
    model = {
        "language_model": whole_model,
        "text_states": lambda model, prompt: text_states(WHOLE.text_encoder, WHOLE.tokenizer, prompt.text),
        "codec": lambda: load_codec(SOURCE),
    }
    settings = SampleSettings(
        folder=folder, prompts=PROMPTS, frames=FRAMES, frame_rate_hz=50.0, sample_rate_hz=32000,
        sampling=Sampling(guidance=2.0, top_k=50), weights="live", device=torch.device("cpu"),
    )  # fmt: skip
    told: list[StepSamples] = changes.pop("told", [])
    return Sampler(settings, SampledModel(**model | changes), OneProcess(), stopping=stopping, on_finished=told.append)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_each_sound_is_the_one_that_generate_writes_and_the_list_says_how_to_make_it(tmp_path, capsys):
    told: list[StepSamples] = []
    sampler_into(tmp_path, told=told)(120)
    names = ["01_slow_rock.flac", "02_no_prompt.flac", "03_jazz.flac"]
    assert files(tmp_path) == [*(f"step-00000120/{name}" for name in names), "step-00000120/samples.json"]
    listed = samples.read(tmp_path, 120)
    assert told == [listed] and [sample.file for sample in listed.samples] == names
    assert (listed.step, listed.guidance, listed.top_k, listed.weights) == (120, 2.0, 50, "live")
    for prompt, sample in zip(PROMPTS, listed.samples, strict=True):
        assert (sample.prompt, sample.seed, sample.origin, sample.clip) == (
            prompt.text, prompt.seed, prompt.origin, prompt.clip
        )  # fmt: skip
        sampling = Sampling(guidance=listed.guidance, top_k=listed.top_k, seed=sample.seed)
        expected = generate(WHOLE, sample.prompt, frames=FRAMES, sampling=sampling, prefix_KT=prompt.prefix_KT)
        write_wav(tmp_path / "expected.wav", expected.audio, 32000)
        found = soundfile.read(tmp_path / "step-00000120" / sample.file, dtype="int16")[0]
        assert np.array_equal(found, soundfile.read(tmp_path / "expected.wav", dtype="int16")[0])
        assert sample.seconds == len(found) / 32000
    assert [sample.continued_seconds for sample in listed.samples] == [0, 0, 0.1]
    assert f"samples of step 120: {tmp_path / 'step-00000120'} (3 sounds" in capsys.readouterr().out


def test_the_codec_is_gone_when_the_sounds_are_there(tmp_path):
    with left_behind(nn.Module) as found:
        sampler_into(tmp_path)(1)
    assert (found, len(samples.read(tmp_path, 1).samples)) == ([], 3)


def test_the_clip_of_a_prompt_is_heard_beside_its_sounds_and_written_once(tmp_path):
    clip_KT = torch.arange(32).reshape(4, 8)
    prompts = tuple(replace(prompt, clip_KT=None if prompt.clip is None else clip_KT) for prompt in PROMPTS)
    made = sampler_into(tmp_path)
    made._settings = replace(made._settings, prompts=prompts)
    made(1)
    [first, none, other] = [sample.clip_file for sample in samples.read(tmp_path, 1).samples]
    assert none is None and first != other and files(tmp_path)[:2] == sorted(f"clips/{name}" for name in (first, other))
    write_wav(tmp_path / "expected.wav", decode(WHOLE.codec, clip_KT), 32000)
    found = soundfile.read(tmp_path / "clips" / first, dtype="int16")[0]
    assert len(found) == 8 * 640 and np.array_equal(found, soundfile.read(tmp_path / "expected.wav", dtype="int16")[0])
    before = (tmp_path / "clips" / first).stat().st_mtime_ns
    made(2)
    assert (tmp_path / "clips" / first).stat().st_mtime_ns == before
    assert [sample.clip_file for sample in samples.read(tmp_path, 2).samples] == [first, None, other]


@pytest.mark.parametrize("name", ["debug-stereo", "debug-stereo-melody"])
def test_stereo_sounds_and_clips_have_two_channels_and_a_clips_prompt_its_melody(name, tmp_path):
    source = open_model(name)
    whole = load_for_generation(source, torch.device("cpu"))

    @contextlib.contextmanager
    def language_model() -> Iterator[Any]:
        yield whole.language_model

    melody_C = torch.arange(235) % 12 if source.melody else None
    clip_KT = torch.arange(64).reshape(8, 8)
    prompts = (replace(PROMPTS[0], clip_KT=clip_KT, melody_C=melody_C), PROMPTS[1])
    made = sampler_into(
        tmp_path, language_model=language_model, codec=lambda: load_codec(source),
        text_states=lambda model, prompt: text_states(whole.text_encoder, whole.tokenizer, prompt.text),
    )  # fmt: skip
    made._settings = replace(made._settings, prompts=prompts, melody=source.melody)
    made(1)
    listed = samples.read(tmp_path, 1)
    assert [sample.melody for sample in listed.samples] == ([True, False] if source.melody else [None, None])
    assert ('"melody"' in (tmp_path / "step-00000001/samples.json").read_text()) is source.melody
    for prompt, sample in zip(prompts, listed.samples, strict=True):
        sampling = Sampling(guidance=2.0, top_k=50, seed=prompt.seed)
        expected = generate(whole, prompt.text, frames=FRAMES, sampling=sampling, melody_C=prompt.melody_C)
        write_wav(tmp_path / "expected.wav", expected.audio, 32000)
        found = soundfile.read(tmp_path / "step-00000001" / sample.file, dtype="int16")[0]
        assert found.shape == (FRAMES * 640, 2) and sample.seconds == FRAMES / 50
        assert np.array_equal(found, soundfile.read(tmp_path / "expected.wav", dtype="int16")[0])
    clip = soundfile.read(tmp_path / "clips" / listed.samples[0].clip_file, dtype="int16")[0]
    write_wav(tmp_path / "expected.wav", decode(whole.codec, clip_KT), 32000)
    assert np.array_equal(clip, soundfile.read(tmp_path / "expected.wav", dtype="int16")[0]) and clip.shape[1] == 2
    if source.melody:  # the null melody is another one, so that the notes are heard
        sampling = Sampling(guidance=2.0, top_k=50, seed=prompts[0].seed)
        with_notes, without = (
            generate(whole, prompts[0].text, frames=FRAMES, sampling=sampling, melody_C=notes)
            for notes in (melody_C, None)
        )
        assert not torch.equal(with_notes.codes_KT, without.codes_KT)


def test_a_finished_step_is_made_once_and_one_that_was_cut_short_again(tmp_path):
    made = sampler_into(tmp_path)
    made(3)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    made(3)
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    (tmp_path / "step-00000003/samples.json").unlink()
    (tmp_path / "step-00000003/03_jazz.flac").unlink()
    made(3)
    assert files(tmp_path) == sorted(before)


def test_a_step_that_was_told_before_a_kill_is_not_told_again(tmp_path):
    told: list[StepSamples] = []
    made = sampler_into(tmp_path, told=told)
    made(2)
    made(4)
    assert samples.move_later(tmp_path, 3) == [4]
    made(4)
    made(6)
    assert [one.step for one in told] == [2, 4, 6]


def test_a_stop_ends_it_within_one_token_and_what_is_not_whole_is_not_there(tmp_path, capsys):
    asked = []

    def stopping() -> bool:
        asked.append(1)
        return len(asked) > FRAMES + 10  # while the second sound is made

    told: list[StepSamples] = []
    assert sampler_into(tmp_path, stopping=stopping, told=told)(5) is True
    assert len(asked) < FRAMES + 10 + 7, "a sound has 15 tokens; the last questions come between the parts of the work"
    assert files(tmp_path) == [] and told == [] and not samples.is_finished(tmp_path, 5)
    assert capsys.readouterr().out == "making 3 sounds of 0.24 s of step 5 ...\n"


def test_a_stop_that_came_before_leaves_the_model_alone(tmp_path):
    def computed() -> None:
        raise AssertionError("the model was asked for")

    assert sampler_into(tmp_path, stopping=lambda: True, language_model=computed)(5) is True
    assert files(tmp_path) == []


def failing(error: BaseException, at: int = 2) -> Callable[..., Any]:
    """A function that raises at its second call, in place of the real one."""
    calls = []

    def instead(real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*arguments, **named)

    return instead


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("generate_codes", torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"), "CUDA out of memory."),
        ("generate_codes", MemoryError(), "MemoryError"),
        ("decode", ModelError("sound that is NaN"), "sound that is NaN"),
        ("write_sound", OSError(28, "No space left on device", "/a/b"), "No space left on device"),
        ("write_sound", soundfile.LibsndfileError(1), "LibsndfileError"),
    ],
)
def test_a_sound_that_fails_is_a_warning_and_the_others_are_there(tmp_path, monkeypatch, capsys, name, error, reason):
    home = samples if name == "write_sound" else sampler
    real, instead = getattr(home, name), failing(error)
    monkeypatch.setattr(home, name, lambda *given, **named: instead(real, *given, **named))
    sampler_into(tmp_path)(5)
    first, second, third = samples.read(tmp_path, 5).samples
    assert first.file and third.file and second.file is None and second.seconds == 0
    if reason != "LibsndfileError":
        assert reason in second.error
    assert first.error is None is third.error
    assert files(tmp_path) == [f"step-00000005/{name}" for name in (first.file, third.file, "samples.json")]
    output = capsys.readouterr().out
    assert f"warning: sample 2 of step 5 (no prompt): {second.error}" in output and "2 sounds of" in output


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ModelError("weights are gone")])
def test_where_the_codec_cannot_be_loaded_all_sounds_have_the_reason(tmp_path, capsys, error):
    def lacking() -> None:
        raise error

    assert sampler_into(tmp_path, codec=lacking)(5) is False
    assert {sample.error for sample in samples.read(tmp_path, 5).samples} == {str(error)}
    assert capsys.readouterr().out.count("warning") == 1


def test_a_model_whose_logits_are_not_finite_is_a_warning_and_no_end_of_the_run(tmp_path, capsys):
    @contextlib.contextmanager
    def diverged() -> Iterator[Any]:
        model = load_language_model(SOURCE).eval().requires_grad_(False)
        model.decoder.lm_heads[2].weight.fill_(float("nan"))
        yield model

    assert sampler_into(tmp_path, language_model=diverged)(5) is False
    assert all("NaN or infinite" in sample.error for sample in samples.read(tmp_path, 5).samples)


def test_where_the_model_does_not_fit_all_sounds_have_the_reason(tmp_path, capsys):
    @contextlib.contextmanager
    def too_large() -> Iterator[Any]:
        raise MemoryShortError("the weights do not fit")
        yield

    made = sampler_into(tmp_path, language_model=too_large)
    made(5)
    made(10)
    for step in (5, 10):
        assert {sample.error for sample in samples.read(tmp_path, step).samples} == {"the weights do not fit"}
    assert capsys.readouterr().out.count("warning") == 1, "the same reason is told once"


def test_a_folder_that_cannot_be_written_is_a_warning_and_nothing_is_computed(tmp_path, capsys):
    (tmp_path / "samples").write_text("a file where the folder has to go")

    def computed() -> None:
        raise AssertionError("the model was asked for")

    made = sampler_into(tmp_path / "samples", language_model=computed)
    made(0)
    made(5)
    assert capsys.readouterr().out.count("warning: samples of step 0 are not made") == 1


def test_random_numbers_are_drawn_by_the_training_as_without(tmp_path):
    import random

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    sampler_into(tmp_path)(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def saved_under(folder: Path, plan: Any, **flags: Any) -> None:
    """A checkpoint of a run with this plan."""
    told = wiring.tell_how_to_listen(Config(dataset_path="unused", **flags), plan)
    saver = Saver(folder, on_complete=told)
    saver.save(3, {"weight/a": FlatSlice(shape=(1,), start=0, values=torch.zeros(1))}, HEADER)
    saver.wait()


def test_where_samples_would_not_fit_each_checkpoint_comes_with_the_command_that_plays_it(tmp_path, capsys):
    fits = plan_for()
    too_small = replace(fits, gpu_memory_bytes=10, sampling_bytes=11)
    saved_under(tmp_path / "a", too_small, trigger="in my-style")
    line = capsys.readouterr().out
    folder = tmp_path / "a/step-00000003"
    assert line.startswith("checkpoint of step 3;") and f"scripts/generate.py --model {folder} --prompt" in line
    assert "in my-style" in line and folder.is_dir()
    saved_under(tmp_path / "b", fits)
    saved_under(tmp_path / "c", too_small, sample_every=5)
    assert capsys.readouterr().out == ""
