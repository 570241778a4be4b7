"""scripts/benchmark.py runs, on this machine, and what it writes adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, environ


def benchmark(folder: Path, *flags: str) -> list[dict]:
    """The rows of a finished run."""
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "--models", "debug", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--out", str(folder), *flags], cwd=folder, env=environ(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| case |" in done.stdout
    return json.loads((folder / "benchmark.json").read_text())["rows"]


def test_steps_of_ours_and_of_peers_are_measured_side_by_side(tmp_path):
    names = ("step", "bare", "seq2seq")
    rows = {row["case"]: row for row in benchmark(tmp_path, "--cases", *names, "--frames", "30")}
    for name in names:
        row = rows[name]
        assert row["frames_per_second"] == pytest.approx(30 / row["seconds"])
        assert row["clips_per_second"] == pytest.approx(1 / row["seconds"])
        assert 0 < row["mfu"] < 2
        assert row["peak_gib"] > 0
    assert rows["bare"]["throughput_of_bare"] == 1
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


def test_saving_and_growth_are_measured(tmp_path):
    rows = benchmark(tmp_path, "--cases", "save", "growth", "--frames", "20")
    save = next(row for row in rows if row["case"] == "save")
    # Weights and two moments, 4 bytes each; the files' headers come on top.
    assert save["gigabytes"] == pytest.approx(12 * save["parameters_m"] / 1000, rel=0.02)
    assert 0 < save["pause_seconds"] <= save["on_disk_after_seconds"]
    flops = {(row["what"], row["times"]): row["flops"] for row in rows if "times" in row}
    assert flops["clips", 16] == 16
    assert 16 < flops["frames", 16] < 32  # attention grows with the square


@pytest.mark.full
def test_every_other_case_runs(tmp_path):
    flags = ["--clips", "2", "--clip_seconds", "2", "--frames", "50", "--processes", "1", "2"]
    rows = benchmark(tmp_path, "--cases", "audiocraft", "run", "encode", "epochs", "scale", "start", "flat", *flags)
    assert {row["case"] for row in rows} == {"audiocraft", "run", "encode", "epochs", "scale", "start", "flat"}
    assert all("failure" not in row for row in rows)


def test_the_gpu_suite_says_that_it_needs_a_gpu(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "--suite", "gpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environ(), capture_output=True, text=True)
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr
