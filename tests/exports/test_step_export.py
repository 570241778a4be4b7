"""scripts/export.py and base_and_tuned on runs of launch.py: any step, any strength, whatever --model names."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import export
import pytest
import torch
from torch import Tensor
from transformers import MusicgenForConditionalGeneration

from tests.exports.comparison import assert_equal
from tests.runs import ROOT, environ, few_clips, import_path, launch_here
from trainer.errors import ConfigError, ModelError
from trainer.exports.audiocraft_files import read_audiocraft
from trainer.exports.strength import at_strength
from trainer.model.new_word import TABLE, read_text_embedding
from trainer.model.source import LANGUAGE_MODEL, Source, open_model
from trainer.model.stereo import in_stereo
from trainer.run.checkpoint import EMA, WEIGHT, Checkpoint, newest
from trainer.wiring.finished_run import base_and_tuned
from trainer.wiring.saved_steps import saved_steps

FLAGS = ("--max_steps", "3", "--warmup_steps", "1", "--lr", "1e-3", "--batch_size", "2", "--grad_acc", "1")
FLAGS = (*FLAGS, "--code_views", "1", "--save_step", "2")
KINDS = {
    "lora": ("--lora_rank", "4"),
    "word": ("--tune_text", "1"),
    "stereo": ("--stereo", "1", "--stereo_init", "copied"),
    "average": ("--ema_decay", "0.5"),
    "part": ("--freeze", "layers.0,heads"),
}


def language_model(source: Source) -> dict[str, Tensor]:
    return {name: source.weights[name] for name in source.weights if name.startswith(LANGUAGE_MODEL)}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def of_the_run(folder: Path) -> dict[str, str]:
    """Digests of what the end of a run exports, but for a word's file: safetensors writes its metadata in any order."""
    names = ("lm_final.pt", "huggingface", "audiocraft", "adapter")
    return {name: digest for name, digest in digests(folder).items() if name.split("/")[0] in names}


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, whose files are links to the others' until they are replaced."""
    shutil.copytree(finished_run, tmp_path / "models", copy_function=os.link)
    return tmp_path / "models"


def test_the_exported_step_again_is_byte_for_byte_what_the_run_exported(run: Path) -> None:
    assert export.main([str(run)]) == 0
    assert of_the_run(run / "exports/step-3") == of_the_run(run) and len(of_the_run(run)) > 8


def test_a_step_is_the_same_from_its_checkpoint_and_from_its_lm_file_and_half_of_it_the_mean(run: Path) -> None:
    written, base = read_audiocraft(run / "lm_2.pt").state, language_model(open_model("debug"))
    shutil.rmtree(run / "checkpoints/step-00000003")  # which says nothing of step 2
    assert export.main([str(run), "--step", "2", "--strength", "0.5"]) == 0
    shutil.rmtree(run / "checkpoints")
    assert saved_steps(run)[2].path.name == "lm_2.pt"
    assert export.main([str(run), "--step", "2", "--strength", "0.5", "--output", str(run / "again")]) == 0
    half, again = run / "exports/step-2-strength-0.5", run / "again"
    assert digests(half) == digests(again)
    mean = {name: ((base[name].double() + written[name].double()) / 2).float() for name in base}
    assert_equal(read_audiocraft(half / "lm_final.pt").state, mean)
    assert_equal(read_audiocraft(half / "audiocraft").state, mean)
    theirs = MusicgenForConditionalGeneration.from_pretrained(half / "huggingface").state_dict()
    assert_equal({name: theirs[name] for name in mean}, mean)
    card = (half / "huggingface/README.md").read_text()
    assert "| optimizer steps | 2 |" in card and "| strength | 0.5, where 0 is what" in card


def test_a_step_that_is_not_there_is_refused_with_those_that_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run), "--step", "1"]) == 2
    assert "step 1 of" in (said := capsys.readouterr().err) and "it has 2, 3." in said
    assert export.main([str(run.parent)]) == 2 and "no output_dir of a run" in capsys.readouterr().err
    assert export.main([str(run), "--strength", "-0.5"]) == 2 and "from 0" in capsys.readouterr().err
    assert not (run / "exports").exists()


PLACES = ("", "huggingface", "audiocraft", "lm_final.pt", "checkpoints/step-00000003")


