"""A folder of Arrow parts: complete or absent, appended by many, mapped when read."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.odd_mount import odd_mount
from trainer.data import arrow_store
from trainer.data.arrow_store import PART, PARTIAL, Store

ROOT = Path(__file__).resolve().parents[2]

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["trainer.data.cache", "trainer.model.debug_model"])  # the same in every test file


def number_store(folder: Path) -> Store:
    return Store(folder, {"number": pa.int64(), "payload": pa.large_binary()})


def number_row(number: int, size: int = 100) -> dict:
    return {"key": str(number), "number": number, "payload": bytes([number % 256]) * size}


def parts(folder: Path) -> int:
    return len(list(folder.glob(f"*{PART}")))


def test_rows_come_back_whatever_the_parts(tmp_path: Path) -> None:
    store, number = number_store(tmp_path), 0
    assert store.keys() == set() and store.open().index == {}
    for count in (1, 5, 0, 3):
        store.append([number_row(number + row, size=10 * (number + row)) for row in range(count)])
        number += count
    store.append([number_row(2, size=77)])  # written twice: the first counts
    rows = store.open()
    payloads = rows.binaries("payload")
    numbers = rows.integers("number")
    for key in range(number):
        row = rows.index[str(key)]
        assert numbers[row] == key
        assert payloads[row].to_pybytes() == number_row(key, size=10 * key)["payload"]


@pytest.mark.parametrize("damage", ["empty", "header", "body", "zeros", "garbage", "offsets", "columns"])
def test_a_damaged_part_is_named_and_its_rows_count_as_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    store = number_store(tmp_path)
    store.append([number_row(0), number_row(1)])
    store.append([number_row(2), number_row(3)])
    part = sorted(tmp_path.iterdir())[0]
    content = part.read_bytes()
    if damage == "columns":
        other = Store(tmp_path / "other", {"different": pa.int64()})
        other.append([{"key": "0", "different": 1}])
        content = next((tmp_path / "other").iterdir()).read_bytes()
    noise = np.random.default_rng(0).bytes(len(content))
    ends = np.array([0, 100, 200], np.int64)  # of the payloads
    assert ends.tobytes() in content or damage == "columns"
    beyond = np.array([0, 100, 10**9], np.int64)
    part.write_bytes(
        {
            "empty": b"",
            "header": content[:100],
            "body": content[:-150],
            "zeros": b"\0" * len(content),
            "garbage": noise,
            "offsets": content.replace(ends.tobytes(), beyond.tobytes()),
            "columns": content,
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert store.keys() == {"2", "3"}
    assert part.name in caplog.text and "damaged" in caplog.text
    caplog.clear()
    store.append([number_row(0), number_row(1)])
    assert store.keys() == {"0", "1", "2", "3"}
    assert caplog.text == "", "reported again"


def test_finished_rows_are_kept_where_a_later_one_raises(tmp_path: Path) -> None:
    store = number_store(tmp_path)

    def rows() -> Iterator[dict]:
        yield number_row(0)
        yield number_row(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.append_all(rows())
    assert store.keys() == {"0", "1"}


def test_rows_wait_for_a_part_by_time_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = number_store(tmp_path)
    monkeypatch.setattr(arrow_store, "FLUSH_BYTES", 1000)
    store.append_all(number_row(number, size=400) for number in range(7))
    assert parts(tmp_path) == 3  # three rows pass 1000 bytes: 3 + 3 + 1
    monkeypatch.setattr(arrow_store, "FLUSH_SECONDS", 0.0)
    store.append_all(number_row(number) for number in range(7, 10))
    assert parts(tmp_path) == 3 + 3


def an_hour_old(path: Path) -> None:
    os.utime(path, (time.time() - 3700,) * 2)


def test_only_abandoned_partial_files_are_removed(tmp_path: Path) -> None:
    store = number_store(tmp_path)
    store.append([number_row(0)])
    abandoned = tmp_path / (arrow_store._new_stem() + PARTIAL)
    abandoned.write_bytes(b"half")
    an_hour_old(abandoned)
    with arrow_store._locked(tmp_path / (arrow_store._new_stem() + PARTIAL)) as file:
        an_hour_old(Path(file.name))
        assert store.keys() == {"0"}
        assert not abandoned.exists()
        assert Path(file.name).exists()
    assert store.keys() == {"0"}
    assert not Path(file.name).exists()


def test_what_another_machine_may_be_writing_is_left_alone(tmp_path: Path) -> None:
    """Where locks do not reach it, only its age tells a partial file that a kill left from one in hand."""
    number_store(tmp_path).append([number_row(0)])
    in_hand = tmp_path / (arrow_store._new_stem() + PARTIAL)
    in_hand.write_bytes(b"half")
    assert number_store(tmp_path).keys() == {"0"}
    assert in_hand.exists()


def test_files_of_other_names_are_neither_read_nor_set_aside_nor_removed(tmp_path: Path) -> None:
    store = number_store(tmp_path)
    store.append([number_row(0)])
    part = next(tmp_path.iterdir())
    (tmp_path / "mine.arrow").write_bytes(b"no table")
    (tmp_path / f"{part.stem} (copy).arrow").write_bytes(part.read_bytes())
    (tmp_path / "mine.partial").write_bytes(b"x")
    an_hour_old(tmp_path / "mine.partial")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert store.keys() == {"0"} and len(store.open().table) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


APPEND = """
import sys
from pathlib import Path
from tests.data.test_arrow_store import number_row, number_store

def rows():
    print("a row was made")
    yield number_row(0)

number_store(Path(sys.argv[1])).append_all(rows())
"""


@pytest.mark.parametrize(
    "lacks,named",
    [
        ("rename_file", "renaming a file fails here: Function not implemented"),
        ("file_fsync", "flushing a file (fsync) fails here: Invalid argument"),
        ("append rename_folder chmod link locks folder_fsync=EINVAL", None),
    ],
)
def test_a_cache_needs_whole_files_alone_and_says_what_its_mount_lacks(
    lacks: str, named: str | None, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", APPEND, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **odd_mount(lacks)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    if named is None:
        assert done.returncode == 0 and number_store(tmp_path).keys() == {"0"}, done.stderr
    else:
        assert done.stdout == "" and done.returncode == 1
        assert f"StorageError: cache folder {tmp_path}: it cannot be written: {named}" in done.stderr


def append_many(folder: Path, first: int) -> None:
    store = number_store(folder)
    for number in range(first, first + 10):
        store.append([number_row(number)])
        store.keys()


def test_processes_append_at_once_without_losing_rows(tmp_path: Path) -> None:
    writers = [processes.Process(target=append_many, args=(tmp_path, first)) for first in (0, 10, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert number_store(tmp_path).keys() == {str(number) for number in range(30)}
