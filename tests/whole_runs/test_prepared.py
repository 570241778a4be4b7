"""Whole runs on a prepared folder: those of the music itself, without it and elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import prepare_dataset
import pytest

from tests.runs import assert_bit_equal, command, environ, few_clips, final_state, launch_here, metrics
from tests.whole_runs.test_start import PROGRAM

TRAINED = ("--lr", "1e-3", "--warmup_steps", "1", "--batch_size", "1", "--grad_acc", "1", "--use_cfg", "1")
ON_PREPARED = ("--dataset", "prepared", "--cache_dir", "none")


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, and prepared/ made of it."""
    root = tmp_path_factory.mktemp("origin")
    few_clips(root / "data")
    given = [str(root / "data"), "--output", str(root / "prepared"), "--model_id", "debug", "--code_views", "2"]
    assert prepare_dataset.main([*given, "--cache_dir", str(root / "cache"), "--word_dropout", "0.2"]) == 0
    return root


@pytest.fixture
def elsewhere(origin: Path, tmp_path: Path) -> Path:
    """Another place with a copy of prepared/ and an empty data/, from which nothing can be trained."""
    shutil.copytree(origin / "prepared", tmp_path / "prepared")
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize("flags", [(), ("--word_dropout", "0.2"), ("--validation", "0.5", "--seed", "1")])
def test_a_moved_folder_gives_the_losses_and_weights_of_the_music_itself(origin, elsewhere, flags):
    launch_here(origin, *TRAINED, *flags, "--max_steps", "5", "--output_dir", "models")
    launch_here(elsewhere, *ON_PREPARED, *TRAINED, *flags, "--max_steps", "5")
    for key in ("loss", "grad_norm", "validation_loss"):
        assert metrics(origin, key) == metrics(elsewhere, key)
    assert len(metrics(origin)) == 5
    assert_bit_equal(final_state(origin), final_state(elsewhere))
    assert not (elsewhere / "none/codes").exists() and not (elsewhere / "none/text").exists()
    shutil.rmtree(origin / "models")


@pytest.mark.full
def test_a_checkpoint_goes_on_from_the_music_to_the_folder_and_back(origin, elsewhere):
    launch_here(origin, *TRAINED, "--epochs", "3", "--lr_schedule", "constant")
    undisturbed = metrics(origin)
    shutil.copytree(origin / "data", elsewhere / "music")
    resumed = (*TRAINED, "--lr_schedule", "constant")
    launch_here(elsewhere, *resumed, "--epochs", "1", "--dataset", "music")
    assert "resuming from" in launch_here(elsewhere, *ON_PREPARED, *resumed, "--epochs", "2")
    assert "resuming from" in launch_here(elsewhere, *resumed, "--epochs", "3", "--dataset", "music")
    assert metrics(elsewhere) == undisturbed and len(undisturbed) == 9
    assert_bit_equal(final_state(origin), final_state(elsewhere))


@pytest.mark.full
def test_two_processes_train_on_a_prepared_folder(elsewhere):
    given = ["--nproc_per_node", "2", "--standalone", *command(elsewhere)[1:], *ON_PREPARED]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *given, "--word_dropout", "0.4", "--max_steps", "2"],
        cwd=elsewhere, env=environ(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(metrics(elsewhere)) == 2
    assert list((elsewhere / "none/text").glob("*/*.arrow")) and not (elsewhere / "none/codes").exists()


@pytest.mark.full
def test_nothing_that_no_step_needs_is_loaded_for_a_prepared_folder(elsewhere):
    argv = command(elsewhere, *ON_PREPARED, "--max_steps", "1")[2:]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *argv],
        cwd=elsewhere, env=environ(PYTHONPATH=str(Path(__file__).parents[2])), capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("loaded:")]
    assert done.returncode == 0 and len(lines) == 2, done.stdout + done.stderr
    assert {"pyarrow"} == set(lines[0][1:]) & {"pyarrow", "pandas", "datasets"}


def test_a_damaged_folder_and_a_flag_that_it_cannot_serve_end_the_run_before_anything_else(elsewhere):
    refused = launch_here(elsewhere, *ON_PREPARED, "--caption_lines", "1", expect=2)
    assert "--caption_lines 1: the prepared folder prepared lacks it" in refused
    (elsewhere / "prepared/prepared.json").unlink()
    refused = launch_here(elsewhere, *ON_PREPARED, expect=3)
    assert "is damaged or incomplete: prepared.json is missing" in refused
    assert not (elsewhere / "models/config.json").exists() and not (elsewhere / "none").exists()
