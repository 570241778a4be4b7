"""From sound files to what plays them back: by launch.py and scripts/recall.py, as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.chroma_sounds import examples, tune

pytestmark = [pytest.mark.full, pytest.mark.numbers]
ROOT = Path(__file__).resolve().parents[2]
RATE, SECONDS = 32_000, 3
CAPTION = "the same words"
FLAGS = ("--segment_seconds", "3", "--grad_acc", "1", "--code_views", "1", "--device", "cpu", "--max_steps", "100")
FLAGS = (*FLAGS, "--warmup_steps", "10", "--log_steps", "50", "--lr", "3e-3")


def python(*arguments: object) -> str:
    """What a program prints."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def music() -> list[np.ndarray]:
    """The beginnings of two real clips, mono."""
    return [track[: SECONDS * RATE] for track in list(examples().values())[:2]]


def learned(folder: Path, *flags: str) -> tuple[str, list[dict[str, float]]]:
    """What launch.py said of a run on folder/data; and of each clip how many of its codes are played back."""
    run = folder / "run"
    said = python(
        ROOT / "launch.py", "--dataset", folder / "data", *FLAGS, *flags, "--cache_dir", folder / "cache",
        "--output_dir", run,
    )  # fmt: skip
    python(ROOT / "scripts/recall.py", "--run", run, "--device", "cpu")
    return said, json.loads((run / "recall.json").read_text())["played_back"]


def test_two_clips_of_one_caption_are_played_back_from_their_melody_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    melodies = [tune([0.0, 4.0, 7.0], RATE), tune([2.0, 5.0, 9.0], RATE)]
    for name, sound, melody in zip("ab", music(), melodies, strict=True):
        soundfile.write(tmp_path / f"data/{name}.wav", sound, RATE)
        soundfile.write(tmp_path / f"data/{name}.melody.wav", melody, RATE)
        (tmp_path / f"data/{name}.txt").write_text(CAPTION)
    said, rows = learned(tmp_path, "--model_id", "debug-melody", "--batch_size", "2", "--melody_rate", "0")
    assert "melodies: each clip's is a file of its own; none is trained without" in said
    assert [row["clip"] for row in rows] == ["a.wav", "b.wav"]
    # Their codes differ, and their captions do not: greedy as recall.py is, nothing but the melodies tells them apart.
    assert all(row["after"] == row["codes"] > 500 and row["before"] < 0.05 * row["codes"] for row in rows)


def test_both_channels_of_a_stereo_file_are_played_back(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    soundfile.write(tmp_path / "data/a.wav", np.stack(music(), axis=1), RATE)
    (tmp_path / "data/a.txt").write_text(CAPTION)
    _, (row,) = learned(tmp_path, "--model_id", "debug-stereo", "--batch_size", "1")
    assert row["after"] == row["codes"] > 1000 and row["before"] < 0.05 * row["codes"]
