"""The table of clips that one process writes and the others read: nothing is lost on the way, and nothing piles up."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from trainer.data import clip_table
from trainer.data.fates import Fate
from trainer.data.manifest import TYPES, Manifest
from trainer.errors import StorageError

ROOT = Path(__file__).resolve().parents[2]
DAY = 24 * 3600


def manifest_of(clips: int) -> Manifest:
    """Names that are no UTF-8, captions that are null, empty or not ASCII, and numbers that no decimal holds."""
    captions = [None, "", "caf\u00e9 \u97f3\u697d", "two\nlines"]
    return Manifest(
        columns={
            "path": [f"{clip}\\xff.wav" for clip in range(clips)],
            "path_bytes": [b"/data/%d\xff\xfe\n.wav" % clip for clip in range(clips)],
            "size_bytes": [2**40 + clip for clip in range(clips)],
            "caption": [captions[clip % 4] for clip in range(clips)],
            "seconds": [clip / 7 for clip in range(clips)],
            "sample_rate_hz": [44_100 + clip for clip in range(clips)],
            "channels": [1 + clip % 2 for clip in range(clips)],
            "content": [f"{clip:032x}" for clip in range(clips)],
            "first_frame": [2**40 + clip for clip in range(clips)],
            "frames": [2**41 + clip for clip in range(clips)],
            "gain": [1 + clip / 7 for clip in range(clips)],
            "sound": [f"{2**64 + clip:032x}" for clip in range(clips)],
            "melody_path_bytes": [b"/data/%d\xff.melody.wav" % clip if clip % 2 else b"" for clip in range(clips)],
            "melody_content": [f"{clip:032x}" if clip % 2 else "" for clip in range(clips)],
            "melody_size_bytes": [2**40 + clip if clip % 2 else 0 for clip in range(clips)],
            "caption_source": [f"{clip}.txt" for clip in range(clips)],
            "caption_fields": ["" if clip % 3 else '[["bpm", "90.0"]]' for clip in range(clips)],
        },
        fates=tuple(Fate(path=f"{file}.wav", fate="used", detail="\u00e9" * file) for file in range(clips + 3)),
    )


@pytest.mark.parametrize("clips", [1, 4, 11])
def test_what_is_read_is_what_was_written(clips: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_table, "BATCH_ROWS", 4)
    found = manifest_of(clips)
    assert clip_table.read(clip_table.write(found, tmp_path / "scan"), tmp_path / "scan") == found


def test_datasets_opens_the_table_as_the_manifest_shows_it(tmp_path: Path) -> None:
    found = manifest_of(9)
    clips, fates = clip_table.write(found, tmp_path)
    opened = datasets.Dataset.from_file(str(tmp_path / clips))
    assert opened.features == found.clips.features and set(opened.features) == set(TYPES)
    assert opened[:] == found.clips[:]
    assert datasets.Dataset.from_file(str(tmp_path / fates))["path"][:] == [fate.path for fate in found.fates]


def test_writing_and_reading_load_neither_datasets_nor_pandas(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.data.test_clip_table import manifest_of;"
        "[sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] in ('datasets', 'pandas')];"
        "from trainer.data import clip_table; folder = Path(sys.argv[1]);"
        "assert clip_table.read(clip_table.write(manifest_of(5), folder), folder) == manifest_of(5);"
        "assert not {'datasets', 'pandas'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, timeout=60).returncode == 0


def test_what_is_there_is_not_written_again_and_another_table_stands_beside_it(tmp_path: Path) -> None:
    names = clip_table.write(manifest_of(3), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no byte can be written now
    try:
        assert clip_table.write(manifest_of(3), tmp_path) == names
        with pytest.raises(StorageError, match=r"table of clips cannot be written.*--cache_dir"):
            clip_table.write(manifest_of(4), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert not set(clip_table.write(manifest_of(4), tmp_path)) & set(names)
    assert clip_table.read(names, tmp_path) == manifest_of(3)


def test_tables_that_nobody_asked_for_in_a_week_are_removed_and_no_others(tmp_path: Path) -> None:
    asked, unused = clip_table.write(manifest_of(1), tmp_path), clip_table.write(manifest_of(2), tmp_path)
    recent = clip_table.write(manifest_of(3), tmp_path)
    left, facts = tmp_path / f".{recent[0]}.{'0123' * 8}.partial", tmp_path / "audio_facts.json"
    mine = (tmp_path / "mine.arrow", tmp_path / "clips-old.arrow", tmp_path / "mine.partial")
    for path in (left, facts, *mine):
        path.write_text("x")
    for path in (*(tmp_path / name for name in (*asked, *unused)), left, facts, *mine):
        os.utime(path, (time.time() - 8 * DAY,) * 2)
    for name in recent:
        os.utime(tmp_path / name, (time.time() - 6 * DAY,) * 2)
    clip_table.write(manifest_of(1), tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*asked, *recent, facts.name, *(path.name for path in mine)])


def test_a_damaged_table_is_an_error_and_the_next_run_writes_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_table, "SHOWN_SECONDS", 0.0)
    names = clip_table.write(manifest_of(3), tmp_path)
    whole = (tmp_path / names[0]).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"#" * len(whole)):
        (tmp_path / names[0]).write_bytes(damaged)
        with pytest.raises(StorageError, match="damaged"):
            clip_table.read(names, tmp_path)
    (tmp_path / names[0]).unlink()
    with pytest.raises(StorageError, match=r"cannot be read: .*No such file"):
        clip_table.read(names, tmp_path)
    assert clip_table.write(manifest_of(3), tmp_path) == names
    assert clip_table.read(names, tmp_path) == manifest_of(3)
