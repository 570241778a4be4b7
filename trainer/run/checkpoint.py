"""Checkpoints that belong to the run, not to the cluster: every tensor as flat float32 slices.

A checkpoint is a folder `step-00000120/` with one safetensors file per rank and a `checkpoint.json`. Each
tensor is stored as contiguous slices of its flattened values, whoever held them: whole tensors (one
process), parts of a partition (ZeRO) or blocks of rows (FSDP). Reading asks for any range and does not care
how it was cut. It is written beside as `.partial`, flushed and renamed: complete, or not there.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.atomic import flush_folder, replacing, write_whole
from trainer.errors import CheckpointError, StorageError
from trainer.model.weights import StoredTensor, Weights

FORMAT = 1
KEPT = 2
WEIGHT = "weight/"
EMA = "ema/"  # the average of the weights over the steps, where the run keeps one


@dataclass(frozen=True, kw_only=True)
class FlatSlice:
    """A rank's share of one tensor: values [start, start + len(values)) of its flattened float32 form."""

    shape: tuple[int, ...]
    start: int
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """The run that a checkpoint belongs to, as its header tells.

    identity      what must be the same for the run to be continued, by name; what is off has no entry
    global_batch  clips of an optimizer step
    flags         the run's flags by name
    """

    identity: Mapping[str, object]
    global_batch: int
    flags: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        return {"identity": dict(self.identity), "global_batch": self.global_batch, "config": dict(self.flags)}

    @staticmethod
    def of_json(values: Mapping[str, Any]) -> RunHeader:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError where `values` is none such."""
        identity, flags = dict(values["identity"]), dict(values["config"])
        return RunHeader(identity=identity, global_batch=int(values["global_batch"]), flags=flags)


class Checkpoint:
    """A complete checkpoint on disk; opening it has read headers only."""

    def __init__(self, folder: Path):
        """Raises CheckpointError where `folder` holds no complete checkpoint."""
        try:
            header = json.loads((folder / "checkpoint.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is no complete checkpoint ({error})") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            given = header.get("format") if isinstance(header, dict) else None
            raise CheckpointError(f"{folder} has format {given}, this version reads {FORMAT}")
        self.folder = folder
        try:
            self.step = int(header["step"])
            self.run = RunHeader.of_json(header["run"])
            files = [folder / str(name) for name in header["files"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder} has no header of a checkpoint ({error!r}): delete it") from error
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[int, int, Path]]] = {}
        for file in files:
            self._index(file)
        for name, shape in self._shapes.items():
            if sum(stop - start for start, stop, _ in self._pieces[name]) != torch.Size(shape).numel():
                raise CheckpointError(f"{folder}: {name} is not whole; delete this folder to use an older one")

    def names(self, kind: str = "") -> list[str]:
        """Names of the stored tensors, for example `exp_avg/decoder.lm_heads.0.weight`."""
        return [name for name in self._shapes if name.startswith(kind)]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Values [start, stop) of the flattened tensor, float32; all of them by default."""
        if name not in self._pieces:
            raise CheckpointError(f"{self.folder} holds no {name}: it belongs to another model or mode")
        stop = torch.Size(self._shapes[name]).numel() if stop is None else stop
        parts = []
        for first, last, path in self._pieces[name]:
            if first < stop and start < last:
                with safe_open(path, framework="pt") as file:
                    parts.append(file.get_slice(name)[max(start, first) - first : min(stop, last) - first])
        return torch.cat(parts)

    def weights(self) -> Weights:
        """The model's tensors by name, each read when it is asked for: their average, where the run keeps one."""
        kind = EMA if self.names(EMA) else WEIGHT
        return Weights(
            {
                name.removeprefix(kind): _InCheckpoint(shape=self._shapes[name], checkpoint=self, name=name)
                for name in self.names(kind)
            }
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                pieces = json.loads(file.metadata()["pieces"])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); delete {path.parent} to use an older one"
            ) from error
        for name, piece in pieces.items():
            self._shapes[name] = tuple(piece["shape"])
            self._pieces.setdefault(name, []).append((piece["start"], piece["stop"], path))
            self._pieces[name].sort()


@dataclass(frozen=True, kw_only=True, eq=False)
class _InCheckpoint(StoredTensor):
    """One tensor of a checkpoint, by its name there."""

    checkpoint: Checkpoint
    name: str

    def read(self, start: int, stop: int) -> Tensor:
        return self.checkpoint.read(self.name, start, stop)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of the complete checkpoints in `folder`, newest first."""
    found = [path.parent for path in folder.glob("step-*/checkpoint.json") if path.parent.suffix != ".partial"]
    return sorted(found, key=lambda path: path.name, reverse=True)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or None where there is none yet."""
    found = complete_checkpoints(folder)
    return Checkpoint(found[0]) if found else None


