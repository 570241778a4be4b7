"""output_dir: the names of a run's files in it, and whether a run starts there, continues, or is complete already."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.atomic import check_operations, is_there, write_whole
from trainer.errors import CheckpointError, ConfigError, StorageError
from trainer.run.checkpoint import Checkpoint, newest
from trainer.run.checkpoint_folders import HEADER, complete_checkpoints, remove_unfinished

TRACKER_ID = re.compile("[0-9a-f]{16}")
# Which commits of the hub's data sets a run uses, and which files of them.
HUB_DATASETS = "hub_datasets.json"


@dataclass(frozen=True, kw_only=True)
class OutputDir:
    """Where a run's files lie below `root`. Another run cannot use the folder meanwhile (trainer/run/exit_code.py)."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Sounds that were made while training."""
        return self.root / "samples"

    @property
    def report(self) -> Path:
        """The fate of each file of the dataset."""
        return self.root / "dataset.csv"

    @property
    def best(self) -> Path:
        """Names the checkpoint of the lowest validation loss, where --keep_best keeps one."""
        return self.root / "best.json"

    @property
    def finished(self) -> Path:
        """Holds the run's last step, and the one whose exports lie beside it.

        Written last: a run killed while exporting then exports again.
        """
        return self.root / "finished.json"

    def tracker_id(self) -> str:
        """wandb's id of this run. It is made once and kept, so that wandb draws one curve across interruptions.

        A file that holds no such id, as a power loss leaves one, gets another id.
        """
        path = self.root / "tracker_id.txt"
        kept = path.read_bytes().decode(errors="replace") if path.is_file() else ""
        if TRACKER_ID.fullmatch(kept):
            return kept
        made = secrets.token_hex(8)
        write_whole(path, made.encode())
        return made

    def upload_hint(self) -> str:
        """How to upload what wandb logged without a network, for the console; empty where it logged nothing so."""
        if not list(self.root.glob("wandb/offline-run-*")):
            return ""
        return f"logged without a network; to upload it: wandb sync {self.root}/wandb/offline-run-*-{self.tracker_id()}"

    def write_json(self, name: str, values: Mapping[str, object]) -> None:
        """Write `values` into the file `name`, whole or not at all."""
        write_whole(self.root / name, json.dumps(values, indent=1).encode())

    def read_json(self, name: str) -> dict[str, object]:
        """What `write_json` wrote there; empty where nothing was, or where it is damaged."""
        try:
            values = json.loads((self.root / name).read_bytes())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def closing_message(
        self, step: int, placeholder: str | None = None, prompt: str = '"..."', exported: str = "", *,
        melody: bool = False,
    ) -> str:
        """What is ready after a run of `step` steps, and how to listen to it, for the console.

        placeholder  the word that the run learned; None where it trained the language model or adapters
        prompt       an example of one as it is typed, with the phrase in it that stood in every caption
        exported     a sentence on the step that is exported; "" where there is nothing to say of it
        melody       whether the model also follows a melody
        """
        done = f"done: {step} steps. {exported}".rstrip()
        followed = " --melody FILE" if melody else ""
        if placeholder is not None:
            return (
                f"{done} {self.root}/text_embedding.safetensors and huggingface/ are ready; listen with\n"
                f'  python scripts/generate.py --model {self.root}/huggingface --prompt "{placeholder} ..."{followed}'
            )
        return (
            f"{done} {self.root}/lm_final.pt, huggingface/, audiocraft/ are ready; listen with\n"
            f'  python scripts/generate.py --model {self.root}/huggingface --prompt {prompt} --seconds 10{followed}'
        )

    def finished_step(self) -> int | None:
        """The step that was the run's last when it was exported; None where it was not, or where the file was cut by a
        crash: exporting again gives the same files."""
        return self._finished("step")

    def exported_step(self) -> int | None:
        """The step whose weights are exported, which is the last one unless an earlier one was better."""
        exported = self._finished("exported_step")  # files of older versions hold the last step alone
        return self.finished_step() if exported is None else exported

    def _finished(self, name: str) -> int | None:
        """A number in finished.json; None where it is not there."""
        if not is_there(self.finished):
            return None
        try:
            return int(json.loads(self.finished.read_text())[name])
        except (ValueError, KeyError, TypeError):
            return None


