"""The caches of codes and text states: equal to the models, resumable, mapped, and honest about disks."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from tqdm import TqdmWarning
from transformers import EncodecModel, T5EncoderModel

from trainer.data import arrow_store, audio, cache, progress
from trainer.data.arrow_store import PART, PARTIAL, Store
from trainer.errors import StorageError
from trainer.model.debug_model import build_debug_model, debug_tokenizer
from trainer.spec.encoding import EncodingPass

CPU = torch.device("cpu")
RATE, VIEWS = 32_000, 2
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["trainer.data.cache", "trainer.model.debug_model"])


@functools.cache
def codec() -> EncodecModel:
    return build_debug_model().audio_encoder


@functools.cache
def text_encoder() -> T5EncoderModel:
    return T5EncoderModel(build_debug_model().config.text_encoder).eval()


def never():
    raise AssertionError("nothing is missing, and yet a model is loaded")


def write_clip(path: Path, seed: int, seconds: float = 0.5, rate: int = RATE) -> Path:
    sound = 0.3 * np.random.default_rng(seed).standard_normal(int(seconds * rate))
    soundfile.write(path, sound.clip(-1, 1), rate)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six clips of different lengths, rates and contents."""
    (tmp_path / "music").mkdir()
    for seed in range(6):
        rate = 44_100 if seed % 2 else RATE
        write_clip(tmp_path / "music" / f"{seed}.wav", seed, seconds=0.3 + 0.13 * seed, rate=rate)
    return tmp_path / "music"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return cache.code_store(tmp_path / "cache", "codec", VIEWS)


def clips_of(folder: Path) -> datasets.Dataset:
    """The manifest's table of a folder, by name."""
    rows = []
    for path in sorted(folder.iterdir()):
        facts = audio.inspect(path)
        rows.append(
            {
                "path": path.name,
                "path_bytes": os.fsencode(path),
                "caption": None,
                "seconds": facts.seconds,
                "sample_rate_hz": facts.sample_rate_hz,
                "channels": facts.channels,
                "content": facts.content,
                "first_frame": 0,
                "frames": round(facts.seconds * facts.sample_rate_hz),
                "gain": 1.0,
            }
        )
    return datasets.Dataset.from_list(rows)


def fill(store: Store, clips: datasets.Dataset, load=codec, **ranks: int) -> list[tuple[int, audio.AudioFault]]:
    return cache.fill_codes(
        store, clips, load, sample_rate_hz=RATE, views=VIEWS, device=CPU, show_progress=False, **ranks
    )


