"""Loading and sharding hold at most one copy of the model in host memory, however many ranks a machine has.

Measured as proportional set size: a page that several processes map counts once. On a CPU the device's memory is
host memory too, so what a strategy must hold there is subtracted.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from transformers import MusicgenProcessor

from tests.plans import plan_for
from tests.ranks.harness import RankProcesses, start_ranks
from trainer.debug_model import build_debug_model, debug_feature_extractor, debug_tokenizer
from trainer.models import DECODER, PROJECTION, open_model

# Float32 copies of the model on the devices of n ranks together: computing weights, ZeRO's masters, AdamW's moments,
# and under ZeRO-3 gradients, which DeepSpeed allocates at once.
DEVICE_COPIES: dict[str, Callable[[int], int]] = {
    "single": lambda n: 1 + 2,
    "ddp": lambda n: n * (1 + 2),
    "zero2": lambda n: n + 1 + 2,
    "zero3": lambda n: 1 + 1 + 2 + 1,
    "fsdp": lambda n: 1 + 2,
}
# Of these, what is there before the moments are. Only strategies that shard from host memory; the others build on the
# device, where DDP's first buckets and DeepSpeed's flattening need a copy more for a moment.
SHARDED_COPIES = {"zero3": 3, "fsdp": 1}
# Copies of one tensor at a time, Python objects and pages that the forkserver's children write to: 0.11 copies of
# 354 MB were measured at most (2026-11-22, 2 CPU cores, gloo).
SLACK = 0.2
M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Host memory of all processes over what they had before the engine was built, in bytes."""

    peak_sharding: int
    peak: int
    final: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A decoder of 88 M parameters as a folder."""
    made = tmp_path_factory.mktemp("model")
    build_debug_model(width=768, layers=8).save_pretrained(made)
    MusicgenProcessor(debug_feature_extractor(), debug_tokenizer()).save_pretrained(made)
    return made


@pytest.mark.parametrize(
    "strategy",
    [name if name in ("zero2", "fsdp") else pytest.param(name, marks=pytest.mark.full) for name in DEVICE_COPIES],
)
def test_at_most_one_copy_is_in_host_memory(strategy, folder, tmp_path):
    world_size = 1 if strategy == "single" else 2
    copy = copy_bytes(folder)
    assert 300e6 < copy < 400e6
    growth = measure(start_ranks(world_size, build, str(folder), strategy, str(tmp_path)), tmp_path)
    print(f"{strategy}: {growth.peak_sharding / copy:.2f}, {growth.peak / copy:.2f}, {growth.final / copy:.2f} copies")
    on_devices = DEVICE_COPIES[strategy](world_size)
    assert growth.final / copy == pytest.approx(on_devices, abs=SLACK)
    assert growth.peak / copy <= on_devices + 1 + SLACK
    if strategy in SHARDED_COPIES:
        assert growth.peak_sharding / copy <= SHARDED_COPIES[strategy] + 1 + SLACK


def build(folder: str, strategy: str, meeting: str) -> float:
    """Build the engine over the model in `folder` once told to; the monotonic time when the weights were sharded."""
    from trainer.config import Config
    from trainer.engine import Engine, Ranks, build_accelerator

    # By itself glibc may keep freed blocks of up to 32 MB for later use; most of what `large` frees is larger.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    plan = plan_for(strategy, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    config = Config(dataset_path="unused", timeout_minutes=2.0)
    accelerator = build_accelerator(plan, config, Path("."))
    with Ranks(timeout_seconds=60) as ranks:
        source = open_model(folder)
        gc.collect()  # writes to every object: pages shared with the forkserver are this process's own from here on
        sharded = _first_call_of_reset_moments()
        (Path(meeting) / f"ready-{os.getpid()}").touch()
        while not (Path(meeting) / "go").exists():
            time.sleep(0.01)
        engine = Engine(accelerator, ranks, source, plan, config)
        (Path(meeting) / f"built-{os.getpid()}").touch()
        while not (Path(meeting) / "end").exists():
            time.sleep(0.01)
        assert any(len(share.weight) for share in engine.backend.shares())
    return sharded[0]


def _first_call_of_reset_moments() -> list[float]:
    """Gets the time of each call of a backend's reset_moments: what comes after it is optimizer state."""
    from trainer.engine.torch_backend import TorchBackend
    from trainer.engine.zero_backend import ZeroBackend

    times: list[float] = []

    def timed(method: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            times.append(time.monotonic())
            method(*arguments)

        return call

    for backend in (TorchBackend, ZeroBackend):
        backend.reset_moments = timed(backend.reset_moments)  # type: ignore[method-assign]
    return times


def measure(ranks: RankProcesses, meeting: Path) -> Growth:
    """Sample the ranks and the forkserver, whose pages they share, while the engine is built."""
    pids: list[int] = [process.pid for process in ranks.processes]  # type: ignore[misc]
    pids.append(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]
    try:
        wait_for(ranks, meeting, "ready-*")
        before = proportional_bytes(pids)
        (meeting / "go").touch()
        samples: list[tuple[float, int]] = []
        while len(list(meeting.glob("built-*"))) < len(ranks.processes):
            assert all(process.is_alive() for process in ranks.processes), ranks.results()
            samples.append((time.monotonic(), proportional_bytes(pids) - before))
            time.sleep(0.005)
        final = proportional_bytes(pids) - before
    finally:
        (meeting / "end").touch()
        results = ranks.results()
    assert all(kind == "returned" for kind, _ in results), results
    sharded = min(value for _, value in results)
    return Growth(
        peak_sharding=max(size for at, size in samples if at <= sharded),
        peak=max(final, *(size for _, size in samples)),
        final=final,
    )


def wait_for(ranks: RankProcesses, meeting: Path, marks: str) -> None:
    while len(list(meeting.glob(marks))) < len(ranks.processes):
        assert all(process.is_alive() for process in ranks.processes), ranks.results()
        time.sleep(0.02)


def proportional_bytes(pids: list[int]) -> int:
    """Proportional set size of these processes together; of those that have ended, nothing."""
    total = 0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += 1024 * int(found[1]) if found else 0
    return total


def copy_bytes(folder: Path) -> int:
    """Bytes of the trained part, in float32."""
    weights = open_model(str(folder)).weights
    return sum(4 * math.prod(weights.shape(name)) for name in weights if name.startswith((DECODER, PROJECTION)))
