"""Parts of a run, measured in this process: encoding, saving, how cost grows, whether memory stays flat."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import EncodecModel

from benchmarks.music import SAMPLE_RATE_HZ, write_clips
from benchmarks.random_models import random_model, random_source
from benchmarks.report import Row
from benchmarks.turns import resident_bytes
from benchmarks.work import CODES, Work
from trainer.data import cache, manifest
from trainer.data.arrow_store import Binaries
from trainer.data.batches import Examples
from trainer.data.order import Order, rows_of_step
from trainer.engine import Engine, Ranks, build_accelerator, find_cluster
from trainer.flags.config import Config
from trainer.plan.launcher import Launch
from trainer.run.checkpoint import RunHeader, Saver
from trainer.run.signals import StopRequest
from trainer.training.loop import Intervals, Run, train
from trainer.training.schedule import Schedule
from trainer.wiring import engine_settings

SAVE_STEPS = 100  # what --save_step is taken to be
GROWTH = (1, 4, 16)  # how many times as many clips, frames or layers
FLAT_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says, for every case."""

    works: Sequence[Work]
    rounds: int
    clips: int
    seconds: float
    processes: Sequence[int]
    files: int = 20_000


HEADER = RunHeader(identity={}, global_batch=1, flags={})


def encode(settings: Settings) -> list[Row]:
    """EnCodec of the published size alone, on independent windows of 10 s, against filling the cache at one view."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = random_model("debug").audio_encoder.to(device)
    total = settings.clips * settings.seconds
    ratios, rows = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sounds = write_clips(folder / "data", settings.clips, settings.seconds)
        clips = manifest.scan(folder / "data", min_seconds=0.5, facts_folder=folder / "scan").clips
        for round_ in range(settings.rounds + 1):
            since = time.perf_counter()
            _encode_plainly(codec, sounds, device)
            alone = time.perf_counter() - since
            store = cache.code_store(folder / f"cache{round_}", "benchmark", 1)
            since = time.perf_counter()
            cache.fill_codes(store, clips, lambda: codec, sample_rate_hz=SAMPLE_RATE_HZ, views=1, device=device)
            filled = time.perf_counter() - since
            if round_:
                ratios.append(alone / filled)
                rows.append((alone, filled))
    alone, filled = (statistics.median(column) for column in zip(*rows, strict=True))
    return [
        {"case": "encode", "what": "EnCodec alone", "seconds": alone, "audio_seconds_per_second": total / alone},
        {
            "case": "encode",
            "what": "filling the cache",
            "seconds": filled,
            "audio_seconds_per_second": total / filled,
            "throughput_of_alone": statistics.median(ratios),
        },
    ]


@torch.no_grad()
def _encode_plainly(codec: EncodecModel, sounds: Sequence[np.ndarray], device: torch.device) -> None:
    window = 10 * SAMPLE_RATE_HZ
    for sound in sounds:
        for start in range(0, len(sound), window):
            piece = torch.from_numpy(sound[start : start + window])[None, None].to(device)
            codec.encode(piece).audio_codes.cpu()


def save(settings: Settings) -> list[Row]:
    """A checkpoint in the middle of steps: how long it holds them up, in the call and beside them."""
    rows: list[Row] = []
    for work in settings.works:
        with tempfile.TemporaryDirectory() as folder, engine_of(work) as (engine, step):
            plain = [step() for _ in range(max(4, settings.rounds))][1:]
            since = time.perf_counter()
            saver = Saver(Path(folder))
            saver.save(1, engine.state(), HEADER)
            pause = time.perf_counter() - since
            beside = []
            while saver.busy:
                beside.append(step())
            saver.wait()
            on_disk = time.perf_counter() - since
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        median = statistics.median(plain)
        lost = pause + sum(seconds - median for seconds in beside)
        rows.append(
            {
                "case": "save",
                "model": work.model,
                "layers": work.shape.layers,
                "parameters_m": work.shape.parameters / 1e6,
                "gigabytes": size / 1e9,
                "pause_seconds": pause,
                "on_disk_after_seconds": on_disk,
                "lost_seconds": lost,
                "step_seconds": median,
                "pause_share": pause / (pause + SAVE_STEPS * median),
                "lost_share": lost / (lost + SAVE_STEPS * median),
            }
        )
    return rows


def growth(settings: Settings) -> list[Row]:
    """Seconds of a step as clips, frames and layers grow, against their FLOPs; and of the order as the set grows."""
    base = replace(settings.works[0], micro_batch=1, accumulation=1, frames=100, layers=1)
    rows: list[Row] = []
    for what in ("clips", "frames", "layers"):
        first: tuple[float, int] | None = None
        for times in GROWTH:
            changes: dict[str, dict[str, Any]] = {
                "clips": {"accumulation": times},
                "frames": {"frames": 100 * times},
                "layers": {"layers": times},
            }
            work = replace(base, **changes[what])
            with engine_of(work) as (_, step):
                seconds = min([step() for _ in range(settings.rounds + 1)][1:])
            first = first or (seconds, work.flops)
            rows.append(
                {
                    "case": "growth",
                    "what": what,
                    "times": times,
                    "seconds": seconds,
                    "cost": seconds / first[0],
                    "flops": work.flops / first[1],
                }
            )
    return rows + [_order_row(1000 * times) for times in GROWTH]


def _order_row(clips: int) -> Row:
    order = Order(
        seed=0,
        epochs=2,
        global_batch=32,
        segment_frames=1500,
        codebooks=4,
        caption_drop_rate=0.1,
        frames=np.full((clips, 4), 2000),
    )
    rows_of_step(order, 0)
    steps = range(1, min(order.steps, 100))
    since = time.perf_counter()
    for step in steps:
        rows_of_step(order, step)
    return {
        "case": "growth",
        "what": "order of a step of 32",
        "clips": clips,
        "seconds": (time.perf_counter() - since) / len(steps),
    }


def flat(settings: Settings) -> list[Row]:
    """The loop itself for 1,000 steps of the debug model: memory of the process on the way."""
    work = Work(model="debug", layers=1, frames=20, micro_batch=2)
    codes = _codes_in_memory(clips=50, frames=60)
    examples = Examples(
        codes=codes,
        text=_TextInMemory(work.shape.text_width),
        captions=[f"clip {clip}" for clip in range(50)],
        names=[f"{clip}.wav" for clip in range(50)],
        shape=work.shape,
        special_token=CODES,
        segment_frames=work.frames,
    )
    order = Order(
        seed=0,
        epochs=10**6,
        global_batch=work.clips,
        segment_frames=work.frames,
        codebooks=work.shape.codebooks,
        caption_drop_rate=0.1,
        frames=codes.frames,
        max_steps=FLAT_STEPS,
    )
    seen: dict[int, int] = {}

    class Reports:
        def log(self, values: dict) -> None:
            if values["step"] in (FLAT_STEPS // 10, FLAT_STEPS // 2, FLAT_STEPS):
                seen[values["step"]] = resident_bytes()

    with tempfile.TemporaryDirectory() as folder, engine_of(work) as (engine, _), StopRequest() as stop:
        run = Run(
            plan=work.plan(gpu_memory_bytes=None),
            order=order,
            schedule=Schedule(peak=1e-5, steps=FLAT_STEPS, warmup_steps=1),
            train=examples,
            validation=None,
            intervals=Intervals(log_steps=1, validation_steps=None, save_step=None, checkpoint_minutes=1e9),
            hours=0.0,
            header=HEADER,
            on_save_step=lambda saved: None,
        )
        train(run, engine, Saver(Path(folder)), Reports(), stop, 0)  # type: ignore[arg-type]
    return [{"case": "flat", "step": step, "resident_mib": count / 2**20} for step, count in seen.items()]


class engine_of:
    """The engine of `work`, and a function that takes one step and returns its seconds."""

    def __init__(self, work: Work):
        self._work = work

    def __enter__(self) -> tuple[Engine, Callable[[], float]]:
        work = self._work
        settings = engine_settings(Config(dataset_path="unused"))
        plan = work.plan(gpu_memory_bytes=find_cluster(Launch()).gpu_memory_bytes)
        accelerator = build_accelerator(plan, settings, Path("."))
        source, ranks = random_source(work.model, work.layers), Ranks(timeout_seconds=3600)
        engine = Engine(accelerator, ranks, source, plan, settings)
        batches = [work.batch()] * work.accumulation

        def step() -> float:
            since = time.perf_counter()
            engine.step(batches, work.cells, step=0, learning_rate=1e-5)
            return time.perf_counter() - since

        return engine, step

    def __exit__(self, *_: object) -> None:
        gc.collect()


def _codes_in_memory(*, clips: int, frames: int) -> cache.CachedCodes:
    """Random codes in the form of cached ones, one view per clip."""
    codes = np.random.default_rng(0).integers(0, CODES, (clips, 4, frames), dtype="<i2")
    offsets = codes[0].nbytes * np.arange(clips + 1)
    return cache.CachedCodes(
        frames=np.full((clips, 1), frames),
        codebooks=4,
        _values=Binaries(ends=np.array([clips]), offsets=[offsets], values=[pa.py_buffer(codes)]),
        _row_of_clip=np.arange(clips),
    )


class _TextInMemory:
    def __init__(self, width: int):
        self._states = np.random.default_rng(0).standard_normal((20, width), dtype=np.float32)

    def states(self, caption: str) -> np.ndarray:
        return self._states

    def tokens(self, caption: str) -> int:
        return len(self._states)