def expected_codes(clip: datasets.Dataset | dict) -> list[np.ndarray]:
    """The codes of each view by transformers' own pass over the whole file."""
    track = np.concatenate(list(audio.stream(Path(os.fsdecode(clip["path_bytes"])), RATE)))
    views = []
    for offset in (0, 320):
        values = torch.from_numpy(track[offset:].copy())[None, None]
        with torch.inference_mode():
            views.append(codec().encode(values).audio_codes[0, 0, :, : (len(track) - offset) // 640].numpy())
    return views


def all_codes(store: Store, clips: datasets.Dataset) -> list[np.ndarray]:
    codes = cache.open_codes(store, clips["content"][:])
    return [
        codes.crop(clip, view, 0, int(codes.frames[clip, view]))
        for clip in range(len(clips))
        for view in range(VIEWS)
    ]


def parts(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.glob(f"*{PART}")}


def rows_in_parts(store: Store) -> int:
    return sum(len(datasets.Dataset.from_file(str(path))) for path in store.folder.glob(f"*{PART}"))


# Codes


def test_cached_codes_and_crops_equal_a_pass_over_each_file(store: Store, folder: Path) -> None:
    clips = clips_of(folder)
    assert fill(store, clips) == []
    codes = cache.open_codes(store, clips["content"][:])
    assert codes.codebooks == 4
    for clip in range(len(clips)):
        for view, expected in enumerate(expected_codes(clips[clip])):
            frames = expected.shape[1]
            assert codes.frames[clip, view] == frames
            whole = codes.crop(clip, view, 0, frames)
            assert whole.dtype == np.int16 and whole.shape == expected.shape
            np.testing.assert_array_equal(whole, expected)
            np.testing.assert_array_equal(codes.crop(clip, view, 3, 7), expected[:, 3:10])
            assert codes.crop(clip, view, frames, 0).shape == (4, 0)
            with pytest.raises(IndexError):
                codes.crop(clip, view, frames - 1, 2)


def test_a_full_cache_loads_no_model_and_writes_nothing(store: Store, folder: Path) -> None:
    clips = clips_of(folder)
    fill(store, clips)
    before = parts(store)
    assert fill(store, clips, load=never) == []
    assert parts(store) == before


def test_an_added_changed_or_removed_file_costs_only_itself(store: Store, folder: Path) -> None:
    fill(store, clips_of(folder))
    first = rows_in_parts(store)
    (folder / "0.wav").unlink()
    write_clip(folder / "1.wav", seed=100)
    write_clip(folder / "new.wav", seed=101)
    (folder / "2.wav").rename(folder / "renamed.wav")
    clips = clips_of(folder)
    fill(store, clips)
    assert rows_in_parts(store) == first + 2
    np.testing.assert_array_equal(all_codes(store, clips)[-1], expected_codes(clips[len(clips) - 1])[-1])


def test_files_of_one_content_share_one_row(store: Store, folder: Path) -> None:
    shutil.copy(folder / "3.wav", folder / "again.wav")
    clips = clips_of(folder)
    fill(store, clips)
    assert rows_in_parts(store) == len(clips) - 1
    codes = cache.open_codes(store, clips["content"][:])
    assert codes.frames.shape == (len(clips), VIEWS)
    first, second = clips["path"][:].index("3.wav"), clips["path"][:].index("again.wav")
    np.testing.assert_array_equal(codes.crop(first, 1, 0, 9), codes.crop(second, 1, 0, 9))


def test_files_that_fail_while_read_are_named_and_end_nothing(store: Store, folder: Path) -> None:
    shutil.copy(folder / "3.wav", folder / "again.wav")
    clips = clips_of(folder)
    (folder / "1.wav").unlink()
    (folder / "2.wav").write_bytes(b"<html>moved</html>")
    (folder / "3.wav").unlink()  # its copy is still there
    faults = fill(store, clips)
    assert [(row, fault.fate) for row, fault in faults] == [(1, "unreadable"), (2, "unreadable")]
    good = clips.select([row for row in range(len(clips)) if row not in (1, 2)])
    assert len(all_codes(store, good)) == VIEWS * len(good)
    with pytest.raises(StorageError, match="lacks 2 of 7 clips"):
        cache.open_codes(store, clips["content"][:])


def test_the_bar_of_encoding_ends_at_its_end(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resampling rounds lengths up, and tqdm warns of a bar that goes on beyond its end."""
    monkeypatch.setattr(progress, "SECONDS_SHOWN_FROM", 0.0)
    (tmp_path / "one").mkdir()
    write_clip(tmp_path / "one" / "song.wav", 9, seconds=22_051.5 / 44_100, rate=44_100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TqdmWarning)
        cache.fill_codes(store, clips_of(tmp_path / "one"), codec, sample_rate_hz=RATE, views=VIEWS, device=CPU)


def test_tracks_shorter_than_a_frame_have_no_frames(store: Store, folder: Path) -> None:
    write_clip(folder / "a-tiny.wav", seed=7, seconds=700 / RATE)
    clips = clips_of(folder)
    fill(store, clips)
    row = clips["path"][:].index("a-tiny.wav")
    assert cache.open_codes(store, clips["content"][:]).frames[row].tolist() == [1, 0]


def test_ranks_share_the_work_whenever_each_of_them_looks(store: Store, folder: Path) -> None:
    clips = clips_of(folder)
    for rank in (2, 0, 1):  # the later ones find rows of the earlier ones
        fill(store, clips, rank=rank, world_size=3)
        assert rows_in_parts(store) == 2 * (1 + [2, 0, 1].index(rank))
    assert fill(store, clips, load=never) == []


def test_crops_are_looks_into_the_mapped_file(store: Store, folder: Path) -> None:
    clips = clips_of(folder)
    fill(store, clips)
    crop = cache.open_codes(store, clips["content"][:]).crop(2, 1, 4, 5)
    address = crop.__array_interface__["data"][0]
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name.endswith(PART):
            mapped.append([int(end, 16) for end in span.split("-")])
    assert any(start <= address < end for start, end in mapped)


def test_files_that_share_passes_are_cached_as_alone(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The road of a GPU, on which a file that cannot be read gives way to its copy while others are under way."""
    shutil.copy(folder / "3.wav", folder / "again.wav")
    clips = clips_of(folder)
    (folder / "3.wav").unlink()
    (folder / "5.wav").unlink()
    fill(store, clips)
    monkeypatch.setattr(cache, "encoding_pass", lambda **_: EncodingPass(windows=3, window_seconds=0.2))
    together = cache.code_store(tmp_path / "together", "codec", VIEWS)
    assert [row for row, _ in fill(together, clips)] == [5]
    assert rows_in_parts(together) == 5
    good = clips.select([row for row in range(len(clips)) if row != 5])
    for left, right in zip(all_codes(together, good), all_codes(store, good), strict=True):
        # A tie between two codes may be decided by rounding, and with it the later codebooks of that frame.
        assert (left != right).any(axis=0).sum() <= 1


def test_encoding_says_what_it_adds_and_refuses_a_disk_without_the_room(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = clips_of(folder)
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr(progress.shutil, "disk_usage", lambda _: free)
    with pytest.raises(StorageError, match=r"kB to cache folder .* 1\.0 kB free: free .*--cache_dir.*--code_views"):
        fill(store, clips)
    with pytest.raises(StorageError, match=r"1 captions will add .*--cache_dir"):
        texts = cache.text_store(store.folder, "t5")
        cache.fill_text(texts, ["rock"], lambda: (text_encoder(), debug_tokenizer()), device=CPU, show_progress=False)
    assert rows_in_parts(store) == 0
    free.free = 10**9
    cache.fill_codes(store, clips, codec, sample_rate_hz=RATE, views=VIEWS, device=CPU)
    said = capsys.readouterr().out
    codes = sum(track.nbytes for track in all_codes(store, clips))
    number = float(re.search(r"will add ([0-9.]+) kB to cache", said)[1])
    # The rows' keys and numbers come on top of the codes, and a view may lack a last frame.
    assert codes <= 1000 * number <= codes + len(clips) * (cache.ROW_BYTES + 8 * VIEWS) + 100
    (folder / "0.wav").unlink()
    write_clip(folder / "new.wav", seed=60, seconds=1.8)
    cache.fill_codes(store, clips_of(folder), codec, sample_rate_hz=RATE, views=VIEWS, device=CPU)
    said = capsys.readouterr().out
    assert "encoding 1.8 s of audio at 2 offsets will add 1.6 kB to cache" in said, "what is missing alone"


def test_the_bar_says_hours_and_how_many_times_as_fast_as_the_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_SHOWN_FROM", 0.0)
    shown = io.StringIO()
    with progress.HoursBar(desc="encoding audio", total=3.0, file=shown, bar_format=progress.HOURS_BAR) as bar:
        bar.update(1.5)
        bar.start_t -= 60
        values = {**bar.format_dict, "rate": 1.5 / 60}
        line = bar.format_meter(**{**values, "real_time": "90 x real time"})
        assert "50%" in line and "1.50/3.00 h, 90 x real time [01:00<01:00]" in line
        told = bar.format_dict["real_time"]
        assert told.endswith(" x real time") and float(told.split()[0].replace(",", "")) > 80
    with progress.HoursBar(total=0.05, file=shown, bar_format=progress.HOURS_BAR) as bar:
        bar.update(0.02)
        assert "1.2/3.0 min, " in str(bar), "less than an hour: in minutes"


def test_the_bar_moves_with_every_short_clip_and_ends_full(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[float] = []
    monkeypatch.setattr(progress.HoursBar, "update", lambda bar, hours: done.append(hours))
    clips = clips_of(folder)
    fill(store, clips)
    assert len(done) >= len(clips) and 0 < max(done) <= max(clips["seconds"][:]) / 3600
    assert sum(done) == pytest.approx(sum(clips["seconds"][:]) / 3600, rel=1e-3)


def keep_filling(cache_dir: Path, folder: Path) -> None:
    arrow_store.FLUSH_SECONDS = 0.0
    torch.set_num_threads(1)
    fill(cache.code_store(cache_dir, "codec", VIEWS), clips_of(folder))


def test_kill_9_costs_only_the_rows_in_hand(tmp_path: Path, folder: Path) -> None:
    for seed in range(20, 50):
        write_clip(folder / f"{seed}.wav", seed)
    clips, store = clips_of(folder), cache.code_store(tmp_path / "cache", "codec", VIEWS)
    moments = random.Random()
    for kill in range(3):
        filling = processes.Process(target=keep_filling, args=(tmp_path / "cache", folder))
        filling.start()
        wanted, limit = 6 * (kill + 1), time.monotonic() + 60
        while len(parts(store)) < wanted and time.monotonic() < limit and filling.is_alive():
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        assert filling.pid is not None
        os.kill(filling.pid, signal.SIGKILL)
        filling.join()
        kept = parts(store)
        assert wanted <= len(kept) < len(clips)
        assert len(store.keys()) == len(kept)
    fill(store, clips)
    assert kept.items() <= parts(store).items()
    assert rows_in_parts(store) == len(clips), "some file was encoded twice"
    # A kill while a part was written leaves it unfinished: it is removed once it is old enough to be nobody's.
    for unfinished in store.folder.glob(f"*{PARTIAL}"):
        os.utime(unfinished, (0, 0))
    assert store.keys() == set(clips["content"]) and list(store.folder.glob(f"*{PARTIAL}")) == []
    undisturbed = cache.code_store(tmp_path / "other", "codec", VIEWS)
    fill(undisturbed, clips)
    for left, right in zip(all_codes(store, clips), all_codes(undisturbed, clips), strict=True):
        np.testing.assert_array_equal(left, right)


# Text


def states_alone(caption: str) -> np.ndarray:
    with torch.inference_mode():
        tokens = debug_tokenizer()(caption, return_tensors="pt", truncation=False)
        return text_encoder()(**tokens).last_hidden_state[0].numpy()


@pytest.mark.numbers
def test_states_equal_those_of_each_caption_alone(tmp_path: Path) -> None:
    store = cache.text_store(tmp_path, "t5")
    captions = ["a slow piano solo", "a fast guitar solo", "rock", "jazz", "", "naïve 音楽", "rock", "drums " * 700]
    cache.fill_text(store, captions, lambda: (text_encoder(), debug_tokenizer()), device=CPU, show_progress=False)
    assert rows_in_parts(store) == len(set(captions))
    text = cache.open_text(store, captions)
    for caption in captions:
        states, expected = text.states(caption), states_alone(caption)
        assert text.tokens(caption) == len(expected)
        assert states.dtype == np.float32 and states.shape == expected.shape
        np.testing.assert_allclose(states, expected, atol=1e-5)
    assert len(text.states(captions[-1])) > 512


def test_known_captions_load_no_model_and_new_ones_cost_only_themselves(tmp_path: Path) -> None:
    store = cache.text_store(tmp_path, "t5")

    def load():
        return text_encoder(), debug_tokenizer()

    cache.fill_text(store, ["rock", "jazz"], load, device=CPU, show_progress=False)
    cache.fill_text(store, ["jazz", "rock"], never, device=CPU, show_progress=False)
    for rank in (1, 0):
        cache.fill_text(
            store, ["rock", "x", "yy"], load, device=CPU, show_progress=False, rank=rank, world_size=2
        )
    assert rows_in_parts(store) == 4
    with pytest.raises(StorageError, match="lacks 1 of 2 captions"):
        cache.open_text(store, ["rock", "absent"])


# Disks that refuse


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk to fill: {' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no small disk to fill: there is no mount command")
    mount(disk, "size=96k")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_keeps_what_was_written_and_the_next_run_continues(
    small_disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(20, 50):
        write_clip(folder / f"{seed}.wav", seed)
    clips, store = clips_of(folder), cache.code_store(small_disk, "codec", VIEWS)
    monkeypatch.setattr(arrow_store, "FLUSH_SECONDS", 0.0)
    with pytest.raises(StorageError, match="No space left on device") as failure:
        fill(store, clips)
    for told in (str(store.folder), "--cache_dir", "kept"):
        assert told in str(failure.value)
    kept = parts(store)
    assert 0 < len(kept) < len(clips)
    assert len(store.keys()) == rows_in_parts(store) == len(kept)
    assert list(store.folder.glob(f"*{PARTIAL}")) == []
    mount(small_disk, "remount,size=1m")
    assert fill(store, clips) == []
    assert kept.items() <= parts(store).items()
    assert rows_in_parts(store) == len(clips)
    last = len(clips) - 1
    np.testing.assert_array_equal(all_codes(store, clips)[-1], expected_codes(clips[last])[-1])


def test_a_read_only_cache_is_read_and_refuses_more_before_any_work(small_disk: Path, folder: Path) -> None:
    clips, store = clips_of(folder), cache.code_store(small_disk, "codec", VIEWS)
    fill(store, clips)
    mount(small_disk, "remount,ro")
    assert fill(store, clips, load=never) == []
    assert len(all_codes(store, clips)) == VIEWS * len(clips)
    write_clip(folder / "new.wav", seed=99)
    with pytest.raises(StorageError, match=r"Read-only file system.*--cache_dir"):
        fill(store, clips_of(folder))


def test_a_cache_below_a_file_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("")
    store = cache.code_store(tmp_path / "file", "codec", VIEWS)
    with pytest.raises(StorageError, match=r"Not a directory.*--cache_dir"):
        fill(store, clips_of(folder))
