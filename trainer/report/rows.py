"""One row for each file of a dataset: what the table of the page shows, and what all its figures are counted from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote_from_bytes

from trainer.data import music_fields, unknown_words
from trainer.data.fates import Fate, display
from trainer.data.fingerprint import groups_of, near_pairs
from trainer.data.held_out import share_of
from trainer.data.inventory import InspectedFile, ScannedFolder
from trainer.data.stand_ins import NOT_HERE, open_at
from trainer.report.settings import ReportSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# First words of what AudioFacts.format says, and suffixes where nothing was decoded, that current browsers play.
PLAYED = ("WAV", "WAVEX", "MP3", "MPEG", "FLAC", "OGG", "OPUS", "OGA", "AAC", "M4A", "MP4", "WEBM")
NOT_PLAYED = ("ADPCM", "GSM", "ULAW", "ALAW", "DOUBLE", "ALAC", "DWVW", "G72", "NMS")  # codecs inside such files
SOUNDS = (*PLAYED, "AIFF", "AIF", "AIFC", "CAF", "AU", "SND", "W64", "RF64", "WMA", "MKA", "WV", "APE")
TRAINING, VALIDATION = "training", "validation"


@dataclass(kw_only=True)
class Row:
    """What is known of one file; None where it is not known, as of a file that was not decoded. `rows_of` fills it in.

    path, fate, detail  as in dataset.csv
    use                 "training", "validation", or "" for a file that is left out
    link                from the report's folder to the file, percent-encoded; "" where there is none
    unplayed            why a browser is not expected to play it; "" where it is, and for what is no sound
    words, tokens       of its caption; tokens of T5 where its tokenizer was at hand
    unknown             words of its caption that T5 does not know
    near                number of its group of near-duplicates
    leak                whether that group has clips to train and to validate on
    seconds             of what is trained on: without silence at both ends under --trim_silence 1
    peak, ..., loudness_lufs  of the whole file as it is, as trainer/data/levels.py has them
    treated_lufs        what --loudness makes of loudness_lufs; None without that flag
    caption             with all that may be merged into it
    same_caption        how many clips have its caption
    melody              the file that is its melody; "" for none
    """

    path: str
    fate: str
    detail: str
    use: str = ""
    link: str = ""
    unplayed: str = ""
    format: str = ""
    seconds: float | None = None
    sample_rate_hz: int | None = None
    channels: int | None = None
    peak: float | None = None
    clipped_share: float | None = None
    silent_share: float | None = None
    lead_seconds: float | None = None
    tail_seconds: float | None = None
    loudness_lufs: float | None = None
    treated_lufs: float | None = None
    caption: str | None = None
    source: str = ""
    words: int | None = None
    tokens: int | None = None
    unknown: tuple[str, ...] = ()
    near: int | None = None
    leak: bool = False
    same_caption: int = 0
    melody: str = ""


def rows_of(
    folders: Sequence[ScannedFolder], settings: ReportSettings, report_folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[Row]:
    """The rows of all folders, of which the second, if there is one, is validated on.

    tokenizer  of T5; None where it is not at hand, and nothing is said of tokens then
    """
    rows: list[Row] = []
    inspected: list[InspectedFile | None] = []
    for number, folder in enumerate(folders):
        prefix = f"{display(folder.root)}/" if number else ""
        known = {one.path: one for one in folder.inspected}
        start = os.path.relpath(folder.root, os.path.abspath(report_folder))
        is_here = open_at(folder.root) is None
        for fate in folder.fates:
            one = known.get(fate.path)
            row = _row(fate, one, prefix, start, folder.root)
            if not is_here and row.format:
                row.link, row.unplayed = "", NOT_HERE
            if one:
                _add_sound(row, one, settings)
            rows.append(row)
            inspected.append(one)
    _add_use(rows, inspected, settings, len(folders[0].fates) if folders else 0)
    _add_near(rows, inspected)
    _add_captions(rows, tokenizer)
    return rows


def _row(fate: Fate, one: InspectedFile | None, prefix: str, start: str, root: str) -> Row:
    kind = os.path.splitext(fate.path)[1][1:].upper()
    row = Row(path=prefix + fate.path, fate=fate.fate, detail=fate.detail, format=kind if kind in SOUNDS else "")
    if one is None:
        # A shown name without a backslash is the name itself. Others cannot be told from the name that they stand for.
        # That of a table's row may be the name of no file.
        is_here = row.format and "\\" not in fate.path and os.path.lexists(os.path.join(root, fate.path))
        plain = fate.path if is_here else ""
        row.link, row.unplayed = _link(start, os.fsencode(plain)), _why_unplayed(row.format)
        return row
    inside = one.reference.removeprefix(os.path.join(os.fsencode(root), b""))
    row.format = one.facts.format
    row.link = "" if b"\0" in inside or os.path.isabs(inside) else _link(start, inside)
    row.unplayed = "it lies inside a table" if b"\0" in inside else _why_unplayed(row.format)
    return row


def _add_sound(row: Row, one: InspectedFile, settings: ReportSettings) -> None:
    """What was found in the sound, and its caption."""
    facts, levels = one.facts, one.facts.levels
    excerpt, _ = settings.treatment.excerpt_of(facts)
    row.caption, row.source, row.melody = _longest_text(one), one.caption_source, one.melody
    row.seconds, row.sample_rate_hz = excerpt.frames / facts.sample_rate_hz, facts.sample_rate_hz
    row.channels = facts.channels
    row.peak, row.clipped_share, row.silent_share = levels.peak, levels.clipped_share, levels.silent_share
    row.lead_seconds, row.tail_seconds = levels.lead_seconds, levels.tail_seconds
    row.loudness_lufs = levels.loudness_lufs
    if settings.treatment.loudness_lufs is not None and levels.loudness_lufs is not None:
        row.treated_lufs = levels.loudness_lufs + 20 * math.log10(excerpt.gain)


def _longest_text(one: InspectedFile) -> str | None:
    """The caption, with all that may be merged into it."""
    if not one.caption_fields:
        return one.caption
    fields = music_fields.of_text(one.caption_fields)
    everything = music_fields.Decisions(kept=[True] * len(fields), order=range(len(fields)), drop_caption=False)
    return music_fields.merged(one.caption, fields, everything)


def _link(start: str, inside: bytes) -> str:
    return quote_from_bytes(os.path.join(os.fsencode(start), inside)) if inside else ""


def _why_unplayed(format_name: str) -> str:
    words = format_name.upper().split()
    if words and (words[0] not in PLAYED or any(codec in word for codec in NOT_PLAYED for word in words)):
        return f"browsers do not play {format_name}"
    return ""


def _add_use(
    rows: Sequence[Row], inspected: Sequence[InspectedFile | None], settings: ReportSettings, first_folder: int
) -> None:
    validates = share_of(
        [one.facts.content if one else "" for one in inspected[:first_folder]], settings.seed, settings.validation_share
    )
    uses = [*validates.tolist(), *(True for _ in rows[first_folder:])]
    for row, validation in zip(rows, uses, strict=True):
        if row.fate == "used":
            row.use = VALIDATION if validation else TRAINING


def _add_near(rows: Sequence[Row], inspected: Sequence[InspectedFile | None]) -> None:
    """The groups of near-duplicates among the clips that are used."""
    clips = [(row, one.facts) for row, one in zip(rows, inspected, strict=True) if row.use and one]
    pairs = near_pairs([facts.fingerprint for _, facts in clips], [facts.seconds for _, facts in clips]).pairs
    # Equal samples are equal sounds, however short: they are two clips where their captions differ.
    first: dict[str, int] = {}
    equal = [(first.setdefault(facts.sound, at), at) for at, (_, facts) in enumerate(clips)]
    together = [*((low, high) for low, high in pairs.tolist()), *((low, high) for low, high in equal if low != high)]
    for name, group in enumerate(groups_of(together), start=1):
        members = [clips[at][0] for at in group]
        leak = len({row.use for row in members}) > 1
        for row in members:
            row.near, row.leak = name, leak


def _add_captions(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None) -> None:
    captions = [row.caption for row in rows if row.caption is not None and row.use]
    counts: dict[str, int] = {}
    for caption in captions:
        counts[caption] = counts.get(caption, 0) + 1
    unknown: Mapping[str, tuple[str, ...]] = {}
    tokens: dict[str, int] = {}
    if tokenizer is not None and counts:
        unknown = unknown_words.unknown_words(tokenizer, counts)
        distinct = list(counts)
        for batch in _batches(distinct, unknown_words.BATCH_WORDS):
            tokens |= {text: len(ids) for text, ids in zip(batch, tokenizer(batch).input_ids, strict=True)}
    for row in rows:
        if row.caption is not None:
            row.words, row.tokens = len(row.caption.split()), tokens.get(row.caption)
            row.unknown = unknown.get(row.caption, ())
            row.same_caption = counts.get(row.caption, 0) if row.use else 0


def _batches(items: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
