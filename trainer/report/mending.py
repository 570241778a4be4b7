"""What of a dataset to mend first: findings in the order of what they cost a training, each with its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.data.audio import DOUBLED
from trainer.data.caption_files import LIKE_LYRICS
from trainer.data.fates import IN_USE
from trainer.report.figures import LONGEST_TOKENS
from trainer.report.rows import TRAINING, VALIDATION, Row

MODEL_RATE_HZ = 32_000
CLIPPED_SHARE, SILENT_SHARE, QUIET_LUFS, EDGE_SECONDS, FEW_WORDS = 0.001, 0.5, -35.0, 2.0, 2
SHOWN = 5
MANY = (
    ". Of many files: python scripts/caption.py drafts captions from tags and names, --caption_template makes them of"
    " these, --default_caption gives all the same"
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to mend.

    key       by which the page's table shows its files; "" for what ends a run before it begins: no clips
    severity  "loses" (music is not trained on, or what is measured is wrong), "harms" (the model learns worse) or
              "look" (it may be meant so)
    """

    key: str
    severity: str
    title: str
    advice: str
    clips: int
    first: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"first": list(self.first)}


_Rule = tuple[str, str, str, str, Callable[[Row], bool]]
RULES: tuple[_Rule, ...] = (
    ("leak", "loses", "Same sound in training and validation",
     "The validation loss is too good because of them: remove one of each group, or keep a group on one side.",
     lambda row: row.leak),
    ("unknown", "harms", "Words in captions that T5 does not know",
     "T5 reads <unk> in their place, whatever they are: write these captions in English.",
     lambda row: bool(row.unknown)),
    ("clipped", "harms", "Clipped sound",
     "More than a thousandth of their samples are at full scale: export them again with a lower gain.",
     lambda row: (row.clipped_share or 0) > CLIPPED_SHARE),
    ("silent", "harms", "Silent for more than half of the length",
     "Crops of them may hold no sound: cut the silence out, or split them.",
     lambda row: (row.silent_share or 0) > SILENT_SHARE),
    ("rate", "harms", f"Sample rate below the model's {MODEL_RATE_HZ:,} Hz",
     "They have no treble, and the model learns that: take the originals where you have them.",
     lambda row: bool(row.use) and (row.sample_rate_hz or MODEL_RATE_HZ) < MODEL_RATE_HZ),
    ("near", "harms", "Same sound as another clip",
     "They are trained on twice. Equal sound at another gain, rate or format was found: keep the best of each group.",
     lambda row: row.near is not None and not row.leak),
    ("sung", "harms", "Captions that look like lyrics",
     "They are used as they are. Name lyrics song.lyrics.txt, and write what the music is into song.caption.txt.",
     lambda row: LIKE_LYRICS in row.detail),
    ("long", "harms", f"Captions of more than {LONGEST_TOKENS} tokens",
     "T5 was trained on shorter texts: shorten them.",
     lambda row: (row.tokens or 0) > LONGEST_TOKENS),
    ("same", "look", "Same caption as another clip",
     "The model cannot learn what tells them apart: say it, where there is something to say.",
     lambda row: row.same_caption > 1),
    ("quiet", "look", f"Quieter than {QUIET_LUFS:g} LUFS",
     "The model learns to be quiet: raise their gain, unless they are meant so.",
     lambda row: bool(row.use) and _heard_lufs(row) < QUIET_LUFS),
    ("mono", "look", "Mono files for a stereo model",
     "It hears the same sound on both sides, and learns nothing of stereo: take stereo originals where you have them.",
     lambda row: DOUBLED in row.detail),
    ("edges", "look", f"More than {EDGE_SECONDS:g} s of silence at the start or the end",
     "Cut it off, unless it belongs to the music.",
     lambda row: bool(row.use) and max(row.lead_seconds or 0, row.tail_seconds or 0) > EDGE_SECONDS),
    ("brief", "look", f"Captions of at most {FEW_WORDS} words",
     "Genre, mood, instruments and tempo are what a prompt will ask for.",
     lambda row: bool(row.use) and row.words is not None and row.words <= FEW_WORDS),
)  # fmt: skip


def mend_first(rows: Sequence[Row], *, no_label: bool, validates: bool = False) -> list[Finding]:
    """The findings, the costliest first; empty where nothing needs to be mended.

    validates  whether the run is to validate, on a share of the clips or on a folder of them
    """
    found = _no_clips(rows, validates)
    found += _left_out(rows)
    for key, severity, title, advice, test in RULES:
        found += _finding(key, severity, title, advice, [row for row in rows if row.use and test(row)])
    if not no_label:
        without = [row for row in rows if row.use and row.caption is None]
        advice = "Their caption files are empty: write what the music is, or leave them so, as music without a prompt."
        found += _finding("untold", "look", "Trained without text", advice, without)
    order = ("loses", "harms", "look")
    return sorted(found, key=lambda one: (order.index(one.severity), -one.clips))


def marks_of(row: Row) -> list[str]:
    """The keys of the findings that `row` belongs to."""
    marks = [key for key, _, _, _, test in RULES if row.use and test(row)]
    return [*marks, "untold"] if row.use and row.caption is None else marks


def _heard_lufs(row: Row) -> float:
    """How loud a clip is as it is trained on; 0 where that is not known."""
    return (row.loudness_lufs if row.treated_lufs is None else row.treated_lufs) or 0.0


def _finding(key: str, severity: str, title: str, advice: str, rows: Sequence[Row]) -> list[Finding]:
    if not rows:
        return []
    first = tuple(row.path for row in rows[:SHOWN])
    return [Finding(key=key, severity=severity, title=title, advice=advice, clips=len(rows), first=first)]


def _no_clips(rows: Sequence[Row], validates: bool) -> list[Finding]:
    """What ends a run before it begins: no clips on one side."""
    uses = {row.use for row in rows}
    below = "what became of each file that is there stands below."
    found = []
    if TRAINING not in uses:
        advice = f"Put sound files with their captions there; {below}"
        if VALIDATION in uses:
            advice = f"All that can be used validates: give --validation a smaller share, or add clips; {below}"
        found.append(("No clip can be trained on", advice))
    elif validates and VALIDATION not in uses:
        advice = f"Give --validation a larger share, another --seed, or a folder of clips; {below}"
        found.append(("No clip to validate on", advice))
    return [
        Finding(key="", severity="loses", title=title, advice=advice, clips=len(rows), first=())
        for title, advice in found
    ]


def _left_out(rows: Sequence[Row]) -> list[Finding]:
    by_fate: dict[str, list[Row]] = {}
    for row in rows:
        by_fate.setdefault(row.fate, []).append(row)
    found = []
    for fate, group in by_fate.items():
        severity = "look" if fate in ("duplicate", "no audio") else "loses"
        if fate not in (*IN_USE, "ignored"):
            advice = f"For example {group[0].path}: {group[0].detail}{MANY if fate == 'no caption' else ''}"
            found += _finding(f"fate:{fate}", severity, f"Left out: {fate}", advice, group)
    return found
