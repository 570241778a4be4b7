"""Metrics are read on as if they were read anew, and thinned curves keep their extremes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report.made_runs import line, validation
from trainer.report.curves import smoothed, thinned
from trainer.report.run_metrics import Columns, Metrics
from trainer.run.metrics import Tracker


def same(one: Columns, other: Columns) -> bool:
    names = [*one._columns]
    columns = all(np.array_equal(one[name], other[name], equal_nan=True) for name in names)
    codebooks = zip(one.per_codebook, other.per_codebook, strict=True)
    return columns and all(np.array_equal(a, b, equal_nan=True) for a, b in codebooks)


def check_as_if_anew(metrics: Metrics) -> None:
    metrics.read_on()
    anew = Metrics(metrics.path)
    anew.read_on()
    assert same(metrics.training, anew.training) and same(metrics.validation, anew.validation)


GARBLED = (b"{\n", b"\xff\0\n", b"[1]\n", b'{"step": "x", "loss": 1}\n', b'{"step": 7, "loss": NaN}\n', b"\n",
           b'{"step": 8, "loss": "x", "loss_per_codebook": [1, null, 3]}\n',
           b'{"step": 9, "loss": %s}\n' % (b"9" * 400),
           )  # fmt: skip
pieces = st.lists(
    st.one_of(
        st.integers(1, 500).map(lambda step: line(step).encode()),
        st.integers(1, 500).map(lambda step: validation(step, step / 7).encode()),
        st.sampled_from(GARBLED),
        st.sampled_from((b"READ", b"CUT")),
    ),
    max_size=30,
)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(pieces, st.integers(1, 300))
def test_reading_on_gives_what_reading_anew_gives(parts: list[bytes], cut: int) -> None:
    """Whatever is added, in halves of lines too, and whatever is cut off meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        metrics = Metrics(path)
        check_as_if_anew(metrics)  # there is none yet
        for part in parts:
            if part == b"READ":
                check_as_if_anew(metrics)
            elif part == b"CUT" and path.exists():
                path.write_bytes(path.read_bytes()[: -min(cut, path.stat().st_size)])
            else:
                for half in (part[: len(part) // 2], part[len(part) // 2 :]):
                    with path.open("ab") as file:
                        file.write(half)
                    metrics.read_on()
        check_as_if_anew(metrics)


def test_what_a_resumed_run_reports_anew_replaces_what_it_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step) for step in range(1, 31)))
    metrics = Metrics(path)
    metrics.read_on()
    tracker = Tracker(path, start_step=20, external=None)
    for step in range(21, 41):  # longer than before, and each line of the same length
        tracker.log({"step": step, "loss": 1.0})
    tracker.close()
    check_as_if_anew(metrics)
    assert metrics.training["step"].tolist() == list(range(1, 41))
    assert set(metrics.training["loss"][20:]) == {1.0}


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(np.nan), max_size=400), st.integers(4, 60))
def test_a_thinned_curve_keeps_its_extremes_and_its_order(values: list[float], most: int) -> None:
    steps, column = np.arange(len(values), dtype=float), np.array(values)
    x, y = thinned(steps, column, most)
    finite = column[np.isfinite(column)]
    assert len(x) <= most and np.all(np.diff(x) > 0)
    assert np.array_equal(column[x.astype(int)], y)
    if len(finite):
        assert y.min() == finite.min() and y.max() == finite.max()


def test_one_spike_among_100_000_steps_stays() -> None:
    values = np.zeros(100_000)
    values[56_789] = 9.0
    x, y = thinned(np.arange(100_000.0), values)
    assert len(x) <= 2_000 and 56_789 in x and y.max() == 9.0 and (x[0], x[-1]) == (0, 99_999)


def test_a_smoothed_curve_is_the_weighted_mean_around_each_value() -> None:
    draw = np.random.default_rng(0)
    for count, places in ((250, (0, 1, 57, 249)), (60_000, (0, 31_234, 59_999))):
        values, decay = draw.normal(size=count), 1 - 2 / (count / 50)
        for at in places:
            weights = decay ** np.abs(np.arange(count) - at)
            assert np.isclose(smoothed(values)[at], (weights * values).sum() / weights.sum())
    known = np.array([np.nan, 3.0, np.nan, 3.0, np.nan])
    assert np.allclose(smoothed(known), [np.nan, 3, 3, 3, np.nan], equal_nan=True)
    few = draw.normal(size=90)
    assert np.allclose(smoothed(few), few, atol=1e-4) and len(smoothed(few[:0])) == 0


def test_a_smoothed_curve_runs_along_one_that_falls_by_decades() -> None:
    falling = 10 ** -np.linspace(0, 5, 1_001)
    # At the ends half of the weights are missing: there it lags by their mean distance, 10 steps of 0.005 decades.
    decades = np.abs(np.log10(smoothed(falling) / falling))
    assert decades[100:-100].max() < 0.01 and decades.max() < 0.06
