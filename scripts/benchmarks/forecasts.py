"""What a run says of itself before it trains, beside what it then takes: time by the rehearsed step, and disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.music import write_clips
from benchmarks.parts import Settings
from benchmarks.random_models import write_model
from benchmarks.report import Row
from benchmarks.whole_runs import flags_of, launch
from benchmarks.work import Work
from trainer.plan.disk import bytes_of

SLICES = (2, 4, 8)  # layers, where --layers names no number
LENGTHS = (1.0, 0.8, 0.5, 0.3)  # of clips, as shares of the segment: a real folder's are not all as long as it
CLIPS_EACH, EPOCHS = 4, 3
EXPORTS, CACHED = ("lm_final.pt", "huggingface", "audiocraft"), ("codes", "text")

# Without it, what has more than 100 million parameters is refused where there is no GPU.
ON_CPU = () if torch.cuda.is_available() else ("--device", "cpu")


def forecast(settings: Settings) -> list[Row]:
    """Predicted and measured seconds of a step, an epoch and a run, and bytes on disk, for slices of a model."""
    rows: list[Row] = []
    for work in settings.works:
        for layers in SLICES if work.layers is None else (work.layers,):
            rows += _of_slice(replace(work, layers=layers))
    return rows


def _of_slice(work: Work) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, share in enumerate(LENGTHS):
            write_clips(folder / "data" / str(number), CLIPS_EACH, share * work.frames / 50)
        model = write_model(folder / "model", work.model, work.layers, real_encoders=False)
        flags = ("--epochs", str(EPOCHS), "--min_seconds", "0.1")  # the shortest clips count too
        lines, _ = launch(folder, "run", [*flags_of(work, model), *flags, *ON_CPU])
        told = json.loads((folder / "run/run.json").read_text())["forecast"]
        clips = CLIPS_EACH * len(LENGTHS)
        whole = lines[-1]["time"] - (told["end"] - told["seconds_left"])
        measured = {
            "seconds of a step": (told["step_seconds"], whole / len(lines)),
            "seconds of an epoch": (told["epoch_seconds"], _epoch(lines, clips // work.clips)),
            "seconds of the run": (told["seconds_left"], whole),
            "MB of the cache": (told["cache_bytes"] / 1e6, _megabytes(folder / "cache-run", CACHED)),
            "MB of a checkpoint": (told["checkpoint_bytes"] / 1e6, _megabytes(folder / "run", ("checkpoints",))),
            "MB of the exports": (told["export_bytes"] / 1e6, _megabytes(folder / "run", EXPORTS)),
        }
    for what, (predicted, found) in measured.items():
        yield {
            "case": "forecast",
            "model": work.model,
            "layers": work.shape.layers,
            "what": what,
            "predicted": predicted,
            "measured": found,
            "predicted_of_measured": predicted / found,
        }


def _epoch(lines: list[dict], steps: int) -> float:
    """Seconds of the second epoch."""
    return lines[2 * steps - 1]["time"] - lines[steps - 1]["time"]


def _megabytes(folder: Path, names: tuple[str, ...]) -> float:
    return sum(bytes_of(str(folder / name)) for name in names) / 1e6
