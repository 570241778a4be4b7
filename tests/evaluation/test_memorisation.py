"""Whether clips known by heart are told from others: made-up codes, and models that answer as they are made to."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.recall import meaning, memorised, settings_of, read_flags
from trainer.errors import ConfigError
from trainer.evaluation.generation import Request
from trainer.evaluation.memorisation import (
    Clip,
    Prompted,
    Row,
    Shares,
    chosen,
    compared_frames,
    continued,
    rows_of,
    shares_of,
    trained_cells,
)
from trainer.evaluation.nearest import Match, nearest
from trainer.evaluation.recall import Findings
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import open_model

CODES = 2048


def codes_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(CODES, shape, generator=torch.Generator().manual_seed(seed))


def clip_from(codes_KT: Tensor, segment: int = 1500, channels: int = 1, melody: Tensor | None = None) -> Clip:
    trained = trained_cells(codes_KT, segment, channels)
    return Clip(name="a.wav", caption="", codes_KT=codes_KT, trained_KT=trained, melody_C=melody, whole=True)


def test_exact_is_every_code_and_partial_begins_at_80_per_cent() -> None:
    true = codes_of(4, 4, 250).repeat(1, 1, 1)
    made = true.clone()
    made[1, 0, 0] += 1  # one wrong code of 1,000
    made[2].view(-1)[:200] += 1  # 80.0 % right
    made[3].view(-1)[:201] += 1  # 79.9 %
    counted = torch.ones_like(true, dtype=torch.bool)
    shares = shares_of(made % CODES, true, counted)
    assert (shares.exact, shares.partial) == (1 / 4, 3 / 4)
    assert shares.equal == pytest.approx((1 + 0.999 + 0.8 + 0.799) / 4, abs=1e-12)
    # What does not count changes nothing: the wrong code of the second clip left out, it is exact.
    counted[1, 0, 0] = False
    assert shares_of(made % CODES, true, counted).exact == 2 / 4


def test_chance_of_independent_codes_is_one_in_as_many_codes_as_there_are() -> None:
    clips, cells = 12, 4 * 250
    made, true = codes_of(clips, 4, 250, seed=1), codes_of(clips, 4, 250, seed=2)
    shares = shares_of(made, true, torch.ones_like(true, dtype=torch.bool))
    # 12 x 11 pairs of 1,000 codes: five standard deviations of a binomial share.
    for share, pairs in ((shares.chance, clips * (clips - 1)), (shares.equal, clips)):
        assert share is not None and abs(share - 1 / CODES) < 5 * math.sqrt(1 / CODES / (pairs * cells))
    assert (shares.exact, shares.partial) == (0, 0)


def test_chance_of_frequent_codes_is_how_often_they_meet() -> None:
    # Two codes, one of them in 90 % of the places: independent sequences meet in 0.9^2 + 0.1^2 of them.
    random = np.random.default_rng(0)
    made, true = (torch.from_numpy((random.random((40, 4, 250)) < 0.1).astype(np.int64)) for _ in range(2))
    chance = shares_of(made, true, torch.ones_like(true, dtype=torch.bool)).chance
    assert chance == pytest.approx(0.82, abs=0.005)


def test_there_is_no_chance_without_another_clip_that_long() -> None:
    codes = codes_of(2, 4, 100)
    counted = torch.ones_like(codes, dtype=torch.bool)
    assert shares_of(codes[:1], codes[:1], counted[:1]).chance is None
    counted[1, :, :60] = False  # the two have no place in common
    counted[0, :, 60:] = False
    assert shares_of(codes, codes, counted) == Shares(exact=1, partial=1, equal=1, chance=None)


def test_a_clip_is_continued_to_its_end_if_a_second_of_it_is_left() -> None:
    clip = clip_from(codes_of(4, 299))
    assert [compared_frames(clip, given, 250) for given in (0, 49, 50, 249, 250, 500)] == [250, 250, 249, 50, 0, 0]
    assert [compared_frames(clip, given, 20) for given in (0, 279, 280)] == [20, 20, 0]


@pytest.fixture(params=["debug", "debug-stereo", "debug-melody"])
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Prompted:
    """A real model, which takes and makes codes of its kind."""
    return Prompted(name=request.param, model=language_model(request.param), texts={"": None})


def language_model(name: str) -> LanguageModel:
    return load_language_model(open_model(name)).eval()


def test_a_model_s_own_output_is_continued_exactly_wherever_it_is_cut(asked: Prompted) -> None:
    # What a model makes greedily of its own beginning is what it made: a copy, without training one.
    from trainer.evaluation.memorisation import GREEDY, played

    codebooks = asked.model.decoder.num_codebooks
    melody = torch.arange(235) % 12 if asked.model.audio_enc_to_dec_proj is not None else None
    seeds = [clip_from(codes_of(codebooks, 10, seed=seed), melody=melody) for seed in (1, 2)]
    made = played(asked, seeds, [70, 66], GREEDY, given_frames=10)
    assert [codes.shape for codes in made] == [(codebooks, 70), (codebooks, 66)]
    clips = [clip_from(codes, segment=68, channels=asked.channels, melody=melody) for codes in made]
    clips[0] = clip_from(made[0][:, :68], segment=68, channels=asked.channels, melody=melody)
    rows = rows_of(
        asked, clips, group="training", model="after", prompt_seconds=(0.2, 0.5, 1.2), continued_frames=20,
        frame_rate_hz=50,
    )  # fmt: skip
    assert [(row.prompt_seconds, row.clips) for row in rows] == [(0.2, 2), (0.5, 2)]
    for row in rows:
        assert row.all_codebooks.exact == row.first_codebook.exact == 1
    # Another clip's beginning is not continued so.
    swapped = [replace(clips[0], codes_KT=torch.cat([clips[1].codes_KT[:, :10], clips[0].codes_KT[:, 10:]], 1))]
    [row] = rows_of(
        asked, swapped, group="training", model="after", prompt_seconds=(0.2,), continued_frames=20, frame_rate_hz=50
    )
    assert row.all_codebooks.exact == 0
