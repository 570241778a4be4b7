"""scripts/generate.py as a user starts it, and trainer/evaluation/generation.py under it, on a real finished run."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from scripts import generate as script
from tests.audio_files import noise
from tests.blown_up import tones
from trainer.data import audio
from trainer.data.chroma import notes_of
from trainer.data.codec import encode
from trainer.data.melody_places import melody_places
from trainer.evaluation.continuation import codes_of_beginning
from trainer.evaluation.generation import Sampling, decode, generate, load_for_generation, write_wav
from trainer.evaluation.melody import melody_of_file
from trainer.evaluation.samples import file_name
from trainer.exports.saved_models import open_saved
from trainer.model.source import load_codec, open_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "arcade_meadow.wav"
CPU = torch.device("cpu")
KINDS = (".", "huggingface", "audiocraft", "audiocraft/state_dict.bin", "lm_final.pt", "lm_2.pt")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sounds(folder: Path) -> dict[str, str]:
    """Digest of each file by name."""
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def run_script(*arguments: object) -> int:
    return script.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_model_gives_sound_of_the_asked_length(kind: str, finished_run: Path, tmp_path: Path) -> None:
    code = run_script("--model", finished_run / kind, "--prompt", "slow rock", "--seconds", "0.5", "--output", tmp_path)
    assert code == 0
    audio, rate = soundfile.read(tmp_path / "01_slow_rock.wav")
    assert (rate, audio.shape) == (32000, (16000,)) and audio.std() > 0


def test_a_base_model_generates_too_and_sampling_options_change_the_sound(tmp_path: Path) -> None:
    options = {"plain": (), "cool": ("--temperature", "0.5"), "two": ("--top_k", "2"), "free": ("--guidance", "1")}
    options |= {"greedy": ("--greedy",), "seed": ("--seed", "1")}
    for name, flags in options.items():
        assert not run_script(
            "--model", "debug", "--prompt", "rock", "--seconds", 0.3, "--output", tmp_path / name, *flags
        )
    assert len({str(sounds(tmp_path / name)) for name in options}) == len(options)


def test_the_same_command_gives_the_same_bits_in_another_process_and_from_another_folder(
    finished_run: Path, tmp_path: Path
) -> None:
    prompts = ("--prompt", "slow rock", "--prompt", "", "--seconds", "0.4")
    words = ("--model", str(finished_run / "huggingface"), *prompts, "--output")
    assert not run_script(*words, tmp_path / "first")
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), *words, "second"]
    env = {"OMP_NUM_THREADS": "1", "PATH": ""}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=120)
    assert sounds(tmp_path / "first") == sounds(tmp_path / "second")
    assert len(set(sounds(tmp_path / "first").values())) == 2


@pytest.mark.numbers
def test_a_prompts_sound_does_not_depend_on_its_neighbours(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("fast metal\n\n  slow rock ballad  \n", encoding="utf-8")
    flags = ("--model", finished_run, "--seconds", "0.4", "--output")
    assert not run_script(*flags, tmp_path / "file", "--prompts", tmp_path / "prompts.txt")
    assert not run_script(*flags, tmp_path / "alone", "--prompt", "slow rock ballad")
    together, alone = sounds(tmp_path / "file"), sounds(tmp_path / "alone")
    assert list(together) == ["01_fast_metal.wav", "02_slow_rock_ballad.wav"]
    assert together["02_slow_rock_ballad.wav"] == alone["01_slow_rock_ballad.wav"]


@pytest.mark.numbers
def test_greedy_codes_agree_between_the_exports(finished_run: Path) -> None:
    codes = {}
    for kind in ("huggingface", "lm_final.pt", "audiocraft"):
        model = load_for_generation(open_saved(str(finished_run / kind)), CPU)
        made = generate(model, "slow rock", frames=40, sampling=Sampling(greedy=True))
        codes[kind] = made.codes_KT
        assert made.codes_KT.shape == (4, 40) and made.codes_KT.max() < 2048
        assert torch.equal(torch.from_numpy(made.audio), torch.from_numpy(decode(model.codec, made.codes_KT)))
    assert torch.equal(codes["lm_final.pt"], codes["huggingface"])
    assert torch.equal(codes["audiocraft"], codes["huggingface"])


@pytest.mark.numbers
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_sound_is_that_of_transformers_itself(guidance: float, finished_run: Path) -> None:
    folder = finished_run / "huggingface"
    theirs = MusicgenForConditionalGeneration.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(["slow rock"], return_tensors="pt")
    torch.manual_seed(7)
    expected = theirs.generate(
        **inputs, do_sample=True, top_k=50, temperature=0.9, guidance_scale=guidance, max_new_tokens=43
    )
    source = open_saved(str(finished_run))
    made = generate(
        load_for_generation(source, CPU),
        "slow rock",
        frames=40,
        sampling=Sampling(guidance=guidance, temperature=0.9, top_k=50, seed=7),
    )
    assert torch.equal(torch.from_numpy(made.audio), expected[0, 0])


def test_the_loaded_model_has_the_sources_weights_and_no_other() -> None:
    source = open_model("debug")
    model = load_for_generation(source, CPU)
    parts = {"": model.language_model, "text_encoder.": model.text_encoder, "audio_encoder.": model.codec}
    state = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}
    for name, tensor in source.weights.items():
        assert torch.equal(state[name], tensor), name
    assert set(state) - set(source.weights) == {"text_encoder.encoder.embed_tokens.weight"}


@pytest.mark.numbers
def test_no_prompt_is_a_null_condition_and_guidance_changes_nothing_there(finished_run: Path) -> None:
    source = open_saved(str(finished_run))
    model = load_for_generation(source, CPU)
    codes = [
        generate(model, prompt, frames=20, sampling=Sampling(greedy=True, guidance=guidance)).codes_KT
        for prompt, guidance in (("", 3.0), (" ", 1.0))
    ]
    assert torch.equal(*codes)
    # Cross-attention to nothing adds nothing: the same codes come out of a decoder without it.
    for layer in model.language_model.decoder.model.decoder.layers:
        layer.encoder_attn.out_proj.weight.zero_()
    without = generate(model, "", frames=20, sampling=Sampling(greedy=True)).codes_KT
    assert torch.equal(without, codes[0])


def test_generation_leaves_the_global_random_state_alone() -> None:
    source = open_model("debug")
    model = load_for_generation(source, CPU)
    before = torch.get_rng_state()
    generate(model, "a", frames=8, sampling=Sampling())
    assert torch.equal(torch.get_rng_state(), before)


def test_refusals_say_what_would_work(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lone = tmp_path / "lone" / "lm_final.pt"
    lone.parent.mkdir()
    shutil.copy(finished_run / "lm_final.pt", lone)
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    shutil.copy(finished_run / "lm_2.pt", unfinished)
    shutil.copy(finished_run / "lm_2.pt", unfinished / "lm_best.pt")  # the user's own, and newer
    broken = tmp_path / "broken.pt"
    broken.write_bytes(lone.read_bytes()[:1000])
    (tmp_path / "empty.txt").write_text("\n \n")
    one = ("--prompt", "a", "--seconds", "0.3", "--output", tmp_path / "out")
    cases: list[tuple[tuple[object, ...], int, tuple[str, ...]]] = [
        (("--model", tmp_path / "none", *one), 1, ("--model", "no such folder")),
        (("--model", tmp_path / "none.pt", *one), 1, ("none.pt", "no such file")),
        (("--model", lone, *one), 1, ("language model only", "--base")),
        (("--model", lone, "--base", tmp_path / "no", *one), 1, ("--base", "no such folder")),
        (("--model", broken, "--base", "debug", *one), 1, ("broken.pt", "complete?")),
        (("--model", unfinished, *one), 1, ("not been exported", "lm_2.pt")),
        (("--model", "debug", "--base", "debug", *one), 1, ("leave --base out",)),
        (("--model", "debug", "--prompts", tmp_path / "empty.txt"), 3, ("empty.txt is empty", "one prompt a line")),
        (("--model", "debug", "--prompts", tmp_path / "no.txt"), 2, ("no.txt cannot be read",)),
        (("--model", "debug"), 2, ("nothing to generate", "--prompt")),
        (("--model", "debug", "--promt", "a"), 2, ("--promt is no flag", "--prompt")),
        (("--model", "debug", *one, "--seconds", "0"), 2, ("--seconds 0.0", "0.1 to 3600")),
        (("--model", "debug", *one, "--temperature", "nan"), 2, ("--temperature nan", "above 0")),
        (("--model", "debug", *one, "--device", "tpu9"), 2, ("--device tpu9", "use auto, cpu or cuda")),
        (("--model", "debug", *one, "--output", broken), 4, ("--output", "choose another folder")),
    ]
    for arguments, exit_code, parts in cases:
        assert run_script(*arguments) == exit_code, arguments
        message = capsys.readouterr().err
        assert message.startswith("error: ") and all(part in message for part in parts), (arguments, message)


def test_a_lone_language_model_works_with_its_base_named(finished_run: Path, tmp_path: Path) -> None:
    shutil.copy(finished_run / "lm_final.pt", tmp_path)
    sources = (open_saved(str(finished_run)), open_saved(str(tmp_path / "lm_final.pt"), base="debug"))
    first, second = (load_for_generation(source, CPU).language_model.state_dict() for source in sources)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_copied_checkpoint_is_its_runs_model(finished_run: Path, tmp_path: Path) -> None:
    [newest, *_] = sorted((finished_run / "checkpoints").iterdir(), reverse=True)
    shutil.copytree(newest, tmp_path / "step-00000003-best")
    sources = (open_saved(str(finished_run)), open_saved(str(tmp_path / "step-00000003-best")))
    first, second = (load_for_generation(source, CPU).language_model.state_dict() for source in sources)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_language_model_of_another_size_than_the_base_is_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(finished_run / "lm_final.pt", weights_only=True)
    fewer = {name: tensor for name, tensor in state.items() if not name.startswith("transformer.layers.1.")}
    torch.save(fewer, tmp_path / "fewer.pt")
    flags = ("--model", tmp_path / "fewer.pt", "--base", "debug", "--prompt", "a", "--output", tmp_path / "out")
    assert run_script(*flags) == 1
    assert "not a language model of the size of debug (2 layers" in capsys.readouterr().err


def test_each_prompt_goes_on_from_the_beginning_of_the_sound_that_is_given(tmp_path: Path) -> None:
    flags = ("--model", "debug", "--prompt", "slow rock", "--prompt", "", "--seconds", "0.5")
    flags += ("--continue_from", EXAMPLE, "--continue_seconds", "0.3")
    assert run_script(*flags, "--output", tmp_path) == 0
    model = load_for_generation(open_model("debug"), CPU)
    codes = codes_of_beginning(model.codec, EXAMPLE, 0.3)
    for name, prompt in (("01_slow_rock.wav", "slow rock"), ("02_no_prompt.wav", "")):
        made = generate(model, prompt, frames=25, sampling=Sampling(), prefix_KT=codes)
        assert torch.equal(made.codes_KT[:, :15], codes)
        write_wav(tmp_path / "expected.wav", made.audio, 32_000)
        assert (tmp_path / name).read_bytes() == (tmp_path / "expected.wav").read_bytes()


@torch.no_grad()
def test_a_sound_is_continued_from_the_codes_that_a_run_caches_of_its_beginning() -> None:
    codec = load_codec(open_model("debug")).double()  # without rounding, they are the same bit for bit
    [whole] = encode(codec, audio.stream(EXAMPLE, 32_000), offsets=[0])
    codes = codes_of_beginning(codec, EXAMPLE, 2.0)
    assert codes.shape == (4, 100) and torch.equal(codes, torch.from_numpy(whole[:, :100].astype("int64")))


def test_a_sound_that_cannot_be_continued_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("--model", "debug", "--prompt", "a", "--seconds", "1", "--output", tmp_path / "out")
    short, broken, endless = tmp_path / "short.wav", tmp_path / "broken.flac", tmp_path / "nan.wav"
    soundfile.write(short, noise(0.5), 8_000)
    broken.write_bytes(b"fLaC no sound")
    soundfile.write(endless, noise(2) * float("nan"), 8_000, "FLOAT")
    cases: list[tuple[tuple[object, ...], int, tuple[str, ...]]] = [
        (("--continue_seconds", "1"), 2, ("no effect without --continue_from",)),
        (("--continue_from", tmp_path / "no.wav"), 2, ("no.wav: there is no such file",)),
        (("--continue_from", short), 2, ("--continue_seconds 3", "--seconds 1", "less than --seconds")),
        (("--continue_from", short, "--continue_seconds", "nan"), 2, ("--continue_seconds nan",)),
        (("--continue_from", short, "--continue_seconds", "0.7"), 3, ("short.wav", "it has 0.50 s", "fewer")),
        (("--continue_from", broken, "--continue_seconds", "0.5"), 3, ("broken.flac cannot be continued",)),
        (("--continue_from", endless, "--continue_seconds", "0.5"), 3, ("nan.wav", "NaN", "repair")),
    ]
    for arguments, exit_code, parts in cases:
        assert run_script(*one, *arguments) == exit_code, arguments
        message = capsys.readouterr().err
        assert message.startswith("error: ") and all(part in message for part in parts), (arguments, message)


def test_a_stereo_model_goes_on_from_both_channels_of_a_sound(tmp_path: Path) -> None:
    left, right = noise(1.0, rate_hz=32_000, seed=1), noise(1.0, rate_hz=32_000, seed=2)
    soundfile.write(tmp_path / "both.wav", np.stack([left, right], axis=1), 32_000, "FLOAT")
    soundfile.write(tmp_path / "left.wav", left, 32_000, "FLOAT")
    soundfile.write(tmp_path / "right.wav", right, 32_000, "FLOAT")
    flags = ("--model", "debug-stereo", "--prompt", "slow rock", "--seconds", "0.5")
    flags += ("--continue_from", tmp_path / "both.wav", "--continue_seconds", "0.3")
    assert run_script(*flags, "--output", tmp_path / "out") == 0
    model = load_for_generation(open_model("debug-stereo"), CPU)
    codes = torch.stack([codes_of_beginning(model.codec, tmp_path / f"{one}.wav", 0.3) for one in ("left", "right")], 1)
    made = generate(model, "slow rock", frames=25, sampling=Sampling(), prefix_KT=codes.flatten(0, 1))
    write_wav(tmp_path / "expected.wav", made.audio, 32_000)
    assert made.audio.shape == (16_000, 2)
    assert (tmp_path / "out/01_slow_rock.wav").read_bytes() == (tmp_path / "expected.wav").read_bytes()
    # A mono file is heard on both sides.
    doubled = codes_of_beginning(model.codec, tmp_path / "left.wav", 0.3, channels=2)
    assert torch.equal(doubled[::2], codes[:, 0]) and torch.equal(doubled[1::2], codes[:, 0])


def write_tones(path: Path, seconds: float, rate: int = 16_000) -> Path:
    """Two notes in turn, in stereo, at another rate than the models'."""
    sound = soxr.resample(tones(seconds).numpy(), 32_000, rate)
    soundfile.write(path, np.stack([sound, 0.5 * sound], axis=1), rate)
    return path


