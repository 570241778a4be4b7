"""EnCodec in windows against transformers' own pass over the whole track."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import EncodecConfig, EncodecModel

from trainer.data import audio
from trainer.data.codec import encode, encode_tracks, view_offsets
from trainer.data.codec_layers import run
from trainer.data.codec_windows import reproducible, windowed_codec
from trainer.errors import ModelError
from trainer.model.debug_model import build_debug_model, codec_config, set_codebooks
from trainer.plan.memory import CODEC_CONTEXT_SECONDS, CODEC_TENSORS
from trainer.spec.encoding import EncodingPass

pytestmark = pytest.mark.numbers
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RATE, FRAME, CONTEXT = 32_000, 640, 2


@functools.cache
def debug_codec() -> EncodecModel:
    return build_debug_model().audio_encoder


def codec_with_memory(forget_bias: float) -> EncodecModel:
    """The debug codec whose LSTM forgets less: `forget_bias` on the forget gate of every layer.

    In float64, where the rounding of different window sizes cannot turn a code into its neighbour.
    """
    codec = copy.deepcopy(debug_codec()).double()
    for name, parameter in codec.encoder.named_parameters():
        if "bias_ih" in name:
            gate = len(parameter) // 4  # input, forget, cell, output: torch.nn.LSTM
            parameter.data[gate : 2 * gate] += forget_bias
    return codec


def music(samples: int, seed: int = 0) -> np.ndarray:
    """A gliding tone with noise, float32 in [-1, 1]."""
    time = np.arange(samples) / RATE
    tone = 0.5 * np.sin(2 * np.pi * (200 + 90 * np.sin(3 * time)) * time)
    return (tone + 0.1 * np.random.default_rng(seed).standard_normal(samples)).clip(-1, 1).astype(np.float32)


def whole(codec: EncodecModel, track: np.ndarray) -> np.ndarray:
    """What transformers makes of the whole track at once, its last partial frame left out."""
    frames = len(track) // FRAME
    if frames == 0:
        return np.zeros((4, 0), np.int16)
    with torch.inference_mode():
        values = torch.from_numpy(track.copy())[None, None].to(codec.dtype)
        return codec.encode(values).audio_codes[0, 0, :, :frames].numpy().astype(np.int16)


def pieces(track: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """The track cut into blocks of these sizes in turn, again and again."""
    cuts: list[np.ndarray] = []
    at = 0
    while at < len(track):
        cuts.append(track[at : at + sizes[len(cuts) % len(sizes)]])
        at += len(cuts[-1])
    return cuts


def assert_equal_to_whole(
    codec: EncodecModel, track: np.ndarray, offsets: Sequence[int], window_seconds: float
) -> None:
    got = encode(codec, pieces(track, (20_011, 7, 64_000)), offsets=offsets, window_seconds=window_seconds)
    assert len(got) == len(offsets)
    for offset, codes in zip(offsets, got, strict=True):
        assert codes.dtype == np.int16
        np.testing.assert_array_equal(codes, whole(codec, track[offset:]), err_msg=f"{len(track)} {offset}")


@pytest.mark.parametrize("forget_bias", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("window_seconds", [1.0, 2.5, 10.0])
def test_windows_give_the_codes_of_one_pass(forget_bias: float, window_seconds: float) -> None:
    codec, longer = codec_with_memory(forget_bias), window_seconds == 10.0
    track = music(RATE * (11 if longer else 6) + 333)
    assert_equal_to_whole(codec, track, [0] if longer else [0, 161, 639], window_seconds)


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_lengths_around_every_border_give_the_codes_of_one_pass(over: int) -> None:
    codec, window = codec_with_memory(2.0), 8  # frames
    frames = [0, 1, 2, 3, 4, 5, CONTEXT + 1, window, window + CONTEXT, 2 * window, 2 * window + CONTEXT + 1]
    for count in frames:
        samples = count * FRAME + over
        if samples > 0:
            assert_equal_to_whole(codec, music(samples, seed=count), [0, 160, 320, 639], window * FRAME / RATE)


def test_windows_smaller_than_the_context_give_the_codes_of_one_pass() -> None:
    assert_equal_to_whole(codec_with_memory(2.0), music(9_999), [0, 320], FRAME / RATE)


def test_in_float32_windows_give_the_codes_of_one_pass_up_to_rounding() -> None:
    codec, track = debug_codec(), music(RATE * 8 + 99)
    got = encode(codec, [track], offsets=[0, 77], window_seconds=1.5)
    for offset, codes in zip((0, 77), got, strict=True):
        # A tie between two codes may be decided by rounding, and with it the later codebooks of that frame.
        differs = (codes != whole(codec, track[offset:])).any(axis=0)
        assert differs.mean() <= 0.005


def test_independent_windows_give_other_codes() -> None:
    codec, track, window = codec_with_memory(2.0), music(6 * RATE), 2 * RATE
    alone = [encode(codec, [part], offsets=[0])[0] for part in np.split(track, len(track) // window)]
    equal = np.concatenate(alone, axis=1) == whole(codec, track)
    first = window // FRAME
    assert equal[:, : first - CONTEXT].all()
    assert equal[:, first:].mean() < 0.9


def test_no_audio_gives_no_frames() -> None:
    assert [codes.shape for codes in encode(debug_codec(), [], offsets=[0, 320])] == [(4, 0), (4, 0)]


@pytest.mark.parametrize("channels", [1, 2])
def test_one_window_of_audio_is_asked_for_at_a_time(channels: int) -> None:
    asked: list[int] = []
    encoded: list[int] = []
    codec = copy.deepcopy(debug_codec())
    codec.encoder.layers[-3].lstm.register_forward_hook(lambda *_: encoded.append(len(asked)))

    def blocks():
        for number in range(12):
            asked.append(number)
            yield np.repeat(music(RATE // 2, seed=number)[:, None], channels, axis=1)

    encode(codec, blocks(), offsets=[0], channels=channels, window_seconds=1.0)
    # Blocks read when a window was encoded: one second of window and its context need 3 halves, then 2 more.
    assert encoded == [3, 5, 7, 9, 11, 12]


def encoded_together(
    codec: EncodecModel, tracks: Sequence[np.ndarray], offsets: Sequence[int], size: EncodingPass
) -> list[np.ndarray]:
    """The codes of all tracks and views in their order, whatever order they were finished in."""
    waiting = [(number, iter(pieces(track, (20_011, 7, 9_000)))) for number, track in enumerate(tracks)]
    found = dict(encode_tracks(codec, lambda: waiting.pop(0) if waiting else None, offsets=offsets, size=size))
    assert sorted(found) == list(range(len(tracks)))
    return [codes for number in range(len(tracks)) for codes in found[number]]


@pytest.mark.parametrize("windows", [2, 3, 16])
def test_tracks_that_share_passes_have_the_codes_of_one_pass_over_each(windows: int) -> None:
    """In float64, where rounding cannot turn a code into its neighbour: bit for bit."""
    codec, window = codec_with_memory(2.0), 12  # frames
    lengths = [0, 5, 1_000, 8 * FRAME + 1, 14 * FRAME, 33 * FRAME + 17, 33 * FRAME + 17, 90 * FRAME + 5, 41 * FRAME]
    tracks = [music(samples, seed) for seed, samples in enumerate(lengths)]
    size = EncodingPass(windows=windows, window_seconds=window * FRAME / RATE)
    got = encoded_together(codec, tracks, [0, 320], size)
    expected = [whole(codec, track[offset:]) for track in tracks for offset in (0, 320)]
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(left, right)


def test_what_a_track_becomes_does_not_depend_on_those_beside_it() -> None:
    """In float32, bit for bit, on the road that a GPU takes: the shape of a pass is the same whoever is in it."""
    codec, size = debug_codec(), EncodingPass(windows=4, window_seconds=0.32)
    tracks = [music(RATE + 777 * seed, seed) for seed in range(7)]
    alone = [codes for track in tracks for codes in encoded_together(codec, [track], [0, 320], size)]
    together = encoded_together(codec, tracks, [0, 320], size)
    backwards = encoded_together(codec, tracks[::-1], [0, 320], size)
    for number in range(len(tracks)):
        for view in range(2):
            expected = alone[2 * number + view]
            np.testing.assert_array_equal(together[2 * number + view], expected)
            np.testing.assert_array_equal(backwards[2 * (len(tracks) - 1 - number) + view], expected)


def test_every_pass_has_the_same_shape_and_the_last_tracks_fill_it() -> None:
    codec, rows = copy.deepcopy(debug_codec()), []
    codec.encoder.layers[-3].lstm.register_forward_hook(lambda _, inputs, __: rows.append(tuple(inputs[0].shape[:2])))
    size = EncodingPass(windows=4, window_seconds=0.2)  # 10 frames
    encoded_together(codec, [music(83 * FRAME)], [0], size)
    # One window at the start of the track, 7 more in two passes of up to 4, then the end, which can have 2 frames more.
    assert rows == [(10, 4)] * 8 + [(12, 4)]


@pytest.mark.parametrize(("windows", "channels"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_a_pass_holds_no_more_than_the_plan_says(windows: int, channels: int) -> None:
    codec, seconds, views = EncodecModel(codec_config(filters=32, width=32)).eval(), 0.64 / channels, 2
    track = np.stack([music(RATE * 2, seed) for seed in range(channels)], axis=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        encode(codec, [track], offsets=[0, 320], channels=channels, window_seconds=seconds, windows=windows)
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    samples = windows * views * channels * (seconds + CODEC_CONTEXT_SECONDS) * RATE
    convolutions = sum(parameter.numel() for name, parameter in codec.encoder.named_parameters() if "lstm" not in name)
    assert most <= 4 * (CODEC_TENSORS * samples * 32 + convolutions)


def test_a_track_that_fails_is_named_and_the_others_go_on() -> None:
    codec, size = codec_with_memory(0.0), EncodingPass(windows=2, window_seconds=0.2)

    def failing():
        yield music(RATE)
        raise audio.AudioFault("truncated", "cut off")

    good = [music(RATE + 50 * seed, seed) for seed in range(3)]
    waiting = [("good", iter([good[0]])), ("bad", failing()), ("fine", iter([good[1]]))]
    found = {}
    for key, codes in encode_tracks(codec, lambda: waiting.pop(0) if waiting else None, offsets=[0], size=size):
        found[key] = codes
        if key == "bad":
            waiting.append(("instead", iter([good[2]])))
    assert isinstance(found.pop("bad"), audio.AudioFault)
    assert list(found) and set(found) == {"good", "fine", "instead"}
    for name, track in zip(("good", "fine", "instead"), good, strict=True):
        np.testing.assert_array_equal(found[name][0], whole(codec, track))


def test_context_covers_every_sample_that_a_frame_depends_on() -> None:
    codec = codec_with_memory(0.0)
    windowed = windowed_codec(codec, [0], EncodingPass(windows=1, window_seconds=10.0))
    samples = torch.zeros(1, 1, 20 * FRAME, dtype=torch.float64)
    samples.normal_(generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    frame = 9
    run(windowed.before, samples)[..., frame].abs().sum().backward()
    assert samples.grad is not None
    seen = samples.grad[0, 0].nonzero().flatten()
    before, after = frame * FRAME - int(seen.min()), int(seen.max()) - ((frame + 1) * FRAME - 1)
    # 482 and 466 by hand: kernel 7, then per stride 4, 4, 5, 8 a residual kernel 3 and a kernel of 2 strides.
    assert (before, after) == (482, 466)
    assert windowed.context * FRAME >= max(before, after)
    assert windowed.hop == FRAME
    assert windowed.left == windowed.right == 3  # half of the last kernel, 7


def test_views_are_spread_evenly_inside_a_frame() -> None:
    assert view_offsets(4, 640) == [0, 160, 320, 480]
    assert view_offsets(1, 640) == [0]
    assert view_offsets(3, 640) == [0, 213, 426]


def test_precision_settings_of_the_training_do_not_reach_the_codec() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with reproducible(torch.device("cpu")):
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.backends.cudnn.allow_tf32
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert torch.get_float32_matmul_precision() == "medium"
            track = music(RATE)
            under_autocast = encode(debug_codec(), [track], offsets=[0])[0]
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(under_autocast, encode(debug_codec(), [track], offsets=[0])[0])


@pytest.mark.parametrize(
    "setting",
    [
        {"use_causal_conv": True},
        {"normalize": True},
        {"chunk_length_s": 1.0},
        {"norm_type": "time_group_norm"},
        {"pad_mode": "constant"},
    ],
)
def test_codecs_that_windows_cannot_reproduce_are_refused(setting: dict) -> None:
    config = EncodecConfig.from_dict({**debug_codec().config.to_dict(), **setting})
    with pytest.raises(ModelError, match="windows"):
        encode(EncodecModel(config), [music(RATE)], offsets=[0])


def test_the_debug_codec_tells_examples_apart() -> None:
    clips = sorted(EXAMPLES.glob("*.wav"))[:3]
    assert clips
    tracks = [encode(debug_codec(), audio.stream(clip, RATE, 2.0), offsets=[0])[0] for clip in clips]
    assert len(np.unique(np.concatenate(tracks, axis=1))) >= 200


@pytest.mark.full
def test_windows_give_the_codes_of_one_pass_at_real_size() -> None:
    sizes = {"num_filters": 64, "hidden_size": 128, "codebook_dim": 128}  # those of facebook/encodec_32khz
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = EncodecModel(EncodecConfig.from_dict({**debug_codec().config.to_dict(), **sizes})).eval()
        set_codebooks(codec)
    track = music(4 * RATE + 123)
    got = encode(codec, pieces(track, (20_011,)), offsets=[0, 320], window_seconds=1.0)
    for offset, codes in zip((0, 320), got, strict=True):
        assert (codes != whole(codec, track[offset:])).any(axis=0).mean() <= 0.005
