"""EnCodec over the two channels of stereo tracks, against transformers' own pass over each channel alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.data.test_codec import FRAME, RATE, codec_with_memory, debug_codec, music, pieces, whole
from trainer.data.codec import encode, encode_tracks, view_offsets
from trainer.spec.encoding import EncodingPass

pytestmark = pytest.mark.numbers


def in_stereo(samples: int, seed: int = 0) -> np.ndarray:
    """Two unlike channels, (samples, 2) float32."""
    return np.stack([music(samples, 2 * seed), music(samples, 2 * seed + 1)[::-1] / 2], axis=1)


def of_channels(codec, track: np.ndarray) -> np.ndarray:
    """(8, frames): transformers' codes of each channel, the first codebook of both, then the second, and so on.

    Source: audiocraft 1.3.0, InterleaveStereoCompressionModel.encode.
    """
    left, right = (whole(codec, np.ascontiguousarray(track[:, channel])) for channel in (0, 1))
    return np.array([row for pair in zip(left, right, strict=True) for row in pair])


def encoded_together(codec, tracks: Sequence[np.ndarray], offsets: Sequence[int], size: EncodingPass):
    waiting = [(number, iter(pieces(track, (20_011, 7, 9_000)))) for number, track in enumerate(tracks)]
    found = dict(
        encode_tracks(codec, lambda: waiting.pop(0) if waiting else None, offsets=offsets, size=size, channels=2)
    )
    return [codes for number in range(len(tracks)) for codes in found[number]]


@pytest.mark.parametrize("windows", [1, 3])
def test_each_channel_has_the_codes_of_one_pass_over_it_alone(windows: int) -> None:
    """Tracks of no sound, shorter than a frame, than a window, and of several; in float64, bit for bit."""
    codec, offsets = codec_with_memory(2.0), [0, 320]
    lengths = [0, 5, 700, 1_000, 14 * FRAME, 33 * FRAME + 17, 33 * FRAME + 17, 40 * FRAME + 5]
    tracks = [in_stereo(samples, seed) for seed, samples in enumerate(lengths)]
    size = EncodingPass(windows=windows, window_seconds=12 * FRAME / RATE)
    got = encoded_together(codec, tracks, offsets, size)
    expected = [of_channels(codec, track[offset:]) for track in tracks for offset in offsets]
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == np.int16 and left.shape == right.shape
        np.testing.assert_array_equal(left, right)
    loud = got[-1]
    assert (loud[::2] != loud[1::2]).any()  # or a mistaken channel would not show


def test_ends_that_share_passes_have_the_codes_of_one_pass_over_each_channel() -> None:
    frames = [0.3, 1, 1.2, 2.5, 7, 10, 11.6]
    codec, offsets = codec_with_memory(2.0), view_offsets(4, FRAME)
    tracks = [in_stereo(round(FRAME * count), seed) for seed, count in enumerate(frames)]
    got = encoded_together(codec, tracks, offsets, EncodingPass(windows=3, window_seconds=8 * FRAME / RATE))
    for left, right in zip(got, (of_channels(codec, track[o:]) for track in tracks for o in offsets), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_channel_does_not_depend_on_the_other_nor_on_the_tracks_beside_it() -> None:
    """In float32, bit for bit, on the road that a GPU takes."""
    codec, size = debug_codec(), EncodingPass(windows=3, window_seconds=0.32)
    tracks = [in_stereo(RATE // 2 + 777 * seed, seed) for seed in range(4)]
    together = encoded_together(codec, tracks, [0, 320], size)
    alone = [codes for track in tracks for codes in encoded_together(codec, [track], [0, 320], size)]
    turned = encoded_together(codec, [track[:, ::-1] for track in tracks], [0, 320], size)
    for left, middle, right in zip(together, alone, turned, strict=True):
        np.testing.assert_array_equal(left, middle)
        np.testing.assert_array_equal(left[::2], right[1::2])
        np.testing.assert_array_equal(left[1::2], right[::2])


def test_two_equal_channels_have_equal_codes_which_are_those_of_the_mono_track() -> None:
    codec, track = codec_with_memory(2.0), music(RATE)
    [mono] = encode(codec, [track], offsets=[0], window_seconds=0.3)
    [stereo] = encode(codec, [np.stack([track, track], axis=1)], offsets=[0], channels=2, window_seconds=0.3)
    np.testing.assert_array_equal(stereo, np.repeat(mono, 2, axis=0))


def test_blocks_of_another_number_of_channels_are_no_track() -> None:
    with pytest.raises(ValueError, match="reshape"):
        encode(debug_codec(), [music(RATE)], offsets=[0], channels=2)
