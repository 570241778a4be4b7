"""Sounds that several ranks make while they train: those of one process, and nothing of the run notices them."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.ranks.launches import ends, launch, send, start, wait_until
from tests.runs import assert_bit_equal, final_state, metrics
from trainer.errors import EXIT_RESUME
from trainer.evaluation import samples
from trainer.evaluation.generation import Sampling, generate, load_for_generation, write_wav
from trainer.exports.saved_models import open_saved
from trainer.model.new_word import read_text_embedding, with_embedding
from trainer.model.source import Source, open_model

STEPS, EVERY = 4, 2
RUN = ("--max_steps", str(STEPS), "--save_step", str(EVERY), "--warmup_steps", "1")
SOUNDS = ("--sample_every", str(EVERY), "--sample_seconds", "0.3")
PROMPTS = ("--sample_prompts", "slow rock|gentle, happy|fast")


def assert_sounds_are_those_of(source: Source, folder: Path, step: int) -> samples.StepSamples:
    """Each sound of a step is, value by value, what generate.py writes with the model in one process."""
    model = load_for_generation(source, torch.device("cpu"))
    listed = samples.read(folder / "models/samples", step)
    assert listed is not None and listed.samples
    for sample in listed.samples:
        assert sample.error is None and sample.file is not None and sample.continued_seconds == 0
        sampling = Sampling(
            guidance=listed.guidance, temperature=listed.temperature, top_k=listed.top_k, seed=sample.seed
        )
        made = generate(model, sample.prompt, frames=round(50 * sample.seconds), sampling=sampling)
        write_wav(folder / "expected.wav", made.audio, listed.sample_rate_hz)
        path = samples.step_folder(folder / "models/samples", step) / sample.file
        found, expected = (soundfile.read(file, dtype="int16")[0] for file in (path, folder / "expected.wav"))
        assert np.array_equal(found, expected), f"step {step}, {sample.prompt!r}"
    return listed


def checked(folder: Path) -> None:
    """All sounds of a finished run against its files of each step, and the base model's before step 1."""
    assert samples.finished_steps(folder / "models/samples") == [0, EVERY, STEPS]
    assert_sounds_are_those_of(open_model("debug"), folder, 0)
    for step in (EVERY, STEPS):
        assert_sounds_are_those_of(open_saved(str(folder / f"models/lm_{step}.pt"), base="debug"), folder, step)


CASES = [
    ("fsdp", 2, ()),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in [
            ("single", 1, ()), ("ddp", 2, ()), ("zero2", 2, ()), ("zero3", 2, ()), ("hsdp", 2, ()), ("fsdp", 4, ()),
            ("zero3", 4, ()), ("fsdp", 2, ("--ema_decay", "0.5")), ("zero2", 2, ("--ema_decay", "0.5")),
            ("fsdp", 2, ("--lora_rank", "4")), ("zero3", 2, ("--freeze", "embeddings,layers.0")),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "ranks", "flags"), CASES)
def test_sounds_are_those_of_one_process_with_the_files_of_that_step(strategy, ranks, flags, tmp_path):
    output = launch(tmp_path, *RUN, *SOUNDS, *PROMPTS, "--strategy", strategy, *flags, world_size=ranks)
    assert f"samples of step {EVERY}: models/samples/step-0000000{EVERY} (3 sounds of 0.3 s in" in output
    checked(tmp_path)
    listed = samples.read(tmp_path / "models/samples", STEPS)
    assert listed is not None and listed.weights == ("ema" if "--ema_decay" in flags else "live")


