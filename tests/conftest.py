"""What all tests share: a folder for compiled code, a tiny finished run; and which tests go together to one worker."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

# Files whose tests share `finished_run`, so that one worker makes it once.
WITH_A_FINISHED_RUN = (
    *("tests/evaluation/test_generation.py", "tests/exports/test_init_from.py", "tests/scripts/test_generate.py"),
    *("tests/whole_runs/test_small_files.py", "tests/whole_runs/test_sharing.py"),
    *("tests/exports/test_step_export.py", "tests/scripts/test_score.py"),
)


COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def pytest_configure(config: pytest.Config) -> None:
    """What torch.compile makes lies in a folder of this session.

    Its usual folder in /tmp serves all processes of a user and does not tell their kernels apart: what another had
    compiled under another ATEN_CPU_CAPABILITY gave losses that are not numbers, or ended the process, and one that is
    killed while it writes there leaves half a library (torch 2.13).
    """
    if not config.pluginmanager.hasplugin("timeout"):  # a GPU machine without a network has pytest alone
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not installed here")
    if COMPILED not in os.environ:  # workers of pytest-xdist find that of the process which started them
        os.environ[COMPILED] = folder = tempfile.mkdtemp(prefix="torchinductor-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of three steps of the debug model on three examples, with an lm_2.pt beside lm_final.pt."""
    from tests.runs import launch_here  # takes seconds, which tests without torch need not wait for

    folder = tmp_path_factory.mktemp("finished_run")
    flags = ("--max_steps", "3", "--warmup_steps", "1", "--lr", "1e-3", "--batch_size", "2", "--grad_acc", "1")
    launch_here(folder, *flags, "--code_views", "1", "--save_step", "2")
    return folder / "models"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2` a worker gets a file at a time, whose fixtures are made once then; one gets all of tests/ranks.

    The units with the most tests come first.

    Two tests of several ranks at once would have four processes or more on two cores, under time limits of seconds; and
    each worker with such a test pays for a forkserver.
    """
    from xdist.scheduler import LoadScopeScheduling

    class TogetherByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.startswith("tests/slurm/"):  # mostly waits: not to be left to the end
                return "tests/slurm"
            if file.startswith(("tests/ranks/", "tests/gpu/")) or file == "tests/whole_runs/test_resume.py":
                return "tests/ranks"
            return WITH_A_FINISHED_RUN[0] if file in WITH_A_FINISHED_RUN else file

    return TogetherByFile(config, log)
