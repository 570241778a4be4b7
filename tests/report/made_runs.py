"""Folders as a run leaves them, without a run: metrics, sounds, and what the run was told."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile

from tests.audio_files import noise

RATE_HZ = 32_000
CAPTIONS = ("slow rock", "fast metal")
STARTED = 1_750_000_000.0


def line(step: int, *, started: float = STARTED, **changes: Any) -> str:
    """A line of metrics.jsonl as training writes it."""
    loss = 2 + 5 * math.exp(-step / 40) + 0.01 * (step * 7919 % 13)
    values = {
        "step": step, "epoch": round(step / 10, 4), "loss": loss, "loss_per_codebook": [loss - 0.1, loss + 0.1],
        "grad_norm": 0.5 + 1 / step, "lr": 1e-5 * step, "time": started + 2.0 * step, "frames_per_second": 5e3 + step,
        "mfu": 0.3, "padding_share": 0.0, "peak_memory_bytes": None,
    }  # fmt: skip
    return json.dumps(values | changes) + "\n"


def validation(step: int, loss: float) -> str:
    values = {"step": step, "validation_loss": loss, "validation_loss_per_codebook": [loss, loss]}
    return json.dumps(values) + "\n"


def add_sounds(
    run: Path, step: int, prompts: Sequence[str] = CAPTIONS, *, seconds: float = 0.2, rate_hz: int = RATE_HZ,
    files: Sequence[str] | None = None, **changes: Any,
) -> Path:  # fmt: skip
    """samples/step-.../ with a sound for each prompt; `changes` are those of each entry of its list."""
    folder = run / f"samples/step-{step:08d}"
    folder.mkdir(parents=True)
    names = files or [f"{number:02d}_sound.flac" for number in range(1, len(prompts) + 1)]
    entries = []
    for number, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        with (folder / name).open("wb") as file:
            soundfile.write(file, noise(seconds, rate_hz, seed=100 * step + number), rate_hz, format="FLAC")
        entries.append({
            "file": name, "prompt": prompt, "seed": 0, "seconds": seconds, "origin": "given", "clip": None,
            "continued_seconds": 0.0, "error": None, **changes,
        })  # fmt: skip
    values = {
        "format": "musicgen-trainer samples", "version": 1, "step": step, "time": STARTED, "sample_rate_hz": rate_hz,
        "guidance": 3.0, "temperature": 1.0, "top_k": 250, "weights": "live", "samples": entries,
    }  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(values))
    return folder


def made_run(folder: Path, *, steps: int = 60, all_steps: int = 100, every: int = 20, sounds: bool = True) -> Path:
    """A run that has done `steps` of `all_steps`; its best validation is that of step 40."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        lines.append(line(step))
        if step % every == 0:
            lines.append(validation(step, 3 + abs(step - 40) / 100))
    (folder / "metrics.jsonl").write_text("".join(lines))
    config = {"dataset_path": "my music", "model_id": "small", "epochs": 10, "max_steps": None, "lr": 2e-5,
              "output_dir": "models", "use_cfg": True, "seed": 0}  # fmt: skip
    start = {"steps": all_steps, "steps_per_epoch": 10.0, "global_batch": 8, "clips": 80, "hours": 0.5,
             "parameters": 420_000_000, "started": STARTED, "start_step": 0,
             "starts": [{"started": STARTED, "start_step": 0}]}  # fmt: skip
    plan = {"strategy": "single", "nodes": 1, "world_size": 1, "on_gpu": True, "mixed_precision": "bf16",
            "global_batch": 8, "reasons": ["one process: nothing is sharded"]}  # fmt: skip
    for name, values in (("config", config), ("run", start), ("plan", plan)):
        (folder / f"{name}.json").write_text(json.dumps(values))
    if sounds:
        for step in range(0, steps + 1, every):
            add_sounds(folder, step)
    return folder


def now() -> float:
    """The time at which a run that still goes on has written its last line."""
    return time.time()
