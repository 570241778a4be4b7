"""Whole runs, started as a user starts them: to the first step, to the end of three epochs, on more processes."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import steps
from benchmarks.music import write_clips
from benchmarks.parts import Settings
from benchmarks.random_models import write_model
from benchmarks.report import Row
from benchmarks.work import Work
from trainer.plan.request import CHECKPOINTING

ROOT = Path(__file__).parents[2]
# torch imports its compiler when the first optimizer is made, and transformers a class when it is first named. So any
# program with AdamW must wait for the second of these, and any with a MusicGen for the third.
IMPORTS = {
    "imports": "import torch, transformers, accelerate",
    "imports with AdamW": (
        "import torch, transformers, accelerate; torch.optim.AdamW([torch.zeros(1, requires_grad=True)])"
    ),
    "imports with MusicGen": "import torch, accelerate; from transformers import MusicgenForConditionalGeneration",
}
EPOCHS = 3
# What --gradient_checkpointing takes, by what is recomputed.
CHECKPOINTING_VALUES = {recompute: value for value, recompute in CHECKPOINTING.items()}


def start(settings: Settings) -> list[Row]:
    """From `python launch.py` to the end of its first step, cache empty and full, against importing the libraries."""
    found: dict[str, list[float]] = {what: [] for what in (*IMPORTS, "cold", "cached")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder / "data", 3, 4.0)
        flags = ["--model_id", "debug", "--max_steps", "1", "--segment_seconds", "4"]
        for round_ in range(settings.rounds + 1):
            seconds = {}
            for what, program in IMPORTS.items():
                since = time.perf_counter()
                subprocess.run([sys.executable, "-c", program], env=_environ(), check=True, capture_output=True)
                seconds[what] = time.perf_counter() - since
            for what in ("cold", "cached"):
                lines, started = launch(folder, f"{what}{round_}", flags, cache=f"cache{round_}")
                seconds[what] = lines[0]["time"] - started
            if round_:  # the first round brings the files into the system's page cache
                for what, value in seconds.items():
                    found[what].append(value)
    rows: list[Row] = []
    for what, values in found.items():
        row: Row = {"case": "start", "what": what, "seconds": statistics.median(values)}
        for base in IMPORTS:
            ratios = [value / of for value, of in zip(values, found[base], strict=True)]
            row[f"of {base}"] = statistics.median(ratios)
        rows.append(row)
    return rows


def scale(settings: Settings) -> list[Row]:
    """Frames per second of a whole run on several processes, each with the same number of clips."""
    rows: list[Row] = []
    work = settings.works[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder / "data", 8, work.frames / 50)
        model = write_model(folder / "model", work.model, work.layers, real_encoders=False)
        for processes in settings.processes:
            flags = [*flags_of(work, model), "--max_steps", str(settings.rounds + 2)]
            lines, _ = launch(folder, f"run{processes}", flags, processes=processes)
            rate = statistics.median(line["frames_per_second"] for line in lines[1:])
            rows.append(
                {
                    "case": "scale",
                    "model": work.model,
                    "layers": work.shape.layers,
                    "frames": work.frames,
                    "clips": work.clips * processes,
                    "processes": processes,
                    "strategy": json.loads((folder / f"run{processes}" / "plan.json").read_text())["strategy"],
                    "frames_per_second": rate,
                    "of_linear": rate / (rows[0]["frames_per_second"] * processes / rows[0]["processes"])
                    if rows
                    else 1.0,
                }
            )
    return rows


def run(settings: Settings) -> list[Row]:
    """A run's frames per second from its first step to its last, everything between steps included, against the step
    alone, measured before and after it."""
    rows: list[Row] = []
    for work in settings.works:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_clips(folder / "data", 8, work.frames / 50)
            model = write_model(folder / "model", work.model, work.layers, real_encoders=False)
            before = _step_rate(work, settings.rounds)
            flags = [*flags_of(work, model), "--max_steps", str(4 * settings.rounds + 1)]
            lines, _ = launch(folder, "run", flags)
            after = _step_rate(work, settings.rounds)
        spans = [later["time"] - earlier["time"] for earlier, later in itertools.pairwise(lines)]
        rate = work.clips * work.frames / statistics.median(spans)
        whole = work.clips * work.frames * (len(lines) - 1) / (lines[-1]["time"] - lines[0]["time"])
        rows.append(
            {
                "case": "run",
                "model": work.model,
                "layers": work.shape.layers,
                "frames": work.frames,
                "clips": work.clips,
                "frames_per_second": whole,
                "of_step": whole / statistics.mean([before, after]),
                "median_of_step": rate / statistics.mean([before, after]),
            }
        )
    return rows


def epochs(settings: Settings) -> list[Row]:
    """From a folder to the end of three epochs, start and caching included, against encoding in every epoch."""
    rows: list[Row] = []
    work = settings.works[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder / "data", settings.clips, settings.seconds)
        model = write_model(folder / "model", work.model, work.layers, real_encoders=True)
        flags = [*flags_of(work, model), "--epochs", str(EPOCHS), "--segment_seconds", str(settings.seconds)]
        seconds = {}
        for views in (1, 4):
            lines, started = launch(folder, f"run{views}", [*flags, "--code_views", str(views)])
            seconds[f"ours, {views} view(s) of each clip"] = lines[-1]["time"] - started
        since = time.time()
        arguments = [str(model), str(folder / "data"), str(work.micro_batch), work.precision]
        command = [sys.executable, "-m", "benchmarks.encode_each_epoch", *arguments]
        subprocess.run(command, cwd=ROOT / "scripts", env=_environ(), check=True)
        seconds["encoding in every epoch"] = time.time() - since
    for what, value in seconds.items():
        rows.append(
            {
                "case": "epochs",
                "what": what,
                "model": work.model,
                "layers": work.shape.layers,
                "clips": settings.clips,
                "clip_seconds": settings.seconds,
                "epochs": EPOCHS,
                "seconds": value,
                "of_encoding_each_epoch": value / seconds["encoding in every epoch"],
            }
        )
    return rows


def flags_of(work: Work, model: Path) -> list[str]:
    return [
        *("--model_id", str(model), "--batch_size", str(work.micro_batch), "--grad_acc", str(work.accumulation)),
        *("--segment_seconds", str(work.frames / 50), "--mixed_precision", work.precision),
        *("--gradient_checkpointing", CHECKPOINTING_VALUES[work.gradient_checkpointing]),
        *("--compile", str(int(work.compiled)), "--checkpoint_minutes", "600"),
    ]


def launch(
    folder: Path, output: str, flags: Sequence[str], processes: int = 1, cache: str | None = None
) -> tuple[list[dict[str, Any]], float]:
    """The reports of a finished run of `folder`/data, and when it was started."""
    launcher = [sys.executable]
    environment = _environ()
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    program = ["launch.py", "--dataset", str(folder / "data"), "--output_dir", str(folder / output)]
    program += ["--cache_dir", str(folder / (cache or f"cache-{output}"))]
    started = time.time()
    done = subprocess.run([*launcher, *program, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the run failed:\n{done.stdout}\n{done.stderr}")
    lines = [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], started


def _step_rate(work: Work, rounds: int) -> float:
    row = steps.measure(["step"], work, rounds)[0]
    if "failure" in row:
        raise SystemExit(f"the step failed: {row['failure']}")
    return row["frames_per_second"]


def _environ() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}
