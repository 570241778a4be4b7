"""scripts/generate.py: several sounds at once, in windows, in each format, by several models, and stopped."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from generating import work
from generating.files import write_sound

from scripts import generate as script
from tests.blown_up import tones
from tests.runs import launch_here
from trainer.data.text_states import text_states
from trainer.errors import EXIT_RESUME, StorageError
from trainer.evaluation.continuation import codes_of_beginning
from trainer.evaluation.generation import Request, Sampling, decode, load_for_generation
from trainer.evaluation.in_batches import bytes_of_sound
from trainer.evaluation.windows import generate_long
from trainer.model.source import open_model
from trainer.run.signals import interruptible

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "arcade_meadow.wav"
WINDOWS = ("--seconds", "1.2", "--window_seconds", "0.6", "--stride_seconds", "0.4")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_script(*arguments: object) -> int:
    return script.main([str(argument) for argument in arguments])


@pytest.mark.numbers
def test_one_command_makes_what_each_prompt_and_seed_gives_alone_in_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("slow rock\na longer prompt about jazz\n", encoding="utf-8")
    flags = ("--model", "debug", "--prompts", tmp_path / "prompts.txt", *WINDOWS, "--repeat", 2, "--seed", 5)
    flags += ("--continue_from", EXAMPLE, "--continue_seconds", 0.2, "--batch_size", 3, "--output", tmp_path / "out")
    assert run_script(*flags, "--format", "flac") == 0
    told = capsys.readouterr().out
    assert "made in 3 windows of at most 0.6 s" in told and "the last 0.2 s" in told
    assert "codes per second" in told and "800 codes in" in told
    model = load_for_generation(open_model("debug"), torch.device("cpu"))
    beginning = codes_of_beginning(model.codec, EXAMPLE, 0.2)
    names = []
    for number, prompt in enumerate(("slow rock", "a longer prompt about jazz"), start=1):
        stem = f"{number:02d}_{prompt.replace(' ', '_')}"
        for seed in (5, 6):
            request = Request(
                text_SD=text_states(model.text_encoder, model.tokenizer, prompt),
                generator=torch.Generator().manual_seed(seed),
                prefix_KT=beginning,
            )
            made = generate_long(
                model.language_model, [request], frames=60, sampling=Sampling(), window_frames=30, stride_frames=20
            )
            assert made is not None
            write_sound(tmp_path / "expected.flac", decode(model.codec, made[0]), 32_000)
            names.append(f"{stem}_seed{seed}.flac")
            assert (tmp_path / "out" / names[-1]).read_bytes() == (tmp_path / "expected.flac").read_bytes()
            assert f"{names[-1]}  1.20 s  seed {seed}  {prompt}" in told
    assert sorted(os.listdir(tmp_path / "out")) == names


def test_mp3_of_two_prompts_at_once_has_the_length_and_the_sound_of_the_wav(tmp_path: Path) -> None:
    flags = ("--model", "debug-stereo", "--prompt", "rock", "--prompt", "", *WINDOWS, "--output", tmp_path)
    for kind in ("wav", "mp3"):
        assert run_script(*flags, "--format", kind) == 0
    assert sorted(os.listdir(tmp_path)) == [
        "01_rock.mp3", "01_rock.wav", "02_no_prompt.mp3", "02_no_prompt.wav"
    ]  # fmt: skip
    wav, _ = soundfile.read(tmp_path / "01_rock.wav")
    mp3, rate = soundfile.read(tmp_path / "01_rock.mp3")
    assert rate == 32_000 and mp3.shape == wav.shape == (38_400, 2)
    size = (tmp_path / "01_rock.mp3").stat().st_size
    assert 0.8 * 1.2 * 24_000 < size < 1.3 * 1.2 * 24_000  # 192 kbit/s


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_a_format_keeps_a_sound(kind: str, tmp_path: Path) -> None:
    sound = np.stack([tones(1.0).numpy(), 5 * tones(1.0, (440.0, 220.0)).numpy()], axis=1)[:32_000]
    for channels in (sound, sound[:, 0]):
        write_sound(tmp_path / f"a.{kind}", channels, 32_000)
        read, rate = soundfile.read(tmp_path / f"a.{kind}")
        expected = channels / max(1.0, abs(channels).max())  # turned down as a whole
        assert rate == 32_000 and read.shape == channels.shape
        loudest = abs(expected).max()
        assert abs(read - expected)[1000:-1000].max() < (0.05 * loudest if kind == "mp3" else 1.01 * 2**-15)


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_a_full_disk_is_one_message_and_leaves_no_half_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, most[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot be written .*choose another --output"):
            write_sound(tmp_path / f"a.{kind}", tones(1.0).numpy(), 32_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert os.listdir(tmp_path) == [] and "Exception ignored" not in capsys.readouterr().err


def test_on_a_cpu_no_more_sounds_are_made_at_once_than_its_memory_has_room_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine in whose 80 % are the model's weights and the keys and values of two sounds and a half."""
    model = load_for_generation(open_model("debug"), torch.device("cpu"))
    parts = (model.language_model, model.text_encoder, model.codec)
    weights = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    memory = int((weights + 2.5 * bytes_of_sound(model.language_model, 15, 3.0)) / 0.8)
    monkeypatch.setattr(work, "host_memory_bytes", lambda: memory)
    asked = ("--model", "debug", "--prompt", "rock", "--repeat", "3", "--seconds", "0.3", "--device", "cpu")
    assert run_script(*asked, "--output", tmp_path) == 0
    assert "note: this machine's memory has room for 2 sounds at once (--batch_size 2)" in capsys.readouterr().out
    assert len(os.listdir(tmp_path)) == 3


