"""What prepared.json says of a prepared folder, and what it must be to be believed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trainer.data.fates import display
from trainer.errors import DataError

FORMAT, VERSION = "musicgen-trainer prepared data set", 1
MARKER, TABLE, CARD, CODES, TEXT, MELODY = "prepared.json", "clips.parquet", "README.md", "codes", "text", "melody"
# Files that prepared.json may list: a name from elsewhere must not lead out of the folder.
OUR_FILE = re.compile(rf"{re.escape(TABLE)}|(?:{CODES}|{TEXT}|{MELODY})/part-\d{{5}}\.arrow")
# What folders say of themselves only where it is something else than this, as those of earlier versions all are.
LATER_FIELDS: Mapping[str, Any] = {"channels": 1, "stems": ""}
AGAIN = "copy or download it again, or make it again with scripts/prepare_dataset.py"


@dataclass(frozen=True, kw_only=True)
class About:
    """What prepared.json says.

    codec, text_encoder  identities, as `Source` gives them, of what made the codes and the states
    model_id             --model_id when it was made, for messages
    codebooks            K of the codes
    channels             of the sound: 2 where codes are of stereo
    hours                of all clips together
    stems                the key of what the melodies were heard in (trainer/data/stems.py); "" where there are none
    flags                SOUND_FLAGS, CAPTION_FLAGS, no_label and min_seconds, by name, as they were when it was made
    files                size in bytes of each file, by its path in the folder
    digests              hex blake2b-128 of each file, by its path in the folder
    """

    codec: str
    text_encoder: str
    model_id: str
    codebooks: int
    frame_rate_hz: float
    sample_rate_hz: int
    clips: int
    hours: float
    flags: Mapping[str, Any]
    files: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    channels: int = 1
    stems: str = ""

    def to_json(self) -> str:
        """The content of prepared.json."""
        in_stereo = "" if self.channels == 1 else " of stereo sound"
        kinds = [f"codes of {self.codebooks} codebooks{in_stereo}", "text states"]
        kinds += ["melodies"] if self.stems else []
        head = {"format": FORMAT, "version": VERSION, "kinds": kinds}
        # Of a mono folder without melodies as it was before there were others.
        said = {name: getattr(self, name) for name in self.__dataclass_fields__}
        kept = {name: value for name, value in said.items() if LATER_FIELDS.get(name, ...) != value}
        return json.dumps(head | kept, indent=1) + "\n"


def about_of(folder: Path, said: Mapping[str, Any]) -> About:
    """What prepared.json says, each value of its type."""
    values: dict[str, Any] = {}
    for name, is_valid in IS_VALID.items():
        values[name] = said.get(name, LATER_FIELDS.get(name))
        if not is_valid(values[name]):
            raise damaged(folder, f"{MARKER} has {str(values[name])[:80]!r} as {name}")
    if TABLE not in values["files"] or values["files"].keys() != values["digests"].keys():
        raise damaged(folder, f"{MARKER} does not list its files")
    return About(**values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _are_flags(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("min_seconds", 0.0)) in (int, float)


def _are_of_files(value: Any, kind: type) -> bool:
    if not isinstance(value, dict):
        return False
    return all(OUR_FILE.fullmatch(name) and type(of_file) is kind for name, of_file in value.items())


# What each entry of prepared.json must be.
IS_VALID: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("codec", "text_encoder", "model_id", "stems"), _is_text),
    **dict.fromkeys(("codebooks", "sample_rate_hz", "clips"), _is_count),
    "channels": lambda value: type(value) is int and value in (1, 2),
    **dict.fromkeys(("frame_rate_hz", "hours"), _is_number),
    "flags": _are_flags,
    "files": partial(_are_of_files, kind=int),
    "digests": partial(_are_of_files, kind=str),
}


def damaged(folder: Path, what: str) -> DataError:
    return DataError(f"the prepared folder {display(folder)} is damaged or incomplete: {what}. {AGAIN.capitalize()}")
