"""Codebooks that give back what they were fitted to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import EncodecConfig, EncodecModel

from trainer.errors import DataError
from trainer.model.fitted_codebooks import CODES, GRID, MOST_LATENTS, fit_codebooks

pytestmark = pytest.mark.numbers
WIDTH = 16
BARE = EncodecModel(
    EncodecConfig(
        sampling_rate=32_000, upsampling_ratios=[8, 5, 4, 4], num_filters=2, hidden_size=WIDTH, codebook_size=CODES,
        target_bandwidths=[2.2], norm_type="weight_norm", audio_channels=1,
    )
)  # fmt: skip


def latents(count: int, seed: int = 0) -> Tensor:
    """(count, WIDTH) float32 of sound's kind: multiples of the grid, some far louder than others."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((count, WIDTH)) * random.exponential(0.2, (count, 1))
    return torch.from_numpy(np.round(values.clip(-1, 1) / GRID) * GRID).float()


def fitted(latents_ND: Tensor, seed: int = 0) -> EncodecModel:
    codec = copy.deepcopy(BARE)
    fit_codebooks(codec, latents_ND, seed=seed)
    return codec


def codes_of(codec: EncodecModel, latents_ND: Tensor) -> Tensor:
    """(K, N)"""
    return codec.quantizer.encode(latents_ND.T[None], 2.2)[:, 0]


def given_back(codec: EncodecModel, latents_ND: Tensor) -> Tensor:
    return codec.quantizer.decode(codes_of(codec, latents_ND)[:, None])[0].T


def tables(codec: EncodecModel) -> list[Tensor]:
    return [layer.codebook.embed for layer in codec.quantizer.layers]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 255, 1000])
def test_latents_come_back_bit_for_bit(count: int) -> None:
    wanted = latents(count)
    codec = fitted(wanted)
    assert torch.equal(given_back(codec, wanted), wanted)
    assert codes_of(codec, wanted).max() < CODES


def test_silence_and_equal_latents_need_no_room() -> None:
    wanted = latents(MOST_LATENTS - 1)
    wanted = torch.cat([wanted, torch.zeros(500, WIDTH), wanted[:300]])
    assert torch.equal(given_back(fitted(wanted), wanted), wanted)  # and so do as many as fit
    assert not given_back(fitted(torch.zeros(7, WIDTH)), torch.zeros(7, WIDTH)).any()


def test_more_different_latents_than_fit_are_refused_with_their_number() -> None:
    with pytest.raises(DataError, match=r"4,095 different latents are too many: 4,094 can be given back"):
        fitted(latents(MOST_LATENTS + 1))


def test_the_rows_depend_on_the_set_of_latents_and_the_seed_alone() -> None:
    wanted = latents(600)
    with threads(1):
        first = tables(fitted(wanted))
    with threads(2):
        again = tables(fitted(torch.cat([wanted.flip(0), wanted[:50]])))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other_seed = tables(fitted(wanted, seed=1))
    assert not any(torch.equal(one, other) for one, other in zip(first, other_seed, strict=True))


def test_each_codebook_leaves_less_than_the_one_before() -> None:
    wanted = latents(1000)
    codec = fitted(wanted)
    codes = codes_of(codec, wanted)
    left, powers = wanted, [wanted.square().sum()]
    for stage, table in enumerate(tables(codec)):
        left = left - table[codes[stage]]
        powers.append(left.square().sum())
    assert powers == sorted(powers, reverse=True) and powers[-1] == 0


def test_a_row_that_nothing_is_fitted_to_sounds_no_louder_than_the_others() -> None:
    # A model that has learned nothing picks such rows, and is listened to.
    wanted = latents(400)
    codes = torch.randint(CODES, (4, 1, 2000), generator=torch.Generator().manual_seed(0))
    made = fitted(wanted).quantizer.decode(codes)
    # Each codebook's rows are about as loud as what it gets, which is at most as loud as the latents: with four of
    # them, independent of each other, powers add up to four times theirs.
    assert made.square().mean() < 4.5 * wanted.square().mean()


def test_a_near_tie_of_centres_is_given_back_whichever_is_taken() -> None:
    # Between two clusters, a little off the middle by less than float32 can tell.
    random = np.random.default_rng(0)
    spread = 0.01 * random.standard_normal((300, WIDTH))
    ends = np.concatenate([spread[:150] - spread[:150].mean(0) - 0.5, spread[150:] - spread[150:].mean(0) + 0.5])
    middle = np.zeros((1, WIDTH))
    middle[0, 0] = 4 * GRID
    wanted = torch.from_numpy(np.round(np.concatenate([ends, middle]) / GRID) * GRID).float()
    codec = fitted(wanted)
    assert torch.equal(given_back(codec, wanted), wanted)
