"""What score.json says, as report.html shows it: how far generated sounds are from held-out music."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.report.json_values import count, number, table, texts
from trainer.report.template import number as shown

FEW_CLIPS = 50
UNSURE = "no verdict: the interval holds zero"
NAMES = {
    "kad": "KAD",
    "frechet": "Fréchet distance",
    "text": "fit to the prompts",
}
EMBEDDINGS = {"encodec": "EnCodec", "clap": "CLAP"}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float | None
    high: float | None

    @property
    def holds_zero(self) -> bool:
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One row of the table.

    name        of the measure
    embedding   what turned the sounds into the numbers that are compared
    lower       whether lower is better
    difference  tuned minus base
    verdict     in words
    better      True, False, or None where nothing can be said
    """

    name: str
    embedding: str
    lower: bool
    base: Interval | None
    tuned: Interval | None
    difference: Interval | None
    verdict: str
    better: bool | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the section shows. few: whether there are too few clips or sounds to trust the numbers."""

    clips: int | None
    generated: int | None
    seconds: float | None
    few: bool
    measures: Sequence[Measure]
    not_run: Sequence[str]

    @property
    def main(self) -> Measure | None:
        """The measure that a line has room for: KAD, which is right with few clips too, by CLAP where that ran."""
        found = [one for one in self.measures if one.name == NAMES["kad"]]
        return next(reversed(found or list(self.measures)), None)

    @property
    def in_words(self) -> str:
        """What the main measure says; "" without one."""
        main = self.main
        if main is None:
            return ""
        by = f"{main.name} on {main.embedding}"
        if main.better is not None:
            return f"The tuned model is {main.verdict} than the base model is ({by})."
        why = "the interval of the difference holds zero" if main.verdict == UNSURE else "the file names none"
        return f"No verdict: {why} ({by}). These sounds show the tuned model neither better nor worse."


def in_brief(score: Score | None) -> str:
    """What fits into a cell of a table: the main measure of the tuned model and of its base."""
    main = None if score is None else score.main
    if main is None or main.tuned is None:
        return ""
    base = "" if main.base is None else f" (base model: {shown(main.base.value)})"
    return f"{main.name}, {main.embedding}: {shown(main.tuned.value)}{base}; {main.verdict}"


def score_of(values: Mapping[str, Any]) -> Score | None:
    """What score.json holds, as an object; None where nothing in it can be shown."""
    measures: list[Measure | None] = []
    for key, embedding_name in EMBEDDINGS.items():
        embedding = table(table(values.get("embeddings")).get(key))
        found = {**table(embedding.get("distances")), "text": embedding.get("text")}
        measures += [_measure(name, embedding_name, table(found.get(name))) for name in NAMES]
    not_run = texts(values.get("not_run"))
    known = [one for one in measures if one is not None]
    if not (known or not_run):
        return None
    clips, generated = count(values.get("clips")), count(values.get("generated"))
    least = min((many for many in (clips, generated) if many is not None), default=FEW_CLIPS)
    return Score(
        clips=clips, generated=generated, seconds=number(values.get("seconds")),
        few=values.get("few") is True or least < FEW_CLIPS, measures=known, not_run=not_run,
    )  # fmt: skip


def _measure(name: str, embedding: str, values: Mapping[str, Any]) -> Measure | None:
    base, tuned, difference = (_interval(values.get(one)) for one in ("base", "tuned", "difference"))
    if base is None and tuned is None:
        return None
    lower, told = name != "text", values.get("verdict")
    words = {"better": "closer to held-out music", "worse": "farther from held-out music"}
    if not lower:
        words = {"better": "closer to the prompts", "worse": "farther from the prompts"}
    told = told if isinstance(told, str) else ""
    unsure = UNSURE if difference is not None and difference.holds_zero else "no verdict"
    return Measure(
        name=NAMES[name], embedding=embedding, lower=lower, base=base, tuned=tuned, difference=difference,
        verdict=words.get(told, unsure), better={"better": True, "worse": False}.get(told),
    )  # fmt: skip


def _interval(values: object) -> Interval | None:
    """[value, low, high], of which the last two may be missing."""
    if not isinstance(values, list) or not values or (value := number(values[0])) is None:
        return None
    low, high = (number(one) for one in (values[1:3] if len(values) >= 3 else (None, None)))
    return Interval(value=value, low=low, high=high)
