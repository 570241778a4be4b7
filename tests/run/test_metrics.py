"""One run's reports stay one curve across interruptions: in metrics.jsonl, wandb and TensorBoard."""

from __future__ import annotations

import json
import shutil
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
    """The steps whose loss an offline run's file has."""
    return (step for step, items in wandb_history(file) if "loss" in items)


def wandb_history(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """What was logged, by step: records of protobuf in LevelDB's log format, after a header of 7 bytes."""
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
            if items:
                yield record.history.step.num, items


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


@pytest.mark.full
def test_sounds_come_to_wandb_and_tensorboard_once_with_their_prompts_across_a_resume(tmp_path):
    few_clips(tmp_path / "data")
    flags = ("--max_steps", "4", "--batch_size", "2", "--grad_acc", "1", "--code_views", "1", "--save_step", "2")
    flags += ("--use_wandb", "1", "--use_tensorboard", "1", "--sample_every", "2", "--sample_seconds", "0.2")
    flags += ("--sample_prompts", "slow rock|Gentle 'piano'")
    launch(tmp_path, *flags, WANDB_MODE="offline")
    shutil.rmtree(tmp_path / "models/checkpoints/step-00000004")
    launch(tmp_path, *flags, WANDB_MODE="offline")
    assert (tmp_path / "models/samples/replaced-1/step-00000004/samples.json").is_file()
    names = {"samples/01_slow_rock": "slow rock", "samples/02_gentle_piano": "Gentle 'piano'"}
    runs = sorted((tmp_path / "models/wandb").glob("offline-run-*"))
    history = [entry for run in runs for entry in wandb_history(next(run.glob("*.wandb")))]
    for name, prompt in names.items():
        sounds = {}
        for step, items in history:
            parts = {key.removeprefix(f"{name}/"): json.loads(value) for key, value in items.items() if name in key}
            if parts:
                assert step not in sounds, f"{name} of step {step} was sent twice"
                sounds[step] = parts
        assert sorted(sounds) == [0, 2, 4]
        for step, sound in sounds.items():
            assert sound["_type"] == "audio-file" and sound["caption"] == prompt
            sent = next(file for run in runs if (file := run / "files" / sound["path"]).exists())
            listed = tmp_path / f"models/samples/step-0000000{step}/{name.removeprefix('samples/')}.flac"
            aside = tmp_path / f"models/samples/replaced-1/step-0000000{step}/{listed.name}"
            assert sent.read_bytes() == (aside if aside.exists() else listed).read_bytes()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, set[str]] = {}
    boards = {path.parent for path in (tmp_path / "models").rglob("events.out.tfevents.*")}
    events = EventAccumulator(
        str(min(boards, key=lambda path: len(path.parts))), size_guidance={"audio": 0, "tensors": 0}
    )
    events.Reload()
    for name, prompt in names.items():
        found[name] = [(event.step, event.sample_rate) for event in events.Audio(name)]
        texts[name] = {event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{name}/text_summary")}
        assert found[name] == [(step, 32000.0) for step in (0, 2, 4)]
        assert texts[name] == {prompt}