def open_output_dir(output_dir: str, resume: str, *, first: bool = True) -> tuple[OutputDir, Checkpoint | None]:
    """The run's folder, and the checkpoint to continue from; None where the run starts anew.

    resume  auto (continue if there is a checkpoint), no (start anew), or the path of a checkpoint
    first   whether this process is the one that makes the folder and removes what a killed run left there. It must be
            the one that holds the folder (trainer/run/exit_code.py)

    Raises ConfigError where `no` would overwrite a run; CheckpointError where the path is no checkpoint, or where the
    folder holds a newer one; StorageError where the folder cannot be written.
    """
    folder = OutputDir(root=Path(output_dir))
    if first:
        _prepare(folder, output_dir)
    if resume == "auto":
        checkpoint = newest(folder.checkpoints)
        if checkpoint is None and first:  # a finished run whose checkpoints were deleted does not count as complete
            folder.finished.unlink(missing_ok=True)
        return folder, checkpoint
    if resume == "no":
        if complete_checkpoints(folder.checkpoints):
            raise ConfigError(
                f"--resume no, but --output_dir {output_dir} holds a run: choose another folder or delete that one"
            )
        if first:
            folder.finished.unlink(missing_ok=True)
        return folder, None
    return folder, _named_checkpoint(folder, Path(resume))


def _prepare(folder: OutputDir, output_dir: str) -> None:
    """Make the folder, check that it can be written, and remove what a killed run left half-written."""
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        check_operations(folder.checkpoints)  # which may be a link to another disk
        remove_unfinished(folder.checkpoints)
    except OSError as error:
        raise StorageError(f"--output_dir {output_dir} cannot be written ({error}): choose another") from error


def _named_checkpoint(folder: OutputDir, path: Path) -> Checkpoint:
    """The checkpoint at `path`, which --resume names."""
    for inside in (path, path / "checkpoints"):
        if not (path / HEADER).exists() and (found := complete_checkpoints(inside)):
            raise CheckpointError(f"--resume {path} is no checkpoint but holds some: give one, such as {found[0]}")
    checkpoint = Checkpoint(path)
    for other in complete_checkpoints(folder.checkpoints):
        if other.resolve() != path.resolve() and Checkpoint(other).step >= checkpoint.step:
            raise CheckpointError(
                f"--resume {path} is step {checkpoint.step}, but --output_dir holds {other.name}: give another"
                " --output_dir, so that the newer state is not mixed up with the new one"
            )
    return checkpoint


def check_same_run(
    checkpoint: Checkpoint, now: Mapping[str, object], changed_files: Callable[[Path], str] = lambda report: ""
) -> None:
    """Raise CheckpointError where the checkpoint belongs to other data or settings than the run that starts now.

    now            the identity of that run, see RunHeader.identity; the message names each entry that differs, with
                   both values
    changed_files  what is said of the files that make the dataset another one, given the report on its files that the
                   checkpoint's run wrote
    """
    then = checkpoint.run.identity
    names = [name for name in {**now, **then} if _comparable(name, then.get(name)) != _comparable(name, now.get(name))]
    different = [f"{name}: {then.get(name)} then, {now.get(name)} now" for name in names]
    if "dataset" in names and (files := changed_files(OutputDir(root=checkpoint.folder.parent.parent).report)):
        different.append(files)
    if different:
        raise CheckpointError(
            f"{checkpoint.folder} belongs to another run; " + "; ".join(different) + ". Set it back to resume, or start"
            f" anew in another --output_dir, from these weights with --init_from {checkpoint.folder.parent.parent}"
        )


def _comparable(name: str, value: object) -> object:
    """An entry of an identity as it is compared: older versions kept --init_from=~/x as it was typed."""
    return str(Path(value).expanduser()) if name == "--init_from" and isinstance(value, str) else value
