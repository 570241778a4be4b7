"""All figures of a dataset, counted from its rows: what dataset.json holds and the page shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from trainer.report.rows import TRAINING, VALIDATION, Row

GROUPS_LISTED = 200  # of near-duplicates; the table has all
LONGEST_TOKENS = 512  # T5 was trained on texts of this length (arXiv 1910.10683, section 3.1.1)


def figures_of(rows: Sequence[Row], *, has_tokens: bool) -> dict[str, Any]:
    """The figures, as JSON has them. Hours, lengths, rates, loudness and captions are those of the clips in use."""
    clips = [row for row in rows if row.use]
    return {
        "files": len(rows),
        "clips": len(clips),
        "hours": _hours(clips),
        "training": _part(clips, TRAINING),
        "validation": _part(clips, VALIDATION),
        "fates": _counts(row.fate for row in rows),
        "melodies": _how_many(clips, lambda row: bool(row.melody)),
        "seconds": _spread(row.seconds for row in clips),
        "sample_rates_hz": _counts(row.sample_rate_hz for row in clips),
        "channels": _counts(row.channels for row in clips),
        "formats": _counts(row.format for row in clips),
        "loudness_lufs": _spread(row.loudness_lufs for row in clips),
        "treated_lufs": _spread(row.treated_lufs for row in clips),
        "peak": _spread(row.peak for row in clips),
        "clipped_clips": _how_many(clips, lambda row: (row.clipped_share or 0) > 0),
        "silent_share": _silent_share(clips),
        "captions": _captions(clips, has_tokens),
        "near_duplicates": _groups(clips),
        "leakage": _groups(row for row in clips if row.leak),
    }


def _hours(rows: Iterable[Row]) -> float:
    return round(sum(row.seconds or 0 for row in rows) / 3600, 6)


def _part(clips: Sequence[Row], use: str) -> dict[str, Any]:
    rows = [row for row in clips if row.use == use]
    return {"clips": len(rows), "hours": _hours(rows)}


def _counts(values: Iterable[object]) -> dict[str, int]:
    """How often each value is there, the most frequent one first."""
    counted = Counter(str(value) for value in values if value is not None and value != "")
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Smallest, median, mean and largest value; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    spread = {"least": min(known), "median": median(known), "mean": sum(known) / len(known), "most": max(known)}
    return {name: round(float(value), 4) for name, value in spread.items()}


def _how_many(rows: Iterable[Row], test: Callable[[Row], bool]) -> int:
    return sum(map(test, rows))


def _silent_share(clips: Sequence[Row]) -> float | None:
    """Of the time of all clips; None where it was not measured."""
    known = [(row.seconds or 0, row.silent_share) for row in clips if row.silent_share is not None]
    total = sum(seconds for seconds, _ in known)
    return round(sum(seconds * share for seconds, share in known) / total, 6) if total else None


def _captions(clips: Sequence[Row], has_tokens: bool) -> dict[str, Any]:
    texts = Counter(row.caption for row in clips if row.caption is not None)
    unknown = Counter(word for row in clips for word in row.unknown)
    return {
        "with": texts.total(),
        "without": len(clips) - texts.total(),
        "distinct": len(texts),
        "sources": _counts(_source(row) for row in clips if row.caption is not None),
        "words": _spread(row.words for row in clips),
        "repeated": [
            {"caption": text, "clips": count} for text, count in texts.most_common(20) if count > 1
        ],
        "tokens": _spread(row.tokens for row in clips),
        # None: no tokenizer was at hand, so that nobody looked.
        "with_unknown_words": _how_many(clips, lambda row: bool(row.unknown)) if has_tokens else None,
        "unknown_words": dict(unknown.most_common(20)) if has_tokens else None,
        "over_long": _how_many(clips, lambda row: (row.tokens or 0) > LONGEST_TOKENS) if has_tokens else None,
    }


def _source(row: Row) -> str:
    """The kind of a caption's source: "text file" of ballad.txt, "metadata.csv" of metadata.csv line 3."""
    for suffix, kind in ((".txt", "text file"), (".json", "JSON file")):
        if row.source.lower().endswith(suffix):
            return kind
    return row.source.rsplit(" line ", 1)[0].rsplit(" row ", 1)[0]


def _groups(clips: Iterable[Row]) -> dict[str, Any]:
    """The groups of near-duplicates among `clips`, each with path and use of its files."""
    groups: dict[int, list[Row]] = {}
    for row in clips:
        if row.near is not None:
            groups.setdefault(row.near, []).append(row)
    return {
        "groups": len(groups),
        "clips": sum(map(len, groups.values())),
        "first": [
            [{"path": row.path, "use": row.use} for row in group] for group in list(groups.values())[:GROUPS_LISTED]
        ],
    }
