"""What output_dir says of a run: how far it is, how it ended, what it was told. Read without torch, at any moment.

Files may be missing, as in folders of older versions, or be cut or garbled by a crash: such a file says nothing then.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import EXIT_DONE, EXIT_RESUME
from trainer.report.run_metrics import Metrics
from trainer.report.run_samples import Samples, Step
from trainer.report.run_sounds import Sounds
from trainer.run.checkpoint_folders import complete_checkpoints

START, RECALL, SCORE = "run.json", "recall.json", "score.json"
RECENT_STEPS = 50  # by whose pace the time that is left is estimated
QUIET_SECONDS = 300.0  # without a line of metrics, and 20 times the usual pause between two: killed, or stuck
PAUSE_SECONDS = 1800.0  # between two lines: the run stood still meanwhile
HEAD_BYTES = 4 << 20  # of dataset.json, whose figures come before its list of all files
RUNNING, STOPPED, FINISHED, FAILED, SILENT = "running", "stopped", "finished", "failed", "no sign of life"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run at one moment; {} and None are what is not.

    config, plan, start  config.json, plan.json, run.json
    dataset              dataset.json without its list of files
    recall, score        recall.json and score.json, which scripts write after the run, unless of a step that is no
                         longer the exported one
    exit_code            what the run ended with; None while it runs
    alive                whether it is known to run
    best                 step and loss of the best validation
    best_kept            the step whose checkpoint is kept for it (best.json)
    resumes              steps after which it went on
    checkpoint           the step of the newest complete one
    written              seconds since 1970
    """

    root: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    start: Mapping[str, Any]
    dataset: Mapping[str, Any]
    finished: Mapping[str, Any]
    recall: Mapping[str, Any]
    score: Mapping[str, Any]
    exit_code: int | None
    alive: bool
    metrics: Metrics
    best: tuple[int, float] | None
    best_kept: int | None
    steps_of_sounds: Sequence[Step]
    resumes: Sequence[int]
    checkpoint: int | None
    written: float

    @property
    def step(self) -> int:
        """How many steps are done, as far as metrics.jsonl says."""
        return int(self.metrics.training.last("step") or 0)

    @property
    def steps(self) -> int | None:
        """How many steps the run has when it is complete; None where nothing says it.

        A folder of a version that wrote no run.json says it by the pace at which epochs go by.
        """
        if self.state == FINISHED:
            return self.step
        if isinstance(stated := self.start.get("steps"), int):
            return stated
        epochs, most = self.config.get("epochs"), self.config.get("max_steps")
        epoch = self.metrics.training.last("epoch")
        of_epochs = math.ceil(self.step * epochs / epoch) if isinstance(epochs, int) and epoch else None
        return min((value for value in (of_epochs, most) if isinstance(value, int)), default=None)

    @property
    def silent_seconds(self) -> float | None:
        """Since the last line of metrics."""
        last = self.metrics.training.last("time")
        return None if last is None else max(0.0, self.written - last)

    @property
    def state(self) -> str:
        """One of RUNNING, STOPPED, FINISHED, FAILED and SILENT."""
        if self.exit_code is not None:
            return {EXIT_DONE: FINISHED, EXIT_RESUME: STOPPED}.get(self.exit_code, FAILED)
        if self.alive:
            return RUNNING
        if self.finished and self.finished.get("step") == self.step:
            return FINISHED
        pauses = np.diff(self.metrics.training["time"][-RECENT_STEPS:])
        usual = float(np.nanmedian(pauses)) if np.isfinite(pauses).any() else 0.0
        silent = self.silent_seconds
        return SILENT if silent is not None and silent > max(QUIET_SECONDS, 20 * usual) else RUNNING

    @property
    def trained_seconds(self) -> float | None:
        """From the first line of metrics to the last, without the pauses in which nothing ran."""
        times = self.metrics.training["time"]
        pauses = np.diff(times[np.isfinite(times)])
        return float(pauses[(pauses > 0) & (pauses < PAUSE_SECONDS)].sum()) if len(pauses) else None

    @property
    def seconds_left(self) -> float | None:
        """Of the steps that are left, at the pace of the last ones, validations and sounds included."""
        if self.steps is None or self.step >= self.steps:
            return None
        training = self.metrics.training
        times, steps = training["time"][-RECENT_STEPS:], training["step"][-RECENT_STEPS:]
        pauses, done = np.diff(times), np.diff(steps)
        ran = (pauses > 0) & (pauses < PAUSE_SECONDS) & (done > 0)
        return float(pauses[ran].sum() / done[ran].sum() * (self.steps - self.step)) if ran.any() else None

    @property
    def expected_end(self) -> float | None:
        """When a run that goes on will have made its steps, in seconds since 1970."""
        left = self.seconds_left
        return None if left is None or self.state != RUNNING else self.written + left


