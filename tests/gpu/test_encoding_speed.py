"""Encoding on a GPU: whether tracks that share passes have the codes that each has alone, and how fast it goes; in
stereo too; and whether melodies are those of a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import encoding
from benchmarks.encoding import Work
from transformers import EncodecModel

from tests.gpu.one_card import gib, say_figure
from trainer.data.chroma import frame_notes
from trainer.data.codec import encode, view_offsets
from trainer.data.codec_windows import reproducible
from trainer.plan.memory import CODEC_CONTEXT_SECONDS, CODEC_TENSORS, FLOAT32
from trainer.spec.encoding import encoding_pass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RATE = 32_000
EXAMPLES = Path(__file__).parents[2] / "examples"
AIM_SECONDS = 4.0  # for an hour of audio and view, on an H100


def gpu_codec() -> EncodecModel:
    return encoding.random_codec(torch.device("cuda"))


def songs(lengths: Sequence[float], channels: int = 1) -> list[np.ndarray]:
    """Gliding tones with noise, float32 at 32 kHz, of these seconds: (n,), or (n, 2) whose channels differ."""
    if channels == 2:
        return [np.stack([song, np.roll(song[::-1], 77)], axis=1) for song in songs(lengths)]
    made = []
    for seed, seconds in enumerate(lengths):
        time = np.arange(round(seconds * RATE) + 37 * seed) / RATE
        noise = 0.1 * np.random.default_rng(seed).standard_normal(len(time))
        made.append((0.4 * np.sin(2 * np.pi * (150 + 40 * seed + 20 * time) * time) + noise).astype(np.float32))
    return made


def share_equal(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    """The share of codes that are equal; lengths must be."""
    assert [codes.shape for codes in left] == [codes.shape for codes in right]
    return float(np.mean(np.concatenate([(a == b).flatten() for a, b in zip(left, right, strict=True)])))


def compared(codec: EncodecModel, work: Work, tracks: Sequence[np.ndarray]) -> dict[str, float]:
    """The share of codes that are those of all tracks together: of each track alone, of the opposite order, of one
    window of 10 s after the other as on a CPU, and of transformers' own pass over the whole track. In stereo also: of
    tracks that have the left channel twice and the right one twice, and of each channel in mono."""
    numbers, channels = range(len(tracks)), work.channels

    def flat(codes: dict[int, list[np.ndarray]]) -> list[np.ndarray]:
        return [view for number in numbers for view in codes[number]]

    offsets = view_offsets(work.views, codec.config.hop_length)
    together = flat(encoding.encode_from_memory(codec, tracks, work))
    alone = [encoding.encode_from_memory(codec, tracks, work, [number])[number] for number in numbers]
    backwards = flat(encoding.encode_from_memory(codec, tracks, work, numbers[::-1]))
    windows = [view for track in tracks for view in encode(codec, [track], offsets=offsets, channels=channels)]
    each = [track.reshape(len(track), channels) for track in tracks]
    whole = [
        interleaved([whole_pass(codec, track[offset:, channel]) for channel in range(channels)])
        for track in each
        for offset in offsets
    ]
    shares = {
        "each track alone": share_equal(together, [view for views in alone for view in views]),
        "the opposite order": share_equal(together, backwards),
        "windows of 10 s, track by track": share_equal(together, windows),
        "transformers' pass over the whole": share_equal(together, whole),
    }
    if channels == 2:
        doubled, mono = [], []
        for channel in range(2):
            twice = [np.repeat(track[:, channel, None], 2, axis=1) for track in each]
            alone_in_both = flat(encoding.encode_from_memory(codec, twice, work))
            assert all(np.array_equal(codes[::2], codes[1::2]) for codes in alone_in_both)
            doubled.append([codes[::2] for codes in alone_in_both])
            once = [np.ascontiguousarray(track[:, channel]) for track in each]
            mono.append(flat(encoding.encode_from_memory(codec, once, replace(work, channels=1))))
        pairs = {"each channel in both": doubled, "each channel in mono": mono}
        for what, (left, right) in pairs.items():
            of_both = [interleaved(pair) for pair in zip(left, right, strict=True)]
            shares[what] = share_equal(together, of_both)
    return shares


def interleaved(channels: Sequence[np.ndarray]) -> np.ndarray:
    """Codes (K, T) of each channel as a stereo model has them: the first codebook's of each, then the second's."""
    return np.stack(channels, axis=1).reshape(-1, channels[0].shape[1])


def whole_pass(codec: EncodecModel, track: np.ndarray) -> np.ndarray:
    with torch.inference_mode(), reproducible(codec.device):
        values = torch.from_numpy(track.copy())[None, None].to(codec.device, codec.dtype)
        codes = codec.encode(values).audio_codes[0, 0]
    return codes[:, : len(track) // codec.config.hop_length].to(torch.int16).cpu().numpy()


def check_shares(shares: Mapping[str, float]) -> None:
    """Alone, in another order and beside itself as the other channel the shapes of all passes are the same, and so must
    be the codes. Other shapes may be
    computed in another order of sums: a code changes where two are as near, to the rounding of float32 (some 1e-6 of
    the distances, of which 2,048 lie as close as 1e-3), and with it the later ones of the frame."""
    assert shares["each track alone"] == 1
    assert shares["the opposite order"] == 1
    assert shares.get("each channel in both", 1) == 1
    assert min(shares.values()) >= 0.98


def melodies_compared(device: torch.device, sounds: Sequence[np.ndarray]) -> float:
    """The share of notes that a device finds as a CPU does. It finds the same ones whatever the blocks."""
    pairs = []
    for sound in sounds:
        found = frame_notes([sound], device)
        np.testing.assert_array_equal(frame_notes(np.array_split(sound, 7), device), found)
        pairs.append((found, frame_notes([sound])))
    return share_equal(*zip(*pairs, strict=True))


def examples() -> list[np.ndarray]:
    """The music of examples/, mono at 32 kHz."""
    paths = [path for path in sorted(EXAMPLES.iterdir()) if path.suffix in (".wav", ".flac", ".mp3", ".ogg")]
    return [encoding.decoded(path) for path in paths]


def say_kinds(rows: Sequence[dict], card: str) -> None:
    for row in rows:
        of_mono = f", {row['of_mono']:.3g} of the time of codes in mono" if row["what"].startswith("the cache") else ""
        say_figure(
            f"{row['what']}: {row['seconds_an_hour']:.3g} s for an hour of audio"
            f" ({row['clips']} songs of {row['clip_seconds']:g} s on {card}){of_mono}"
        )


def say_speed(rows: Sequence[dict], card: str) -> None:
    for row in rows:
        say_figure(
            f"{row['what']}: {row['seconds_an_hour_and_view']:.2f} s for an hour of audio and view"
            f" ({row['clips']} songs of {row['clip_seconds']:g} s at {row['views']} views on {card};"
            f" the aim is {AIM_SECONDS:g} s), {row['throughput_of_alone']:.2f} of EnCodec alone"
        )


def test_tracks_that_share_passes_have_the_codes_of_each_alone_on_a_gpu() -> None:
    work = Work(clips=0, seconds=0, views=4, device=torch.device("cuda"))
    # More than two passes of fresh tracks, of lengths that end at different times, and one that goes on alone for long.
    # Some are shorter than a window; ends share passes too.
    short = [5.0] * 5 + [0.05, 0.1, 0.2, 0.7, 1.0, 1.3]
    tracks = songs([2 + 0.7 * number for number in range(18)] + [40.0, 0.4] + short)
    shares = compared(gpu_codec(), work, tracks)
    for what, share in shares.items():
        say_figure(f"share of codes equal to those of {what}: {share:.6f}")
    check_shares(shares)


def test_both_channels_of_tracks_that_share_passes_have_the_codes_of_each_alone_on_a_gpu() -> None:
    work = Work(clips=0, seconds=0, views=4, device=torch.device("cuda"), channels=2)
    tracks = songs([2 + 0.7 * number for number in range(18)] + [20.0, 0.4, 0.05, 0.7, 1.3], channels=2)
    shares = compared(gpu_codec(), work, tracks)
    for what, share in shares.items():
        say_figure(f"share of codes equal to those of {what}: {share:.6f}")
    check_shares(shares)


def test_melodies_are_those_of_a_cpu_and_found_in_seconds(tmp_path: Path) -> None:
    """Another note is found where two are as strong to six digits: of music's frames, few in ten thousand."""
    device = torch.device("cuda")
    share = melodies_compared(device, examples())
    say_figure(f"share of the examples' notes equal to those of a CPU: {share:.6f}")
    work = Work(clips=32, seconds=45.0, views=4, device=device)
    say_kinds(encoding.measure_kinds(work, gpu_codec(), tmp_path, rounds=1), torch.cuda.get_device_name())
    assert share >= 0.999


def test_an_hour_of_audio_is_encoded_in_seconds(tmp_path: Path) -> None:
    device = torch.device("cuda")
    codec = gpu_codec()
    torch.cuda.reset_peak_memory_stats()
    work = Work(clips=32, seconds=45.0, views=4, device=device)
    rows = encoding.measure(work, codec, tmp_path, rounds=1)
    say_speed(rows, torch.cuda.get_device_name())
    peak = torch.cuda.max_memory_allocated()
    size = encoding_pass(on_gpu=True, views=4)
    samples = size.windows * 4 * (size.window_seconds + CODEC_CONTEXT_SECONDS) * RATE
    weights = sum(parameter.numel() for parameter in codec.parameters())
    expected = FLOAT32 * (CODEC_TENSORS * samples * codec.config.num_filters + weights)
    say_figure(f"peak {gib(peak)}, the plan says {gib(expected)}")
    assert peak <= expected
    for clips, seconds in ((96, 5.0), (192, 0.5)):
        short = Work(clips=clips, seconds=seconds, views=4, device=device)
        say_speed(encoding.measure(short, codec, tmp_path / f"{seconds:g}", rounds=1), "the same card")
