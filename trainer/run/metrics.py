"""What a run reports: metrics.jsonl always, wandb and tensorboard, by Accelerate's trackers, when asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from trainer.atomic import write_whole

Value = int | float | str | list[float] | None


class ExternalTrackers(Protocol):
    """The part of accelerate.Accelerator that is used here."""

    def log(self, values: dict, step: int | None = ..., log_kwargs: dict | None = ...) -> None: ...

    @property
    def trackers(self) -> list[Any]: ...


class Tracker:
    """Owns metrics.jsonl: one JSON object a line, in order of steps, none twice."""

    def __init__(self, path: Path | None, *, start_step: int, external: ExternalTrackers | None):
        """Continues `path` after `start_step`: what a killed run reported beyond that is cut off.

        The external trackers cannot take back what they were told beyond it. It is not told to them again, and
        kept in `.told.json` beside `path` for the case that this run is killed too.

        path  None on the processes that do not report
        """
        self._told: set[tuple[str, ...]] = set()
        if path is not None and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
            kept = [line for line, values in whole if values["step"] <= start_step]
            told_path = path.with_name(".told.json")
            before = json.loads(told_path.read_text()) if told_path.exists() else []
            self._told = {_what(values) for _, values in whole if values["step"] > start_step} | set(map(tuple, before))
            if len(kept) != len(lines):
                if external is not None:
                    write_whole(told_path, json.dumps(sorted(self._told)).encode())
                write_whole(path, "".join(kept).encode())
        self._file = path.open("a") if path is not None else None
        self._external = external

    def log(self, values: Mapping[str, Value]) -> None:
        """Report one object; `values["step"]` is the number of optimizer steps done."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        if self._external is not None and _what(values) not in self._told:
            self._external.log(_flat(values), step=int(values["step"]))  # type: ignore[arg-type]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._external is not None:
            for tracker in self._external.trackers:  # end_training would end the process group with them
                tracker.finish()


def _what(values: Mapping[str, Value]) -> tuple[str, ...]:
    """What a report is about: its step, and which values it names."""
    return (str(values["step"]), *sorted(values))


def _flat(values: Mapping[str, Value]) -> dict[str, Value]:
    """Lists as one entry per codebook, and without what was not measured: trackers draw scalars."""
    flat: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}/{index}": item for index, item in enumerate(value)}
        elif value is not None:
            flat[name] = value
    return flat