@pytest.mark.full
@pytest.mark.parametrize(
    ("strategy", "ranks"), [("single", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 2), ("hsdp", 2)]
)
def test_a_run_with_samples_ends_bit_equal_to_one_without_on_resume_too(strategy, ranks, tmp_path):
    flags = ("--strategy", strategy, "--dropout", "0.1", "--validation", "0.4", "--validation_steps", "2")
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    launch(tmp_path / "without", *RUN, *flags, world_size=ranks)
    launch(tmp_path / "with", *RUN, *flags, *SOUNDS, world_size=ranks)
    assert_bit_equal(final_state(tmp_path / "with"), final_state(tmp_path / "without"))
    for key in ("loss", "grad_norm", "validation_loss"):
        assert metrics(tmp_path / "with", key) == metrics(tmp_path / "without", key)
    whole = final_state(tmp_path / "without")
    sounds = {path: path.read_bytes() for path in (tmp_path / "with/models/samples").rglob("*.flac")}
    shutil.rmtree(tmp_path / "with/models/checkpoints" / f"step-{STEPS:08d}")
    output = launch(tmp_path / "with", *RUN, *flags, *SOUNDS, "--sample_top_k", "251", world_size=ranks)
    assert "resuming from" in output, "a flag of samples is no part of a run's identity"
    assert_bit_equal(final_state(tmp_path / "with"), whole)
    aside = tmp_path / "with/models/samples/replaced-1" / f"step-{STEPS:08d}"
    assert {path.name for path in aside.glob("*.flac")} and samples.finished_steps(aside.parent) == [STEPS]
    for path in aside.glob("*.flac"):
        assert path.read_bytes() == sounds[aside.parents[1] / aside.name / path.name]


@pytest.mark.full
def test_prompts_of_a_learned_word_are_read_with_its_rows_of_that_step(tmp_path):
    launch(tmp_path, *RUN, *SOUNDS, "--tune_text", "1", "--init_word", "rock", "--strategy", "ddp")
    assert samples.finished_steps(tmp_path / "models/samples") == [0, EVERY, STEPS]
    embedding = read_text_embedding(tmp_path / f"models/text_embedding_{EVERY}.safetensors")
    listed = assert_sounds_are_those_of(with_embedding(open_model("debug"), embedding), tmp_path, EVERY)
    assert all(embedding.placeholder.word in sample.prompt for sample in listed.samples)


@pytest.mark.full
def test_a_run_without_captions_plays_without_prompts(tmp_path):
    launch(tmp_path, *RUN, *SOUNDS, "--no_label", "1", "--strategy", "zero2")
    listed = assert_sounds_are_those_of(open_model("debug"), tmp_path, 0)
    assert {sample.prompt for sample in listed.samples} == {""}
    assert len({sample.seed for sample in listed.samples}) == len(listed.samples) > 1
    assert_sounds_are_those_of(open_saved(str(tmp_path / f"models/lm_{STEPS}.pt"), base="debug"), tmp_path, STEPS)


def slow_from_step_2() -> None:
    """Sounds of step 2 and later: each rank says that it makes its first token and makes the others as slowly as a
    large model does."""
    from trainer.evaluation import sampler

    generate_codes = sampler.generate_codes

    def slowly(model, text, *, should_stop, **named):
        def asks() -> bool:
            if steps_reported_here() >= EVERY:
                Path(f"rank-{os.environ['RANK']}-plays").touch()
                time.sleep(0.1)
            return should_stop()

        return generate_codes(model, text, should_stop=asks, **named)

    sampler.generate_codes = slowly


def slow_until_the_clock_strikes() -> None:
    """The same, and --max_minutes is over once this rank makes sounds."""
    slow_from_step_2()
    from trainer.evaluation import sampler

    generate_codes = sampler.generate_codes

    def struck(*arguments, **named):
        if steps_reported_here() >= EVERY:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
        return generate_codes(*arguments, **named)

    sampler.generate_codes = struck


def steps_reported_here() -> int:
    path = Path("models/metrics.jsonl")
    return len(path.read_text().splitlines()) if path.exists() else 0


def playing(folder: Path) -> int:
    return len(list(folder.glob("rank-*-plays")))


