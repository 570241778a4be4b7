"""One tiny finished run, which any test may read and none may change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of three steps of the debug model on the examples, with an lm_2.pt beside lm_final.pt."""
    folder = tmp_path_factory.mktemp("finished_run")
    command = [sys.executable, str(ROOT / "launch.py"), "--dataset", str(ROOT / "examples"), "--model_id", "debug"]
    command += ["--code_views", "1", "--max_steps", "3", "--warmup_steps", "1", "--lr", "1e-3", "--save_step", "2"]
    command += ["--batch_size", "2", "--grad_acc", "1"]
    command += ["--cache_dir", str(folder / "cache"), "--output_dir", str(folder / "models")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "models"
