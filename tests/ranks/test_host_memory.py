"""Loading and sharding hold at most one copy of the model in host memory, however many ranks a machine has.

From safetensors not even that: a rank reads its share, tensor by tensor.

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
import torch
from transformers import MusicgenProcessor

from tests.plans import plan_for
from tests.ranks.harness import RankProcesses, start_ranks
from trainer.model.debug_model import build_debug_model, debug_feature_extractor, debug_tokenizer
from trainer.model.source import DECODER, PROJECTION, open_model
from trainer.wiring import engine_settings

# Float32 copies of the model on the devices of n ranks together: computing weights, ZeRO's masters, AdamW's moments,
# and under ZeRO-3 gradients, which DeepSpeed allocates at once.
DEVICE_COPIES: dict[str, Callable[[int], int]] = {
    "single": lambda n: 1 + 2,
    "ddp": lambda n: n * (1 + 2),
    "zero2": lambda n: n + 1 + 2,
    "zero3": lambda n: 1 + 1 + 2 + 1,
    "fsdp": lambda n: 1 + 2,
}
# Beside them: single tensors on their way from the file, in copies; where the file is mapped as a whole, that is one
# copy, whose pages all ranks share.
SLACK = 0.1
MAPPED_COPIES = {"safetensors": 0, "pickled": 1}
# And what does not grow with the model, in each process: modules loaded late, pages that a fork shared and a write
# unshared. With a decoder of 3 M parameters 30 MB (FSDP) to 80 MB (ZeRO-3) were measured, which is what is left here
# too (2026-11-22, 2 CPU cores, gloo).
PROCESS_BYTES = 100e6
M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Host memory of all processes over what they had before the engine was built, in bytes."""

    peak_empty: int  # until the model without weights is handed to the strategy
    peak_sharding: int  # until it is sharded, before AdamW's moments are there
    peak: int
    final: int


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A decoder of 88 M parameters, as safetensors and as pytorch_model.bin."""
    root = tmp_path_factory.mktemp("models")
    model = build_debug_model(width=768, layers=8)
    for stored in MAPPED_COPIES:
        model.config.save_pretrained(root / stored)
        MusicgenProcessor(debug_feature_extractor(), debug_tokenizer()).save_pretrained(root / stored)
    model.save_pretrained(root / "safetensors")
    torch.save(model.state_dict(), root / "pickled" / "pytorch_model.bin")
    return {stored: root / stored for stored in MAPPED_COPIES}


CASES = [(strategy, "safetensors") for strategy in DEVICE_COPIES] + [("zero2", "pickled"), ("fsdp", "pickled")]


@pytest.mark.full
@pytest.mark.parametrize("strategy,stored", CASES)
def test_no_more_than_the_shares_and_one_mapped_file_is_in_host_memory(strategy, stored, folders, tmp_path):
    world_size = 1 if strategy == "single" else 2
    copy = copy_bytes(folders[stored])
    assert 300e6 < copy < 400e6
    growth = measure(start_ranks(world_size, build, str(folders[stored]), strategy, str(tmp_path)), tmp_path)
    print(f"{strategy}, {stored}:", {name: round(size / copy, 2) for name, size in vars(growth).items()}, "copies")
    slack = SLACK + world_size * PROCESS_BYTES / copy
    on_devices = DEVICE_COPIES[strategy](world_size)
    assert growth.final / copy >= on_devices - SLACK
    assert growth.peak / copy <= on_devices + MAPPED_COPIES[stored] + slack
    assert growth.peak_empty / copy <= slack
    if strategy == "fsdp":  # the others have more on the device by then: masters, gradients, buckets
        assert growth.peak_sharding / copy <= 1 + slack


def build(folder: str, strategy: str, meeting: str) -> tuple[float, float]:
    """Build the engine over the model in `folder` once told to; when its sharding began and ended, monotonic time."""
    from trainer.engine import Engine, Ranks, build_accelerator
    from trainer.engine.torch_backend import TorchBackend
    from trainer.engine.zero_backend import ZeroBackend
    from trainer.flags.config import Config

    # By itself glibc may keep freed blocks of up to 32 MB for later use; most of what `large` frees is larger.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    plan = plan_for(strategy, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    config = Config(dataset_path="unused", timeout_minutes=2.0)
    accelerator = build_accelerator(plan, engine_settings(config), Path("."))
    with Ranks(timeout_seconds=60) as ranks:
        source = open_model(folder)
        gc.collect()  # writes to every object: pages shared with the forkserver are this process's own from here on
        starts = _noting_calls(type(accelerator), "prepare")
        ends = [_noting_calls(backend, "reset_moments") for backend in (TorchBackend, ZeroBackend)]
        (Path(meeting) / f"ready-{os.getpid()}").touch()
        while not (Path(meeting) / "go").exists():
            time.sleep(0.01)
        engine = Engine(accelerator, ranks, source, plan, engine_settings(config))
        (Path(meeting) / f"built-{os.getpid()}").touch()
        while not (Path(meeting) / "end").exists():
            time.sleep(0.01)
        assert any(len(shard.weight) for shard in engine.backend.shards())
    return starts[0], min(time for times in ends for time in times)


def _noting_calls(owner: type, name: str) -> list[float]:
    """A list that gets the time of each call of a method."""
    method, times = getattr(owner, name), list[float]()

    def call(*arguments: Any) -> Any:
        times.append(time.monotonic())
        return method(*arguments)

    setattr(owner, name, call)
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
    begun, sharded = (min(value[index] for _, value in results) for index in (0, 1))
    return Growth(
        peak_empty=max(size for at, size in samples if at <= begun),
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
