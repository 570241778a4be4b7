"""best.json: names the checkpoint of the lowest validation loss, which stays besides the newest ones (--keep_best)."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.atomic import write_whole
from trainer.run.checkpoint_folders import HEADER, folder_name, is_complete
from trainer.run.standing import Validation


def name_best(file: Path, checkpoints: Path, kept: Validation) -> None:
    """Make `file` name the complete checkpoint of `kept`; a file that names it already is left alone.

    `time` is that at which the checkpoint was complete, in seconds since 1970, so that naming it again gives the same.
    """
    time = (checkpoints / folder_name(kept.step) / HEADER).stat().st_mtime
    content = json.dumps({"step": kept.step, "validation_loss": kept.loss, "time": time}, indent=1).encode()
    if not (file.is_file() and file.read_bytes() == content):
        write_whole(file, content)


def mend_best(file: Path, checkpoints: Path, kept: Validation | None) -> None:
    """Make `file` say what the checkpoints say: a run may have been killed between the two."""
    if kept is not None and is_complete(checkpoints / folder_name(kept.step)):
        name_best(file, checkpoints, kept)
    else:
        file.unlink(missing_ok=True)