@pytest.mark.parametrize("place", PLACES)
def test_base_and_tuned_are_found_from_each_place_of_a_run(finished_run: Path, place: str) -> None:
    base, tuned = base_and_tuned(str(finished_run / place), None)
    assert_equal(language_model(base), language_model(open_model("debug")))
    assert_equal(language_model(tuned), read_audiocraft(finished_run / "lm_final.pt").state)
    at_strength(base, tuned, 0.5)


def test_a_step_has_the_weights_of_its_lm_file(finished_run: Path) -> None:
    _, tuned = base_and_tuned(str(finished_run), None, step=2)
    assert_equal(language_model(tuned), read_audiocraft(finished_run / "lm_2.pt").state)
    with pytest.raises(ConfigError, match=r"--step 2 is for the output_dir of a run"):
        base_and_tuned(str(finished_run / "huggingface"), None, step=2)


def test_a_base_that_is_not_found_is_named_with_the_way_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = json.loads((run / "config.json").read_text())
    for change, named in (
        ({"model_id": "/gone/model"}, "/gone/model: there is no such folder"),
        ({"model_id": "someone/absent"}, "someone/absent"),
        ({"init_from": "/gone/lm.pt"}, "--init_from /gone/lm.pt: there is no such file"),
    ):
        (run / "config.json").unlink()  # a link to that of the run of all tests
        (run / "config.json").write_text(json.dumps(config | change))
        for place in ("", "huggingface", "lm_final.pt"):
            with pytest.raises(ModelError, match=rf"trained from cannot be opened: .*{named}.* by --base"):
                base_and_tuned(str(run / place), None)
        base, tuned = base_and_tuned(str(run), "debug")  # by hand
        assert base.name == "debug" and not torch.equal(tuned.weights["enc_to_dec_proj.bias"],
                                                        base.weights["enc_to_dec_proj.bias"])  # fmt: skip
    shutil.move(run / "huggingface", run.parent / "alone")
    with pytest.raises(ModelError, match=r"nothing says what .*alone was trained from: .*Add --base"):
        base_and_tuned(str(run.parent / "alone"), None)
    assert base_and_tuned(str(run.parent / "alone"), "debug")[0].name == "debug"


