"""The joined outcome of what several people have judged on listening pages, from the files that the pages save."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from itertools import combinations
from pathlib import Path
from typing import Any

from trainer.data.fates import display
from trainer.errors import DataError
from trainer.report.blind import FORMAT, VERSION

NO_DIFFERENCE = "no difference"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What one person said of the sounds of one prompt.

    choice  the side that was chosen, NO_DIFFERENCE, or None for no choice
    marks   1 to 5, or None, by side
    """

    choice: str | None
    marks: Mapping[str, int | None]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A file that a page has saved. `session` is drawn once for each person and browser."""

    path: Path
    page: str
    session: str
    listener: str
    saved: float
    sides: tuple[str, ...]
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True, kw_only=True)
class SideScore:
    """How one side did: how often it was chosen, and its marks."""

    side: str
    chosen: int
    marks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """How two sides did against each other. p is that of the sign test; None where no judgement prefers one."""

    first: str
    second: str
    first_better: int
    second_better: int
    ties: int
    p: float | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """The joined outcome. `judged` counts judgements by listener."""

    judged: Mapping[str, int]
    sides: tuple[SideScore, ...]
    pairs: tuple[PairScore, ...]
    notes: tuple[str, ...]


def read_saved(path: Path) -> Saved:
    """Raises DataError for what no listening page has saved."""
    try:
        values = json.loads(path.read_bytes())
        if (values["format"], values["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {values['format']!r}, version {values['version']!r}")
        sides = tuple(str(side["name"]) for side in values["sides"])
        return Saved(
            path=path,
            page=str(values["page"]),
            session=str(values["session"]),
            listener=str(values["listener"]).strip(),
            saved=float(values["saved"]),
            sides=sides,
            judgements=tuple(_judgement(one, sides) for one in values["judgements"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is no file that a listening page has saved ({error!r}): use its button") from error


def score(files: Sequence[Saved]) -> Score:
    """All judgements together; of several files of one session, the one that was saved last.

    Raises DataError where they compare different sides.
    """
    sides = files[0].sides
    for other in files[1:]:
        if set(other.sides) != set(sides):
            raise DataError(
                f"{files[0].path} and {other.path} compare different things ({'; '.join(map(display, sides))} and"
                f" {'; '.join(map(display, other.sides))}): score them apart"
            )
    latest: dict[str, Saved] = {}
    notes = []
    for one in files:
        former = latest.get(one.session)
        if former is None:
            latest[one.session] = one
            continue
        older, newer = sorted((former, one), key=lambda file: file.saved)
        latest[one.session] = newer
        notes.append(f"{older.path} is left out: {newer.path} is of the same listener, saved as late or later")
    if len({one.page for one in latest.values()}) > 1:
        notes.append("the files are of different pages that compare the same sides")
    all_ = [judgement for one in latest.values() for judgement in one.judgements]
    return Score(
        judged=_judged(list(latest.values())),
        sides=tuple(_side_score(side, all_) for side in sides),
        pairs=tuple(_pair_score(first, second, all_) for first, second in combinations(sides, 2)),
        notes=tuple(notes),
    )


def preference(judgement: Judgement, first: str, second: str) -> int | None:
    """1 where the first side was better, -1 where the second was, 0 for no difference, None where nothing was said.

    The choice tells. Where there is none, or where a third side was chosen, the marks tell if both have one. blind.js
    does the same.
    """
    if judgement.choice == NO_DIFFERENCE:
        return 0
    if judgement.choice in (first, second):
        return 1 if judgement.choice == first else -1
    one, other = judgement.marks.get(first), judgement.marks.get(second)
    return None if one is None or other is None else (one > other) - (one < other)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p: how often `wins + losses` fair coins fall at least as unevenly as this. 1 of none."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)


def mean_and_reach(marks: Sequence[int]) -> tuple[float, float | None]:
    """The mean of one mark or more, and 1.96 sd / sqrt(n), half the interval in which it lies in 95 of 100 cases.

    sd divides by n - 1, so that one mark alone has no interval.
    """
    mean = sum(marks) / len(marks)
    if len(marks) == 1:
        return mean, None
    variance = sum((mark - mean) ** 2 for mark in marks) / (len(marks) - 1)
    return mean, 1.96 * math.sqrt(variance / len(marks))


def fixed(value: float, digits: int) -> str:
    """The number with so many decimals, as toFixed of a browser writes it: 0.0625 is 0.063, where Python says 0.062."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def table(outcome: Score) -> str:
    """The outcome as lines for a console."""
    listeners = ", ".join(f"{display(name)} {count}" for name, count in outcome.judged.items())
    total = sum(outcome.judged.values())
    lines = [f"judgements: {total:,} ({listeners})", ""]
    rows: list[tuple[str, ...]] = [("side", "chosen", "marks", "mean mark")]
    rows += [(display(one.side), str(one.chosen), str(len(one.marks)), _mean_in_words(one)) for one in outcome.sides]
    lines += _columns(rows)
    rows = [("pair", "first better", "second better", "no difference", "p")]
    for pair in outcome.pairs:
        name = f"{display(pair.first)} against {display(pair.second)}"
        p = "none" if pair.p is None else fixed(pair.p, 3)
        rows.append((name, str(pair.first_better), str(pair.second_better), str(pair.ties), p))
    lines += ["", *_columns(rows)]
    return "\n".join([*lines, *(f"note: {note}" for note in outcome.notes)])


def _judgement(values: Mapping[str, Any], sides: Sequence[str]) -> Judgement:
    """Raises ValueError for a choice or mark that a page does not give."""
    choice = values["choice"]
    if choice is not None and choice != NO_DIFFERENCE and choice not in sides:
        raise ValueError(f"choice {choice!r}")
    marks = {str(sound["side"]): sound["mark"] for sound in values["sounds"]}
    if set(marks) != set(sides):
        raise ValueError(f"sounds of {sorted(marks)}")
    if any(mark is not None and (type(mark) is not int or not 1 <= mark <= 5) for mark in marks.values()):
        raise ValueError(f"marks {list(marks.values())}")
    return Judgement(choice=choice, marks=marks)


def _judged(files: Sequence[Saved]) -> dict[str, int]:
    """How many prompts each listener has judged; those of one name, and those without a name, together."""
    counts: Counter[str] = Counter()
    for one in files:
        said = [judgement.choice is not None or any(judgement.marks.values()) for judgement in one.judgements]
        counts[one.listener or "no name"] += sum(said)
    return dict(counts)


def _side_score(side: str, judgements: Sequence[Judgement]) -> SideScore:
    marks = [judgement.marks[side] for judgement in judgements]
    chosen = sum(judgement.choice == side for judgement in judgements)
    return SideScore(side=side, chosen=chosen, marks=tuple(mark for mark in marks if mark is not None))


def _pair_score(first: str, second: str, judgements: Sequence[Judgement]) -> PairScore:
    said = Counter(preference(judgement, first, second) for judgement in judgements)
    p = sign_test(said[1], said[-1]) if said[1] + said[-1] else None
    return PairScore(first=first, second=second, first_better=said[1], second_better=said[-1], ties=said[0], p=p)


def _mean_in_words(one: SideScore) -> str:
    if not one.marks:
        return ""
    mean, reach = mean_and_reach(one.marks)
    return fixed(mean, 2) if reach is None else f"{fixed(mean, 2)} +- {fixed(reach, 2)}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines: the first column from the left, the others from the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines
