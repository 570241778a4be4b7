"""A disk that will not suffice is told beforehand, in one line, and nothing fails where that cannot be known."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trainer.plan.disk import Place, bytes_of, place_of, told
from trainer.plan.forecast import Disk

DISK = Disk(cache=10**9, checkpoint=22 * 10**9, checkpoints=3, exports={"lm_final.pt": 8 * 10**9})


def place(folder: str, free: int | None, device: int = 1, **there: int) -> Place:
    return Place(folder=folder, free=free, device=device, there=there)


def test_a_disk_that_suffices_is_no_warning_and_one_byte_less_is() -> None:
    for cache in (place("cache", 10**9, 2), place("cache", 75 * 10**9, 1)):
        needed = 74 * 10**9 + (10**9 if cache.device == 1 else 0)
        assert len(told(DISK, place("models", needed), cache, cached=False)) == 1
        [line, warning] = told(DISK, place("models", needed - 1), cache, cached=False)
        assert line.startswith("disk: checkpoints 3 x 22 GB, exports 8.0 GB in models (")
        assert warning.startswith("warning: ") and "models" in warning and "\n" not in warning


def test_what_lies_there_already_is_not_needed_again() -> None:
    output = place("models", 8 * 10**9, checkpoints=66 * 10**9)
    assert len(told(DISK, output, place("cache", 0, 2, codes=10**9), cached=False)) == 1
    assert len(told(DISK, output, place("cache", 0, 2), cached=True)) == 1


def test_a_full_disk_of_the_cache_alone_names_the_cache() -> None:
    [_, warning] = told(DISK, place("models", 10**12), place("far/cache", 5, 2), cached=False)
    assert "far/cache" in warning and "--cache_dir" in warning and "--output_dir" not in warning


def test_a_disk_that_cannot_tell_is_no_reason_to_warn_or_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: str) -> None:
        raise OSError("no")

    monkeypatch.setattr(shutil, "disk_usage", fails)
    unknown = place_of("models")
    assert unknown.free is None
    [line] = told(DISK, unknown, place_of("cache"), cached=False)
    assert "free" not in line


def test_a_folder_that_is_not_there_has_the_disk_of_the_one_above_it(tmp_path: Path) -> None:
    below = place_of(str(tmp_path / "not/yet"), ["checkpoints"])
    assert below.device == tmp_path.stat().st_dev and below.there == {}
    assert below.free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_what_lies_in_a_folder_is_counted_whole(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-1").mkdir(parents=True)
    (tmp_path / "checkpoints/step-1/a").write_bytes(b"x" * 1000)
    (tmp_path / "checkpoints/b").write_bytes(b"x" * 24)
    (tmp_path / "lm_final.pt").write_bytes(b"x" * 7)
    assert place_of(str(tmp_path), ["checkpoints", "lm_final.pt", "huggingface"]).there == {
        "checkpoints": 1024, "lm_final.pt": 7,
    }  # fmt: skip
    assert bytes_of(str(tmp_path / "absent")) == 0
