"""On a GPU, the copy that sounds are made with takes what the plan says and leaves nothing behind.

Skipped without one. `bash scripts/test.sh full -m gpu` runs them alone.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from tests.gpu import sampling
from tests.gpu.one_card import gib, say_figure
from tests.runs import ROOT, environ, import_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("size", "strategy"), [("small", "single"), ("medium", "fsdp")])
def test_a_sound_takes_what_the_plan_says_and_leaves_nothing(size: str, strategy: str) -> None:
    command = [sys.executable, "-m", sampling.__name__, size, strategy]
    environment = environ(PYTHONPATH=import_path())
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    assert lines, done.stdout + done.stderr
    found = json.loads(lines[0].removeprefix("MEASURED "))
    peak, expected = found["peak_bytes"], found["expected_bytes"]
    say_figure(
        f"peak {gib(peak)}, {peak / expected:.3f} of planned {gib(expected)}; {found['left_bytes']} bytes left, the"
        f" largest blocks {found['left_blocks']}; cuBLAS's workspaces {found['workspace_bytes']} bytes"
    )
    assert found["equal"] and math.isfinite(found["loss"])
    assert 0.85 * expected < peak <= 1.02 * expected
    assert abs(found["left_bytes"]) < 2**20
