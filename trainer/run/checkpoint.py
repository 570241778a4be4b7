"""Checkpoints that belong to the run and not to the cluster: any strategy on any number of ranks can continue them.

A checkpoint is a folder `step-00000120/` with one safetensors file per rank and a `checkpoint.json`. Each tensor is
stored in float32, as contiguous slices of its flattened values, as the ranks held them: whole tensors (one process,
DDP), parts of a partition (ZeRO) or blocks of rows (FSDP). So a rank saves what it holds without a collective, and
reading asks for any range of values without knowing how they were cut.

The folder is written as `step-00000120.partial`, flushed and renamed: it is complete, or it is not there.

Not torch.distributed.checkpoint: its index is a pickle, and ZeRO's partitions, which cut through tensors, would have to
be gathered first (docs/decisions.md).
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.atomic import PARTIAL, flush_folder, names_in, rename_folder, replacing, write_whole
from trainer.errors import CheckpointError, StorageError
from trainer.model.safetensors_file import fill, read_header
from trainer.model.weights import StoredTensor, Weights
from trainer.run.best import name_best
from trainer.run.checkpoint_folders import (
    HEADER,
    complete_checkpoints,
    folder_name,
    is_complete,
    rank_file,
    remove_all_but_newest,
)
from trainer.run.standing import Standing

FORMAT = 1  # to be raised when older versions of the program could not read what this one writes
KEPT = 2  # complete checkpoints that stay on disk, besides the best
# A tensor's key is one of these and the parameter's name. Moments are exp_avg/NAME and exp_avg_sq/NAME.
WEIGHT = "weight/"
EMA = "ema/"  # the exponential moving average of the weights, where the run keeps one
_DELETE = "Delete this folder to use an older checkpoint, or to start anew where there is none"


@dataclass(frozen=True, kw_only=True)
class FlatSlice:
    """Values [start, start + N) of a flattened tensor.

    shape   of the whole tensor
    values  (N,), on any device, of any float dtype; saved as float32
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """What a checkpoint says about the run that it belongs to.

    identity      what must be the same for the run to be continued, by name. A setting that is off has no entry, so
                  that checkpoints from before the setting existed can be continued
    global_batch  clips per optimizer step
    flags         the run's flags by name
    validations   what they have shown up to the checkpoint's step. None where the run never validated, and in
                  checkpoints of older versions, which can read newer ones too: they pass over it
    """

    identity: Mapping[str, object]
    global_batch: int
    flags: Mapping[str, object]
    validations: Standing | None = None

    def to_json(self) -> dict[str, object]:
        """The value of `run` in checkpoint.json. Keep the keys: older checkpoints have them."""
        values = {"identity": dict(self.identity), "global_batch": self.global_batch, "config": dict(self.flags)}
        return values if self.validations is None else {**values, "validations": self.validations.to_json()}

    @staticmethod
    def of_json(values: Mapping[str, Any]) -> RunHeader:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError where `values` is not what it returns."""
        identity, flags, found = dict(values["identity"]), dict(values["config"]), values.get("validations")
        return RunHeader(
            identity=identity,
            global_batch=int(values["global_batch"]),
            flags=flags,
            validations=None if found is None else Standing.of_json(found),
        )


class Checkpoint:
    """A complete checkpoint on disk. Opening it reads headers only, and no tensor."""

    def __init__(self, folder: Path):
        """Raises CheckpointError where `folder` holds no complete checkpoint that this version can read."""
        try:
            header = json.loads((folder / HEADER).read_text())
        except OSError as error:
            raise CheckpointError(f"{folder} is no complete checkpoint ({error})") from error
        except ValueError as error:
            raise CheckpointError(f"{folder / HEADER} is empty or damaged ({error}). {_DELETE}") from error
        if not isinstance(header, dict) or "format" not in header:
            raise CheckpointError(f"{folder / HEADER} is no header of a checkpoint. {_DELETE}")
        if header["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {header['format']}, this version reads {FORMAT}")
        self.folder = folder
        try:
            self.step = int(header["step"])
            self.run = RunHeader.of_json(header["run"])
            files = [folder / str(name) for name in header["files"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / HEADER} lacks a part of a header ({error!r}). {_DELETE}") from error
        self._shapes: dict[str, tuple[int, ...]] = {}
        # Of each tensor (first value, the one behind its last, file, where in the file they begin), in this order.
        self._pieces: dict[str, list[tuple[int, int, Path, int]]] = {}
        for file in files:
            self._index(file)
        for name, shape in self._shapes.items():
            self._pieces[name].sort()
            if sum(stop - start for start, stop, _, _ in self._pieces[name]) != torch.Size(shape).numel():
                raise CheckpointError(f"{folder}: {name} is not whole; delete this folder to use an older one")

    def names(self, kind: str = "") -> list[str]:
        """Names of the stored tensors that begin with `kind`, for example `exp_avg/decoder.lm_heads.0.weight`."""
        return [name for name in self._shapes if name.startswith(kind)]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Values [start, stop) of a flattened tensor, (stop - start,) float32; all of them by default.

        Raises CheckpointError where the checkpoint has no tensor of this name, StorageError where a file is gone.
        """
        if name not in self._pieces:
            raise CheckpointError(f"{self.folder} holds no {name}: it belongs to another model or mode")
        stop = torch.Size(self._shapes[name]).numel() if stop is None else stop
        values = torch.empty(stop - start)
        for first, last, path, offset in self._pieces[name]:
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                fill(values[begin - start : end - start], path, offset + (begin - first) * values.itemsize)
        return values

    def weights(self) -> Weights:
        """The trained tensors by name, each read when it is asked for. Their EMA, where the run keeps one."""
        kind = EMA if self.names(EMA) else WEIGHT
        return Weights(
            {
                name.removeprefix(kind): _InCheckpoint(shape=self._shapes[name], checkpoint=self, name=name)
                for name in self.names(kind)
            }
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, before it was flattened."""
        return self._shapes[name]

    def _index(self, path: Path) -> None:
        """Note which slices of which tensors a rank's file holds."""
        try:
            places, metadata = read_header(path)
            pieces = json.loads(metadata["pieces"])
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); delete {path.parent} to use an older one"
            ) from error
        for name, piece in pieces.items():
            if name not in places or places[name].dtype != torch.float32:
                raise CheckpointError(f"{path}: {name} is not there in float32; delete {path.parent}")
            self._shapes[name] = tuple(piece["shape"])
            self._pieces.setdefault(name, []).append((piece["start"], piece["stop"], path, places[name].offset))


