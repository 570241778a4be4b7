"""The same checks on a CUDA device: equal numbers at world size 1, and memory within 10 % of the plan.

Skipped without one. `bash scripts/test.sh full -m gpu` runs them alone.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.gpu import cases
from tests.gpu.cases import work_of
from tests.gpu.one_card import gib, say_figure
from tests.runs import ROOT, environ, import_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def measured(size: str, strategy: str, micro_batch: int, way: str) -> dict:
    """What tests/gpu/cases.py prints, run in a process of its own, so that memory starts from nothing."""
    words = [size, strategy, str(micro_batch), way]
    environment = environ(PYTHONPATH=import_path())
    command = [sys.executable, "-m", cases.__name__, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    assert lines, done.stdout + done.stderr
    print(*words, lines[0])
    return json.loads(lines[0].removeprefix("MEASURED "))


@pytest.fixture(scope="module")
def one_process() -> dict:
    return measured("small", "single", 2, "eager")


@pytest.mark.parametrize(
    "strategy,way",
    [
        ("single", "selective"),
        ("zero2", "eager"),
        ("zero2", "selective"),
        ("fsdp", "eager"),
        ("fsdp", "compiled"),
        ("fsdp", "selective"),
    ],
)
def test_strategies_give_the_losses_of_one_eager_process_in_bf16(strategy, way, one_process):
    if strategy == "zero2":
        pytest.importorskip("deepspeed")
    found, expected = measured("small", strategy, 2, way), one_process["losses"]
    apart = [abs(loss - other) for loss, other in zip(found["losses"], expected, strict=True)]
    say_figure(f"losses within {max(apart):.1e} nats over {len(apart)} steps, the first within {apart[0]:.1e}")
    # The first step has equal weights: bf16's roundings alone, here in weights, there in their casts.
    assert found["losses"][0] == pytest.approx(expected[0], rel=2e-3)
    assert found["norms"][0] == pytest.approx(one_process["norms"][0], rel=2e-2)
    # Later ones have learned from rounded gradients, of which AdamW takes little more than the signs at first.
    for loss, other in zip(found["losses"], expected, strict=True):
        assert loss == pytest.approx(other, abs=2e-3 * other + 0.05 * (expected[0] - min(expected)))
    assert expected[-1] < expected[0] - 0.02


@pytest.mark.parametrize(
    "size,strategy,micro_batch,way",
    [
        ("small", "single", 4, "eager"),
        ("small", "single", 4, "compiled"),
        ("small", "zero2", 4, "eager"),
        ("small", "fsdp", 4, "eager"),
        ("small", "fsdp", 4, "selective"),
        ("medium", "single", 2, "eager"),
        ("medium", "single", 8, "selective"),
        ("medium", "fsdp", 2, "recomputing"),
        ("large", "single", 1, "recomputing"),
        ("large", "single", 4, "selective"),
        ("large", "fsdp", 1, "recomputing"),
        ("melody", "single", 4, "eager"),
        ("melody", "single", 8, "selective"),
        ("stereo-medium", "single", 2, "eager"),
        ("stereo-small", "single", 4, "compiled"),
        ("stereo-melody", "fsdp", 2, "recomputing"),
    ],
)
def test_memory_is_what_the_plan_expects(size, strategy, micro_batch, way):
    if strategy == "zero2":
        pytest.importorskip("deepspeed")
    expected = work_of(size, strategy, micro_batch, way).plan(gpu_memory_bytes=1).memory.total
    if expected > 0.95 * torch.cuda.get_device_properties(0).total_memory:
        pytest.skip(f"{expected / 2**30:.0f} GiB are more than this GPU has")
    found = measured(size, strategy, micro_batch, way)
    ratio = found["peak_bytes"] / found["expected_bytes"]
    say_figure(f"peak {gib(found['peak_bytes'])}, {ratio:.3f} of planned {gib(found['expected_bytes'])}")
    assert found["peak_bytes"] == pytest.approx(found["expected_bytes"], rel=0.10)