class Saver:
    """Writes checkpoints beside the training loop, at most one at a time."""

    def __init__(self, folder: Path, *, rank: int = 0, world_size: int = 1, timeout_seconds: float = 1800.0):
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._timeout_seconds = timeout_seconds
        self._thread: threading.Thread | None = None
        self._step_in_flight: int | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        state: Mapping[str, FlatSlice],
        run: RunHeader,
        then: Callable[[Checkpoint], None] | None = None,
    ) -> None:
        """Save this rank's share of `state`; returns once it is copied, unless a save is still in flight.

        run   what the checkpoint belongs to
        then  called on rank 0 in the writing thread with the complete checkpoint

        Raises what the previous save raised, a StorageError for a disk that is full or cannot be written.
        """
        self.wait()
        self._step_in_flight = step
        copied = {name: _copied(piece) for name, piece in state.items()}
        self._thread = threading.Thread(target=self._run, args=(step, copied, run, then), name="checkpoint")
        self._thread.start()

    def has(self, step: int) -> bool:
        """Whether a complete checkpoint of this step is on disk or on its way there."""
        return (self._folder / f"step-{step:08d}").exists() or self._step_in_flight == step

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def last(self) -> Checkpoint:
        """The newest complete checkpoint, after waiting for a save in flight."""
        self.wait()
        checkpoint = newest(self._folder)
        assert checkpoint is not None, "nothing was saved"
        return checkpoint

    def wait(self) -> None:
        """Return once nothing is in flight; raises what the last save raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = self._step_in_flight = None
        self.check()

    def check(self) -> None:
        """Raise what a finished save raised, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(
        self,
        step: int,
        state: dict[str, FlatSlice],
        run: RunHeader,
        then: Callable[[Checkpoint], None] | None,
    ) -> None:
        try:
            folder = self._folder / f"step-{step:08d}"
            if not folder.exists():  # the same step of the same run has the same state
                self._write(folder, step, state, run)
            if self._rank == 0 and then is not None:
                then(Checkpoint(folder))
        except (OSError, SafetensorError) as error:
            partial = self._folder / f"step-{step:08d}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            self._error = StorageError(
                f"{partial} could not be written ({error}). Older checkpoints in {self._folder} are complete and"
                " valid: free space, or give another --output_dir a copy of them, and run the same command again"
            )
        except BaseException as error:  # handed to the loop, which raises it
            self._error = error

    def _write(self, final: Path, step: int, state: dict[str, FlatSlice], run: RunHeader) -> None:
        partial = final.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        names = [f"rank-{rank:05d}.safetensors" for rank in range(self._world_size)]
        _write_slices(partial / names[self._rank], state)
        if self._rank != 0:
            return
        self._await([partial / name for name in names])
        header = {"format": FORMAT, "step": step, "run": run.to_json(), "files": names}
        write_whole(partial / "checkpoint.json", json.dumps(header, indent=1).encode())
        os.replace(partial, final)
        flush_folder(self._folder)
        _forget_old(self._folder)

    def _await(self, paths: list[Path]) -> None:
        """Wait for the other ranks' files: by the file system, since a thread must not use collectives."""
        deadline = time.monotonic() + self._timeout_seconds
        while missing := [path.name for path in paths if not path.exists()]:
            if not threading.main_thread().is_alive():
                raise OSError("the run has ended")
            if time.monotonic() > deadline:
                raise OSError(f"no {', '.join(missing)} after {self._timeout_seconds:.0f} s")
            time.sleep(0.05)


def remove_partial(folder: Path) -> None:
    """Delete what a killed run left half-written or half-deleted."""
    for path in folder.glob("step-*"):
        if path.suffix == ".partial" or not (path / "checkpoint.json").exists():
            shutil.rmtree(path)


def _write_slices(path: Path, state: Mapping[str, FlatSlice]) -> None:
    pieces = {
        name: {"shape": piece.shape, "start": piece.start, "stop": piece.start + len(piece.values)}
        for name, piece in state.items()
    }
    values = {name: piece.values for name, piece in state.items()}
    with replacing(path) as partial:
        save_file(values, partial, metadata={"pieces": json.dumps(pieces)})


def _copied(piece: FlatSlice) -> FlatSlice:
    """The slice on the host, in memory of its own, so that training may go on."""
    values = piece.values.detach().to("cpu", torch.float32, copy=True).contiguous()
    return FlatSlice(shape=piece.shape, start=piece.start, values=values)


def _forget_old(folder: Path) -> None:
    for path in complete_checkpoints(folder)[KEPT:]:
        (path / "checkpoint.json").unlink()
        shutil.rmtree(path)