def test_base_and_tuned_stand_beside_each_other(finished_run: Path, tmp_path: Path) -> None:
    one = ("--prompt", "slow rock", "--prompt", "", "--seconds", "0.3", "--output")
    assert run_script("--model", finished_run, *one, tmp_path, "--compare", "--strength", "0.5") == 0
    for name, flags in {
        "base": ("--model", "debug"),
        "tuned": ("--model", finished_run),
        "strength-0.5": ("--model", finished_run / "lm_final.pt", "--base", "debug", "--strength", "0.5"),
    }.items():
        assert run_script(*flags, *one, tmp_path / "alone" / name) == 0
        for sound in ("01_slow_rock.wav", "02_no_prompt.wav"):
            assert (tmp_path / name / sound).read_bytes() == (tmp_path / "alone" / name / sound).read_bytes()
    sounds = {(tmp_path / name / "01_slow_rock.wav").read_bytes() for name in ("base", "tuned", "strength-0.5")}
    assert len(sounds) == 3
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("slow rock", "base", "tuned", "strength-0.5"))


@pytest.mark.full
def test_a_learned_word_is_compared_with_the_rows_that_it_started_from(tmp_path: Path) -> None:
    word = ("--tune_text", "1", "--placeholder", "<my-style>", "--lr", "0.5", "--code_views", "1")
    launch_here(tmp_path, *word, "--max_steps", "2", "--batch_size", "2", "--grad_acc", "1")
    file = tmp_path / "models" / "text_embedding.safetensors"
    flags = ("--model", "debug", "--text_embedding", file, "--seconds", "0.3", "--output")
    prompts = ("--prompt", "a song in <my-style>", "--prompt", "rock")
    assert run_script(*flags, tmp_path / "both", *prompts, "--compare") == 0
    assert run_script(*flags, tmp_path / "alone", *prompts) == 0
    names = ("01_a_song_in_my_style.wav", "02_rock.wav")
    base, tuned, alone = (
        [(tmp_path / folder / name).read_bytes() for name in names] for folder in ("both/base", "both/tuned", "alone")
    )
    assert tuned == alone and base[0] != tuned[0] and base[1] == tuned[1]  # the word is nowhere in the second
    assert "<my-style>" in (tmp_path / "both" / "comparison.html").read_text("utf-8").replace("&lt;", "<").replace(
        "&gt;", ">"
    )


@pytest.mark.full
def test_strength_0_is_the_base_and_1_the_tuned_model(finished_run: Path, tmp_path: Path) -> None:
    one = ("--prompt", "slow rock", "--seconds", "0.3", "--output")
    models = {"0": ("--model", "debug"), "1": ("--model", finished_run)}
    for strength, model in models.items():
        assert run_script("--model", finished_run, *one, tmp_path / strength, "--strength", strength) == 0
        assert run_script(*model, *one, tmp_path / f"same{strength}") == 0
        sounds = [(tmp_path / name / "01_slow_rock.wav").read_bytes() for name in (strength, f"same{strength}")]
        assert sounds[0] == sounds[1]


def test_ctrl_c_ends_it_at_once_and_leaves_whole_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "01_rock.wav"

    def interrupt() -> None:
        while not first.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    flags = ("--model", "debug", "--prompt", "rock", "--repeat", 1, "--batch_size", 1, "--output", tmp_path)
    assert run_script(*flags, *("--prompt", "jazz") * 40, "--seconds", 2) == EXIT_RESUME
    assert capsys.readouterr().err.startswith("stopped: ")
    names = os.listdir(tmp_path)
    assert 1 <= len(names) < 40
    assert all(soundfile.info(tmp_path / name).frames == 64_000 for name in names if name.endswith(".wav"))


