"""The caption of each sound of a folder: from the first of several sources that has one for it.

A source that is there and cannot be read is the fate of its sound. No other source is then asked: what a person wrote
would be replaced in silence. A text of lyrics is no caption, and the next source is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.data import caption_template, music_fields
from trainer.data.audio_fault import AudioFault
from trainer.data.caption_files import LIKE_LYRICS, LYRICS_ALONE, CaptionFault, LyricsFault, caption_of, read_caption
from trainer.data.caption_metadata import MetadataIndex
from trainer.data.caption_settings import CaptionSettings
from trainer.data.fates import Fate, display
from trainer.data.folder_walk import NEITHER, Found, MetadataFile, Sound, stem
from trainer.data.json_captions import Described, described, read_json
from trainer.data.metadata_files import CAPTION_COLUMNS
from trainer.data.places import sound_at
from trainer.data.table_scan import TableRow
from trainer.data.tags import FIELDS, read_tags, read_tags_of
from trainer.errors import ConfigError


def check_texts(template: str | None, captions: Mapping[str, str | None]) -> None:
    """Raise ConfigError for a template that cannot be filled, or a text, by its flag's name, that is no caption."""
    if template is not None:
        caption_template.check(template)
    for flag, text in captions.items():
        try:
            if text is not None:
                caption_of(text)
        except CaptionFault as fault:
            raise ConfigError(f"the text of {flag} {fault.detail}") from fault


@dataclass(frozen=True, kw_only=True)
class Caption:
    """The caption of a sound.

    text    None for a clip that is trained without text
    source  what it is from, for a person: "ballad.txt", "metadata.csv line 3"; "" where no caption was read
    remark  for the report; "" where the caption is simply that of the .txt file of the sound's name
    fields  what is merged into it, as music_fields.as_text writes it; "" for nothing
    """

    text: str | None
    source: str
    remark: str = ""
    fields: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """By which clips of equal sound are ordered, no text first."""
        return self.text or "", self.fields


