"""The same checks on a CUDA device: equal numbers at world size 1, and memory within 10 % of the plan.

Skipped without one. `bash scripts/test.sh full -m gpu` runs them alone.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.gpu.cases import work_of
from tests.runs import ROOT, environ

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GIB = 2**30


def measured(size: str, strategy: str, micro_batch: int, checkpointing: bool) -> dict:
    """What tests/gpu/cases.py prints, run in a process of its own, so that memory starts from nothing."""
    words = [size, strategy, str(micro_batch), str(int(checkpointing))]
    environment = environ(PYTHONPATH=f"{ROOT}:{ROOT}/scripts")
    command = [sys.executable, "-m", "tests.gpu.cases", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("MEASURED "))


@pytest.fixture(scope="module")
def single_losses() -> list[float]:
    return measured("small", "single", 2, False)["losses"]


@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_strategies_give_the_losses_of_one_process_in_bf16(strategy, single_losses):
    if strategy == "zero2":
        pytest.importorskip("deepspeed")
    losses = measured("small", strategy, 2, False)["losses"]
    assert losses == pytest.approx(single_losses, rel=2e-3)


@pytest.mark.parametrize(
    "size,strategy,micro_batch,checkpointing",
    [
        ("small", "single", 4, False),
        ("small", "zero2", 4, False),
        ("small", "fsdp", 4, False),
        ("medium", "single", 2, False),
        ("medium", "fsdp", 2, True),
        ("large", "single", 1, True),
        ("large", "fsdp", 1, True),
    ],
)
def test_memory_is_what_the_plan_expects(size, strategy, micro_batch, checkpointing):
    if strategy == "zero2":
        pytest.importorskip("deepspeed")
    expected = _expected_gib(size, strategy, micro_batch, checkpointing)
    if expected * GIB > 0.95 * torch.cuda.get_device_properties(0).total_memory:
        pytest.skip(f"{expected:.0f} GiB are more than this GPU has")
    found = measured(size, strategy, micro_batch, checkpointing)
    assert found["peak_bytes"] == pytest.approx(found["expected_bytes"], rel=0.10)


def _expected_gib(size: str, strategy: str, micro_batch: int, checkpointing: bool) -> float:
    return work_of(size, strategy, micro_batch, checkpointing).plan(gpu_memory_bytes=1).memory.total / GIB