@dataclass(frozen=True, kw_only=True, eq=False)
class _InCheckpoint(StoredTensor):
    """One tensor of a checkpoint, by its name there."""

    checkpoint: Checkpoint
    name: str

    def read(self, start: int, stop: int) -> Tensor:
        return self.checkpoint.read(self.name, start, stop)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or None where there is none yet."""
    found = complete_checkpoints(folder)
    return Checkpoint(found[0]) if found else None


def rotate(folder: Path, validations: Standing | None) -> None:
    """Remove the checkpoints that are neither among the newest nor the best one that is kept."""
    kept = None if validations is None else validations.kept
    remove_all_but_newest(folder, KEPT, spared=() if kept is None else (folder_name(kept.step),))


class Saver:
    """Writes checkpoints in a thread beside the training loop, at most one at a time; one Saver on each rank."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        timeout_seconds: float = 1800.0,
        best: Path | None = None,
        on_complete: Callable[[int, Path], None] = lambda step, folder: None,
    ):
        """
        timeout_seconds  how long rank 0 waits for the other ranks' files
        best             the file that names the best checkpoint; None where nobody reads it
        on_complete      called with the step and folder of each new checkpoint, on rank 0, in the writing thread
        """
        self._folder = folder
        self._best = best
        self._rank = rank
        self._world_size = world_size
        self._timeout_seconds = timeout_seconds
        self._on_complete = on_complete
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
        """Save this rank's slices. To be called on every rank, after the same step.

        Returns once the slices are copied to host memory, so that training may go on and change them. A save that is
        still being written is waited for first.

        step   optimizer steps done
        state  slices by the names of their tensors
        run    the run that the checkpoint belongs to
        then   called with the complete checkpoint, on rank 0, in the writing thread

        Raises what the previous save raised: StorageError where the disk is full or cannot be written.
        """
        self.wait()
        self._step_in_flight = step
        copied = {name: _copied(piece) for name, piece in state.items()}
        self._thread = threading.Thread(target=self._run, args=(step, copied, run, then), name="checkpoint")
        self._thread.start()

    def has(self, step: int) -> bool:
        """Whether a complete checkpoint of this step is on disk or being written."""
        return is_complete(self._folder / folder_name(step)) or self._step_in_flight == step

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def last(self) -> Checkpoint:
        """The newest complete checkpoint, after waiting for the one that is being written."""
        self.wait()
        checkpoint = newest(self._folder)
        assert checkpoint is not None, "nothing was saved"
        return checkpoint

    def of_step(self, step: int) -> Checkpoint:
        """The complete checkpoint of this step, after waiting for the one that is being written."""
        self.wait()
        return Checkpoint(self._folder / folder_name(step))

    def wait(self) -> None:
        """Return once nothing is being written; raises what the last save raised."""
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
            folder = self._folder / folder_name(step)
            if not is_complete(folder):  # else it is there already: the same step of the same run has the same state
                self._write(folder, step, state, run)
            if self._rank == 0 and then is not None:
                then(Checkpoint(folder))
        except (OSError, SafetensorError) as error:
            partial = self._folder / (folder_name(step) + PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            self._error = StorageError(
                f"{partial} could not be written ({error}). Older checkpoints in {self._folder} are complete and"
                " valid: free space, or give another --output_dir a copy of them, and run the same command again"
            )
        except BaseException as error:  # handed to the loop, which raises it
            self._error = error

    def _write(self, final: Path, step: int, state: dict[str, FlatSlice], run: RunHeader) -> None:
        partial = final.with_suffix(PARTIAL)
        partial.mkdir(parents=True, exist_ok=True)
        names = [rank_file(rank) for rank in range(self._world_size)]
        _write_slices(partial / names[self._rank], state)
        if self._rank != 0:
            return
        self._wait_for_files(partial, names)
        header = {"format": FORMAT, "step": step, "run": run.to_json(), "files": names}
        write_whole(partial / HEADER, json.dumps(header, indent=1).encode())
        rename_folder(partial, final)
        flush_folder(self._folder)
        self._name_and_rotate(step, run.validations)
        self._on_complete(step, final)

    def _name_and_rotate(self, step: int, validations: Standing | None) -> None:
        """Name the checkpoint of this step if it is the best, and remove those that are neither new nor the best.

        In this order, once it is complete: so there is a best checkpoint at any moment, and a kill in between leaves
        one too many, or a name that the next start mends from the newest header (`mend_best`).
        """
        kept = None if validations is None else validations.kept
        if kept is not None and kept.step == step and self._best is not None:
            name_best(self._best, self._folder, kept)
        rotate(self._folder, validations)

    def _wait_for_files(self, folder: Path, names: list[str]) -> None:
        """Wait until the other ranks' files are there.

        By looking for the files and not by a collective: this is a thread, and its collective would mix with those of
        the training steps in the main thread. Raises OSError after `timeout_seconds`, or when the run has ended.
        """
        deadline = time.monotonic() + self._timeout_seconds
        while missing := set(names) - set(names_in(folder)):
            if not threading.main_thread().is_alive():
                raise OSError("the run has ended")
            if time.monotonic() > deadline:
                raise OSError(f"no {', '.join(sorted(missing))} after {self._timeout_seconds:.0f} s")
            time.sleep(0.05)


def _write_slices(path: Path, state: Mapping[str, FlatSlice]) -> None:
    """Write one rank's file: the slices, and in its metadata where each belongs."""
    pieces = {
        name: {"shape": piece.shape, "start": piece.start, "stop": piece.start + len(piece.values)}
        for name, piece in state.items()
    }
    values = {name: piece.values for name, piece in state.items()}
    with replacing(path, flush_entry=False) as partial:  # rank 0 flushes it with the header
        save_file(values, partial, metadata={"pieces": json.dumps(pieces)})


def _copied(piece: FlatSlice) -> FlatSlice:
    """The slice in host memory of its own, as float32."""
    values = piece.values.detach().to("cpu", torch.float32, copy=True).contiguous()
    return FlatSlice(shape=piece.shape, start=piece.start, values=values)
