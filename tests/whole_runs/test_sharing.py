"""Whole runs that end on the hub, by a small local server of its protocol in its place."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import export
import pytest
import soundfile
import torch
from huggingface_hub import ModelCard

from tests.exports.test_shared_card import RECALL, SCORE
from tests.hub_models_server import TOKEN, Models, environment, serving, used_by_this_process
from tests.ranks.launches import ends
from tests.ranks.launches import start as start_ranks
from tests.runs import ROOT, assert_bit_equal, environ, final_state, import_path, launch, launch_here
from trainer.errors import EXIT_USAGE, ConfigError
from trainer.exports.model_card import model_card
from trainer.run.output_dir import OutputDir
from trainer.wiring.exporting import card_facts, made_in
from trainer.wiring.finished_run import config_of_run
from trainer.wiring.sharing import content_of, without_paths

PUSH = ("--push_to_hub", "ann/x")
FINISHED = ("--max_steps", "3", "--warmup_steps", "1", "--lr", "1e-3", "--batch_size", "2", "--grad_acc", "1")
FINISHED += ("--code_views", "1", "--save_step", "2")  # the flags of tests/conftest.py's finished_run
LORA = ("--max_steps", "4", "--lora_rank", "2", "--lr", "1e-2", "--warmup_steps", "1", "--validation", "0.4")
LORA += ("--sample_every", "2", "--sample_seconds", "1", "--sample_prompts", 'rock & <b>"roll"</b>|slow')
LORA += ("--sample_continue", "0.5")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    with used_by_this_process(tmp_path / "home", monkeypatch) as hub:
        yield hub


def traces(folder: Path, *words: str) -> list[str]:
    """Files below `folder` that hold one of the words."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [f"{word} in {path}" for path in files for word in words if word.encode() in path.read_bytes()]


def push_script(folder: Path, hub: Models, *flags: str, expect: int = 0) -> str:
    command = [sys.executable, str(ROOT / "scripts/push_to_hub.py"), "models", "--repo", *flags]
    variables = environ(**environment(hub, folder), PYTHONPATH=import_path())
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_that_could_not_be_uploaded_is_refused_before_anything_is_encoded(
    hub: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    output = launch_here(tmp_path, *PUSH, expect=EXIT_USAGE)
    assert "error: the hub's repository ann/x: there is no token for the hub: log in with `hf auth login`" in output
    assert not (tmp_path / "cache").exists() and hub.repositories == {}
    assert "--public has no effect without --push_to_hub" in launch_here(tmp_path, "--public", expect=EXIT_USAGE)


def test_a_finished_run_that_is_started_again_with_the_flag_is_uploaded_once(
    hub: Models, tmp_path: Path, finished_run: Path
) -> None:
    """The flag is no part of a run's identity: one that was made without it goes on with it."""
    shutil.copytree(finished_run.parent, tmp_path / "run")
    output = launch_here(tmp_path / "run", *FINISHED, *PUSH)
    assert "already complete: 3 steps" in output and "uploaded: " in output and "(a private repository)" in output
    pushed, repository = hub.content("ann/x"), hub.repositories["ann/x"]
    ours = {path.name: path.read_bytes() for path in (tmp_path / "run/models/huggingface").iterdir()}
    card = pushed.pop("README.md").decode()
    ours.pop("README.md")
    assert pushed == ours and repository.private and 'model="ann/x"' in card
    again = launch_here(tmp_path / "run", *FINISHED, *PUSH)
    assert "nothing to upload, all of it is there" in again and len(repository.commits) == 2
    assert Counter(hub.received) == Counter(set(hub.received))
    hub.refuse = {"/commit/": 403}
    (tmp_path / "run/models/huggingface/generation_config.json").write_text("{}")
    failed = launch_here(tmp_path / "run", *FINISHED, *PUSH)
    assert "warning: the run is complete, but not uploaded: " in failed and "403" in failed
    assert "\n  python scripts/push_to_hub.py models --repo ann/x\n" in failed
    assert len(repository.commits) == 2
    assert TOKEN not in output + again + failed and traces(tmp_path / "run", TOKEN) == []


def card_from_its_folder(run: Path) -> str:
    """The card beside the exported model, made anew from what the run's folder tells."""
    folder = OutputDir(root=run)
    step, loss = folder.exported_step(), folder.read_json("finished.json").get("validation_loss")
    assert step is not None
    return model_card(card_facts(config_of_run(run), made_in(folder), step, loss if isinstance(loss, float) else None))


def test_the_card_says_of_a_run_what_its_export_said(finished_run: Path) -> None:
    assert card_from_its_folder(finished_run) == (finished_run / "huggingface/README.md").read_text()


def card_of(place: Path) -> str:
    card = content_of(place, "ann/x").files["README.md"]
    assert isinstance(card, bytes)
    return card.decode()


def test_a_card_has_no_figures_of_another_step(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "models"
    shutil.copytree(finished_run, run, copy_function=os.link)
    for step, shown in ((3, True), (2, False)):  # of step 2, as where the run went on after it was judged
        (run / "score.json").write_text(json.dumps(SCORE | {"exported_step": step}))
        (run / "recall.json").write_text(json.dumps(RECALL | {"exported_step": step}))
        card = card_of(run)
        assert ("KAD, EnCodec" in card, "Memorisation" in card) == (shown, shown)
    assert "recall.json is left out of the card: it is of step 2, and this is step 3" in capsys.readouterr().out
    card_file = run / "huggingface/README.md"
    other = card_file.read_text().replace("| optimizer steps | 3 |", "| optimizer steps | 5 |")
    card_file.unlink()  # a link to that of the run of all tests
    card_file.write_text(other)
    with pytest.raises(ConfigError, match="huggingface is of step 5, and the run exported step 3"):
        content_of(run, "ann/x")


@pytest.mark.full
def test_an_export_of_another_step_and_strength_is_shared_as_that(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "models"
    shutil.copytree(finished_run, run, copy_function=os.link)
    (run / "score.json").write_text(json.dumps(SCORE | {"exported_step": 3}))
    assert export.main([str(run), "--step", "2", "--strength", "0.5"]) == 0
    half = run / "exports/step-2-strength-0.5"
    content, card = content_of(half, "ann/x"), card_of(half)
    assert content.files["model.safetensors"] == half / "huggingface/model.safetensors"
    assert "| optimizer steps | 2 |" in card and "| strength | 0.5, " in card and "KAD" not in card
    assert (content.exported.in_words, content.part) == ("step 2 at strength 0.5", "model")
    assert export.main([str(run), "--output", str(run)]) == EXIT_USAGE, "its page and figures are of its own export"
    shutil.move(half, tmp_path / "half")
    with pytest.raises(ConfigError, match="outside of its run's folder"):
        content_of(tmp_path / "half", "ann/x")


def test_a_configuration_goes_without_the_folder_that_a_part_came_from(tmp_path: Path) -> None:
    t5 = {"_name_or_path": "t5-small", "d_model": 8}
    (tmp_path / "config.json").write_text(json.dumps({"text_encoder": t5}))
    assert without_paths(tmp_path / "config.json") == tmp_path / "config.json", "names of the hub stay"
    codec = {"_name_or_path": "/home/ann/encodec", "layers": [{"base_model_name_or_path": str(tmp_path), "width": 3}]}
    (tmp_path / "config.json").write_text(json.dumps({"text_encoder": t5, "audio_encoder": codec}))
    written = without_paths(tmp_path / "config.json")
    assert isinstance(written, bytes)
    assert json.loads(written) == {"text_encoder": t5, "audio_encoder": {"layers": [{"width": 3}]}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Models, str]]:
    """A LoRA's run with sounds that has pushed itself, from a copy of the debug model in a folder."""
    from trainer.exports.export import write_huggingface
    from trainer.model.source import LANGUAGE_MODEL, open_model

    folder = tmp_path_factory.mktemp("shared")
    source = open_model("debug")
    write_huggingface(source, source.weights.starting_with(*LANGUAGE_MODEL), folder / "private_base", "a card")
    with serving() as hub:
        flags = (*LORA, "--model_id", str(folder / "private_base"), *PUSH)
        yield folder, hub, launch(folder, *flags, **environment(hub, folder))


@pytest.mark.full
def test_a_run_pushes_its_model_sounds_and_card_and_nothing_private(shared: tuple[Path, Models, str]) -> None:
    folder, hub, output = shared
    assert "at the end this run is uploaded to ann/x" in output and f"uploaded: {hub.url}/ann/x" in output
    pushed = hub.content("ann/x")
    named = {path for path in pushed if not path.startswith("samples/")}
    assert named == {path.name for path in (folder / "models/huggingface").iterdir()}
    private = [TOKEN, str(folder), str(Path.home()), "private_base/"]
    for path, content in pushed.items():
        assert not [word for word in private if word.encode() in content], path
    assert TOKEN not in output and traces(folder, TOKEN) == []
    card = ModelCard(pushed["README.md"].decode())
    assert "rock &amp; &lt;b&gt;&quot;roll&quot;&lt;/b&gt;" in card.text and "<b>" not in card.text
    assert card_from_its_folder(folder / "models") == (folder / "models/huggingface/README.md").read_text()
    losses = {one.metric_type: one.metric_value for one in card.data.eval_results or []}
    assert re.search(rf"validation loss \(nats\) \| {losses['loss']:.4f} ", card.text)


@pytest.mark.full
def test_every_sound_of_the_card_is_there_and_plays_and_none_is_of_a_clip(shared: tuple[Path, Models, str]) -> None:
    _, hub, _ = shared
    sources = re.findall(r'<audio [^>]*src="([^"]+)"', hub.content("ann/x")["README.md"].decode())
    assert len(sources) == 4, "two prompts before and after; the one that goes on from a clip is not shown"
    sounds = []
    for source in sources:
        with urlopen(Request(source, headers={"Authorization": f"Bearer {TOKEN}"})) as answer:
            sounds.append(soundfile.read(io.BytesIO(answer.read()))[0])
    assert all(abs(len(sound) / 32_000 - 1) < 0.1 and abs(sound).max() > 0 for sound in sounds)
    assert {f"samples/{Path(source).name}" for source in sources} == {
        path for path in hub.content("ann/x") if path.startswith("samples/")
    }


@pytest.mark.full
def test_transformers_and_peft_load_what_was_pushed(
    shared: tuple[Path, Models, str], tmp_path: Path
) -> None:
    folder, hub, _ = shared
    output = push_script(folder, hub, "ann/adapter", "--part", "adapter")
    assert "uploading the adapter of step 4" in output
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.content("ann/adapter"))
    code = f"""
import torch, sys
from peft import PeftModel
from transformers import AutoProcessor, MusicgenForConditionalGeneration as Model
pushed = Model.from_pretrained("ann/x").eval()
words = AutoProcessor.from_pretrained("ann/x")(text=["slow rock"], padding=True, return_tensors="pt")
own = Model.from_pretrained("{folder}/models/huggingface").eval()
adapted = PeftModel.from_pretrained(Model.from_pretrained("{folder}/private_base"), "ann/adapter").eval()
codes = torch.randint(0, 100, (4, 7))
with torch.no_grad():
    logits = [model(**words, decoder_input_ids=codes).logits for model in (pushed, own, adapted)]
assert torch.equal(logits[0], logits[1]), "what was pushed is what was exported"
error = (logits[0] - logits[2]).abs().max() / logits[0].abs().max()
assert error < 1e-5, error  # float32: the merged adapter adds in another order
print("loaded")
"""
    variables = environ(**environment(hub, tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "loaded" in done.stdout, done.stderr[-3000:]


@pytest.mark.full
def test_a_run_whose_upload_fails_ends_as_one_without_it(hub: Models, tmp_path: Path) -> None:
    launch_here(tmp_path / "without", *FINISHED)
    hub.refuse = {"/repos/create": 500}
    output = launch_here(tmp_path / "with", *FINISHED, *PUSH)
    assert "warning: the run is complete, but not uploaded" in output
    assert (tmp_path / "with/models/exit_code").read_text() == (tmp_path / "without/models/exit_code").read_text()
    assert_bit_equal(final_state(tmp_path / "without"), final_state(tmp_path / "with"))
    exported: list[Any] = [
        torch.load(tmp_path / name / "models/lm_final.pt", weights_only=True) for name in ("without", "with")
    ]
    assert_bit_equal(*exported)


@pytest.mark.full
def test_of_two_processes_one_talks_to_the_hub(tmp_path: Path) -> None:
    with serving() as hub:
        variables = [environment(hub, tmp_path)] * 2
        ranks = ends(start_ranks(tmp_path, "--max_steps", "2", *PUSH, environments=variables), tmp_path, 150)
        assert [code for code, _ in ranks] == [0, 0]
        assert hub.asked.count(("GET", "/api/whoami-v2")) == 1
        assert len(hub.repositories["ann/x"].commits) == 2
        wrong = [one | {"HF_TOKEN": "hf_wrong"} for one in variables]
        refused = ends(start_ranks(tmp_path / "2", *PUSH, environments=wrong), tmp_path / "2", 100)
        assert all(code != 0 for code, _ in refused) and not (tmp_path / "2/cache").exists()
