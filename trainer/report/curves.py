"""The curves of runs, thinned for a page so that every spike stays visible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

MOST_POINTS = 2_000
SMOOTHED_OVER = 50  # a value of the smoothed curve averages over about one in so many of all points


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points of a curve (4 or more): its ends, and the lowest and the highest of equal parts, in order.
    NaN is left out.

    steps, values  (n,) float64
    """
    finite = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) <= most:
        return steps, values
    edges = np.linspace(0, len(values), max(1, most // 2 - 1) + 1).astype(int)
    chosen = {0, len(values) - 1}
    for start, stop in pairwise(edges):
        part = values[start:stop]
        chosen |= {int(start + part.argmin()), int(start + part.argmax())}
    kept = sorted(chosen)
    return steps[kept], values[kept]


def smoothed(values: np.ndarray) -> np.ndarray:
    """The average around each value, over about a SMOOTHED_OVER-th of all; NaN is passed over, but stays at the ends.

    Weights fall exponentially to both sides. An average of what came before alone lies far above a loss that falls by
    decades, on an axis that shows them.
    """
    known = np.isfinite(values)
    terms = np.stack([np.where(known, values, 0.0), known.astype(float)])
    before, after = _decaying_sums(terms), _decaying_sums(terms[:, ::-1])[:, ::-1]
    sums = before + after - terms  # of values and of weights
    inside = (before[1] > 0) & (after[1] > 0)
    return np.divide(sums[0], sums[1], out=np.full(len(values), np.nan), where=inside)


def _decaying_sums(terms: np.ndarray) -> np.ndarray:
    """Of each row, the sum up to each place, in which a term counts the less the more terms lie behind it."""
    count = terms.shape[1]
    decay = max(1e-6, 1 - 2 * SMOOTHED_OVER / max(1, count))
    sums, before = np.zeros_like(terms), np.zeros((len(terms), 1))
    # A sum of decay^(i - j) x_j is decay^i times a sum of decay^-j x_j: in blocks, over which the power stays finite.
    block = max(1, int(20 / (1 - decay)))
    for start in range(0, count, block):
        part = terms[:, start : start + block]
        powers = decay ** np.arange(part.shape[1])
        sums[:, start : start + block] = powers * (decay * before + np.cumsum(part / powers, axis=1))
        before = sums[:, start + part.shape[1] - 1, None]
    return sums


def series(name: str, steps: np.ndarray, values: np.ndarray, kind: str, colour: int, most: int) -> dict[str, Any]:
    """A curve as the page's program reads it.

    kind    raw (faint), line, dashed, or dots (a line with a dot for each value)
    colour  number of the page's colour
    """
    steps, values = thinned(steps, values, most)
    return {
        "name": name, "kind": kind, "colour": colour,
        "x": [int(step) for step in steps], "y": [float(f"{value:.6g}") for value in values],
    }  # fmt: skip


def chart(title: str, made: Sequence[dict[str, Any]], **options: object) -> dict[str, Any] | None:
    """A chart of those series that have a point; None without one.

    options  unit: what stands behind values; log: whether its axis starts as a logarithmic one; zero: whether it
             starts at 0; marks: [[step, text]] to be drawn as vertical lines
    """
    shown = [one for one in made if one["x"]]
    return {"title": title, "series": shown, **options} if shown else None


def spans_decades(*columns: np.ndarray) -> bool:
    """Whether values are better shown on a logarithmic axis: all above 0, and the typical ones far apart."""
    values = np.concatenate([column[np.isfinite(column)] for column in columns])
    if not len(values) or values.min() <= 0:
        return False
    low, high = np.quantile(values, [0.02, 0.98])
    return bool(high > 20 * low)
