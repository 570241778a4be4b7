"""Ranks share the encoding: every clip once, whoever dies meanwhile, and what one finds all know."""

from __future__ import annotations

import csv
import glob
import os
import signal
import sys
import time
from pathlib import Path

import datasets
import pytest
import soundfile

from tests.ranks.launches import ends, launch, send, start, wait_until
from tests.runs import FEW, few_clips
from trainer.errors import EXIT_DATA

CLIPS = ("arcade_return_home", "metal_madness", "rock_feelings", "arcade_meadow")
HELD = ("arcade_meadow", "metal_chaosland")  # clips that validate, in a folder of their own
FOLDERS = ("data", "held")
ONE_STEP = ("--max_steps", "1", "--strategy", "ddp")


def keys_of_parts(folder: Path, what: str) -> list[list[str]]:
    """The keys of each part of a cache: one part a rank and start, in these short runs."""
    parts = sorted((folder / "cache" / what).rglob("*.arrow"), key=lambda path: path.stat().st_mtime)
    return [datasets.Dataset.from_file(str(part))["key"][:] for part in parts]


def second_longest(folder: Path) -> Path:
    """The sound that is the second rank's first to encode."""
    return sorted(folder.glob("*.wav"), key=lambda path: -soundfile.info(path).duration)[1]


def noting_what_is_looked_at() -> None:
    """Each rank writes what it opens, lists or asks the size of below data/ and held/ into a file of its own."""
    folders = tuple(os.path.join(os.getcwd(), name) for name in FOLDERS)
    notes = os.open(f"seen-{os.environ['RANK']}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    stat = os.stat

    def note(what: str, path: object) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            whole = os.path.abspath(os.fsdecode(path))
            if whole.startswith(folders):
                os.write(notes, f"{what} {os.path.relpath(whole)}\n".encode())

    def noting(event: str, arguments: tuple) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            note(event, arguments[0])

    # Whether a folder is a prepared one, every rank asks by these names; a folder of music has none of them.
    signs = {os.path.join(folder, name) for folder in folders for name in ("prepared.json", "clips.parquet", "codes")}

    def noting_stat(path, *arguments, **named):  # Python audits no stat
        if os.fspath(path) not in {*folders, *signs}:  # which the flags' check resolves on every rank
            note("stat", path)
        return stat(path, *arguments, **named)

    sys.addaudithook(noting)
    os.stat = noting_stat


def looked_at(folder: Path, rank: int) -> dict[str, list[str]]:
    """Files and folders that a rank opened, listed, and asked the size of, each once."""
    lines = [line.split(" ", 1) for line in (folder / f"seen-{rank}").read_text().splitlines()]
    names = {"open": ("open",), "list": ("os.listdir", "os.scandir"), "stat": ("stat",)}
    return {kind: sorted({path for event, path in lines if event in events}) for kind, events in names.items()}


def test_the_work_is_shared_and_only_the_first_rank_looks_at_what_is_not_its_share(tmp_path):
    few_clips(tmp_path / "data")
    few_clips(tmp_path / "held", HELD)
    sounds = {f"data/{name}.wav" for name in FEW} | {f"held/{name}.wav" for name in HELD}
    captions = {name.replace(".wav", ".txt") for name in sounds}
    nothing = {"open": [], "list": [], "stat": []}
    flags = (*ONE_STEP, "--validation", "held")

    def run(output: str) -> list[dict[str, list[str]]]:
        running = start(tmp_path, *flags, "--output_dir", output, change=noting_what_is_looked_at)
        ended = ends(running, tmp_path, 120)
        assert [code for code, _ in ended] == [0, 0], ended
        return [looked_at(tmp_path, rank) for rank in (0, 1)]

    first, other = run("models")
    assert set(first["open"]) >= sounds | captions and {"data", "held"} <= set(first["list"])
    for what, shares in (("codes", [1, 1, 1, 2]), ("text", [2, 3])):  # each folder is shared out by itself
        parts = keys_of_parts(tmp_path, what)
        assert sorted(len(part) for part in parts) == shares
        assert len({key for part in parts for key in part}) == 5
    # The longest is the first rank's, the next the other's, and so on.
    share = [second_longest(tmp_path / folder) for folder in FOLDERS]
    share = [os.path.relpath(path, tmp_path) for path in share]
    assert other == {"open": share, "list": [], "stat": share}
    for folder in FOLDERS:
        of_folder = {os.fsencode(tmp_path / name) for name in sounds if name.startswith(folder)}
        assert set(paths_in_table(tmp_path, folder)) == of_folder

    first, other = run("again")
    assert other == nothing
    assert not sounds & set(first["open"]) and captions <= set(first["open"])


def paths_in_table(folder: Path, data: str) -> list[bytes]:
    """The paths in the one table of clips that is of this data folder."""
    start = os.fsencode(folder / data)
    tables = [datasets.Dataset.from_file(str(path)) for path in (folder / "cache/scan").glob("clips-*.arrow")]
    (found,) = [table["path_bytes"][:] for table in tables if table["path_bytes"][0].startswith(start)]
    return found


def slow_after_the_first_clip() -> None:
    """Each clip is a part of its own, and rank 1 takes long over its second."""
    from trainer.data import arrow_store, cache

    arrow_store.FLUSH_BYTES = 1
    encode_tracks = cache.encode_tracks

    def slowly(*arguments, **named):
        for number, track in enumerate(encode_tracks(*arguments, **named)):
            if number == 1 and os.environ["RANK"] == "1":
                time.sleep(60)
            yield track

    cache.encode_tracks = slowly  # type: ignore[assignment]


@pytest.mark.parametrize("victims", [(1,), pytest.param((0, 1), marks=pytest.mark.full)])
def test_a_kill_while_encoding_costs_only_the_clip_in_hand(victims, tmp_path):
    few_clips(tmp_path / "data", CLIPS)
    flags = (*ONE_STEP, "--timeout_minutes", "0.1")
    running = start(tmp_path, *flags, change=slow_after_the_first_clip)
    # Not rglob, which raises where a folder goes away under it, as those in which a store tries its disk.
    wait_until(running, lambda: len(glob.glob("cache/codes/*/*.arrow", root_dir=tmp_path)) == 3)
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
