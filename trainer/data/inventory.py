"""What a scan knew of each file and each folder, for the report: nothing is opened again to show it."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.audio import AudioFacts
from trainer.data.fates import Fate


@dataclass(frozen=True, kw_only=True)
class InspectedFile:
    """A sound file that was decoded to its end and found in order, whether or not it is used.

    path            as `display` shows it, relative to its folder: its fate has the same
    reference       os.fsencode of the absolute path, which may be no UTF-8
    caption         None for none
    caption_source  where the caption stands, as a person would name it; "" for none
    caption_fields  what is merged into it, as music_fields.as_text writes it; "" for nothing
    """

    path: str
    reference: bytes
    caption: str | None
    caption_source: str
    caption_fields: str
    facts: AudioFacts


@dataclass(frozen=True, kw_only=True)
class ScannedFolder:
    """A folder of music after its scan.

    root       its absolute path
    fates      of all files in it
    inspected  its sound files in order; of a run only the first process has them, and of a prepared folder none has
    """

    root: str
    fates: tuple[Fate, ...]
    inspected: tuple[InspectedFile, ...]