def test_the_music_follows_the_melody_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "debug-stereo-melody", "--prompt", "slow rock", "--seconds", "0.5")
    files = {"short": 0.25, "one": 12.0, "long": 32.0}
    expected = {"short": "0.2 s: its melody is repeated", "one": "", "long": "the first 30 s"}
    for name, seconds in files.items():
        file = write_tones(tmp_path / f"{name}.flac", seconds)
        assert run_script(*flags, "--melody", file, "--output", tmp_path / name) == 0
        output = capsys.readouterr().out
        notes = [line for line in output.splitlines() if line.startswith("note:")]
        assert "(--stems mix)" in notes[0] and expected[name] in output
        # The first note of the short one is C, and it has no other: that is no melody to follow.
        assert len(notes) == {"short": 3, "one": 1, "long": 2}[name] and ("note C" in output) == (name == "short")
    assert run_script(*flags, "--melody", tmp_path / "one.flac", "--stems", "mix", "--output", tmp_path / "mix") == 0
    assert "note:" not in capsys.readouterr().out
    assert run_script(*flags, "--output", tmp_path / "without") == 0
    sound = audio.stream(tmp_path / "one.flac", 32_000)
    melody = melody_places(notes_of(np.concatenate(list(sound))))
    model = load_for_generation(open_model("debug-stereo-melody"), CPU)
    for name, notes in (("one", melody), ("mix", melody), ("without", None)):
        made = generate(model, "slow rock", frames=25, sampling=Sampling(), melody_C=notes)
        write_wav(tmp_path / "expected.wav", made.audio, 32_000)
        assert (tmp_path / name / "01_slow_rock.wav").read_bytes() == (tmp_path / "expected.wav").read_bytes()


