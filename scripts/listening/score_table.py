"""score.json as a table with plain words, for the console."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

EARS = {"encodec": "EnCodec's latents", "clap": "CLAP"}
FIGURES = {"kad": "KAD", "frechet": "Fréchet distance", "text": "likeness to the caption"}
WORDS = {
    ("kad", "better"): "closer than the base", ("kad", "worse"): "further away than the base",
    ("frechet", "better"): "closer than the base", ("frechet", "worse"): "further away than the base",
    ("text", "better"): "nearer to its captions", ("text", "worse"): "less like its captions",
}  # fmt: skip
UNDECIDED = "no difference shown"


def table(result: Mapping[str, Any]) -> str:
    """A row for each figure: base, tuned model and difference with their intervals, and what that says."""
    lines = [
        f"{result['generated']} sounds of each model, of up to {result['seconds']:g} s, against {result['clips']}"
        " held-out clips. Value [95 % interval]; distances: smaller is closer, likeness: larger is better",
        f"{'':<44}{'base':<26} {'tuned':<26} {'tuned - base'}",
    ]
    for ears, name, row in _rows(result["embeddings"]):
        figures = "".join(f"{in_words(row[key]):<26} " for key in ("base", "tuned"))
        words = WORDS.get((name, row["verdict"]), UNDECIDED)
        lines.append(f"{EARS[ears] + ', ' + FIGURES[name]:<44}{figures}{in_words(row['difference'], '+'):<28} {words}")
    if result["few"]:
        lines.append(
            f"warning: {min(result['clips'], result['generated'])} clips are few. Under 50, intervals are wide, and"
            " what they do not show may be there all the same"
        )
    lines += [f"not run: {reason}" for reason in result["not_run"]]
    return "\n".join(lines)


def in_words(figure: list[float], sign: str = "") -> str:
    """[value, low, high] with three digits that count."""
    value, low, high = (f"{number:{sign}.3g}" for number in figure)
    return f"{value} [{low}, {high}]"


def _rows(embeddings: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for ears, of in embeddings.items():
        for name, row in of["distances"].items():
            yield ears, name, row
        if "text" in of:
            yield ears, "text", of["text"]
