"""What measures encoding on a GPU, run on this machine with a small codec: it adds up, and its claims hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import encoding
from benchmarks.encoding import Work

from tests.gpu.test_encoding_speed import (
    check_shares,
    compared,
    examples,
    melodies_compared,
    say_kinds,
    say_speed,
    songs,
)
from trainer.spec.encoding import EncodingPass

CPU = torch.device("cpu")


def test_a_cache_filled_from_files_is_measured_against_the_codec_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec, work = encoding.random_codec(CPU, filters=4, width=8), Work(clips=3, seconds=1.5, views=2, device=CPU)
    rows = encoding.measure(work, codec, tmp_path, rounds=1)
    assert [row["what"] for row in rows] == ["EnCodec alone", "the cache from wav", "the cache from mp3"]
    for row in rows:
        assert row["seconds_an_hour_and_view"] == pytest.approx(row["seconds"] * 3600 / (3 * 1.5 * 2))
        assert row["throughput_of_alone"] == pytest.approx(rows[0]["seconds"] / row["seconds"])
    alone, wav, mp3 = (row["core_seconds_of_sound"] for row in rows)
    assert alone < min(wav, mp3), "there are no files to read for the codec alone"
    say_speed(rows, "a CPU")
    assert capsys.readouterr().out.count("FIGURE") == 3


def test_stereo_and_melodies_are_measured_beside_mono(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec, work = encoding.random_codec(CPU, filters=4, width=8), Work(clips=2, seconds=1.5, views=2, device=CPU)
    rows = encoding.measure_kinds(work, codec, tmp_path, rounds=1)
    mono, stereo, *of_melodies = rows
    assert all("views" not in row for row in of_melodies) and len(of_melodies) == 2
    assert mono["of_mono"] == 1 and stereo["of_mono"] == pytest.approx(stereo["seconds"] / mono["seconds"])
    for row in rows:
        assert row["seconds_an_hour"] == pytest.approx(row["seconds"] * 3600 / (2 * 1.5))
    assert {path.name for path in (tmp_path / "cache1/codes").iterdir()} == {"benchmark-2", "benchmark-2-stereo"}
    assert (tmp_path / "cache1/melody").is_dir()
    say_kinds(rows, "a CPU")
    assert capsys.readouterr().out.count("FIGURE") == 4


def test_the_notes_of_a_device_are_compared_with_those_of_a_cpu() -> None:
    assert melodies_compared(CPU, examples()[:1]) == 1


@pytest.mark.parametrize("channels", [1, 2])
def test_the_codes_of_shared_passes_are_compared(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU's road, whose passes hold windows of several tracks."""
    size = EncodingPass(windows=3, window_seconds=0.4)
    monkeypatch.setattr(encoding, "encoding_pass", lambda **_: size)
    work = Work(clips=0, seconds=0, views=2, device=CPU, channels=channels)
    tracks = songs([0.3, 1.1, 2.0, 0.9], channels)
    shares = compared(encoding.random_codec(CPU, filters=4, width=8), work, tracks)
    assert len(shares) == (4 if channels == 1 else 6)
    check_shares(shares)
