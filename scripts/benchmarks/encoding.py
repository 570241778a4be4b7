"""From sound files to codes in the cache, against EnCodec alone on the same sound in memory; in stereo; melodies."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import EncodecModel

from benchmarks.music import SAMPLE_RATE_HZ
from benchmarks.parts import Settings
from benchmarks.report import Row
from trainer.data import audio, cache, chroma, melodies
from trainer.data.arrow_store import Store
from trainer.data.codec import encode_tracks, view_offsets
from trainer.data.excerpt import Excerpt
from trainer.data.stems import Mix
from trainer.data.treatment import AS_IT_IS
from trainer.model.debug_model import codec_config, set_codebooks
from trainer.spec.encoding import encoding_pass

FILE_RATE_HZ = 44_100  # what most music has, so that it must be resampled
FORMATS = {"wav": "PCM_16", "mp3": "MPEG_LAYER_III"}
HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """So many clips of `seconds`, encoded at `views` offsets in mono or in stereo (`channels`), on `device`."""

    clips: int
    seconds: float
    views: int
    device: torch.device
    channels: int = 1

    @property
    def view_hours(self) -> float:
        """Hours of audio times views."""
        return self.hours * self.views

    @property
    def hours(self) -> float:
        return self.clips * self.seconds / HOUR


def encode_files(settings: Settings) -> list[Row]:
    """EnCodec of the published size with random weights; four views on a GPU, one on a CPU."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    work = Work(clips=settings.clips, seconds=settings.seconds, views=4 if on_gpu else 1, device=device)
    with tempfile.TemporaryDirectory() as folder:
        codec, rounds = random_codec(device), settings.rounds
        rows = measure(work, codec, Path(folder) / "mono", rounds=rounds)
        return rows + measure_kinds(work, codec, Path(folder) / "kinds", rounds=rounds)


def random_codec(device: torch.device, *, filters: int = 64, width: int = 128) -> EncodecModel:
    """MusicGen's EnCodec of the published size, or a smaller one, with random weights, float32, in eval mode."""
    torch.manual_seed(0)
    codec = EncodecModel(codec_config(filters=filters, width=width)).eval()
    set_codebooks(codec)
    return codec.to(device)


