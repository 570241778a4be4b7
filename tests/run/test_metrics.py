"""One run's reports stay one curve across interruptions: in metrics.jsonl, wandb and TensorBoard."""

from __future__ import annotations

import json
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import few_clips, launch, metrics, start
from trainer.run.metrics import Tracker

STEPS = 40
FLAGS = ("--max_steps", str(STEPS), "--epochs", "1000", "--batch_size", "2", "--grad_acc", "1", "--code_views", "1")
FLAGS += ("--use_wandb", "1", "--use_tensorboard", "1")


class Told:
    """What an external tracker was told, by step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int | None, set[str]]] = []

    def log(self, values: dict, step: int | None = None, log_kwargs: dict | None = None) -> None:
        self.steps.append((step, set(values)))

    trackers = ()


def test_steps_that_killed_runs_reported_beyond_their_checkpoint_are_told_once(tmp_path):
    path, told = tmp_path / "metrics.jsonl", Told()
    killed = Tracker(path, start_step=0, external=told)
    for step in (1, 2, 3, 4):
        killed.log({"step": step, "loss": 1.0})
        if step % 2 == 0:
            killed.log({"step": step, "validation_loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # cut off by the kill: not told yet
    Tracker(path, start_step=2, external=told).log({"step": 3, "loss": 1.0})  # and is killed before it comes to 4
    again = Tracker(path, start_step=2, external=told)
    for step in (3, 4, 5):
        again.log({"step": step, "loss": 1.0})
    again.log({"step": 5, "validation_loss": 1.0})
    again.close()
    assert [step for step, names in told.steps if "loss" in names] == [1, 2, 3, 4, 5]
    assert [step for step, names in told.steps if "validation_loss" in names] == [2, 4, 5]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


def wandb_steps(file: Path) -> Iterator[int]:
    """The steps in an offline run's file: records of protobuf in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    assert content.startswith(b":W&B")
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for a header in this block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(parts)
            parts = b""
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "loss" in items:
                yield record.history.step.num


def tensorboard_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def interrupt(folder: Path, number: int, **environment: str) -> None:
    """Start the run, and send the signal once it has reported a few more steps."""
    reported = max(metrics(folder), default=0) if (folder / "models/metrics.jsonl").exists() else 0
    process = start(folder, *FLAGS, **environment)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        path = folder / "models/metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= reported + 3:
            break
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert f"wandb sync models/wandb/offline-run-*-{(folder / 'models/tracker_id.txt').read_text()}" in output


@pytest.mark.full
def test_three_interruptions_leave_one_run_without_gap_or_repeat(tmp_path):
    few_clips(tmp_path / "data")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        interrupt(tmp_path, number, WANDB_MODE="offline")
    launch(tmp_path, *FLAGS, WANDB_MODE="offline")
    every = list(range(1, STEPS + 1))
    assert list(metrics(tmp_path)) == every
    runs = sorted((tmp_path / "models/wandb").glob("offline-run-*"))
    assert len(runs) == 4 and len({run.name.split("-")[-1] for run in runs}) == 1
    assert [step for run in runs for step in wandb_steps(next(run.glob("*.wandb")))] == every
    boards = {path.parent for path in (tmp_path / "models").rglob("events.out.tfevents.*")}
    top = min(boards, key=lambda path: len(path.parts))
    assert tensorboard_steps(top) == every
