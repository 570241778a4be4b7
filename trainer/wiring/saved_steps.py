"""The steps of a run of which the trained weights are on disk, and in which file or folder each is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trainer.atomic import names_in
from trainer.errors import ConfigError
from trainer.exports.init_from import FINAL
from trainer.model.new_word import FILE
from trainer.run.checkpoint_folders import HEADER, complete_checkpoints
from trainer.run.output_dir import OutputDir

# In a folder of scripts/export.py: which step that is, at which strength, and its validation loss.
EXPORTED = "export.json"
# What --save_step writes beside the checkpoints.
OF_A_STEP = re.compile(r"(?:lm_(\d+)\.pt|text_embedding_(\d+)\.safetensors)")


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """path  a checkpoint's folder, or a file of audiocraft's layout or of a learned word, which hold no more"""

    step: int
    path: Path

    @property
    def is_checkpoint(self) -> bool:
        return (self.path / HEADER).is_file()


def saved_steps(run: Path) -> dict[int, SavedStep]:
    """All steps that can be taken up, in ascending order; of one that lies there twice, the checkpoint."""
    found: dict[int, Path] = {}
    exported = OutputDir(root=run).exported_step()
    if exported is not None:  # the checkpoint of a finished run may have been deleted
        found.update((exported, run / name) for name in (FINAL, FILE) if (run / name).is_file())
    for name in names_in(run):
        if (match := OF_A_STEP.fullmatch(name)) is not None:
            found[int(match[1] or match[2])] = run / name
    found |= {int(folder.name.removeprefix("step-")): folder for folder in complete_checkpoints(run / "checkpoints")}
    return {step: SavedStep(step=step, path=found[step]) for step in sorted(found)}


def find_step(run: Path, step: int | None) -> SavedStep:
    """That step of the run; for None the one that was exported or, of a run that has not ended, the last one saved.

    Raises ConfigError, with the steps that are there, where it is not.
    """
    found = saved_steps(run)
    if not found:
        raise ConfigError(f"{run} has no weights yet: no complete checkpoint, no lm_*.pt and no export")
    wanted = step
    if wanted is None:
        wanted = OutputDir(root=run).exported_step()
        wanted = max(found) if wanted is None else wanted
    if wanted not in found:
        raise ConfigError(
            f"step {wanted} of {run} is not there: it has {', '.join(map(str, found))}. A run keeps its newest two"
            " checkpoints, with --keep_best 1 the best one, and with --save_step N an lm_*.pt of every Nth step"
        )
    return found[wanted]
