"""What several people judged, joined: exact numbers of the sign test, means with their interval, and refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import DataError
from trainer.report.blind_score import fixed, mean_and_reach, preference, read_saved, score, sign_test, table

SIDES = ("models, step 0 (before training)", "models, step 120")


def saved(
    path: Path, judged: list[tuple[str | None, tuple[int | None, ...]]], *,
    sides: tuple[str, ...] = SIDES, **values: Any,
) -> Path:
    """A file as the page saves it: for each prompt the choice, and the marks in the order of the sides."""
    judgements = []
    for number, (choice, marks) in enumerate(judged):
        sounds = [{"shown": "AB"[side % 2], "side": name, "file": "01.flac", "mark": mark}
                  for side, (name, mark) in enumerate(zip(sides, marks, strict=True))]  # fmt: skip
        order = sounds if number % 2 else sounds[::-1]  # as they were shown, which must not matter
        judgements.append({"prompt": "x", "seed": 0, "sounds": order, "choice": choice, "note": ""})
    whole = {
        "format": "musicgen-trainer listening", "version": 1, "page": "p", "seed": 0, "session": path.stem,
        "listener": path.stem, "saved": 1.0, "revealed": False, "sides": [{"name": side} for side in sides],
        "judgements": judgements,
    }  # fmt: skip
    path.write_text(json.dumps(whole | values))
    return path


def test_the_sign_test_counts_all_outcomes_of_coins() -> None:
    for wins, losses in itertools.product(range(7), range(7)):
        n = wins + losses
        uneven = [abs(2 * sum(coins) - n) >= abs(wins - losses) for coins in itertools.product((0, 1), repeat=n)]
        assert sign_test(wins, losses) == pytest.approx(sum(uneven) / 2**n, rel=1e-12)
    # From a table of the binomial distribution with p = 1/2: 5 of 5, 6 of 6, 9 of 10, 15 of 20.
    for wins, losses, p in ((5, 0, 0.0625), (6, 0, 0.03125), (1, 9, 0.021484375), (15, 5, 0.04138946533203125)):
        assert sign_test(wins, losses) == p
    assert 0 < sign_test(2_000, 1_500) < 1e-15


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    assert mean_and_reach([1, 2, 3, 4, 5]) == (3.0, pytest.approx(1.96 * (2.5 / 5) ** 0.5))
    assert mean_and_reach([4]) == (4.0, None)


def test_numbers_are_written_as_a_browser_writes_them() -> None:
    assert [fixed(value, 3) for value in (0.0625, 1.0, 0.0004, 1.0005)] == ["0.063", "1.000", "0.000", "1.000"]
    assert fixed(3.125, 2) == "3.13"  # and 1.0005 lies below 1.0005, as a binary number


def test_files_of_several_listeners_are_joined(tmp_path: Path) -> None:
    base, tuned = SIDES
    anna = [(tuned, (1, 4)), (tuned, (2, 5)), ("no difference", (3, 3)), (None, (None, None))]
    ben = [(base, (4, None)), (tuned, (None, None)), (None, (2, 3)), (tuned, (1, 1))]
    files = [saved(tmp_path / "anna.json", anna), saved(tmp_path / "ben.json", ben)]
    outcome = score([read_saved(file) for file in files])
    assert outcome.judged == {"anna": 3, "ben": 4}
    assert [(one.side, one.chosen, one.marks) for one in outcome.sides] == [
        (base, 1, (1, 2, 3, 4, 2, 1)), (tuned, 4, (4, 5, 3, 3, 1)),
    ]  # fmt: skip
    [pair] = outcome.pairs
    # (2, 3) without a choice counts by its marks, (1, 1) with one does not.
    assert (pair.first_better, pair.second_better, pair.ties) == (1, 5, 1)
    assert pair.p == sign_test(1, 5) == 14 / 64
    said = table(outcome)
    assert "judgements: 7 (anna 3, ben 4)" in said
    [line] = [line for line in said.splitlines() if line.startswith(tuned)]
    assert line.split() == [*tuned.split(), "4", "5", "3.20", "+-", "1.30"]
    assert said.splitlines()[-1].split() == [*f"{base} against {tuned}".split(), "1", "5", "1", "0.219"]


def test_of_three_sides_each_pair_counts_by_choices_and_else_by_marks(tmp_path: Path) -> None:
    sides = ("a", "b", "c")
    path = saved(tmp_path / "x.json", [("a", (1, 2, 5)), ("c", (2, 4, None)), ("b", (None,) * 3)], sides=sides)
    one = read_saved(path)
    assert [preference(judgement, "a", "b") for judgement in one.judgements] == [1, -1, -1]
    assert [preference(judgement, "b", "c") for judgement in one.judgements] == [-1, -1, 1]
    assert [preference(judgement, "a", "c") for judgement in one.judgements] == [1, -1, None]
    assert [(pair.first, pair.second) for pair in score([one]).pairs] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_a_second_file_of_the_same_listener_takes_the_place_of_the_first(tmp_path: Path) -> None:
    older = saved(tmp_path / "old.json", [(SIDES[0], (None, None))], session="s", saved=1.0)
    newer = saved(tmp_path / "new.json", [(SIDES[1], (None, None))], session="s", saved=2.0)
    for files in ((older, newer), (newer, older)):
        outcome = score([read_saved(file) for file in files])
        assert (outcome.pairs[0].first_better, outcome.pairs[0].second_better) == (0, 1)
        assert "old.json is left out" in outcome.notes[0]


def test_pages_of_other_orders_are_joined_and_other_sides_are_refused(tmp_path: Path) -> None:
    one = saved(tmp_path / "one.json", [(SIDES[0], (1, 2))])
    turned = saved(tmp_path / "two.json", [(SIDES[0], (2, 1))], sides=SIDES[::-1], page="q")
    outcome = score([read_saved(one), read_saved(turned)])
    assert [side.marks for side in outcome.sides] == [(1, 1), (2, 2)]
    assert outcome.notes == ("the files are of different pages that compare the same sides",)
    other = saved(tmp_path / "three.json", [("x", (1, 2))], sides=("x", "y"))
    with pytest.raises(DataError, match="compare different things"):
        score([read_saved(one), read_saved(other)])


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"}, {"version": 2}, {"judgements": None}, {"sides": "x"}, {"saved": None},
        {"judgements": [{"choice": "x", "sounds": []}]}, {"judgements": [{"choice": None, "sounds": []}]},
        {"judgements": [{"choice": None, "sounds": [{"side": side, "mark": 6} for side in SIDES]}]},
        {"judgements": [{"choice": None, "sounds": [{"side": side, "mark": True} for side in SIDES]}]},
    ],
)  # fmt: skip
def test_a_file_that_no_page_has_saved_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = saved(tmp_path / "x.json", [(SIDES[0], (1, 2))])
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(DataError, match=r"x\.json is no file that a listening page has saved"):
        read_saved(path)


def test_a_file_that_is_not_there_or_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "y.json").write_bytes(b"\xff\x00")
    for name in ("absent.json", "y.json"):
        with pytest.raises(DataError, match=rf"{name} is no file that a listening page"):
            read_saved(tmp_path / name)
