"""Large data sets: opening a prepared folder and training from it, and a start with a full cache."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import torch

from benchmarks.parts import Settings
from benchmarks.report import Row
from trainer.data import cache, dataset, manifest, prepared_writing
from trainer.data.arrow_store import Rows
from trainer.data.order import Order, rows_of_step
from trainer.data.prepared_about import About
from trainer.flags.config import Config
from trainer.model.source import Source, open_model
from trainer.wiring import data_settings

CPU = torch.device("cpu")
VIEWS, CODEBOOKS, FRAME_RATE_HZ, CODES = 4, 4, 50, 2048
PREPARED_HOURS, CLIP_SECONDS = 200.0, 240.0
CAPTION_TOKENS = 20
SHARED_CLIPS = 40  # codes are made up for so many clips, and the others have the same ones: 15 MB in memory
BATCH_CLIPS, MEASURED_AT = 8, (100, 400, 1600)  # steps after which memory is looked at
CACHED_CLIPS = 20_000


def prepared(settings: Settings) -> list[Row]:
    """A prepared folder of 200 hours of 4-minute clips: opening it, and batches of 8 crops of 30 s."""
    source = open_model("debug")
    clips = round(PREPARED_HOURS * 3600 / CLIP_SECONDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "prepared"
        _write_prepared(folder, source, clips)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        config = Config(dataset_path=str(folder), cache_dir=str(Path(name) / "cache"), model_id="debug")
        wanted = data_settings(config)
        before = _kept_bytes()
        seconds = [_timed(lambda: dataset.prepare(wanted, source, CPU)) for _ in range(settings.rounds)]
        data = dataset.prepare(wanted, source, CPU)
        row: Row = {"case": "prepared", "hours": data.seconds / 3600, "clips": data.clips, "gigabytes": size / 1e9}
        row |= {"open_seconds": statistics.median(seconds), "open_mib": (_kept_bytes() - before) / 2**20}
        rows = [row]
        order = Order(
            seed=0, epochs=10**6, global_batch=BATCH_CLIPS, segment_frames=data.train.segment_frames,
            codebooks=CODEBOOKS, caption_drop_rate=0.0, frames=data.train.codes.frames,
        )  # fmt: skip
        done = 0
        for until in MEASURED_AT:
            since = time.perf_counter()
            for step in range(done, until):
                data.train.batch(rows_of_step(order, step))
            rate = (until - done) / (time.perf_counter() - since)
            grown = (_kept_bytes() - before) / 2**20
            rows.append({"case": "prepared", "step": until, "batches_per_second": rate, "grown_mib": grown})
            done = until
    return rows


def cached(settings: Settings) -> list[Row]:
    """What of a start depends on the data set: 20,000 clips whose codes and captions are all in the cache."""
    source = open_model("debug")
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        for clip in range(CACHED_CLIPS):
            sound = 0.3 * draw.standard_normal(800)
            soundfile.write(folder / f"data/{clip:05}.wav", sound, 8_000, subtype="PCM_16")
            (folder / f"data/{clip:05}.txt").write_text(f"slow rock number {clip % 2000} with piano")
        data, caches = str(folder / "data"), str(folder / "cache")
        wanted = data_settings(Config(dataset_path=data, cache_dir=caches, model_id="debug", min_seconds=0.05))
        tables = wanted.cache_dir / "scan"

        def scan() -> manifest.Manifest:
            return manifest.scan(wanted.folder, min_seconds=0.05, facts_folder=tables)

        seconds = {"scan, nothing known": _timed(scan)}
        store = cache.code_store(wanted.cache_dir, source.codec_identity(), wanted.code_views)
        codes = bytes(VIEWS * CODEBOOKS * 5 * 2)
        row = {"views": VIEWS, "codebooks": CODEBOOKS, "frames": [5] * VIEWS, "codes": codes}
        store.append_all({"key": content, **row} for content in scan().columns["content"])
        dataset.prepare(wanted, source, CPU)
        seconds["scan again"] = min(_timed(scan) for _ in range(settings.rounds))
        whole = min(_timed(lambda: dataset.prepare(wanted, source, CPU)) for _ in range(settings.rounds))
        seconds["the data of a start, all cached"] = whole
    same = {"case": "cached", "clips": CACHED_CLIPS}
    return [{**same, "what": what, "seconds": value} for what, value in seconds.items()]


def _write_prepared(folder: Path, source: Source, clips: int) -> None:
    """A prepared folder of so many clips with made-up codes, each with a caption of its own."""
    frames = round(CLIP_SECONDS * FRAME_RATE_HZ)
    draw = np.random.default_rng(0)
    keys = [f"{clip:032x}" for clip in range(clips)]
    captions = [f"made-up music, number {clip}" for clip in range(clips)]
    codes = draw.integers(0, CODES, (SHARED_CLIPS, VIEWS * CODEBOOKS * frames), dtype="<i2")
    width = source.shape.text_width
    states = draw.standard_normal((SHARED_CLIPS, CAPTION_TOKENS * width), dtype=np.float32)
    about = About(
        codec=source.codec_identity(), text_encoder=source.text_identity(), model_id=source.name, codebooks=CODEBOOKS,
        frame_rate_hz=source.frame_rate_hz, sample_rate_hz=source.sample_rate_hz, clips=clips, hours=PREPARED_HOURS,
        flags={"code_views": VIEWS, "no_label": False, "min_seconds": 0.5},
    )  # fmt: skip
    nothing = {"string": "", "binary": b""}
    columns: manifest.Columns = {
        **{name: [nothing.get(kind, 0)] * clips for name, kind in manifest.TYPES.items()},
        "path": [f"{clip}.wav" for clip in range(clips)], "content": keys, "caption": captions,
        "seconds": [CLIP_SECONDS] * clips,
    }  # fmt: skip
    code_columns: Row = {"views": VIEWS, "codebooks": CODEBOOKS, "frames": [frames] * VIEWS}
    text_columns: Row = {"tokens": CAPTION_TOKENS, "width": width}
    prepared_writing.write_rows(
        folder,
        about,
        columns,
        _rows(cache.code_store(folder, "", VIEWS).schema, keys, code_columns, codes),
        _rows(cache.text_store(folder, "").schema, cache.text_keys(captions), text_columns, states),
        cache.text_keys(captions),
    )


def _rows(schema: pa.Schema, keys: list[str], same: Row, values: np.ndarray) -> Rows:
    """A table in which every row has `same`, and of `values`, over and over, one after the other."""
    pieces = [row.tobytes() for row in values]
    shared = pa.array(pieces, pa.large_binary())
    tables = []
    for start in range(0, len(keys), len(pieces)):
        of_batch = keys[start : start + len(pieces)]
        columns = {"key": pa.array(of_batch, pa.string())}
        for name, value in same.items():
            columns[name] = pa.array([value] * len(of_batch), schema.field(name).type)
        columns[schema.names[-1]] = shared[: len(of_batch)]
        tables.append(pa.table(columns, schema=schema))
    return Rows(table=pa.concat_tables(tables), index={key: row for row, key in enumerate(keys)})


def _timed(work: Callable[[], object]) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


def _kept_bytes() -> int:
    """Memory of this process that no file stands behind: what is mapped, the system can drop at any time."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))
