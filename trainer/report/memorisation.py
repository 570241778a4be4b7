"""What recall.json says, as report.html shows it: whether the model plays its training clips by heart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.report.json_values import count, number, rows, share, table, text, texts
from trainer.report.template import percent

GROUPS, MODELS = ("training", "held out"), ("before", "after")
CODEBOOKS = ("first_codebook", "all_codebooks")
INAUDIBLE_DB = 60.0  # the difference between two sounds is then a thousandth of the sound
# The chart's coordinates: from the left edge to the right one, and from 100 % to 0 %.
LEFT, RIGHT, TOP, BOTTOM = 46.0, 470.0, 12.0, 190.0


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How alike outputs and clips are, in [0, 1]; None is what the file does not say.

    exact    of the clips, those of which all codes came back
    partial  of the clips, those of which 80 % of the codes or more did
    equal    of the codes, on average over the clips
    chance   the same beside other clips
    """

    exact: float | None
    partial: float | None
    equal: float
    chance: float | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One group of clips by one model: its shares by the seconds of each clip that the model was given.

    clips  how many clips, by those seconds
    """

    group: str
    model: str
    clips: Mapping[float, int]
    shares: Mapping[float, Mapping[str, Shares]]


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """What the section shows.

    lengths   seconds of clip that the model was given, in order
    lines     training clips before and after, then the held-out ones
    played    clips played back from their captions alone: name, codes and how many of them came back before and after
    nearest   by sampled output: the training clip that is most like it
    searched, training_clips  among how many clips that was looked for, and of how many; None where the file is silent
    remarks   what a reader must know besides
    """

    continued_seconds: float
    lengths: Sequence[float]
    lines: Sequence[Line]
    played: Sequence[Mapping[str, Any]]
    nearest: Sequence[Mapping[str, Any]]
    searched: int | None
    training_clips: int | None
    remarks: Sequence[str]

    def line(self, group: str, model: str) -> Line | None:
        """The line of a group and a model; None where it was not measured."""
        return next((one for one in self.lines if (one.group, one.model) == (group, model)), None)

    def chance(self, length: float) -> float | None:
        """The mean chance of the trained model after a length of prompt, in the first codebook."""
        known = [line.shares.get(length, {}).get("first_codebook") for line in self.lines if line.model == "after"]
        values = [one.chance for one in known if one is not None and one.chance is not None]
        return sum(values) / len(values) if values else None

    def played_share(self, model: str) -> float:
        """Of all codes of the clips that were played back, those that came back."""
        return sum(one[model] for one in self.played) / sum(one["codes"] for one in self.played)


def memorisation_of(recall: Mapping[str, Any]) -> Memorisation | None:
    """What recall.json holds, as an object; None where nothing in it can be shown.

    The file of older versions is a list, which run_facts reads as {"played_back": the list}.
    """
    found = table(recall.get("memorisation"))
    lines = _lines(rows(found.get("rows")))
    lengths = sorted({length for line in lines for length in line.shares})
    played = [made for one in rows(recall.get("played_back")) if (made := _played(one))]
    nearest = [made for one in rows(found.get("nearest")) if (made := _nearest(one))]
    if not (lines or played or nearest):
        return None
    return Memorisation(
        continued_seconds=number(found.get("continued_seconds")) or 5.0, lengths=lengths, lines=lines, played=played,
        nearest=sorted(nearest, key=lambda one: (one["model"] != "after", -one["first_codebook"])),
        searched=count(found.get("searched_clips")), training_clips=count(found.get("training_clips")),
        remarks=texts(recall.get("remarks")),
    )  # fmt: skip


def _lines(found: Sequence[Mapping[str, Any]]) -> list[Line]:
    made = []
    for group in GROUPS:
        for model in MODELS:
            shares: dict[float, dict[str, Shares]] = {}
            clips: dict[float, int] = {}
            for row in found:
                length = number(row.get("prompt_seconds"))
                if row.get("group") != group or row.get("model") != model or length is None or not 0 <= length <= 1000:
                    continue
                known = {name: one for name in CODEBOOKS if (one := _shares(table(row.get(name)))) is not None}
                if known:
                    shares[length], clips[length] = known, count(row.get("clips")) or 0
            if shares:
                made.append(Line(group=group, model=model, clips=clips, shares=shares))
    return made


def _shares(values: Mapping[str, Any]) -> Shares | None:
    equal = share(values.get("equal"))
    if equal is None:
        return None
    exact, partial, chance = (share(values.get(name)) for name in ("exact", "partial", "chance"))
    return Shares(exact=exact, partial=partial, equal=equal, chance=chance)


def _played(row: Mapping[str, Any]) -> dict[str, Any] | None:
    codes, before, after = (count(row.get(name)) for name in ("codes", "before", "after"))
    if not codes or before is None or after is None or max(before, after) > codes:
        return None
    ratio = row.get("snr_after_db", 0.0)  # null: the very same sound
    alike = ratio is None or (number(ratio) or 0.0) > INAUDIBLE_DB
    return {"clip": text(row.get("clip")), "codes": codes, "before": before, "after": after, "alike": alike}


def _nearest(row: Mapping[str, Any]) -> dict[str, Any] | None:
    equal, first, model = share(row.get("equal")), share(row.get("first_codebook")), text(row.get("model"))
    if equal is None or first is None or model not in MODELS:
        return None
    return {
        "prompt": text(row.get("prompt")), "clip": text(row.get("clip")), "model": model, "equal": equal,
        "first_codebook": first, "first_codebook_chance": share(row.get("first_codebook_chance")),
        "chance": share(row.get("chance")), "output_seconds": number(row.get("output_seconds")),
        "clip_seconds": number(row.get("clip_seconds")),
    }  # fmt: skip


def verdict_of(found: Memorisation) -> tuple[str, str, str]:
    """What the figures come to: "heart", "partly", "alike" or "free", in a few words, and in sentences; "" without.

    It goes by the clips of which 80 % or more of the codes come back in the first codebook, as the papers do, after the
    length of prompt that brings most of them back.
    """
    trained, other = found.line("training", "after"), found.line("held out", "after")
    length = _most_telling(trained)
    if trained is None or length is None:
        return "", "", ""
    own, clips = trained.shares[length]["first_codebook"], trained.clips[length]
    control = None if other is None else other.shares.get(length, {}).get("first_codebook")
    known, known_other = own.partial or 0.0, 0.0 if control is None else control.partial or 0.0
    given = "the caption alone" if length == 0 else f"the caption and the first {length:g} s"
    many = f"{round(known * clips)} of {clips} training clips" if clips else f"{percent(known)} of the training clips"
    beside = "" if control is None else (
        f" Of clips it never learned from, {percent(control.equal)} of the codes come back{_beside_chance(control)}."
    )  # fmt: skip
    if known == 0:
        return "free", "Not by heart.", (
            f"Even with {given}, the trained model goes on with none of the training clips as it is:"
            f" {percent(own.equal)} of their codes come back{_beside_chance(own)}.{beside}"
        )
    said = f"With {given}, the trained model goes on with {many} as they are (80 % or more of the codes).{beside}"
    if known_other >= known / 2:
        return "alike", "No verdict.", (
            f"{said} But so it does with {percent(known_other)} of the held-out clips: this music is alike,"
            " or repeats itself, so that going on with it takes no knowing by heart."
        )
    kind, headline = ("heart", "By heart.") if known >= 0.5 else ("partly", "Partly by heart.")
    return kind, headline, (
        f"{said} That is right where a run only tests whether"
        " training works, as the demo does. Elsewhere it is a warning: asked for music of this kind, the model may play"
        " your clips. Fewer epochs, or more clips, mend it."
    )


def in_brief(found: Memorisation | None) -> str:
    """What fits into a cell of a table: how many training clips the trained model knows by heart."""
    line = None if found is None else found.line("training", "after")
    length = _most_telling(line)
    if line is None or length is None:
        return ""
    own, clips = line.shares[length]["first_codebook"], line.clips[length]
    known = f"{round((own.partial or 0.0) * clips)} of {clips}" if clips else percent(own.partial or 0.0)
    return f"{known}; {percent(own.equal)} of the codes{_beside_chance(own)}"


def _most_telling(line: Line | None) -> float | None:
    """The length of prompt after which most clips come back in the first codebook, and among equals most codes do."""
    if line is None:
        return None
    known = {length: one["first_codebook"] for length, one in line.shares.items() if "first_codebook" in one}
    return max(
        known, key=lambda at: ((known[at].partial or 0) * (line.clips[at] or 1), known[at].equal, -at), default=None
    )


def _beside_chance(one: Shares) -> str:
    return "" if one.chance is None else f" (chance: {percent(one.chance)})"


def chart_of(found: Memorisation) -> dict[str, Any] | None:
    """The share of equal codes of the first codebook by the length of the prompt, as the template draws it; None with
    fewer than two lengths.

    Lengths stand side by side with equal gaps, whatever lies between them.
    """
    if len(found.lengths) < 2:
        return None
    gap = (RIGHT - LEFT) / len(found.lengths)
    at = {length: LEFT + gap * (place + 0.5) for place, length in enumerate(found.lengths)}
    lines = []
    for line in found.lines:
        points = [
            (at[length], _height(one["first_codebook"].equal))
            for length, one in sorted(line.shares.items()) if "first_codebook" in one
        ]  # fmt: skip
        name = f"{'training clips' if line.group == 'training' else 'held-out clips'}, {line.model}"
        colour, kind = int(line.group == "held out"), "line" if line.model == "after" else "dashed"
        lines.append({"name": name, "colour": colour, "kind": kind, "points": points})
    chance = [(at[length], _height(value)) for length in at if (value := found.chance(length)) is not None]
    if chance:
        lines.append({"name": "chance, after", "colour": 7, "kind": "dashed", "points": chance})
    return {
        "lines": lines,
        "ticks": [(value, _height(value / 100)) for value in (0, 25, 50, 75, 100)],
        "lengths": [(f"+ {length:g}\N{NO-BREAK SPACE}s" if length else "caption alone", at[length]) for length in at],
        "left": LEFT, "right": RIGHT, "bottom": BOTTOM,
    }  # fmt: skip


def _height(value: float) -> float:
    return round(BOTTOM - value * (BOTTOM - TOP), 1)