@pytest.mark.parametrize("hertz", [0.0, 261.63, 440.0])
def test_a_file_that_models_take_for_no_melody_is_told(
    hertz: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silence has the note of a C, which is also what no melody is."""
    sound = 0.3 * np.sin(2 * np.pi * hertz * np.arange(32_000) / 32_000)
    soundfile.write(tmp_path / "a.wav", sound, 32_000)
    flags = ("--model", "debug-melody", "--prompt", "a", "--seconds", "0.1", "--output", tmp_path / "out")
    assert run_script(*flags, "--melody", tmp_path / "a.wav") == 0
    assert ("no melody to follow" in capsys.readouterr().out) == (hertz != 440.0)


def test_the_notes_of_a_long_file_are_the_first_of_all_of_it(tmp_path: Path) -> None:
    file = write_tones(tmp_path / "long.wav", 33.0, rate=32_000)
    notes, seconds = melody_of_file(file)
    whole = notes_of(np.concatenate(list(audio.stream(file, 32_000))))
    assert notes.tolist() == whole[:235].tolist() and len(set(notes.tolist())) == 2 and seconds > 30


def test_a_melody_is_heard_in_the_blocks_that_are_given(tmp_path: Path) -> None:
    file, higher = (write_tones(tmp_path / name, 3.0) for name in ("a.wav", "b.wav"))
    soundfile.write(higher, soundfile.read(file)[0], 8_000)  # played faster: other notes
    notes, _ = melody_of_file(file, lambda _, *rest: audio.stream(higher, *rest))
    assert notes.tolist() == melody_of_file(higher)[0].tolist() != melody_of_file(file)[0].tolist()


def test_a_melody_that_cannot_be_followed_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ("--prompt", "a", "--seconds", "0.5", "--output", tmp_path / "out")
    sound, broken = write_tones(tmp_path / "sound.wav", 1.0), tmp_path / "broken.flac"
    broken.write_bytes(b"fLaC no sound")
    soundfile.write(tmp_path / "nan.wav", noise(2) * float("nan"), 8_000, "FLOAT")
    cases: list[tuple[tuple[object, ...], int, tuple[str, ...]]] = [
        (("--model", "debug", "--melody", sound), 2, ("no effect with --model debug", "melody-large")),
        (("--model", "debug-melody", "--melody", tmp_path / "no.wav"), 2, ("no.wav: there is no such file",)),
        (("--model", "debug-melody", "--melody", broken), 3, ("broken.flac gives no melody",)),
        (("--model", "debug-melody", "--melody", tmp_path / "nan.wav"), 3, ("nan.wav gives no melody", "NaN")),
        (("--model", "debug-melody", "--stems", "mix"), 2, ("--stems mix has no effect without --melody FILE",)),
        (("--model", "debug-melody", "--melody", sound, "--stems", "demucs"), 2, ("not installed", "--stems mix")),
    ]
    monkeypatch.setattr("trainer.data.demucs_files._package", lambda: None)
    monkeypatch.setattr("trainer.evaluation.generation.load_for_generation", lambda *_: pytest.fail("loaded"))
    for arguments, exit_code, parts in cases:
        assert run_script(*one, *arguments) == exit_code, arguments
        message = capsys.readouterr().err
        assert message.startswith("error: ") and all(part in message for part in parts), (arguments, message)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "5.17.0")
    assert run_script(*one, "--model", "debug-melody") == 2
    assert "pip install 'transformers>=5.18'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Café jazz, 90 bpm", "03_cafe_jazz_90_bpm.wav"),
        ("../../etc/passwd", "03_etc_passwd.wav"),
        ("日本", "03_prompt.wav"),
        ("", "03_no_prompt.wav"),
        ("x" * 500, "03_" + "x" * 60 + ".wav"),
    ],
)
def test_file_names_are_safe(prompt: str, name: str) -> None:
    assert file_name(3, prompt, "wav") == name


def test_the_runs_config_is_what_names_an_lm_files_base(finished_run: Path) -> None:
    assert json.loads((finished_run / "config.json").read_text())["model_id"] == "debug"
    assert open_saved(str(finished_run / "lm_2.pt")).name == str(finished_run / "lm_2.pt")