class CaptionReader:
    """The captions of what was found in one data folder; see `caption_of`, and `fates` once all were asked for."""

    def __init__(self, root: str, found: Iterable[Found], settings: CaptionSettings):
        self._root, self._settings = root, settings
        items = list(found)
        self._sounds = [item for item in items if isinstance(item, Sound)]
        files = [item for item in items if isinstance(item, MetadataFile)]
        self._metadata = MetadataIndex(root, files, [sound.name for sound in self._sounds], settings.column)
        self._json_read: set[str] = set()
        self._given = None if settings.instead is None else caption_of(settings.instead)[0]

    def caption_of(self, sound: Sound) -> Caption | Fate:
        """The caption of a sound, or the sound's fate where there is none or it cannot be used."""
        settings = self._settings
        if settings.no_label:
            remark = "caption not used under --no_label 1" if sound.caption_name else ""
            return Caption(text=None, source="", remark=remark)
        if settings.instead is not None:
            return Caption(text=self._given, source="--caption", remark="caption from --caption")
        try:
            found, missed = self._first(sound)
        except CaptionFault as fault:
            return Fate(path=display(sound.name), fate=fault.fate, detail=fault.detail)
        if found is None and settings.default is not None:
            found = Caption(text=caption_of(settings.default)[0], source="--default_caption")
        if found is None:
            return Fate(path=display(sound.name), fate="no caption", detail=self._advice(sound, missed))
        is_plain = bool(sound.caption_name) and found.source == display(sound.caption_name) and sound.is_plain
        remarks = ("" if is_plain else f"caption from {found.source}", found.remark, missed)
        remark = "; ".join(filter(None, remarks))
        return found if remark == found.remark else replace(found, remark=remark)

    def caption_of_row(self, row: TableRow) -> Caption | Fate:
        """The caption of a row of a table: the source "metadata" is what the row itself says."""
        settings = self._settings
        if settings.no_label:
            return Caption(text=None, source="", remark="caption not used under --no_label 1" if row.caption else "")
        if settings.instead is not None:
            return Caption(text=self._given, source="--caption", remark="caption from --caption")
        try:
            for source in settings.sources:
                if source == "metadata" and (found := self._of_row(row)):
                    return found
                if source == "template" and (found := self._filled(row.own_path, os.fsencode(row.reference))):
                    return replace(found, remark=f"caption from {found.source}")
        except CaptionFault as fault:
            return Fate(path=display(row.name), fate=fault.fate, detail=fault.detail)
        if settings.default is not None:
            text, source = caption_of(settings.default)[0], "--default_caption"
            return Caption(text=text, source=source, remark=f"caption from {source}")
        asked = "metadata" in settings.sources
        why = row.why_none if asked else (
            f"none is in --captions {','.join(settings.sources)}: name metadata, or train without text: --no_label 1"
        )
        return Fate(path=display(row.name), fate="no caption", detail=why)

    def fates(self) -> list[Fate]:
        """What became of the files that may hold captions and are not a sound's own .txt."""
        unread = sorted({sound.json_name for sound in self._sounds} - self._json_read - {""})
        return [*self._metadata.fates(), *(Fate(path=display(name), fate="ignored", detail=NEITHER) for name in unread)]

    def _first(self, sound: Sound) -> tuple[Caption | None, str]:
        """The caption of the first source that has one, and a remark on what was passed over.

        Raises CaptionFault, of lyrics where these are all that there is.
        """
        missed, lyrics = "", None
        sources = self._settings.sources
        for place, source in enumerate(sources):
            try:
                found = self._of(source, sound)
            except LyricsFault as fault:
                missed, lyrics = f"{_place_of(fault)} is lyrics, and not read", fault
                continue
            if found is not None and LIKE_LYRICS in found.remark and (other := self._written(sound, sources[place:])):
                return other, f"{found.source} looks like lyrics, and is not read"
            if found is not None:
                return found, missed
            if source == "metadata":
                missed = "; ".join(filter(None, (missed, self._metadata.lacking(sound.name))))
        if lyrics is not None and self._settings.default is None:
            raise lyrics
        return None, missed

    def _written(self, sound: Sound, sources: Sequence[str]) -> Caption | None:
        """What a table or a .json file says of a sound whose text may be lyrics, as ACE-Step has its lyrics and table;
        None where none of them can be read as a caption."""
        for source in ("metadata", "json"):
            try:
                found = self._of(source, sound) if source in sources[1:] else None
            except CaptionFault:
                continue
            if found is not None and found.text is not None:
                return found
        return None

    def _of(self, source: str, sound: Sound) -> Caption | None:
        """What one source has for the sound; None for nothing. Raises CaptionFault, with the name of what is wrong."""
        match source:
            case "text":
                return self._of_text(sound)
            case "metadata":
                return self._of_metadata(sound)
            case "json":
                return self._of_json(sound)
            case _:
                return self._filled(sound.name, os.fsencode(os.path.join(self._root, sound.name)))

    def _of_text(self, sound: Sound) -> Caption | None:
        if sound.elsewhere:
            raise CaptionFault("caption unreadable", sound.elsewhere)
        if not sound.caption_name:
            return None
        shown = display(sound.caption_name)
        try:
            path = os.path.join(self._root, sound.caption_name)
            text, remark = read_caption(path, lines=self._settings.lines)
        except CaptionFault as fault:
            raise fault.of(shown) from fault
        return Caption(text=text, source=shown, remark=remark)

    def _of_metadata(self, sound: Sound) -> Caption | None:
        found = self._metadata.row_of(sound.name)
        if found is None:
            return None
        column = self._settings.column
        keys = CAPTION_COLUMNS if column is None else (column.lower(),)
        try:
            row = described(found.row.values, keys, lines=self._settings.lines, tags=column is None)
        except CaptionFault as fault:
            raise fault.of(found.place) from fault
        return self._with_fields(row, found.place)

    def _of_json(self, sound: Sound) -> Caption | None:
        if not sound.json_name:
            return None
        shown = display(sound.json_name)
        self._json_read.add(sound.json_name)
        try:
            found = read_json(os.path.join(self._root, sound.json_name), lines=self._settings.lines)
        except CaptionFault as fault:
            raise fault.of(shown) from fault
        return self._with_fields(found, shown)

    def _of_row(self, row: TableRow) -> Caption | None:
        fields = music_fields.as_text(row.fields)  # which were read only if they are merged
        if row.caption is None and not fields:
            return None
        try:
            text, remark = caption_of(row.caption or "", lines=self._settings.lines)
        except CaptionFault as fault:
            raise fault.of("its caption") from fault
        if text is None and not fields:
            remark = "empty caption: trained without text"
        return Caption(text=text, source=row.place, remark=remark, fields=fields)

    def _filled(self, name: str, reference: bytes) -> Caption | None:
        """The template with the tags of a sound, and what its name says."""
        template = self._settings.template
        if template is None:
            return None
        fields = caption_template.name_fields(name)
        if any(f"{{{name}}}" in template for name in FIELDS):
            fields = {**_tags_at(reference), **fields}
        text = caption_template.fill(template, fields)
        try:
            return Caption(text=caption_of(text)[0], source="--caption_template") if text else None
        except CaptionFault as fault:
            raise fault.of("its caption from --caption_template") from fault

    def _with_fields(self, found: Described, source: str) -> Caption | None:
        """A caption with what is merged into it; one of fields alone counts only where they are merged."""
        fields = music_fields.as_text(found.fields) if self._settings.merge.on else ""
        if found.caption is None and not fields:
            return None
        return Caption(text=found.caption, source=source, remark=found.remark, fields=fields)

    def _advice(self, sound: Sound, missed: str) -> str:
        """What to do about a sound for which no source has a caption."""
        sources = self._settings.sources
        expected = display(stem(os.path.basename(sound.name)) + ".txt")
        write = f"write {expected} beside it, or " if "text" in sources else ""
        if not write and not missed:
            write = f"none is in --captions {','.join(sources)}: name another source, or "
        return f"{missed + ': ' if missed else ''}{write}train without text: --no_label 1"


def _place_of(fault: LyricsFault) -> str:
    return fault.detail.partition(f" {LYRICS_ALONE}")[0]


def _tags_at(reference: bytes) -> dict[str, str]:
    """The tags of a sound in a file or in a row of a table; {} where it cannot be read, which will be its fate."""
    try:
        sound = sound_at(reference)
    except AudioFault:
        return {}
    return read_tags_of(sound) if isinstance(sound, bytes) else read_tags(sound)
