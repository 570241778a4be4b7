"""metrics.jsonl as columns of numbers, read on from where it was left: a run of 100,000 lines is read once."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.run.metrics import report_of_line

TRAINING = ("step", "loss", "lr", "grad_norm", "frames_per_second", "mfu", "epoch", "time", "padding_share")
BLOCK_BYTES = 1 << 20
SEAM_BYTES = 256  # of what was read last: where they differ, the file is another one than it was


class Columns:
    """Reports of one kind, as a column for each value. A value that is absent or no finite number is NaN."""

    def __init__(self, names: Iterable[str]):
        self._columns = {name: array("d") for name in names}
        self._per_codebook: list[array[float]] = []

    def add(self, values: Mapping[str, Any], per_codebook: object) -> None:
        for name, column in self._columns.items():
            column.append(_finite(values.get(name)))
        losses = per_codebook if isinstance(per_codebook, list) else []
        while len(self._per_codebook) < min(len(losses), 64):
            self._per_codebook.append(array("d", [math.nan] * (len(self) - 1)))
        for number, codebook in enumerate(self._per_codebook):
            codebook.append(_finite(losses[number]) if number < len(losses) else math.nan)

    def __len__(self) -> int:
        return len(self._columns["step"])

    def __getitem__(self, name: str) -> np.ndarray:
        """A column, (n,) float64; a copy."""
        return np.array(self._columns[name])

    @property
    def per_codebook(self) -> list[np.ndarray]:
        """The losses of each codebook, (n,) float64 each."""
        return [np.array(column) for column in self._per_codebook]

    def last(self, name: str) -> float | None:
        """The last value that is a number; None without one."""
        return next((value for value in reversed(self._columns[name]) if value == value), None)


class Metrics:
    """What a metrics.jsonl says of training and of validation. `read_on` adds what was written since."""

    def __init__(self, path: Path):
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.training = Columns(TRAINING)
        self.validation = Columns(("step", "validation_loss"))
        self._offset, self._seam, self._file_number = 0, b"", 0

    def read_on(self) -> None:
        """Read what is new. Where the file was cut back or replaced, as a resumed run does, all is read anew.

        A last line without its end is left for the next time; a garbled one is passed over. Raises OSError.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._forget()
            return
        with file:
            self._check_seam(file)
            file.seek(self._offset)
            rest = b""
            while block := file.read(BLOCK_BYTES):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    self._add(line + b"\n")
                    self._offset += len(line) + 1
            file.seek(max(0, self._offset - SEAM_BYTES))
            self._seam = file.read(self._offset - file.tell())

    def _check_seam(self, file: Any) -> None:
        found = os.fstat(file.fileno())
        file.seek(max(0, self._offset - SEAM_BYTES))
        same = found.st_ino == self._file_number and found.st_size >= self._offset
        if not same or file.read(len(self._seam)) != self._seam:
            self._forget()
        self._file_number = found.st_ino

    def _add(self, line: bytes) -> None:
        report = report_of_line(line)
        if report is None:
            return
        if "validation_loss" in report:
            self.validation.add(report, report.get("validation_loss_per_codebook"))
        elif "loss" in report:
            self.training.add(report, report.get("loss_per_codebook"))

    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best validation; None before the first."""
        losses = self.validation["validation_loss"]
        if not np.isfinite(losses).any():
            return None
        at = int(np.nanargmin(losses))
        return int(self.validation["step"][at]), float(losses[at])


def _finite(value: object) -> float:
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # a whole number of more than 300 digits
        return math.nan
    return number if math.isfinite(number) else math.nan
