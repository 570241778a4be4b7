"""The codec that passes sound through, by signals that have nothing to do with any clip."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import EncodecModel

from trainer.data.codec import encode
from trainer.model.fitted_codebooks import fit_codebooks
from trainer.model.passing_codec import HEADROOM, latents_of, passing_codec

pytestmark = pytest.mark.numbers
FRAME = 640
# Samples between 0 and 4 lie between 4 and 8 once the headroom is added, where float32 has multiples of 2**-21.
HALF_STEP = 2.0**-22


@functools.cache
def codec() -> EncodecModel:
    state = torch.get_rng_state()
    made = passing_codec()
    assert torch.equal(torch.get_rng_state(), state), "making it draws from the global generator"
    return made


def noise(frames: int, loudest: float = 1.0, seed: int = 0) -> Tensor:
    """(frames x 640,) float32, evenly spread over [-loudest, loudest]."""
    values = np.random.default_rng(seed).uniform(-loudest, loudest, frames * FRAME)
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("loudest", [1e-3, 1.0, 0.999 * HEADROOM])
def test_any_sound_passes_through_to_rounding(loudest: float) -> None:
    samples = noise(20, loudest)
    with torch.inference_mode():
        latents = codec().encoder(samples[None, None])
        sound = codec().decoder(latents)[0, 0]
    assert latents.shape == (1, FRAME, 20)
    torch.testing.assert_close(latents[0].T, samples.reshape(-1, FRAME), rtol=0, atol=HALF_STEP)
    torch.testing.assert_close(sound, samples, rtol=0, atol=2 * HALF_STEP)


def test_beyond_its_headroom_sound_is_bent() -> None:
    with torch.inference_mode():
        latents = codec().encoder(torch.full((1, 1, 4 * FRAME), -2 * HEADROOM))
    assert float(latents.min()) > -2 * HEADROOM + 1


def test_its_latents_are_known_without_it_bit_for_bit() -> None:
    samples = noise(20)
    with torch.inference_mode():
        assert torch.equal(codec().encoder(samples[None, None])[0].T, latents_of(samples))


def test_its_windows_give_the_codes_of_one_pass() -> None:
    fitted, samples = copy.deepcopy(codec()), noise(30)
    fit_codebooks(fitted, latents_of(samples), seed=0)
    track = samples.numpy()[: -FRAME // 3]  # the last frame is not whole, and has no codes
    with torch.inference_mode():
        whole = fitted.encode(torch.from_numpy(track)[None, None]).audio_codes[0, 0, :, :29]
    for window_frames in (7, 20):
        seconds = window_frames * FRAME / 32_000
        [codes] = encode(fitted, np.split(track, [1000, 9001]), offsets=[0], window_seconds=seconds)
        np.testing.assert_array_equal(codes, whole.numpy())
