"""Runs with --stereo 1: resumed, told from runs without it, and started from mono and stereo runs."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.runs import assert_bit_equal, final_state, launch_here, metrics
from trainer.exports.audiocraft_names import lm_to_audiocraft
from trainer.exports.saved_models import open_saved
from trainer.model.source import LANGUAGE_MODEL, open_model

pytestmark = [pytest.mark.full, pytest.mark.numbers]
FLAGS = ("--lr", "1e-3", "--warmup_steps", "1", "--batch_size", "2", "--grad_acc", "1", "--code_views", "1")
FLAGS = (*FLAGS, "--lr_schedule", "constant")
STEREO = (*FLAGS, "--stereo", "1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a run made stereo in models/, and of a mono one in mono/."""
    folder = tmp_path_factory.mktemp("made_stereo")
    launch_here(folder, *STEREO, "--max_steps", "2")
    launch_here(folder, *FLAGS, "--max_steps", "2", "--output_dir", "mono")
    return folder


def losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_the_uninterrupted_one(runs: Path, tmp_path: Path) -> None:
    for name in ("data", "cache"):
        shutil.copytree(runs / name, tmp_path / name)
    launch_here(tmp_path, *STEREO, "--max_steps", "4")
    shutil.copytree(tmp_path / "data", tmp_path / "again/data")
    shutil.copytree(runs / "models", tmp_path / "again/models")
    said = launch_here(tmp_path / "again", *STEREO, "--max_steps", "4")
    assert "resuming from" in said and metrics(tmp_path / "again") == metrics(tmp_path)
    assert_bit_equal(final_state(tmp_path / "again"), final_state(tmp_path))


def test_stereo_typed_at_resume_alone_or_at_the_start_alone_is_refused_with_both_values(runs: Path) -> None:
    said = launch_here(runs, *FLAGS, "--max_steps", "3", expect=1)
    assert "--stereo, --stereo_init: stereo, with embeddings halved then, None now" in said
    said = launch_here(runs, *STEREO, "--max_steps", "3", "--output_dir", "mono", expect=1)
    assert "--stereo, --stereo_init: None then, stereo, with embeddings halved now" in said
    said = launch_here(runs, *STEREO, "--stereo_init", "copied", "--max_steps", "3", expect=1)
    assert "stereo, with embeddings halved then, stereo, with embeddings copied now" in said


def test_what_is_exported_is_a_stereo_model_by_itself(runs: Path) -> None:
    made = open_model(str(runs / "models/huggingface"))
    assert (made.channels, made.codebooks) == (2, 8)
    assert made.load_feature_extractor().feature_size == 2
    flags = ("--model_id", "models/huggingface", "--output_dir", "refused")
    said = launch_here(runs, *STEREO, "--max_steps", "1", *flags, expect=1)
    assert "models/huggingface is a stereo model already: leave out --stereo 1" in said


def test_a_mono_run_and_a_stereo_one_are_starts_and_adapters_are_trained_on_the_stereo_one(runs: Path) -> None:
    said = launch_here(runs, *STEREO, "--max_steps", "1", "--init_from", "mono", "--output_dir", "of_mono")
    assert "starting from the weights in mono/checkpoints/step-00000002" in said
    launch_here(runs, *STEREO, "--max_steps", "2", "--init_from", "mono", "--output_dir", "of_mono")
    card = (runs / "of_mono/huggingface/README.md").read_text()
    assert "These weights were mono." in card and "with embeddings halved." in card  # of the run that went on, too
    of_stereo = (*STEREO, "--max_steps", "1", "--init_from", "models", "--output_dir", "of_stereo")
    said = launch_here(runs, *of_stereo, "--stereo_init", "halved", expect=2)
    assert "--stereo_init halved has no effect with --init_from models/checkpoints/step-00000002" in said
    launch_here(runs, *of_stereo)
    assert "mono" not in (runs / "of_stereo/huggingface/README.md").read_text()
    # The first step's loss is that of the weights at the start, whatever their format.
    launch_here(runs, *FLAGS, "--max_steps", "1", "--model_id", "models/huggingface", "--output_dir", "as_base")
    assert losses(runs / "of_stereo") == losses(runs / "as_base")
    said = launch_here(runs, *FLAGS, "--max_steps", "1", "--init_from", "models", "--output_dir", "refused", expect=1)
    assert "add --stereo 1" in said

    lora = (*STEREO, "--lora_rank", "4")
    said = launch_here(runs, *lora, "--max_steps", "1", "--init_from", "mono", "--output_dir", "refused", expect=2)
    assert "--stereo 1 cannot be used with what is trained here (LoRA" in said
    said = launch_here(runs, *lora, "--max_steps", "1", "--output_dir", "refused", expect=2)
    assert "--stereo 1 cannot be used with what is trained here (LoRA" in said
    for steps in ("1", "2"):
        said = launch_here(runs, *lora, "--max_steps", steps, "--init_from", "models", "--output_dir", "lora")
    assert "resuming from" in said and len(losses(runs / "lora")) == 2
    with contextlib.chdir(runs):  # --init_from is relative to the folder that the run was started in
        saved = open_saved("lora/checkpoints/step-00000002")
        names = [name for name in saved.weights if name.startswith(LANGUAGE_MODEL)]
        found = lm_to_audiocraft({name: saved.weights[name] for name in names})
    assert saved.channels == 2
    state = torch.load(runs / "lora/lm_final.pt", weights_only=True)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
