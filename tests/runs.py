"""Runs of launch.py as a user starts them, on few real clips."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from launch import main
from trainer.run.checkpoint import newest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FEW = ("arcade_return_home", "metal_madness", "rock_feelings")


def few_clips(folder: Path, names: Iterable[str] = FEW, captions: bool = True) -> Path:
    """A dataset folder with copies of a few example clips."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(EXAMPLES / f"{name}.wav", folder)
        if captions:
            shutil.copy(EXAMPLES / f"{name}.txt", folder)
    return folder


def command(folder: Path, *flags: str) -> list[str]:
    """launch.py in `folder`, which gets data/, cache/ and models/."""
    if not (folder / "data").exists():
        few_clips(folder / "data")
    base = ["--dataset", "data", "--model_id", "debug", "--code_views", "2", "--segment_seconds", "4"]
    return [sys.executable, str(ROOT / "launch.py"), *base, *flags]


def start(folder: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """The running process; its output can be read."""
    return subprocess.Popen(
        command(folder, *flags),
        cwd=folder,
        env=environ(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(folder: Path, *flags: str, expect: int = 0, **environment: str) -> str:
    """The output of a finished run, whose exit code must be `expect`."""
    done = subprocess.run(
        command(folder, *flags),
        cwd=folder,
        env=environ(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == expect, f"exit code {done.returncode}, not {expect}:\n{done.stdout}"
    return done.stdout


def launch_here(folder: Path, *flags: str, expect: int = 0) -> str:
    """`launch` in this process, which has the imports done; for what needs no process of its own."""
    argv = command(folder, *flags)[2:]
    AcceleratorState._reset_state(True)
    output = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(argv)
    assert code == expect, f"exit code {code}, not {expect}:\n{output.getvalue()}"
    return output.getvalue()


def environ(**changes: str) -> dict[str, str]:
    """One thread, so that runs beside each other keep their pace; sums have the same order at every start."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **changes}


def import_path() -> str:
    """PYTHONPATH for a process that imports the trainer and its scripts from here, and the rest from where we do."""
    return os.pathsep.join([str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])


def a_step_is_reported(folder: Path) -> bool:
    """Whether a run is past its first step; models/metrics.jsonl itself is there a moment before it."""
    path = folder / "models" / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def metrics(folder: Path, key: str = "loss") -> dict[int, float]:
    """`key` by step from models/metrics.jsonl; a step that stands there twice fails."""
    values: dict[int, float] = {}
    for line in (folder / "models" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if key in entry:
            assert entry["step"] not in values, f"step {entry['step']} stands twice"
            values[entry["step"]] = entry[key]
    return values


def final_state(folder: Path) -> dict[str, Tensor]:
    """Weights and moments of the newest checkpoint."""
    checkpoint = newest(folder / "models" / "checkpoints")
    assert checkpoint is not None
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def assert_bit_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