class RunReader:
    """Reads a run again and again; what does not change is read once."""

    def __init__(self, root: Path):
        self.root = root
        self.metrics = Metrics(root / "metrics.jsonl")
        self.samples = Samples(root)
        self.sounds = Sounds()
        self._json: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

    def read(self, *, exit_code: int | None = None, alive: bool = False) -> Facts:
        """Raises OSError.

        exit_code  what the run is about to end with, where its file is not written yet
        alive      whether the caller knows that it runs
        """
        self.metrics.read_on()
        start = self._read_json(START)
        checkpoints = complete_checkpoints(self.root / "checkpoints")
        kept = self._read_json("best.json").get("step")
        finished = self._read_json("finished.json")
        return Facts(
            root=self.root,
            config=self._read_json("config.json"),
            plan=self._read_json("plan.json"),
            start=start,
            dataset=self._read_json("dataset.json"),
            finished=finished,
            recall=_if_of_exported(self._read_json(RECALL), finished),
            score=_if_of_exported(self._read_json(SCORE), finished),
            exit_code=self._exit_code() if exit_code is None else exit_code,
            alive=alive,
            metrics=self.metrics,
            best=self.metrics.best(),
            best_kept=kept if isinstance(kept, int) else None,
            steps_of_sounds=self.samples.steps(),
            resumes=resumes_of(start),
            checkpoint=int(checkpoints[0].name.removeprefix("step-")) if checkpoints else None,
            written=time.time(),
        )

    def _exit_code(self) -> int | None:
        try:
            return int((self.root / "exit_code").read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.root / name
        try:
            found = path.stat()
            state = (found.st_mtime_ns, found.st_size)
            known = self._json.get(name)
            if known is None or known[0] != state:
                self._json[name] = known = (state, _object(path))
        except (FileNotFoundError, IsADirectoryError):
            return {}
        return known[1]


def _if_of_exported(judged: dict[str, Any], finished: Mapping[str, Any]) -> dict[str, Any]:
    """What a script found of the run's model; {} where that was another step than the one that is exported now, as of a
    run that was trained on since."""
    exported = finished.get("exported_step", finished.get("step"))
    judged_step = judged.get("exported_step")
    return judged if None in (exported, judged_step) or exported == judged_step else {}


def resumes_of(start: Mapping[str, Any]) -> list[int]:
    """The steps after which a run went on, by its run.json."""
    starts = start.get("starts")
    steps = [one.get("start_step") for one in starts if isinstance(one, dict)] if isinstance(starts, list) else []
    return sorted({step for step in steps if isinstance(step, int) and step > 0})


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; of dataset.json what comes before its list of files. {} where it is none.

    Older versions wrote recall.json as a list of what is now one part of it.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    # No text inside of JSON can look so, because its quotation marks are escaped.
    if path.name == "dataset.json" and (at := head.find(b', "files": [')) > 0:
        head = head[:at] + b"}"
    try:
        values = json.loads(head)
    except (ValueError, RecursionError):
        return {}
    if path.name == RECALL and isinstance(values, list):
        values = {"played_back": values}
    return values if isinstance(values, dict) else {}
