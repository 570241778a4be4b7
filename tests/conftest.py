"""One tiny finished run, which any test may read and none may change; and which tests go together to one worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Files whose tests share `finished_run`, so that one worker makes it once.
WITH_A_FINISHED_RUN = ("tests/evaluation/test_generation.py", "tests/exports/test_init_from.py")


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2` a worker gets a file at a time, whose fixtures are made once then; one gets all of tests/ranks.

    Two tests of several ranks at once would have four processes or more on two cores, under time limits of seconds; and
    each worker with such a test pays for a forkserver.
    """
    from xdist.scheduler import LoadScopeScheduling

    class TogetherByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.startswith("tests/ranks/"):
                return "tests/ranks"
            return WITH_A_FINISHED_RUN[0] if file in WITH_A_FINISHED_RUN else file

    return TogetherByFile(config, log)