LONG = ("--sample_every", str(EVERY), "--sample_seconds", "20")


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_a_kill_while_sounds_are_made_loses_none_and_no_step_of_a_checkpoint(strategy, tmp_path):
    flags = (*RUN, "--strategy", strategy)
    (tmp_path / "whole").mkdir()
    launch(tmp_path / "whole", *flags)
    running = start(tmp_path, *flags, *LONG, *PROMPTS, change=slow_from_step_2)
    wait_until(running, lambda: playing(tmp_path) == 2, 120)
    wait_until(running, lambda: (tmp_path / f"models/checkpoints/step-{EVERY:08d}/checkpoint.json").exists())
    for rank in (0, 1):
        send(running, rank, signal.SIGKILL)
    ends(running, tmp_path, 20)
    assert samples.finished_steps(tmp_path / "models/samples") == [0]
    output = launch(tmp_path, *flags, *SOUNDS, *PROMPTS)
    assert f"step {EVERY} of {STEPS}" in output
    assert samples.finished_steps(tmp_path / "models/samples") == [0, EVERY, STEPS]
    assert_sounds_are_those_of(open_saved(str(tmp_path / f"models/lm_{STEPS}.pt"), base="debug"), tmp_path, STEPS)
    assert_bit_equal(final_state(tmp_path), final_state(tmp_path / "whole"))
    assert not list((tmp_path / "models/samples").rglob("*.partial"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        pytest.param("slow|fast", [(1, signal.SIGTERM)], id="one of two that make sounds"),
        pytest.param("slow", [(1, signal.SIGUSR1)], id="the one that waits for the other"),
        pytest.param("slow|fast", [(0, signal.SIGINT), (1, signal.SIGINT)], id="ctrl-c"),
        pytest.param("slow|fast", [], id="the clock"),
    ],
)
def test_a_stop_while_sounds_are_made_ends_all_ranks_with_a_checkpoint(prompts, told, tmp_path):
    flags = (*RUN, *LONG, "--sample_prompts", prompts, "--strategy", "fsdp")
    change = slow_from_step_2 if told else slow_until_the_clock_strikes
    running = start(tmp_path, *flags, *(() if told else ("--max_minutes", "60")), change=change)
    wait_until(running, lambda: playing(tmp_path) == min(2, len(prompts.split("|"))), 120)
    for rank, number in told:
        send(running, rank, number)
    for code, output in ends(running, tmp_path, 45):  # a sound alone takes 100 s
        assert code == EXIT_RESUME and "Traceback" not in output and "warning" not in output, output
    assert samples.finished_steps(tmp_path / "models/samples") == [0]
    assert not list((tmp_path / f"models/samples/step-{EVERY:08d}").iterdir())
    assert list(metrics(tmp_path)) == [1, 2], "it ends with a checkpoint of that step"
    output = launch(tmp_path, *RUN, *SOUNDS, "--strategy", "fsdp")
    assert f"resuming from models/checkpoints/step-{EVERY:08d}" in output
    assert samples.finished_steps(tmp_path / "models/samples") == [0, EVERY, STEPS]


@pytest.mark.full
def test_a_folder_that_cannot_be_written_is_one_warning_and_the_run_ends_as_without(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/samples").write_text("a file where the folder has to go")
    output = launch(tmp_path, *RUN, *SOUNDS, *PROMPTS, "--strategy", "zero2")
    assert output.count("warning") == 1 and "samples of step 0 are not made" in output


def full_on_rank_1() -> None:
    from trainer.evaluation import samples as home

    write_sound = home.write_sound

    def fails(path, *arguments):
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device", str(path))
        write_sound(path, *arguments)

    home.write_sound = fails


@pytest.mark.full
def test_a_full_disk_on_one_rank_costs_its_sounds_alone_and_is_told_once(tmp_path):
    ended = ends(start(tmp_path, *RUN, *SOUNDS, *PROMPTS, "--strategy", "ddp", change=full_on_rank_1), tmp_path, 120)
    assert [code for code, _ in ended] == [0, 0], ended
    assert ended[0][1].count("No space left on device") == 1 and "No space" not in ended[1][1]
    for step in (0, EVERY, STEPS):
        listed = samples.read(tmp_path / "models/samples", step)
        assert listed is not None
        assert [sample.error for sample in listed.samples] == [None, "No space left on device", None]