@pytest.fixture(scope="module", params=KINDS)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run of each other kind."""
    folder = tmp_path_factory.mktemp(request.param)
    launch_here(folder, *FLAGS, *KINDS[request.param])
    return request.param, folder / "models"


@pytest.mark.full
@pytest.mark.timeout(300)
def test_every_kind_of_run_exports_its_last_step_as_it_did_and_others_at_any_strength(other: tuple[str, Path]) -> None:
    kind, run = other
    assert export.main([str(run)]) == 0
    assert of_the_run(run / "exports/step-3") == of_the_run(run) != {}
    assert export.main([str(run), "--step", "2"]) == export.main([str(run), "--strength", "0.5"]) == 0
    two, half = run / "exports/step-2", run / "exports/step-3-strength-0.5"
    base, tuned = base_and_tuned(str(run), None)
    made = at_strength(base, tuned, 0.5)
    if kind == "word":
        for written, again in (("text_embedding_2", two), ("text_embedding", run / "exports/step-3")):
            then = read_text_embedding(run / f"{written}.safetensors")
            now = read_text_embedding(again / "text_embedding.safetensors")
            assert replace(now, rows_ND=then.rows_ND) == then and torch.equal(now.rows_ND, then.rows_ND)
        rows = read_text_embedding(half / "text_embedding.safetensors").rows_ND
        start, last = (model.weights[TABLE][-len(rows) :] for model in (base, tuned))
        assert torch.equal(rows, ((start.double() + last.double()) / 2).float()) and not torch.equal(start, last)
        assert torch.equal(made.weights[TABLE], base_and_tuned(str(half / "huggingface"), None)[1].weights[TABLE])
        before, _ = base_and_tuned(str(two / "text_embedding.safetensors"), None)
        assert torch.equal(before.weights[TABLE], base.weights[TABLE])
        return
    assert (two / "lm_final.pt").read_bytes() == (run / "lm_2.pt").read_bytes()
    assert_equal(read_audiocraft(half / "lm_final.pt").state, language_model(made))
    for place in [place for place in (*PLACES, "lm_2.pt", "adapter") if (run / place).exists()]:
        assert_equal(language_model(base_and_tuned(str(run / place), None)[0]), language_model(base))
    if kind == "lora":
        # Base and scaled adapter are rounded once, the mean of base and merged weights twice.
        _, scaled = base_and_tuned(str(half / "adapter"), None)
        for name, weight in language_model(scaled).items():
            assert (weight - made.weights[name]).abs().max() <= 2.0**-22 * weight.abs().max(), name
    if kind == "stereo":
        assert_equal(language_model(base), language_model(in_stereo(open_model("debug"), "copied")))
        assert_equal(language_model(base_and_tuned(str(run), "debug")[0]), language_model(base))
    if kind == "average":
        checkpoint = newest(run / "checkpoints")
        assert checkpoint is not None and checkpoint.names(EMA)
        name = "decoder.lm_heads.0.weight"
        assert torch.equal(tuned.weights[name].reshape(-1), checkpoint.read(EMA + name))
        assert not torch.equal(tuned.weights[name].reshape(-1), checkpoint.read(WEIGHT + name))


@pytest.mark.full
@pytest.mark.parametrize("lora", [(), ("--lora_rank", "4")], ids=["whole", "lora"])
def test_a_run_with_a_start_has_that_as_its_base(finished_run: Path, tmp_path: Path, lora: tuple[str, ...]) -> None:
    launch_here(tmp_path, *FLAGS, "--init_from", str(finished_run), *lora)
    first = read_audiocraft(finished_run / "lm_final.pt").state
    for place in ("", "lm_final.pt", "checkpoints/step-00000003"):
        base, tuned = base_and_tuned(str(tmp_path / "models" / place), None)
        assert_equal(language_model(base), first)
        assert_equal(language_model(tuned), read_audiocraft(tmp_path / "models/lm_final.pt").state)
    named, _ = base_and_tuned(str(tmp_path / "models/checkpoints/step-00000003"), str(finished_run))
    assert_equal(language_model(named), first)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_run_of_two_processes_exports_on_one_as_it_did(tmp_path: Path) -> None:
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    few_clips(tmp_path / "data")
    flags = ("--dataset", "data", "--model_id", "debug", "--segment_seconds", "4", "--strategy", "zero2", *FLAGS)
    flags = (*flags, "--device", "cpu")
    done = subprocess.run(
        [*two, str(ROOT / "launch.py"), *flags],
        cwd=tmp_path, env=environ(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = newest(tmp_path / "models/checkpoints")
    assert checkpoint is not None and len(list(checkpoint.folder.glob("rank-*"))) == 2
    assert export.main([str(tmp_path / "models")]) == 0
    assert of_the_run(tmp_path / "models/exports/step-3") == of_the_run(tmp_path / "models")


@pytest.mark.full
def test_audiocraft_loads_a_step_at_a_strength(run: Path) -> None:
    from tests.interop.audiocraft_modules import require_audiocraft

    require_audiocraft()
    from tests.interop.audiocraft_models import load_exported

    assert export.main([str(run), "--step", "2", "--strength", "0.6"]) == 0
    half = run / "exports/step-2-strength-0.6"
    model, state = load_exported(half / "audiocraft"), torch.load(half / "lm_final.pt", weights_only=True)
    theirs = model.lm.state_dict()
    assert_equal({name: theirs[name] for name in state}, state)
    again = {name: tensor + 1 for name, tensor in state.items()}
    model.lm.load_state_dict(again)
    assert_equal({name: model.lm.state_dict()[name] for name in state}, again)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_an_export_killed_at_any_moment_leaves_whole_files_and_the_runs_own(run: Path) -> None:
    before, place = of_the_run(run), run / "exports/step-2-strength-0.5"
    command = [sys.executable, str(ROOT / "scripts/export.py"), str(run), "--step", "2", "--strength", "0.5"]
    environment = environ(PYTHONPATH=import_path())
    seen = set()
    for milliseconds in (0, 60, 150, 300, 600):
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not (place.exists() and any(place.iterdir())):
                time.sleep(0.005)
            time.sleep(milliseconds / 1000)
            os.kill(process.pid, signal.SIGKILL)
        left = {name for name in ("lm_final.pt", "audiocraft") if (place / name).exists()}
        if "lm_final.pt" in left:
            assert len(read_audiocraft(place / "lm_final.pt").state) == len(language_model(open_model("debug")))
        if "audiocraft" in left:
            read_audiocraft(place / "audiocraft")
        if (place / "huggingface").exists():
            open_model(str(place / "huggingface"))
        seen.add(tuple(sorted(path.name for path in place.iterdir())))
        shutil.rmtree(place)
    assert of_the_run(run) == before and len(seen) > 1
    assert Checkpoint(run / "checkpoints/step-00000002").step == 2
    assert export.main([str(run), "--step", "2", "--strength", "0.5"]) == 0
