"""What a run loads, before its first step and at all: times, which are no test, are in docs/benchmarks.md."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT, command, environ, launch_here

# Each takes from a fifth of a second to seconds, and no step of the whole model on one process calls them.
# bitsandbytes comes with peft where it is installed, networkx with what it imports of torch.
# (transformers imports scipy where it is installed, as it is beside the tests: pyloudnorm brings it.)
NOT_NEEDED = {
    *("datasets", "pandas", "peft", "bitsandbytes", "networkx", "deepspeed"),
    *("sklearn", "torchvision", "torchaudio", "tensorboard", "wandb", "matplotlib"),
}
# Nor does anything else of a run without trackers; the export needs some of the others.
NEVER_NEEDED = {"wandb", "tensorboard", "audiocraft"}
PROGRAM = """
import sys
import launch, trainer.training.loop
def tell():
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}), flush=True)
steps = trainer.training.loop.train
def train(*arguments):
    done = steps(*arguments)
    assert done == 1
    tell()
    return done
trainer.training.loop.train = train
code = launch.main(sys.argv[1:])
tell()
sys.exit(code)
"""


def test_nothing_that_no_step_needs_is_loaded_before_the_first_and_no_tracker_ever(tmp_path: Path) -> None:
    """With a full cache and the dataset's page: encoding and drawing need more."""
    launch_here(tmp_path, "--max_steps", "1")
    (tmp_path / "again").mkdir()
    for name in ("dataset.json", "dataset.html"):
        shutil.copy(tmp_path / "models" / name, tmp_path / "again")
    argv = command(tmp_path, "--max_steps", "1", "--output_dir", "again")[2:]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *argv],
        cwd=tmp_path,
        env=environ(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("loaded:")]
    assert done.returncode == 0 and len(lines) == 2, done.stdout + done.stderr
    loaded, at_the_end = (set(line[1:]) for line in lines)
    assert {"torch", "transformers", "accelerate", "pyarrow"} <= loaded
    assert sorted(loaded & NOT_NEEDED) == sorted(at_the_end & NEVER_NEEDED) == []
    assert (tmp_path / "again/lm_final.pt").is_file()


def test_help_loads_no_tracker_and_nothing_else_that_is_heavy() -> None:
    program = (
        "import sys, launch\n"
        "try:\n    launch.main(['--help'])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print('loaded:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "--use_wandb" in done.stdout, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "launch" in loaded and not loaded & (NOT_NEEDED | {"torch", "transformers", "accelerate"})
    assert importlib.util.find_spec("wandb") is not None  # it is installed, and could have been loaded
