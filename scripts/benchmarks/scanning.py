"""A folder of very many files: looked at for the first time, again, and trained on with a full cache."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.parts import Settings
from benchmarks.report import Row
from benchmarks.turns import resident_bytes
from benchmarks.whole_runs import launch
from trainer.data import cache, manifest
from trainer.data.arrow_store import KEY
from trainer.data.inventory import ScannedFolder
from trainer.model.source import open_model
from trainer.report import report
from trainer.report.settings import ReportSettings

FILE_RATE_HZ, FILE_SECONDS = 8_000, 0.6
VIEWS, FRAMES = 4, 29  # codes of each file: what EnCodec would give in its shortest view
CAPTIONS = 200  # distinct ones
PART_ROWS = 2_000


def scan(settings: Settings) -> list[Row]:
    """Of --files files: the scan, cold and again, and from `python launch.py` to the end of its first step on a full
    cache. The files are as small as may be: what is measured is the cost of a file, not that of its sound."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder / "data", settings.files)
        rows = []
        for what in ("scan, cold", "scan, again"):
            before = resident_bytes()
            seconds, contents = _timed(lambda: _contents(folder))
            rows.append(_row(what, settings.files, seconds) | {"grown_mib": (resident_bytes() - before) / 2**20})
        rows.append(_page(folder, settings.files))
        _fill(folder / "cache", contents)
        flags = ["--model_id", "debug", "--max_steps", "1", "--segment_seconds", "1"]
        for what in ("start, its scan cold", "start on a full cache"):
            lines, started = launch(folder, what.split()[-1], flags, cache="cache")
            rows.append(_row(what, settings.files, lines[0]["time"] - started))
        return rows


def _page(folder: Path, files: int) -> Row:
    """The page of the folder, as check_dataset.py writes it once the sounds are known."""
    data, to = folder / "data", folder / "report"
    found = manifest.scan(data, min_seconds=0.5, facts_folder=folder / "facts")
    scanned = ScannedFolder(root=str(data), fates=found.fates, inspected=found.inspected)
    since = time.perf_counter()
    report.write([scanned], ReportSettings(), to, load_tokenizer=None)
    seconds = time.perf_counter() - since
    return _row("the page", files, seconds) | {"html_mib": (to / report.PAGE).stat().st_size / 2**20}


def _row(what: str, files: int, seconds: float) -> Row:
    each = 1e6 * seconds / files
    return {"case": "scan", "what": what, "files": files, "seconds": seconds, "microseconds_a_file": each}


def _timed(function: Callable[[], list[str]]) -> tuple[float, list[str]]:
    since = time.perf_counter()
    value = function()
    return time.perf_counter() - since, value


def _contents(folder: Path) -> list[str]:
    facts = folder / "facts"
    return manifest.scan(folder / "data", min_seconds=0.5, facts_folder=facts).clips["content"]


def _write(folder: Path, files: int) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(-9999, 9999, (files, round(FILE_RATE_HZ * FILE_SECONDS)), dtype=np.int16)
    for number, samples in enumerate(noise):
        soundfile.write(folder / f"{number:05}.wav", samples, FILE_RATE_HZ, subtype="PCM_16")
        (folder / f"{number:05}.txt").write_text(f"noise of kind {number % CAPTIONS}\n")


def _fill(cache_dir: Path, contents: list[str]) -> None:
    """Random codes of every file, under the names that the debug model's codec gives them."""
    source = open_model("debug")
    store = cache.code_store(cache_dir, source.codec_identity(), VIEWS)
    draw = np.random.default_rng(0)
    for start in range(0, len(contents), PART_ROWS):
        rows = []
        for content in contents[start : start + PART_ROWS]:
            codes = draw.integers(0, 2048, (VIEWS, source.shape.codebooks, FRAMES), dtype="<i2")
            row = {KEY: content, "views": VIEWS, "codebooks": source.shape.codebooks, "frames": [FRAMES] * VIEWS}
            rows.append(row | {"codes": codes.tobytes()})
        store.append(rows)
