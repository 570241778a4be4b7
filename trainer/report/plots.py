"""Histograms as SVG text that stands inside a page, takes its colours from it, and is the same for the same values."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# Colours that are put in place of the page's, which a style sheet defines and matplotlib does not know.
COLOURS = {"#010101": "var(--ink)", "#020202": "var(--accent)", "#030303": "var(--line)"}
INK, ACCENT, LINE = COLOURS
MOST_BINS = 40


def histogram(values: Sequence[float], *, label: str, name: str, logarithmic: bool = False) -> str:
    """An <svg> with how many of `values` lie where; "" where fewer than two differ.

    name  unique on the page: the SVG's ids are made from it
    """
    if len(set(values)) < 2:
        return ""
    import matplotlib  # half a second, and only a page that is written needs it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    bins = min(MOST_BINS, max(8, round(len(values) ** 0.5)))
    edges = np.geomspace(low, high, bins + 1) if logarithmic and low > 0 else np.linspace(low, high, bins + 1)
    fonts = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    settings: dict[Any, Any] = {"svg.hashsalt": name, **fonts}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5, 2.1), layout="constrained")
        axes = figure.subplots()
        axes.hist(values, bins=edges.tolist(), color=ACCENT, edgecolor="none", rwidth=0.9)
        if logarithmic and low > 0:
            axes.set_xscale("log")
            ticks = np.unique([float(f"{tick:.1g}") for tick in np.geomspace(low, high, 6)])
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel(label, color=INK)
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # No metadata, whose links look like requests, and no fixed size: the page's width decides.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # HTML knows them
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="Histogram: {label}"', 1)
