"""The folder of a run's samples: which steps are finished, what moves aside, and files that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainer.evaluation import samples
from trainer.evaluation.generation import write_wav
from trainer.evaluation.samples import Sample, StepSamples


def made(step: int) -> StepSamples:
    sound = Sample(
        file="01_x.flac", prompt="Ça 'x'\n\u2028", seed=3, seconds=1.5, origin="given", clip=None,
        continued_seconds=0.0, error=None,
    )  # fmt: skip
    return StepSamples(
        step=step, time=2.5, sample_rate_hz=32000, guidance=3.0, temperature=1.0, top_k=250, weights="ema",
        samples=(sound,),
    )  # fmt: skip


def finish(folder: Path, *steps: int) -> None:
    for step in steps:
        samples.begin(folder, step)
        samples.finish(folder, made(step))


def test_a_step_is_finished_by_its_list_alone_and_reads_back_as_it_was_written(tmp_path):
    samples.begin(tmp_path, 120)
    samples.write_sound(tmp_path / "step-00000120/01_x.flac", np.zeros(640, np.float32), 32000)
    assert not samples.is_finished(tmp_path, 120) and samples.read(tmp_path, 120) is None
    samples.finish(tmp_path, made(120))
    assert samples.is_finished(tmp_path, 120) and samples.read(tmp_path, 120) == made(120)
    assert samples.finished_steps(tmp_path) == [120]


def test_a_list_that_is_no_list_of_ours_is_read_as_none(tmp_path):
    finish(tmp_path, 5)
    for content in (b"", b"[]", b"{}", b'{"format": "musicgen-trainer samples", "version": 2}', b"\xff"):
        (tmp_path / "step-00000005/samples.json").write_bytes(content)
        assert samples.read(tmp_path, 5) is None


def test_beginning_an_unfinished_step_removes_the_sounds_there_and_nothing_else(tmp_path):
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    for name in ("01_old_words.flac", "02_x.flac.partial", "mine.flac", "notes.txt"):
        (folder / name).touch()
    samples.begin(tmp_path, 7)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.flac", "notes.txt"]


def test_later_steps_move_aside_finished_or_not_and_nothing_is_ever_removed(tmp_path):
    finish(tmp_path, 0, 100, 200, 300)
    samples.begin(tmp_path, 400)
    (tmp_path / "mine").mkdir()
    assert samples.move_later(tmp_path, 100) == [200, 300, 400]
    finish(tmp_path, 200)
    assert samples.move_later(tmp_path, 200) == []
    assert samples.was_replaced(tmp_path, 200) and not samples.was_replaced(tmp_path, 400)
    assert samples.move_later(tmp_path, 100) == [200]
    assert samples.move_later(tmp_path, -1) == [0, 100]
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("step-*"))
    assert found == [
        *(f"replaced-1/step-00000{step}" for step in (200, 300, 400)),
        "replaced-2/step-00000200",
        *(f"replaced-3/step-00000{step}" for step in ("000", "100")),
    ]
    assert (tmp_path / "mine").is_dir() and samples.move_later(tmp_path / "absent", 0) == []


def test_a_flac_has_the_samples_of_the_wav_that_generate_writes(tmp_path):
    for loudest in (0.3, 1.0, 1.25):  # the last is to be turned down
        audio = np.random.default_rng(1).uniform(-loudest, loudest, 64000).astype(np.float32)
        samples.write_sound(tmp_path / "a.flac", audio, 32000)
        write_wav(tmp_path / "a.wav", audio, 32000)
        flac, wav = (soundfile.read(tmp_path / name, dtype="int16") for name in ("a.flac", "a.wav"))
        assert np.array_equal(flac[0], wav[0]) and flac[1] == wav[1] == 32000
        assert soundfile.info(tmp_path / "a.flac").subtype == "PCM_16"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_full_raises_and_leaves_no_sound(tmp_path, monkeypatch):
    """The sound's bytes go to a device that is full, as write_bytes of a file there does."""
    monkeypatch.setattr(Path, "write_bytes", lambda self, content: os.write(os.open("/dev/full", os.O_WRONLY), content))
    with pytest.raises(OSError) as caught:
        samples.write_sound(tmp_path / "01_x.flac", np.zeros(640, np.float32), 32000)
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
