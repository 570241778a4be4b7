"""Whole runs of the debug model that validate on other clips: which step they end at, keep and export."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks.harness import start_ranks
from tests.ranks.launches import ends, launched
from tests.run.test_best import named_best, steps_on_disk
from tests.runs import assert_bit_equal, command, few_clips, launch_here, metrics
from trainer.exports.audiocraft_names import lm_to_audiocraft
from trainer.run.checkpoint import Checkpoint, newest
from trainer.run.checkpoint_folders import folder_name

OTHERS = ("arcade_meadow", "metal_chaosland")
FLAGS = ("--validation", "held_out", "--validation_steps", "2", "--lr", "3e-3", "--warmup_steps", "1")
FLAGS += ("--epochs", "999", "--batch_size", "3", "--grad_acc", "1", "--keep_best", "1")
# It learns its three clips by heart within some 20 steps, and gets worse on the others.
EARLY = (*FLAGS, "--max_steps", "200", "--early_stop", "3")


def with_others(folder: Path) -> Path:
    few_clips(folder / "held_out", OTHERS)
    return folder


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "models/lm_final.pt", weights_only=True)


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return lm_to_audiocraft(dict(Checkpoint(folder / "models/checkpoints" / folder_name(step)).weights()))


def told_best(folder: Path) -> tuple[int, float]:
    """Step and loss of the lowest validation loss in metrics.jsonl, the first of equal ones."""
    losses = metrics(folder, "validation_loss")
    return min(losses.items(), key=lambda item: (item[1], item[0]))


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = with_others(tmp_path_factory.mktemp("early"))
    return folder, launch_here(folder, *EARLY)


def test_a_run_ends_early_exports_its_best_step_and_says_so(early: tuple[Path, str]) -> None:
    folder, output = early
    losses = metrics(folder, "validation_loss")
    step, loss = told_best(folder)
    last = max(losses)
    assert 0 < step < last < 200 and last == step + 6, "three validations, of two steps each, after the best"
    assert steps_on_disk(folder / "models")[-1] == last and named_best(folder / "models") == step
    assert_bit_equal(exported(folder), weights_of(folder, step))
    assert f"Exported is step {step}, validation loss {loss:.4f}" in output
    assert "3 validation(s) were no better" in output
    card = (folder / "models/huggingface/README.md").read_text()
    assert f"| optimizer steps | {step} |" in card and f"| validation loss (nats) | {loss:.4f} |" in card
    assert json.loads((folder / "models/finished.json").read_text()) == {
        "step": last, "exported_step": step, "reason": "early stop", "steps": 200, "validation_loss": loss,
        "early_stop": 3,
    }  # fmt: skip
    assert output.count("the training loss falls") == 1
    again = launch_here(folder, *EARLY)
    assert f"already complete: {last} of 200 steps" in again and "training:" not in again


@pytest.mark.full
def test_the_last_step_is_exported_where_that_is_asked_for_without_a_step_more(tmp_path: Path) -> None:
    folder = with_others(tmp_path)
    flags = (*FLAGS, "--max_steps", "30")
    launch_here(folder, *flags)
    step, _ = told_best(folder)
    assert 0 < step < 30 and step in steps_on_disk(folder / "models")
    assert_bit_equal(exported(folder), weights_of(folder, step))
    output = launch_here(folder, *flags, "--export", "last")
    assert "Exported is step 30" in output and max(metrics(folder)) == 30
    assert_bit_equal(exported(folder), weights_of(folder, 30))
    assert "already complete: 30 steps" in launch_here(folder, *flags, "--export", "last")
    assert f"Exported is step {step}" in launch_here(folder, *flags)
    more = launch_here(folder, *flags[:-1], "32")
    assert "step 30 of 32" in more and max(metrics(folder)) == 32


@pytest.mark.full
@pytest.mark.parametrize("flags", [("--ema_decay", "0.7"), ("--lora_rank", "4"), ("--tune_text", "1", "--lr", "0.5")])
def test_averages_adapters_and_new_words_are_exported_of_the_best_step(flags: tuple[str, ...], tmp_path: Path) -> None:
    folder = with_others(tmp_path)
    output = launch_here(folder, *FLAGS, *flags, "--max_steps", "12")
    step, loss = told_best(folder)
    assert f"Exported is step {step}, validation loss {loss:.4f}" in output and named_best(folder / "models") == step
    best = dict(Checkpoint(folder / "models/checkpoints" / folder_name(step)).weights())
    if "--ema_decay" in flags:
        assert_bit_equal(exported(folder), lm_to_audiocraft(best))
        return
    # What is exported is a function of the checkpoint: that of a run whose last step is the best one.
    launch_here(folder, *FLAGS, *flags, "--max_steps", "12", "--save_step", str(step), "--output_dir", "twin")
    name = "text_embedding" if "--tune_text" in flags else "lm"
    if name == "lm":
        at_step = torch.load(folder / f"twin/lm_{step}.pt", weights_only=True)
        assert_bit_equal(exported(folder), at_step)
    else:
        files = [folder / "models/text_embedding.safetensors", folder / f"twin/text_embedding_{step}.safetensors"]
        # Not by their bytes: safetensors writes the entries of a header in any order.
        assert_bit_equal(*(load_file(file) for file in files))


def killed_before_naming() -> None:
    """The second best checkpoint is complete, and best.json names the first one still."""
    _kill_at("name_best", 2)


def killed_before_removing() -> None:
    """best.json names the new best, and the former one is still there."""
    _kill_at("rotate", 3)


def _kill_at(name: str, call: int) -> None:
    from trainer.run import checkpoint

    function, calls = getattr(checkpoint, name), []

    def kill(*arguments: object) -> None:
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        function(*arguments)

    setattr(checkpoint, name, kill)


@pytest.mark.full
@pytest.mark.parametrize("change", [killed_before_naming, killed_before_removing])
def test_kill_9_around_the_naming_of_the_best_changes_nothing(change, early: tuple[Path, str], tmp_path: Path) -> None:
    whole, _ = early
    folder = with_others(tmp_path)
    [process] = start_ranks(1, launched, str(folder), [command(folder, *EARLY)[2:]], change).processes
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "models/finished.json").exists()
    running = start_ranks(1, launched, str(folder), [command(folder, *EARLY)[2:]], None)
    [(code, output)] = ends(running, folder, 120)
    assert code == 0, output
    assert metrics(folder, "validation_loss") == metrics(whole, "validation_loss")
    assert steps_on_disk(folder / "models") == steps_on_disk(whole / "models")
    assert named_best(folder / "models") == named_best(whole / "models")
    assert_bit_equal(exported(folder), exported(whole))
    headers = [newest(one / "models/checkpoints") for one in (folder, whole)]
    assert headers[0] is not None and headers[1] is not None
    assert headers[0].run.validations == headers[1].run.validations
