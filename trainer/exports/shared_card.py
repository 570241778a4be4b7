"""The sections that a model's card has on the hub alone: sounds that play there, and what was measured.

Prompts are people's texts: they are escaped, for HTML and for what would end a block of HTML in Markdown.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SoundRow:
    """The sounds of one prompt, by their paths in the repository; None where there is none.

    prompt  "" for none
    note    what else was asked of both sounds; "" for nothing
    """

    prompt: str
    before: str | None
    after: str | None
    note: str = ""


def sounds_section(rows: Sequence[SoundRow], *, address: str, before: str, after: str, note: str) -> str:
    """The table of sounds as Markdown; "" for no row.

    address        under which the repository's files lie: https://huggingface.co/user/name/resolve/main
    before, after  heads of the columns
    note           a sentence on how the sounds were made
    """
    if not rows:
        return ""
    with_before = any(row.before is not None for row in rows)
    heads = ["prompt", *([before] if with_before else []), after]
    lines = ["<table>", f"<tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>"]
    for row in rows:
        paths = [*([row.before] if with_before else []), row.after]
        cells = [_prompt(row), *(_player(address, path) for path in paths)]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "\n".join(["## Sounds", "", note, "", *lines, "</table>"])


def _prompt(row: SoundRow) -> str:
    text = " ".join(row.prompt.split())
    shown = html.escape(text) if text else "<em>no prompt</em>"
    return f"{shown}<br><small>{html.escape(row.note)}</small>" if row.note else shown


def _player(address: str, path: str | None) -> str:
    if path is None:
        return "-"
    return f'<audio controls preload="none" src="{html.escape(f"{address}/{path}")}"></audio>'


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What judging a run has measured.

    section  as Markdown; "" for nothing
    results  for the front matter: {"type", "value", "name"} each
    unread   names of files that are none that this version can read
    """

    section: str
    results: Sequence[Mapping[str, object]]
    unread: Sequence[str]


def figures_of(score: object, recall: object) -> Figures:
    """What RUN/score.json and RUN/recall.json say; None for a file that is not there."""
    sections, results, unread = [], list[Mapping[str, object]](), []
    for name, content, read in (("score.json", score, _score), ("recall.json", recall, _recall)):
        if content is None:
            continue
        try:
            text, found = read(content)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            unread.append(name)
            continue
        if text:
            sections.append(text)
            results += found
    return Figures(
        section="\n\n".join(["## Measured", *sections]) if sections else "", results=results, unread=unread
    )


DISTANCES = {"kad": "KAD", "frechet": "Fréchet distance"}
EMBEDDINGS = {"encodec": "EnCodec", "clap": "CLAP"}
Read = tuple[str, list[Mapping[str, object]]]


def _score(score: object) -> Read:
    """Distances between generated and held-out sound. Raises KeyError and the like for a file of another kind."""
    values = _of_format(score, "musicgen-trainer score", 1)
    rows, results = [], list[Mapping[str, object]]()
    for key, embedding in values["embeddings"].items():
        for name, found in embedding["distances"].items():
            label = f"{DISTANCES.get(name, name)}, {EMBEDDINGS.get(key, key)}"
            rows.append(
                f"| {_cell(label)} | {_interval(found['base'])} | {_interval(found['tuned'])} |"
                f" {_interval(found['difference'])} | {_cell(found['verdict'] or 'not told apart')} |"
            )
            results.append({"type": f"{name}_{key}", "value": round(float(found["tuned"][0]), 6), "name": label})
    few = " With fewer than 50 clips such distances say little." if values["few"] else ""
    text = (
        f"Distances of {int(values['generated'])} generated sounds of {float(values['seconds']):g} s from"
        f" {int(values['clips'])} clips that were not trained on, each with its 95 % interval; less is nearer.{few}\n\n"
        "| distance | base | fine-tuned | difference | verdict |\n|---|---|---|---|---|\n" + "\n".join(rows)
    )
    return (text, results) if rows else ("", [])


def _recall(recall: object) -> Read:
    """How much of its clips the model plays back. The older format, a list, has no such figures: ("", [])."""
    if isinstance(recall, list):
        return "", []
    rows = []
    for row in _of_format(recall, "musicgen-trainer recall", 2)["memorisation"]["rows"]:
        first = row["first_codebook"]
        shares = [_share(first[name]) for name in ("exact", "partial", "equal", "chance")]
        cells = [row["group"], row["model"], f"{float(row['prompt_seconds']):g} s", int(row["clips"]), *shares]
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
    if not rows:
        return "", []
    text = (
        "Memorisation: clips were continued greedily from their first seconds and their caption. Exact and partial are"
        " shares of\nclips of which all, or 80 % or more, of the first codebook's codes came out as they are; chance is"
        " what other clips\nhave in common.\n\n"
        "| clips | training | given | number | exact | partial | equal codes | chance |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(rows)
    )
    return text, []


def _of_format(values: object, name: str, version: int) -> dict[str, Any]:
    if not isinstance(values, dict) or (values["format"], values["version"]) != (name, version):
        raise ValueError(f"no {name} of version {version}")
    return values


def _share(found: float | None) -> str:
    """Chance is not known where there is one clip of a kind alone."""
    return "-" if found is None else f"{100 * float(found):.1f} %"


def _interval(found: Sequence[float]) -> str:
    value, low, high = (f"{float(one):.4g}" for one in found)
    return f"{value} ({low} to {high})"


def _cell(value: object) -> str:
    """A value as text that breaks no table and is no HTML."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|")
