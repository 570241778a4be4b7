"""What each flag of the first system promised, seen in what a run leaves behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.musicgen.modeling_musicgen import MusicgenAttention

from tests.rounding import LOSS, ROUNDING
from tests.runs import few_clips, final_state, launch_here, metrics
from trainer.engine.torch_build import why_gpus_are_unused
from trainer.model.debug_model import build_debug_model, debug_feature_extractor, debug_tokenizer

SHORT = ("--epochs", "2", "--batch_size", "2", "--grad_acc", "1")


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "models" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    """A folder whose cache is filled; its data is copied by the tests that change it."""
    folder = tmp_path_factory.mktemp("warm")
    launch_here(folder, *SHORT, "--output_dir", "first")
    return folder


def test_epochs_batch_size_and_grad_acc_make_the_steps(warm):
    # 3 clips, 5 epochs = 15 clips: steps of 2 x 2
    launch_here(warm, "--epochs", "5", "--batch_size", "2", "--grad_acc", "2", "--output_dir", "steps")
    lines = (warm / "steps/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert json.loads(lines[-1])["epoch"] == 5


def test_global_batch_is_split_by_batch_size(warm):
    launch_here(warm, "--epochs", "4", "--global_batch", "6", "--batch_size", "4", "--output_dir", "global")
    plan = json.loads((warm / "global/plan.json").read_text())
    assert (plan["global_batch"], plan["micro_batch"], plan["accumulation"]) == (6, 3, 2)
    assert len((warm / "global/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("grad_acc", ["1", "2", "3"])
def test_save_step_writes_at_every_nth_optimizer_step_for_any_grad_acc(warm, grad_acc):
    output = f"saves{grad_acc}"
    flags = ("--epochs", "40", "--max_steps", "7", "--save_step", "3", "--batch_size", "1", "--grad_acc", grad_acc)
    launch_here(warm, *flags, "--output_dir", output)
    assert sorted(path.name for path in (warm / output).glob("lm_*.pt")) == ["lm_3.pt", "lm_6.pt", "lm_final.pt"]
    saved, final = (torch.load(warm / output / name) for name in ("lm_6.pt", "lm_final.pt"))
    assert saved.keys() == final.keys()
    assert any(not torch.equal(saved[name], final[name]) for name in saved)


@pytest.mark.numbers
def test_no_label_trains_a_folder_without_captions(tmp_path):
    few_clips(tmp_path / "data", captions=False)
    refused = launch_here(tmp_path, *SHORT, expect=3)
    assert "no caption" in refused and "--no_label 1" in refused
    launch_here(tmp_path, *SHORT, "--no_label", "1")
    assert len(metrics(tmp_path)) == 3
    # Null conditions add nothing to the loss, so nothing of the text path may learn: its gradient is exactly 0, and the
    # default decay of 1e-5 at a rate of 1e-5 is below rounding, which each of three steps may do twice.
    before = build_debug_model().enc_to_dec_proj.weight.detach()
    after = final_state(tmp_path)["weight/enc_to_dec_proj.weight"].view_as(before)
    torch.testing.assert_close(after, before, rtol=6 * ROUNDING, atol=0)


def test_use_cfg_drops_captions_and_the_same_seed_drops_the_same(warm):
    losses = []
    for output, flags in [("cfg0", ()), ("cfg1", ("--use_cfg", "1", "--cfg_rate", "0.9")), ("cfg2", ("--use_cfg=1",))]:
        launch_here(warm, *SHORT, *flags, "--output_dir", output)
        losses.append([json.loads(line)["loss"] for line in (warm / output / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] != losses[1]
    launch_here(warm, *SHORT, "--use_cfg", "1", "--cfg_rate", "0.9", "--output_dir", "cfg3")
    again = [json.loads(line)["loss"] for line in (warm / "cfg3/metrics.jsonl").read_text().splitlines()]
    assert again == losses[1]


def test_lr_and_warmup_steps_are_what_the_run_reports(warm):
    flags = ("--lr", "0.002", "--warmup_steps", "4", "--epochs", "50", "--max_steps", "8", "--batch_size", "1")
    launch_here(warm, *flags, "--output_dir", "rates")
    lines = [json.loads(line) for line in (warm / "rates/metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines[:4]] == pytest.approx([0.0005, 0.001, 0.0015, 0.002])
    assert 0 < lines[-1]["lr"] < 0.0005
    assert all(len(line["loss_per_codebook"]) == 4 for line in lines)
    assert all(line["frames_per_second"] > 0 and 0 < line["mfu"] < 2 for line in lines)


@pytest.mark.full
@pytest.mark.numbers
@pytest.mark.parametrize("checkpointing", ["0", "selective", "1"])
def test_compiled_layers_give_the_same_losses(warm, checkpointing):
    from torch._dynamo.utils import counters

    # Clips of several lengths: what is compiled serves them all.
    flags = (*SHORT, "--batch_size", "1", "--max_steps", "6", "--gradient_checkpointing")
    # Folders of their own: a finished run in one would not be run again.
    names = [f"{way}-{checkpointing}" for way in ("eager", "compiled")]
    launch_here(warm, *flags, checkpointing.replace("selective", "0"), "--output_dir", names[0])
    torch._dynamo.reset()
    counters.clear()
    launch_here(warm, *flags, checkpointing, "--output_dir", names[1], "--compile", "1")
    assert counters["stats"]["unique_graphs"] > 0
    eager, compiled = (
        [json.loads(line)["loss"] for line in (warm / name / "metrics.jsonl").read_text().splitlines()]
        for name in names
    )
    # As tests/ranks/test_compiled.py.
    assert compiled == pytest.approx(eager, abs=3 * LOSS) and compiled != [0.0] * len(eager)


def test_weight_decay_shrinks_every_parameter(warm):
    flags = ("--epochs", "40", "--max_steps", "4", "--lr", "1e-3", "--warmup_steps", "0", "--lr_schedule", "constant")
    launch_here(warm, *flags, "--weight_decay", "100", "--output_dir", "decay")
    launch_here(warm, *flags, "--weight_decay", "0", "--output_dir", "none")
    decayed, plain = (torch.load(warm / name / "lm_final.pt") for name in ("decay", "none"))
    for name in decayed:  # (1 - lr x decay) ** 4 = 0.9 ** 4
        assert decayed[name].norm() < 0.9 * plain[name].norm() or plain[name].norm() < 0.1, name


def test_wandb_writes_one_offline_run_when_asked(warm, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    launch_here(warm, *SHORT, "--use_wandb=1", "--output_dir", "tracked")
    assert len(list((warm / "tracked/wandb").glob("offline-run-*/*.wandb"))) == 1


def test_wandb_without_a_login_is_refused_with_a_way_out(warm, monkeypatch, tmp_path):
    import wandb

    wandb.teardown()  # what it remembers of other runs in this process
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    output = launch_here(warm, *SHORT, "--use_wandb", "1", "--output_dir", "no_login", expect=2)
    assert "wandb login" in output and "WANDB_MODE=offline" in output


def test_a_tracker_that_is_not_installed_is_refused_and_not_left_out(warm, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    output = launch_here(warm, *SHORT, "--use_tensorboard", "1", "--output_dir", "no_board", expect=2)
    assert "pip install tensorboard" in output


def test_tensorboard_writes_events_when_asked(warm):
    launch_here(warm, *SHORT, "--use_tensorboard", "1", "--output_dir", "board")
    assert list((warm / "board").rglob("events.out.tfevents.*"))


def test_model_id_takes_a_local_folder(warm):
    folder = warm / "model"
    build_debug_model().save_pretrained(folder)
    debug_tokenizer().save_pretrained(folder)
    debug_feature_extractor().save_pretrained(folder)
    launch_here(warm, *SHORT, "--output_dir", "from_debug")
    launch_here(warm, *SHORT, "--model_id", "./model", "--output_dir", "from_folder")
    first, second = (torch.load(warm / name / "lm_final.pt") for name in ("from_debug", "from_folder"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "model_id,words",
    [
        ("./nowhere", "no such folder"),
        ("data", "config.json"),
        ("someone/musicgen", "HF_HUB_OFFLINE is set"),
        ("no such model!", "it can be no hub id"),
        ("tiny", "no folder of this name here, and it is none of small, medium"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_with_a_way_out(warm, monkeypatch, model_id, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert words in launch_here(warm, "--model_id", model_id, "--output_dir", "refused", expect=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that is used")
def test_a_gpu_that_is_not_used_is_told_and_a_real_model_is_not_fetched_for_the_cpu(warm, monkeypatch, tmp_path):
    """With an nvidia-smi that lists a card, as where the driver works and torch is a build without CUDA, or too new."""
    program = tmp_path / "nvidia-smi"
    card = "<gpu><product_name>RTX 3060</product_name></gpu>"
    program.write_text(f"#!/bin/sh\necho '<log><driver_version>470.57</driver_version>{card}</log>'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # --device cpu sets it
    why_gpus_are_unused.cache_clear()
    try:
        said = launch_here(warm, "--max_steps", "1", "--output_dir", "on_the_cpu")
        assert said.count("warning: this run is on the CPU. 1 GPU(s) (RTX 3060) in this machine, but") == 1
        said = launch_here(warm, "--model_id", "small", "--output_dir", "never", expect=2)
        assert "small has 420 million parameters" in said and "RTX 3060" in said and "add --device cpu" in said
        said = launch_here(warm, "--max_steps", "1", "--device", "cpu", "--output_dir", "asked_for")
        assert "warning" not in said
    finally:
        why_gpus_are_unused.cache_clear()


def test_validation_reports_each_codebook_and_leaves_the_order_of_others(warm):
    launch_here(warm, *SHORT, "--validation", "0.5", "--output_dir", "validated", "--seed", "3")
    lines = [json.loads(line) for line in (warm / "validated/metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "validation_loss" in line]
    assert validations and all(len(line["validation_loss_per_codebook"]) == 4 for line in validations)
    config = json.loads((warm / "validated/config.json").read_text())
    assert config["validation"] == "0.5"


def test_dropout_repeats_itself_and_changes_the_losses(warm):
    losses = []
    for output, rate in [("drop1", "0.3"), ("drop2", "0.3"), ("drop3", "0")]:
        launch_here(warm, *SHORT, "--dropout", rate, "--output_dir", output)
        losses.append([json.loads(line)["loss"] for line in (warm / output / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.numbers
def test_gradient_checkpointing_computes_layers_twice_and_changes_no_number(warm, monkeypatch):
    states, calls = [], []
    counts = []
    forward = MusicgenAttention.forward

    def counted(self, *arguments, **named):
        calls.append(self)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(MusicgenAttention, "forward", counted)
    for output, flag in [("kept", "0"), ("recomputed", "1")]:
        calls.clear()
        launch_here(warm, *SHORT, "--gradient_checkpointing", flag, "--output_dir", output)
        counts.append(len(calls))
        states.append(torch.load(warm / output / "lm_final.pt"))
    assert counts[1] == 2 * counts[0]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
