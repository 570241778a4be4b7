"""What a run reports: metrics.jsonl always, wandb and tensorboard, by Accelerate's trackers, when asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from trainer.checkpoint import write_atomically

Value = int | float | str | list[float] | None


class ExternalTrackers(Protocol):
    """The part of accelerate.Accelerator that is used here."""

    def log(self, values: dict, step: int | None = ..., log_kwargs: dict | None = ...) -> None: ...

    def end_training(self) -> None: ...


class Tracker:
    """Owns metrics.jsonl: one JSON object a line, in order of steps, none twice."""

    def __init__(self, path: Path | None, *, start_step: int, external: ExternalTrackers | None):
        """Continues `path` after `start_step`: what a killed run reported beyond that is cut off.

        path  None on the processes that do not report
        """
        if path is not None and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start_step]
            if len(kept) != len(lines):
                write_atomically(path, "".join(kept).encode())
        self._file = path.open("a") if path is not None else None
        self._external = external

    def log(self, values: Mapping[str, Value]) -> None:
        """Report one object; `values["step"]` is the number of optimizer steps done."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        if self._external is not None:
            self._external.log(_flat(values), step=int(values["step"]))  # type: ignore[arg-type]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._external is not None:
            self._external.end_training()


def _flat(values: Mapping[str, Value]) -> dict[str, Value]:
    """Lists as one entry per codebook, and without what was not measured: trackers draw scalars."""
    flat: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}/{index}": item for index, item in enumerate(value)}
        elif value is not None:
            flat[name] = value
    return flat
