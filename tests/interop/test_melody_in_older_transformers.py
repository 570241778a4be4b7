"""Why melody models need transformers 5.18 to be heard, in an environment that has a real 5.17."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.runs import environ

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
TRANSFORMERS = "5.17.0"
SAME_WHATEVER_IS_ASKED = """
import torch
from tests.evaluation.test_stereo_and_melody_codes import their_codes
asked = [("slow rock ballad", "chord"), ("slow rock ballad", "other"), (None, "none")]
print(len({str(their_codes("debug-melody", *one).tolist()) for one in asked}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with that version, which finds all that it does not have itself in ours."""
    folder = tmp_path_factory.mktemp("older")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*install, f"transformers=={TRANSFORMERS}"], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        message = f"NOT TESTED: what transformers {TRANSFORMERS} makes of melodies ({done.stderr[-300:]})"
        warnings.warn(message, stacklevel=2)
        pytest.skip(message)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "zz_ours.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # behind its own, so that those win
    return str(interpreter)


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *arguments], cwd=ROOT, env=environ(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip


def test_its_own_generate_hears_neither_melody_nor_text(python: str) -> None:
    assert run(python, "-c", SAME_WHATEVER_IS_ASKED).stdout == "1\n"
    assert run(sys.executable, "-c", SAME_WHATEVER_IS_ASKED).stdout == "3\n"


def test_generate_and_a_run_with_samples_refuse_and_name_both_versions(python: str, tmp_path: Path) -> None:
    output = ("--output", str(tmp_path / "out"))
    made = run(python, "scripts/generate.py", "--model", "debug-melody", "--prompt", "a", "--seconds", "0.3", *output)
    flags = ("--dataset", "examples", "--model_id", "debug-melody", "--output_dir", str(tmp_path / "run"))
    trained = run(python, "launch.py", *flags, "--sample_every", "5")
    for one in (made, trained):
        text = one.stdout + one.stderr
        assert one.returncode == 2 and f"{TRANSFORMERS} is installed" in text, text
        assert "pip install 'transformers>=5.18'" in text
    stereo = run(python, "scripts/generate.py", "--model", "debug-stereo", "--prompt", "a", "--seconds", "0.3", *output)
    assert stereo.returncode == 0, stereo.stderr