@pytest.mark.parametrize("kind", ["mp3", "wav"])
def test_ctrl_c_while_a_file_is_written_is_not_lost_and_leaves_it_whole(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """libsndfile's callbacks are the first Python code that runs then, and what they raise reaches nobody."""
    sound = tones(30.0).numpy()
    write_sound(tmp_path / f"whole.{kind}", sound, 32_000)
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), interruptible():
        write_sound(tmp_path / f"a.{kind}", sound, 32_000)
        time.sleep(5)
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    assert "Exception ignored" not in capsys.readouterr().err


@pytest.mark.full
def test_a_melody_is_followed_from_each_windows_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second half of the file has other notes: only music that reaches the second window knows of it."""
    notes = [tones(2.0, (329.63, 440.0)).numpy(), tones(2.0, (220.0, 293.66)).numpy()]
    soundfile.write(tmp_path / "a.wav", np.concatenate(notes), 32_000)
    soundfile.write(tmp_path / "b.wav", np.concatenate([notes[0], notes[0]]), 32_000)
    flags = ("--model", "debug-melody", "--prompt", "rock", "--window_seconds", 1, "--stride_seconds", "0.9")
    for file in ("a", "b"):
        for seconds in ("1.9", "2.8"):
            out = tmp_path / f"{file}{seconds}"
            assert not run_script(
                *flags, "--melody", tmp_path / f"{file}.wav", "--seconds", seconds, "--format", "wav", "--output", out
            )
    assert "is repeated" not in capsys.readouterr().out
    made = {path.name: soundfile.read(path / "01_rock.wav", dtype="int16")[0] for path in tmp_path.glob("[ab]?.?")}
    assert np.array_equal(made["a1.9"], made["b1.9"])  # its windows end at 1.9 s
    assert not np.array_equal(made["a2.8"], made["b2.8"])  # and its last one at 2.8 s
    assert np.array_equal(made["a2.8"][:32_000], made["b2.8"][:32_000])


def test_flags_without_an_effect_and_out_of_range_are_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("--model", "debug", "--prompt", "a", "--output", tmp_path)
    cases: list[tuple[tuple[object, ...], int, tuple[str, ...]]] = [
        (("--window_seconds", "20"), 2, ("--window_seconds has no effect with --seconds 10", "one window of 20 s")),
        (("--stride_seconds", "9"), 2, ("--stride_seconds has no effect with --seconds 10",)),
        (("--seconds", "60", "--window_seconds", "20", "--stride_seconds", "20"), 2, ("--stride_seconds 20", "19.9")),
        (("--seconds", "60", "--window_seconds", "0.1"), 2, ("--window_seconds 0.1", "0.5 to 300")),
        (("--seconds", "3601"), 2, ("--seconds 3601", "0.1 to 3600")),
        (("--batch_size", "0"), 2, ("--batch_size 0", "1 to 1000")),
        (("--repeat", "0"), 2, ("--repeat 0",)),
        (("--repeat", "2", "--seed", 2**63 - 1), 2, ("largest seed",)),
        (("--strength", "2.5"), 2, ("--strength 2.5", "to 2")),
        (("--strength", "nan"), 2, ("--strength nan",)),
        (("--format", "ogg"), 2, ("--format", "mp3")),
        (("--compile", "2"), 2, ("--compile",)),
        (("--greedy", "--temperature", "2"), 2, ("--temperature has no effect with --greedy",)),
        (("--greedy", "--repeat", "2"), 2, ("--repeat has no effect with --greedy",)),
        (("--compare", "--strength", "1"), 2, ("--strength 1 has no effect with --compare",)),
        (("--compare",), 1, ("nothing says what debug was trained from", "--base")),
        (("--seconds", "60", "--continue_from", EXAMPLE, "--continue_seconds", "31"), 2, ("the model makes 30 s",)),
        (("--seconds", "0.13", "--continue_from", EXAMPLE, "--continue_seconds", "0.11"), 2, ("0.04 less than",)),
        (
            ("--seconds", "2", "--window_seconds", "0.53", "--continue_from", EXAMPLE, "--continue_seconds", "0.51"),
            2, ("the model makes 0.53 s",),
        ),
        (("--prompt", "caf\udce9"), 2, (r"--prompt 'caf\udce9' is no text in UTF-8",)),
        (("--output", "/proc/self"), 4, ("--output /proc/self cannot be used",)),
        (("--text_embedding", EXAMPLE, "--compare"), 1, ("arcade_meadow.wav",)),
    ]
    for arguments, exit_code, parts in cases:
        assert run_script(*one, *arguments) == exit_code, arguments
        message = capsys.readouterr().err
        assert message.startswith("error: ") and all(part in message for part in parts), (arguments, message)
    assert os.listdir(tmp_path) == []
