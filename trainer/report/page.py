"""dataset.html: one file with figures, plots, and a table that sorts, filters and plays, without any request.

How text reaches it, escaped: trainer/report/template.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from trainer.data.fates import FATE_KINDS
from trainer.report.mending import marks_of
from trainer.report.plots import histogram
from trainer.report.rows import Row
from trainer.report.template import rendered

if TYPE_CHECKING:
    from trainer.report.excerpts import Sample

# What the table's program reads of each row, in this order. page.js has the same names.
COLUMNS = (
    *("path", "fate", "detail", "use", "link", "unplayed", "format", "seconds", "sample_rate_hz", "channels"),
    *("loudness_lufs", "treated_lufs", "caption", "source", "unknown", "near"),
)
FEW = 12  # rows of a table of counts that are shown


def page_of(report: Mapping[str, Any], rows: Sequence[Row], excerpts: Mapping[str, Sample]) -> str:
    """The page as text. excerpts: by the path of a row."""
    return rendered(
        "page.html",
        styles=("base.css", "page.css"),
        programs=("page.js",),
        data={
            "columns": [*COLUMNS, "marks"],
            "rows": [[*(getattr(row, name) for name in COLUMNS), marks_of(row)] for row in rows],
            "excerpts": {path: [sample.start_seconds, sample.mp3] for path, sample in excerpts.items()},
        },
        report=report,
        figures=report["figures"],
        findings=report["mend_first"],
        plots=_plots([row for row in rows if row.use]),
        fates=[kind for kind in FATE_KINDS if kind in report["figures"]["fates"]],
        marks=[(one["key"], one["title"]) for one in report["mend_first"] if one["key"] and ":" not in one["key"]],
        excerpts=len(excerpts),
        top=_top,
    )


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


def _top(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """The largest of some counts with their share of the largest, and all others as one."""
    items = list(counts.items())
    if len(items) > FEW:
        items = [*items[: FEW - 1], ("others", sum(count for _, count in items[FEW - 1 :]))]
    most = max((count for _, count in items), default=1)
    return [(name, count, count / most) for name, count in items]
