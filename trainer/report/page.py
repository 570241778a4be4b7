"""dataset.html: one file with figures, plots, and a table that sorts, filters and plays, without any request.

Text reaches the page in two ways, both escaped: by jinja2 into the HTML, and as JSON in a script element, from which
the page's program takes it as text (textContent), never as HTML. A content security policy lets only that program run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from trainer.data.fates import FATE_KINDS
from trainer.report.mending import marks_of
from trainer.report.plots import histogram
from trainer.report.rows import Row

if TYPE_CHECKING:
    from trainer.report.excerpts import Sample

HERE = Path(__file__).parent
# What the table's program reads of each row, in this order. page.js has the same names.
COLUMNS = (
    *("path", "fate", "detail", "use", "link", "unplayed", "format", "seconds", "sample_rate_hz", "channels"),
    *("loudness_lufs", "treated_lufs", "caption", "source", "unknown", "near"),
)
FEW = 12  # rows of a table of counts that are shown


def page_of(report: Mapping[str, Any], rows: Sequence[Row], excerpts: Mapping[str, Sample]) -> str:
    """The page as text. excerpts: by the path of a row."""
    program = (HERE / "page.js").read_text(encoding="utf-8")
    data = {
        "columns": [*COLUMNS, "marks"],
        "rows": [[*(getattr(row, name) for name in COLUMNS), marks_of(row)] for row in rows],
        "excerpts": {path: [sample.start_seconds, sample.mp3] for path, sample in excerpts.items()},
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "top": _top, "share": lambda part, all_: f"{part / all_:.1%}"}
    return environment.get_template("page.html").render(
        report=report,
        figures=report["figures"],
        findings=report["mend_first"],
        plots=_plots([row for row in rows if row.use]),
        fates=[kind for kind in FATE_KINDS if kind in report["figures"]["fates"]],
        marks=[(one["key"], one["title"]) for one in report["mend_first"] if one["key"] and ":" not in one["key"]],
        excerpts=len(excerpts),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        program=Markup(program),
        program_hash=base64.b64encode(hashlib.sha256(program.encode()).digest()).decode(),
        data=_in_script(data),
    )


def _in_script(values: object) -> Markup:
    """JSON that no text in it can leave: it is ASCII, and <, > and & are escaped."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _plots(clips: Sequence[Row]) -> list[tuple[str, Markup]]:
    """Titles and <svg> elements of the histograms that have something to show."""
    loudness = [row.loudness_lufs for row in clips if row.loudness_lufs is not None]
    words = [float(row.words) for row in clips if row.words is not None]
    made = [
        ("Length of the clips", histogram(
            [row.seconds for row in clips if row.seconds], label="seconds", name="lengths", logarithmic=True)),
        ("Loudness of the files as they are", histogram(loudness, label="LUFS", name="loudness")),
        ("Words in captions", histogram(words, label="words", name="words")),
    ]  # fmt: skip
    return [(title, Markup(svg)) for title, svg in made if svg]


def _number(value: float) -> str:
    """1,234 and 0.0123 and 5.25 as a person reads them."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _top(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """The largest of some counts with their share of the largest, and all others as one."""
    items = list(counts.items())
    if len(items) > FEW:
        items = [*items[: FEW - 1], ("others", sum(count for _, count in items[FEW - 1 :]))]
    most = max((count for _, count in items), default=1)
    return [(name, count, count / most) for name, count in items]
