"""What a run loads before its first step: counted, since times are no test (docs/benchmarks.md has them)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT, command, environ, launch_here

# Each takes from a fifth of a second to seconds, and no step of the whole model on one process calls them.
# bitsandbytes comes with peft where it is installed, networkx with what it imports of torch.
NOT_NEEDED = {
    *("datasets", "pandas", "peft", "bitsandbytes", "networkx", "deepspeed"),
    *("sklearn", "scipy", "torchvision", "torchaudio", "tensorboard", "wandb", "matplotlib"),
}
PROGRAM = """
import os, sys
import launch, trainer.training.loop
steps = trainer.training.loop.train
def train(*arguments):
    assert steps(*arguments) == 1
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}), flush=True)
    os._exit(0)  # before the export, which needs more
trainer.training.loop.train = train
launch.main(sys.argv[1:])
"""


def test_with_a_full_cache_nothing_that_no_step_needs_is_loaded_before_the_first_step(tmp_path: Path) -> None:
    launch_here(tmp_path, "--max_steps", "1")
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
    assert lines, done.stdout + done.stderr
    loaded = set(lines[0][1:])
    assert {"torch", "transformers", "accelerate", "pyarrow"} <= loaded
    assert sorted(loaded & NOT_NEEDED) == []
