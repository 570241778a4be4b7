"""The reports of a run: always in metrics.jsonl, and in wandb and TensorBoard where the flags ask for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import soundfile

from trainer.atomic import write_whole

Value = int | float | str | list[float] | None


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A sound as trackers get it: `name` tells it from the others of a step, and is the same at every step."""

    name: str
    caption: str
    path: Path


class ExternalTrackers(Protocol):
    """The part of accelerate.Accelerator that is used here: this room may not import accelerate."""

    def log(self, values: dict, step: int | None = ..., log_kwargs: dict | None = ...) -> None: ...

    @property
    def trackers(self) -> list[Any]: ...


class Tracker:
    """Owns metrics.jsonl: one JSON object per line, in the order of the steps, and no report twice."""

    def __init__(self, path: Path | None, *, start_step: int, external: ExternalTrackers | None):
        """Continue `path` after `start_step`, the step of the checkpoint that the run resumes from, or 0.

        A killed run may have reported steps beyond its last checkpoint, which are now computed again. In `path` these
        lines are cut off. wandb and TensorBoard cannot take back what they have; so these reports are not sent to them
        a second time. Which ones they are is kept in `.told.json` beside `path`, in case this run is killed too
        before it has passed them.

        path      None on the processes that do not report
        external  where else reports are sent; None for nowhere
        """
        self._sent_before: set[tuple[str, ...]] = set()
        if path is not None and path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            found = [(line, report) for line in lines if (report := report_of_line(line)) is not None]
            kept = [line for line, report in found if report["step"] <= start_step]
            sent_path = path.with_name(".told.json")
            beyond = {_report_key(report) for _, report in found if report["step"] > start_step}
            self._sent_before = beyond | _read_sent(sent_path)
            if len(kept) != len(lines):
                if external is not None:  # before the lines are cut off, which are the only other trace of them
                    write_whole(sent_path, json.dumps(sorted(self._sent_before)).encode())
                write_whole(path, b"".join(kept))
        self._file = path.open("a") if path is not None else None
        self._external = external

    def log(self, values: Mapping[str, Value]) -> None:
        """Report one object; `values["step"]` is the number of optimizer steps done."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        if self._external is not None and _report_key(values) not in self._sent_before:
            self._external.log(_scalars(values), step=int(values["step"]))  # type: ignore[arg-type]

    def log_sounds(self, step: int, sounds: Sequence[Sound]) -> None:
        """Send sounds to wandb and TensorBoard, where a sample of a song can be played beside the curves.

        Raises OSError and soundfile.LibsndfileError where a file cannot be read.
        """
        for tracker in [] if self._external is None else self._external.trackers:
            if tracker.name == "wandb":
                import wandb

                audio = {sound.name: wandb.Audio(str(sound.path), caption=sound.caption) for sound in sounds}
                tracker.run.log(audio, step=step)
            elif tracker.name == "tensorboard":  # which shows no captions: the text beside it has them
                for sound in sounds:
                    samples, rate_hz = soundfile.read(sound.path, dtype="float32", always_2d=True)
                    # It plays mono alone. Of one channel the mean is that channel, bit for bit.
                    tracker.writer.add_audio(sound.name, samples.mean(axis=1)[None], step, sample_rate=rate_hz)
                    tracker.writer.add_text(sound.name, sound.caption, step)
                tracker.writer.flush()

    def close(self) -> None:
        """Close the file and finish the external trackers."""
        if self._file is not None:
            self._file.close()
        if self._external is not None:
            # Not accelerator.end_training(), which ends the process group too; the ranks still need it to end together.
            for tracker in self._external.trackers:
                tracker.finish()


def reports(path: Path) -> list[dict[str, Any]]:
    """What a metrics.jsonl reports, line by line, without lines that a kill or a power loss has cut or garbled."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [report for line in lines if (report := report_of_line(line)) is not None]


def report_of_line(line: bytes) -> dict[str, Any] | None:
    """The report in a whole line of metrics.jsonl; None where it is none. The cut last line lacks its newline."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _read_sent(path: Path) -> set[tuple[str, ...]]:
    """The keys that `.told.json` holds. Where it is lost, some reports are sent a second time."""
    try:
        return {tuple(map(str, key)) for key in json.loads(path.read_bytes())}
    except (FileNotFoundError, ValueError, TypeError):
        return set()


def _report_key(values: Mapping[str, Value]) -> tuple[str, ...]:
    """What tells one report from another: its step, and the names of its values."""
    return (str(values["step"]), *sorted(values))


def _scalars(values: Mapping[str, Value]) -> dict[str, Value]:
    """The values as wandb and TensorBoard can draw them: a list becomes one entry per codebook, None is left out."""
    scalars: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, list):
            scalars |= {f"{name}/{index}": item for index, item in enumerate(value)}
        elif value is not None:
            scalars[name] = value
    return scalars
