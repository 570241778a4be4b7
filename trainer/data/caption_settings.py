"""Where the captions of a folder's clips come from."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.music_fields import MergeRates
from trainer.spec.caption_sources import SOURCES

NEVER = MergeRates()


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Which sources of captions are asked, and what is made of them.

    sources    of trainer/spec/caption_sources.py, in the order in which they are asked: the first that has a caption
               for a file counts
    column     of metadata files that holds the caption; None for the usual ones
    template   what the source "template" fills with tags and names; None for no such source
    default    the caption of files for which no source has one; None for none
    instead    the caption of all files, in place of every source; None for none
    lines      whether each line of a caption is a caption of its own
    no_label   whether all clips are trained without text, and no caption is read
    merge      how often what a .json or a row of metadata holds beside the caption is merged into it
    """

    sources: tuple[str, ...] = SOURCES
    column: str | None = None
    template: str | None = None
    default: str | None = None
    instead: str | None = None
    lines: bool = False
    no_label: bool = False
    merge: MergeRates = NEVER
