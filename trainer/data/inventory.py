"""What a scan knew of each file and each folder, for the report: nothing is opened again to show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from trainer.data.audio import AudioFacts
from trainer.data.fates import Fate, display
from trainer.errors import DataError


@dataclass(frozen=True, kw_only=True)
class InspectedFile:
    """A sound file that was decoded to its end and found in order, whether or not it is used.

    path            as `display` shows it, relative to its folder: its fate has the same
    reference       os.fsencode of the absolute path, which may be no UTF-8
    caption         None for none
    caption_source  where the caption stands, as a person would name it; "" for none
    caption_fields  what is merged into it, as music_fields.as_text writes it; "" for nothing
    melody          the path of the file that is its melody, as `display` shows it; "" for none
    """

    path: str
    reference: bytes
    caption: str | None
    caption_source: str
    caption_fields: str
    facts: AudioFacts
    melody: str = ""


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


class UnusableDataError(DataError):
    """Folders that a run cannot train or validate on. `folders` are those that were scanned, for the report: that is
    when a person needs it. There are none where a folder was prepared, whose sounds are not there to be shown."""

    def __init__(self, message: str, folders: Sequence[ScannedFolder]):
        super().__init__(message)
        self.folders = tuple(folders)


@contextmanager
def shows_too(folders: Sequence[ScannedFolder]) -> Iterator[None]:
    """Where a folder to validate on turns out to be of no use inside, the report shows these before it."""
    try:
        yield
    except UnusableDataError as error:
        raise UnusableDataError(f"no clip to validate on: {error}", [*folders, *error.folders]) from error


def check_split(share: float, train: int, held_out: int, folders: Sequence[ScannedFolder]) -> None:
    """Raise UnusableDataError where --validation `share` leaves no clip to train on, or chooses none to validate on."""
    if train == 0:
        raise UnusableDataError(f"--validation {share:g} leaves no clip to train on: use a smaller share", folders)
    if share > 0 and held_out == 0:
        raise UnusableDataError(
            f"--validation {share:g} chose none of the {train} clips, since each is chosen by itself, with that"
            " probability: use a larger share, another --seed, or a folder of clips to validate on",
            folders,
        )


def fates_of(folders: Sequence[ScannedFolder]) -> tuple[Fate, ...]:
    """The fates of all files, those of a second folder with its name, since names may be those of the first."""
    return tuple(
        replace(fate, path=f"{display(folder.root)}/{fate.path}") if number else fate
        for number, folder in enumerate(folders)
        for fate in folder.fates
    )
