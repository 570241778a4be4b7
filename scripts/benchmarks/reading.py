"""Reading a checkpoint that many processes wrote, each its part of every tensor."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.parts import HEADER, Settings
from benchmarks.random_models import random_source
from benchmarks.report import Row
from trainer.model.safetensors_file import files_kept_open
from trainer.run.checkpoint import WEIGHT, Checkpoint, FlatSlice, Saver, newest

PROCESSES = 64
KINDS = (WEIGHT, "exp_avg/", "exp_avg_sq/")
# Each axis is so much shorter than the model's: it is the pieces that cost, and 39 GB fit few disks.
SHORTER = 16
# The library's way is measured on every so-manieth tensor; on all of them it takes minutes.
SAMPLED = 24


def read(settings: Settings) -> list[Row]:
    """One pass over all weights in the files of 64 processes, against opening a file for each piece of a tensor."""
    rows: list[Row] = []
    for model, layers in dict.fromkeys((work.model, work.layers) for work in settings.works):
        with tempfile.TemporaryDirectory() as folder:
            since = time.perf_counter()
            checkpoint = _written(Path(folder), model, layers)
            written, since = time.perf_counter() - since, time.perf_counter()
            Checkpoint(checkpoint.folder)
            opened = time.perf_counter() - since
            names = checkpoint.names(WEIGHT)
            _pass(checkpoint, names)  # so that both ways find the files in the page cache
            ours = min(_pass(checkpoint, names) for _ in range(settings.rounds))
            library = _pass_of_library(checkpoint, names[::SAMPLED])
        pieces = len(names) * PROCESSES
        rows.append(
            {
                "case": "read",
                "model": model,
                "tensors": len(names),
                "files": PROCESSES,
                "write_seconds": written,
                "open_seconds": opened,
                "pass_seconds": ours,
                "milliseconds_a_piece": 1000 * ours / pieces,
                "milliseconds_a_piece_opened_each": 1000 * library / len(names[::SAMPLED]) / PROCESSES,
                "times_faster": library / len(names[::SAMPLED]) / (ours / len(names)),
            }
        )
    return rows


def _written(folder: Path, model: str, layers: int | None) -> Checkpoint:
    """A checkpoint with the tensors of the model, each shorter, cut into as many parts as there are processes."""
    weights = random_source(model, layers).weights
    shorter = {name: tuple(max(1, axis // SHORTER) for axis in weights.shape(name)) for name in weights}
    shapes = {kind + name: shape for name, shape in shorter.items() for kind in KINDS}
    savers = [Saver(folder, rank=rank, world_size=PROCESSES) for rank in range(PROCESSES)]
    for rank, saver in reversed(list(enumerate(savers))):  # the first waits for the files of the others
        saver.save(1, {key: _part(shape, rank) for key, shape in shapes.items()}, HEADER)
        saver.wait()
    found = newest(folder)
    assert found is not None
    return found


def _part(shape: tuple[int, ...], rank: int) -> FlatSlice:
    size = torch.Size(shape).numel()
    first, last = (size * end // PROCESSES for end in (rank, rank + 1))
    return FlatSlice(shape=shape, start=first, values=torch.arange(first, last, dtype=torch.float32))


def _pass(checkpoint: Checkpoint, names: list[str]) -> float:
    since = time.perf_counter()
    with files_kept_open():
        for name in names:
            checkpoint.read(name)
    return time.perf_counter() - since


def _pass_of_library(checkpoint: Checkpoint, names: list[str]) -> float:
    """Seconds; checks that the values are those that we read."""
    files = sorted(checkpoint.folder.glob("*.safetensors"))
    seconds = 0.0
    for name in names:
        since = time.perf_counter()
        parts = []
        for path in files:
            with safe_open(path, framework="pt") as file:
                parts.append(file.get_slice(name)[:])
        whole = torch.cat(parts)
        seconds += time.perf_counter() - since
        assert torch.equal(whole, checkpoint.read(name)), name
    return seconds
