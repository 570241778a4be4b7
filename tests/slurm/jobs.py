"""Runs of the debug model, submitted by the scripts of scripts/slurm as a user does."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.runs import few_clips, metrics
from tests.slurm.cluster import ENDED, Cluster
from trainer.run.checkpoint import newest

STEPS = 60
# Losses of one and of two processes, nats: their rounding of 1e-6 grows as 60 steps at a high rate learn the clips.
NEAR = 1e-3
FLAGS = [
    *("--model_id", "debug", "--code_views", "1", "--segment_seconds", "2", "--lr", "3e-3", "--epochs", "1000"),
    *("--global_batch", "4", "--batch_size", "2", "--use_cfg", "1", "--cfg_rate", "0.3"),
]
OPTIONS = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=1G", "--time=30")
ENVIRONMENT = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


class Run:
    """A run in `folder`, which gets data/, cache/, models/ and the jobs' logs."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster = cluster
        self.folder = folder
        self.output_dir = folder / "models"
        self.job = ""
        few_clips(folder / "data")

    def submit(self, script: str, *options: str, flags: tuple[str, ...] = (), **environment: str) -> str:
        """Submit scripts/slurm/SCRIPT.sbatch; returns the job's id, which is from now on the run's."""
        self.job = self.cluster.submit(
            *(*OPTIONS, f"--output={self.folder}/%A.log", *options, f"scripts/slurm/{script}.sbatch"),
            *("--dataset", str(self.folder / "data"), "--cache_dir", str(self.folder / "cache"), *FLAGS),
            *("--output_dir", str(self.output_dir), "--max_steps", str(STEPS), *flags),
            **(ENVIRONMENT | environment),
        )
        return self.job

    def with_the_cache_of(self, other: Run) -> Run:
        """This run, which need not encode the data again."""
        shutil.copytree(other.folder / "cache", self.folder / "cache")
        return self

    def steps(self) -> int:
        """The last step of metrics.jsonl."""
        path = self.output_dir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for_step(self, step: int, *, start: int = 1, seconds: float = 120) -> None:
        """Return once the run reports that step, or a later one, in its start of that number, over all its jobs."""
        self._until(lambda: self.training(start) and self.steps() >= step, f"step {step} of start {start}", seconds)

    def training(self, start: int) -> bool:
        """Whether metrics.jsonl was written in the newest start, which is at least that one."""
        times = [path.stat().st_mtime_ns for path in self.output_dir.glob("logs/*/start-*/started")]
        path = self.output_dir / "metrics.jsonl"
        return len(times) >= start and path.exists() and path.stat().st_mtime_ns > max(times)

    def _until(self, happened: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"{what} did not come:\n" + self.log()
            state = self.cluster.job(self.job)["JobState"]
            assert state not in ENDED, f"{state} before {what}:\n" + self.log()
            time.sleep(0.1)

    def wait(self, state: str = "COMPLETED", exit_code: int | None = 0, seconds: float = 180) -> dict[str, str]:
        """The job once it has ended, in this state and with this exit code; None: with any."""
        deadline = time.monotonic() + seconds
        while (job := self.cluster.job(self.job))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"{job['JobState']} ({job['Reason']}) for long:\n" + self.log()
            time.sleep(0.2)
        found = int(job["ExitCode"].split(":")[0])
        assert (job["JobState"], found) == (state, found if exit_code is None else exit_code), self.log()
        return job

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))

    def resumed_at(self) -> list[int]:
        """The step from which each start went on, in order; the first start is not among them."""
        return [int(step) for step in re.findall(r"resuming from \S+, step (\d+)", self.log())]

    def saved(self) -> int:
        """The step of the newest complete checkpoint."""
        found = newest(self.output_dir / "checkpoints")
        return 0 if found is None else found.step

    def assert_every_step_once(self) -> dict[int, float]:
        """The losses of all steps, which stand in metrics.jsonl once each and in order."""
        losses = metrics(self.folder)
        assert list(losses) == list(range(1, STEPS + 1))
        return losses
