"""Ends of tracks that share passes of EnCodec, each padded where its own audio ends, against each end alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import EncodecModel

from tests.data.test_codec import FRAME, RATE, codec_with_memory, debug_codec, encoded_together, music, whole
from trainer.data import audio
from trainer.data.codec import encode, view_offsets
from trainer.data.codec_layers import run
from trainer.data.codec_windows import LEAST_END_FRAMES, windowed_codec
from trainer.model.debug_model import codec_config, set_codebooks
from trainer.spec.encoding import EncodingPass, encoding_pass

pytestmark = pytest.mark.numbers


def small_codec() -> EncodecModel:
    """MusicGen's EnCodec with few channels, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = EncodecModel(codec_config(filters=2, width=4)).eval()
        set_codebooks(codec)
    return codec


def passes_of(codec: EncodecModel) -> list[tuple[int, int]]:
    """To which frames and rows of each call of the LSTM are added from now on; every pass calls it."""
    calls: list[tuple[int, int]] = []
    codec.encoder.layers[-3].lstm.register_forward_hook(lambda _, inputs, __: calls.append(tuple(inputs[0].shape[:2])))
    return calls


@pytest.mark.parametrize("part", ["before", "after"])
def test_rows_that_end_at_different_places_come_out_as_each_alone(part: str) -> None:
    """The convolutions on both sides of the LSTM: every length up to beyond all paddings, and every rest of a frame."""
    windowed = windowed_codec(codec_with_memory(0.0), [0], EncodingPass(windows=1, window_seconds=1.0))
    layers, hop = (windowed.before, windowed.hop) if part == "before" else (windowed.after, 1)
    channels = 1 if part == "before" else windowed.lstm.hidden_size
    draw = torch.Generator().manual_seed(0)
    several = [*range(1, 26, 3), *range(40, 3 * 640, 197), 639, 640, 641, 1281] if hop > 1 else list(range(1, 20))
    # Behind each row's end stand other numbers, which must not matter.
    rows = torch.randn(len(several), channels, -(-max(several) // hop) * hop, dtype=torch.float64, generator=draw)
    with torch.inference_mode():
        together = run(layers, rows, lengths_B=torch.tensor(several))
        for row, length in enumerate(several):
            alone = run(layers, rows[row : row + 1, :, :length])[0]
            assert alone.shape[-1] == -(-length // hop)
            torch.testing.assert_close(together[row, :, : alone.shape[-1]], alone, rtol=1e-12, atol=1e-12)


def lengths_of(seconds: Sequence[float]) -> list[int]:
    return [round(number * RATE) + 13 * index for index, number in enumerate(seconds)]


def assert_as_whole(codec: EncodecModel, lengths: Sequence[int], views: int, size: EncodingPass) -> None:
    """In float64, where rounding cannot turn a code into its neighbour: bit for bit."""
    tracks, offsets = [music(samples, seed) for seed, samples in enumerate(lengths)], view_offsets(views, FRAME)
    got = encoded_together(codec, tracks, offsets, size)
    expected = [whole(codec, track[offset:]) for track in tracks for offset in offsets]
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(left, right)


def test_short_clips_have_the_codes_of_one_pass_over_each() -> None:
    """Shorter than a window, as long as one, and a little longer; some shorter than a frame, or than its views."""
    frames = [0.3, 0.9, 1, 1.2, 1.6, 2, 2.5, 3, 7, 9.5, 10, 11.6, 14]
    size = EncodingPass(windows=3, window_seconds=8 * FRAME / RATE)
    assert_as_whole(codec_with_memory(2.0), [round(FRAME * count) for count in frames], 4, size)


@pytest.mark.full
@pytest.mark.parametrize("views", [1, 4])
def test_ends_of_tracks_of_any_length_have_the_codes_of_one_pass_over_each(views: int) -> None:
    """In windows as a GPU has them, tracks of 0.1 to 40 s."""
    size = replace(encoding_pass(on_gpu=True, views=views), windows=3)
    seconds = [0.1, 0.5, 0.9, 1.3, 1.37, 2, 2.5, 5, 5, 5.2, 7, 40] if views == 1 else [0.1, 1.3, 1.37, 5, 5, 5.1]
    assert_as_whole(codec_with_memory(2.0), lengths_of(seconds), views, size)


def test_an_end_does_not_depend_on_those_beside_it() -> None:
    """In float32, bit for bit: alone, with others, in another order, and with others of its length."""
    codec, size = debug_codec(), EncodingPass(windows=4, window_seconds=0.64)
    tracks = [music(samples, seed) for seed, samples in enumerate(lengths_of([0.3, 0.31, 0.6, 0.6, 0.9, 0.05, 0.62]))]
    together = encoded_together(codec, tracks, [0, 320], size)
    alone = [codes for track in tracks for codes in encoded_together(codec, [track], [0, 320], size)]
    backwards = encoded_together(codec, tracks[::-1], [0, 320], size)
    backwards = [backwards[2 * (len(tracks) - 1 - row) + view] for row in range(len(tracks)) for view in range(2)]
    for left, middle, right in zip(together, alone, backwards, strict=True):
        np.testing.assert_array_equal(left, middle)
        np.testing.assert_array_equal(left, right)


def test_files_of_one_and_two_channels_have_the_codes_of_a_cpu_up_to_rounding(tmp_path: Path) -> None:
    """Decoded, mixed and resampled, in shared passes, against one after the other. In float32."""
    blocks = []
    for number, (channels, rate) in enumerate(itertools.product((1, 2), (22_050, 32_000, 44_100))):
        sound = [music(rate // 2 + 999 * number, seed=number + channel) for channel in range(channels)]
        soundfile.write(tmp_path / f"{number}.wav", np.stack(sound, axis=1), rate)
        blocks.append(list(audio.stream(tmp_path / f"{number}.wav", RATE)))
    tracks = [np.concatenate(parts) for parts in blocks]
    together = encoded_together(debug_codec(), tracks, [0, 320], EncodingPass(windows=4, window_seconds=0.64))
    alone = [codes for track in tracks for codes in encode(debug_codec(), [track], offsets=[0, 320])]
    for left, right in zip(together, alone, strict=True):
        # A tie between two codes may be decided by rounding, and with it the later codebooks of that frame.
        assert left.shape == right.shape and (left != right).any(axis=0).sum() <= 1


def test_a_hundred_short_clips_take_a_few_passes() -> None:
    """One for 16 clips that are shorter than a window, and the last for those that are left."""
    codec, size = small_codec(), EncodingPass(windows=16, window_seconds=0.16)  # 8 frames
    passes = passes_of(codec)
    encoded_together(codec, [music(FRAME * 6, seed) for seed in range(100)], [0, 320], size)
    assert passes == [(11, 16 * 2)] * 7


def test_clips_of_several_windows_take_one_pass_for_their_ends() -> None:
    """20 clips as clips of 5 s are on a GPU with 4 views: three windows and most of a fourth."""
    codec, size = small_codec(), EncodingPass(windows=4, window_seconds=0.32)
    passes = passes_of(codec)
    encoded_together(codec, [music(FRAME * 62, seed) for seed in range(20)], [0], size)
    assert sorted(passes) == [(16, 4)] * 15 + [(18, 4)] * 5


def test_an_end_takes_a_pass_of_about_its_length() -> None:
    codec, size = small_codec(), EncodingPass(windows=2, window_seconds=1.28)  # 64 frames
    passes = passes_of(codec)
    for frames in (65, 34, 33, 16, 1):
        encoded_together(codec, [music(FRAME * frames)], [0], size)
    assert passes == [(66, 2), (66, 2), (33, 2), (16, 2), (LEAST_END_FRAMES, 2)]


def test_ends_wait_for_others_until_no_more_tracks_come() -> None:
    """Clips of other lengths between them do not send them off."""
    codec, size = small_codec(), EncodingPass(windows=4, window_seconds=0.64)  # 32 frames
    passes = passes_of(codec)
    encoded_together(codec, [music(FRAME * (30 if number % 2 else 12)) for number in range(16)], [0], size)
    assert sorted(passes) == [(17, 4)] * 2 + [(34, 4)] * 2
    passes.clear()
    encoded_together(codec, [music(FRAME * 30) for _ in range(5)], [0], size)
    assert passes == [(34, 4)] * 2
