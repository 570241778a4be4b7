"""What scripts/benchmark.py measures on a GPU, as figures: nothing of it is bounded but that it ran and the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import benchmark
from tests.gpu.one_card import say_figure
from tests.runs import ROOT, environ, import_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEP = ("step", "--frames", "1500", "--precision", "bf16")
# What the plan takes on a card of 80 GB, from docs/benchmarks.md.
WAYS = {
    "small": ("--micro_batch", "16", "--compile"),
    "medium": ("--micro_batch", "16", "--compile", "--gradient_checkpointing", "selective"),
    "large": ("--micro_batch", "9", "--compile", "--gradient_checkpointing", "selective"),
    # As medium, to stand beside it.
    "stereo-medium": ("--micro_batch", "16", "--compile", "--gradient_checkpointing", "selective"),
    "melody": ("--micro_batch", "16", "--compile", "--gradient_checkpointing", "selective"),
}


def rows(folder: Path, *flags: str) -> list[dict]:
    """What the benchmark wrote, run in a process of its own as its users run it."""
    command = [sys.executable, str(Path(benchmark.__file__)), "--out", str(folder), "--cases", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environ(PYTHONPATH=import_path()), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "benchmark.json").read_text())["rows"]


def mfu(row: dict) -> str:
    """A step's share of what the card's own large product reaches, and of what its datasheet says."""
    datasheet = "" if row["of_datasheet"] is None else f" and {row['of_datasheet']:.2f} of the datasheet"
    return f"MFU {row['mfu']:.2f} of its own product{datasheet}"


@pytest.mark.parametrize("size", WAYS)
def test_the_step_as_the_plan_would_run_it(size: str, tmp_path: Path) -> None:
    expected = torch.cuda.get_device_properties(0).total_memory / 2**30
    if expected < 70:
        pytest.skip("these micro-batches are for 80 GB")
    [row] = rows(tmp_path, *STEP, "--models", size, "--rounds", "4", *WAYS[size])
    assert "failure" not in row, row
    say_figure(
        f"{row['frames_per_second']:,.0f} frames per second, {mfu(row)}, peak {row['peak_gib']:.1f} GiB"
        f" ({row['peak_of_plan']:.2f} of the plan), {row['first_seconds']:.0f} s for the first step"
    )
    assert row["peak_of_plan"] == pytest.approx(1, abs=0.10)


@pytest.mark.parametrize("size,clips", [("medium", "8"), ("large", "4"), ("small", "16")])
def test_the_step_beside_a_bare_loop(size: str, clips: str, tmp_path: Path) -> None:
    """The bare loop is eager and recomputes nothing, as transformers' decoder comes; ours as it is and as planned."""
    common = (*STEP[1:], "--models", size, "--micro_batch", clips, "--rounds", "3")
    found = rows(tmp_path / "eager", "bare", "step", *common)
    planned = [flag for flag in WAYS[size] if flag not in ("--micro_batch", WAYS[size][1])]
    found += rows(tmp_path / "planned", "step", *common, *planned)
    assert all("failure" not in row for row in found), found
    names = ("bare", "ours", "as planned")
    bare, ours, compiled = (row["frames_per_second"] for row in found)
    say_figure(
        f"{size}, {clips} clips: bare {bare:,.0f} frames per second, ours {ours / bare:.2f} of it, as planned"
        f" {compiled / bare:.2f}; {', '.join(f'{name} {mfu(row)}' for name, row in zip(names, found, strict=True))}"
    )


def test_encoding_beside_encodec_alone(tmp_path: Path) -> None:
    _, filling = rows(tmp_path, "encode", "--rounds", "2", "--clips", "16", "--clip_seconds", "60")
    say_figure(
        f"{filling['audio_seconds_per_second']:,.0f} s of sound per second into the cache,"
        f" {filling['throughput_of_alone']:.2f} of EnCodec's alone"
    )
    assert filling["audio_seconds_per_second"] > 0


def test_a_checkpoint_beside_the_steps(tmp_path: Path) -> None:
    [row] = rows(tmp_path, "save", *STEP[1:], "--models", "medium", "--micro_batch", "8", "--rounds", "4")
    say_figure(
        f"medium, {row['gigabytes']:.1f} GB: the call holds steps up {row['pause_seconds']:.2f} s, in all"
        f" {row['lost_seconds']:.2f} s are lost; on disk after {row['on_disk_after_seconds']:.1f} s"
    )