def measure(work: Work, codec: EncodecModel, folder: Path, *, rounds: int) -> list[Row]:
    """The codec alone on sound in memory, then filling the cache from each of FORMATS, in turns, after one round that
    is not counted. The codec alone has the same passes; nothing is decoded, resampled, checked or written for it.

    What else than EnCodec the files take is measured by itself too, in core seconds, which tell it where a clock
    cannot: other work on the cores, or a codec whose own time varies by more than that.
    """
    columns = {name: write_songs(folder / name, work, name) for name in FORMATS}
    tracks = [decoded(path, work.channels) for path in columns["wav"]["path_bytes"]]

    def run(name: str, round_: int) -> None:
        if name == "alone":
            encode_from_memory(codec, tracks, work)
        else:
            store = cache.code_store(folder / f"cache-{name}-{round_}", "benchmark", work.views)
            _fill(work, codec, store, columns[name])

    names = ["alone", *FORMATS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    of_cores: dict[str, list[float]] = {name: [] for name in names}
    of_sound: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:  # each is the first in its turn
            taken, cores = _timed(partial(run, name, round_))
            _, sound = _timed(partial(_read, columns.get(name, {}), work.channels))
            if round_:
                seconds[name].append(taken)
                of_cores[name].append(cores)
                of_sound[name].append(sound)
    rows = []
    for name in names:
        cores, sound = statistics.median(of_cores[name]), statistics.median(of_sound[name])
        rows.append(_row(work, name, seconds) | {"core_seconds": cores, "core_seconds_of_sound": sound})
    return rows


def measure_kinds(work: Work, codec: EncodecModel, folder: Path, *, rounds: int) -> list[Row]:
    """Filling the cache from the same wav files with codes in mono, codes in stereo, and melodies of the full mix; and
    melodies of the same sound in memory. In turns, as `measure`; `of_mono` is the median of each round's seconds over
    those of mono."""
    clips = write_songs(folder / "wav", work, "wav")
    tracks = [decoded(path) for path in clips["path_bytes"]]

    def codes(round_: int, channels: int) -> None:
        of_kind = replace(work, channels=channels)
        store = cache.code_store(folder / f"cache{round_}", "benchmark", work.views, channels=channels)
        _fill(of_kind, codec, store, clips)

    def found(round_: int) -> None:
        store = melodies.melody_store(folder / f"cache{round_}", AS_IT_IS, Mix.key)
        faults = melodies.fill_melodies(store, clips, Mix(), device=work.device, show_progress=False)
        assert not faults, faults

    def of_memory(round_: int) -> None:
        for track in tracks:
            chroma.frame_notes(_blocks(track), work.device)

    runs: dict[str, Callable[[int], None]] = {
        "the cache from wav, mono": partial(codes, channels=1),
        "the cache from wav, stereo": partial(codes, channels=2),
        "melodies from wav": found,
        "melodies of sound in memory": of_memory,
    }
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            taken, _ = _timed(partial(runs[name], round_))
            if round_:
                seconds[name].append(taken)
    rows = []
    for name in names:
        taken = statistics.median(seconds[name])
        ratios = [own / mono for own, mono in zip(seconds[name], seconds[names[0]], strict=True)]
        views = {} if "melodies" in name else {"views": work.views, "seconds_an_hour_and_view": taken / work.view_hours}
        row = {"case": "encode_files", "what": name, "clips": work.clips, "clip_seconds": work.seconds, **views}
        rows.append(
            row | {"seconds": taken, "seconds_an_hour": taken / work.hours, "of_mono": statistics.median(ratios)}
        )
    return rows


def _timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and of all cores together."""
    since, cores = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - since, time.process_time() - cores


def _fill(work: Work, codec: EncodecModel, store: Store, clips: dict[str, list]) -> None:
    faults = cache.fill_codes(
        store,
        clips,
        lambda: codec,
        sample_rate_hz=SAMPLE_RATE_HZ,
        views=work.views,
        device=work.device,
        channels=work.channels,
        show_progress=False,
    )
    assert not faults, faults


def _read(clips: dict[str, list], channels: int) -> None:
    """Decode, mix, resample and hash the files as `fill_codes` does, for nobody."""
    for row, path in enumerate(clips.get("path_bytes", ())):
        excerpt = Excerpt(**{name: clips[name][row] for name in ("first_frame", "frames", "gain")})
        for _ in cache.sound_blocks(path, clips["content"][row], SAMPLE_RATE_HZ, excerpt, channels):
            pass


def encode_from_memory(
    codec: EncodecModel, tracks: Sequence[np.ndarray], work: Work, order: Sequence[int] | None = None
) -> dict[int, list[np.ndarray]]:
    """The codes of each track (n, work.channels), or (n,) in mono, by its number, encoded in this order as `fill_codes`
    does."""
    waiting = [(number, iter(_blocks(tracks[number]))) for number in (order or range(len(tracks)))]
    offsets = view_offsets(work.views, codec.config.hop_length)
    size = encoding_pass(on_gpu=work.device.type == "cuda", views=work.views, channels=work.channels)
    found = encode_tracks(
        codec, lambda: waiting.pop(0) if waiting else None, offsets=offsets, size=size, channels=work.channels
    )
    codes = {}
    for number, made in found:
        assert isinstance(made, list), made
        codes[number] = made
    return codes


def write_songs(folder: Path, work: Work, name: str) -> dict[str, list]:
    """Stereo files of chords over noise that swells, none like another, as columns for `fill_codes` and
    `fill_melodies`."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    time_N = np.arange(round(work.seconds * FILE_RATE_HZ)) / FILE_RATE_HZ
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * 0.3 * time_N)
    chord = np.sum([np.sin(2 * np.pi * 110 * step * time_N + step) / step for step in (1, 1.5, 2, 3, 5, 8)], axis=0)
    song = np.stack([0.15 * chord * swell, 0.1 * chord[::-1]], axis=1) + 0.02 * draw.standard_normal((len(time_N), 2))
    song = song.astype(np.float32)

    def write(clip: int) -> Path:
        path = folder / f"song{clip:04}.{name}"
        shifted = np.roll(song, 997 * clip, axis=0)
        soundfile.write(path, shifted, FILE_RATE_HZ, subtype=FORMATS[name], format=name.upper())
        return path

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        paths = list(pool.map(write, range(work.clips)))
        contents = list(pool.map(audio.content_of, paths))
    return {
        "path_bytes": [os.fsencode(path) for path in paths],
        "content": contents,
        "seconds": [work.seconds] * work.clips,
        "first_frame": [0] * work.clips,
        "frames": [len(time_N)] * work.clips,
        "gain": [1.0] * work.clips,
        "sample_rate_hz": [FILE_RATE_HZ] * work.clips,
        "melody_path_bytes": [b""] * work.clips,
        "melody_content": [""] * work.clips,
    }


def decoded(path: bytes | Path, channels: int = 1) -> np.ndarray:
    """A whole sound at 32 kHz, (n,) in mono or (n, 2) float32."""
    return np.concatenate(list(audio.stream(Path(os.fsdecode(path)), SAMPLE_RATE_HZ, channels=channels)))


def _blocks(track: np.ndarray) -> list[np.ndarray]:
    return np.array_split(track, max(1, round(len(track) / SAMPLE_RATE_HZ / cache.BLOCK_SECONDS)))


def _row(work: Work, name: str, seconds: dict[str, list[float]]) -> Row:
    taken = statistics.median(seconds[name])
    ratios = [alone / other for alone, other in zip(seconds["alone"], seconds[name], strict=True)]
    return {
        "case": "encode_files",
        "what": "EnCodec alone" if name == "alone" else f"the cache from {name}",
        "clips": work.clips,
        "clip_seconds": work.seconds,
        "views": work.views,
        "seconds": taken,
        "seconds_an_hour_and_view": taken / work.view_hours,
        "times_real_time": HOUR * work.view_hours / work.views / taken,
        "throughput_of_alone": statistics.median(ratios),
    }
