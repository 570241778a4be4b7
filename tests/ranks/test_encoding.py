"""Ranks share the encoding: every clip once, whoever dies meanwhile, and what one finds all know."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path

import datasets
import pytest

from tests.ranks.launches import ends, launch, send, start, wait_until
from tests.runs import few_clips
from trainer.errors import EXIT_DATA

CLIPS = ("arcade_return_home", "metal_madness", "rock_feelings", "arcade_meadow")
ONE_STEP = ("--max_steps", "1", "--strategy", "ddp")


def keys_of_parts(folder: Path, what: str) -> list[list[str]]:
    """The keys of each part of a cache: one part a rank and start, in these short runs."""
    parts = sorted((folder / "cache" / what).rglob("*.arrow"), key=lambda path: path.stat().st_mtime)
    return [datasets.Dataset.from_file(str(part))["key"][:] for part in parts]


def test_each_clip_and_caption_is_encoded_once_and_the_work_is_shared(tmp_path):
    few_clips(tmp_path / "data")
    launch(tmp_path, *ONE_STEP)
    for what in ("codes", "text"):
        parts = keys_of_parts(tmp_path, what)
        assert sorted(len(part) for part in parts) == [1, 2]
        assert len({key for part in parts for key in part}) == 3


def slow_after_the_first_clip() -> None:
    """Each clip is a part of its own, and rank 1 takes long over its second."""
    from trainer.data import arrow_store, cache

    arrow_store.FLUSH_BYTES = 1
    encode = cache.encode
    done: list[None] = []

    def slowly(*arguments, **named):
        if done and os.environ["RANK"] == "1":
            time.sleep(60)
        done.append(None)
        return encode(*arguments, **named)

    cache.encode = slowly  # type: ignore[assignment]


@pytest.mark.parametrize("victims", [(1,), pytest.param((0, 1), marks=pytest.mark.full)])
def test_a_kill_while_encoding_costs_only_the_clip_in_hand(victims, tmp_path):
    few_clips(tmp_path / "data", CLIPS)
    flags = (*ONE_STEP, "--timeout_minutes", "0.1")
    running = start(tmp_path, *flags, change=slow_after_the_first_clip)
    wait_until(running, lambda: len(list((tmp_path / "cache/codes").rglob("*.arrow"))) == 3)
    for rank in victims:
        send(running, rank, signal.SIGKILL)
    ended = ends(running, tmp_path, 30)
    if victims == (1,):
        assert ended[0][0] == 1 and "rank 1 on" in ended[0][1] and "the same command resumes" in ended[0][1]
    launch(tmp_path, *flags)
    parts = keys_of_parts(tmp_path, "codes")
    assert [len(part) for part in parts] == [1, 1, 1, 1]
    assert len({key for part in parts for key in part}) == 4


def a_clip_of_rank_1_vanishes() -> None:
    """Between scan and encoding: the second longest, which is rank 1's first."""
    from trainer.data import cache

    fill_codes = cache.fill_codes

    def later(store, clips, *arguments, **named):
        if os.environ["RANK"] == "1":
            rows = zip(clips["seconds"], clips["content"], clips["path"], strict=True)
            _, _, second = sorted(rows, key=lambda row: (-row[0], row[1]))[1]
            os.unlink(Path("data") / second)
        return fill_codes(store, clips, *arguments, **named)

    cache.fill_codes = later


def test_a_file_that_fails_on_one_rank_is_left_out_and_told_by_all(tmp_path):
    few_clips(tmp_path / "data")
    ended = ends(start(tmp_path, *ONE_STEP, change=a_clip_of_rank_1_vanishes), tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    with open(tmp_path / "models/dataset.csv", newline="", encoding="utf-8") as file:
        fates = {row["path"]: row["fate"] for row in csv.DictReader(file)}
    gone = {name for name in fates if not (tmp_path / "data" / name).exists()}
    assert len(gone) == 1 and {fates[name] for name in gone} == {"unreadable"}
    assert sorted(fates.values()) == ["unreadable", "used", "used"]


def test_no_usable_clip_ends_all_ranks_with_its_code(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/notes.txt").write_text("no sound")
    for code, output in ends(start(tmp_path, *ONE_STEP), tmp_path):
        assert code == EXIT_DATA and "error: " in output and "Traceback" not in output, output
