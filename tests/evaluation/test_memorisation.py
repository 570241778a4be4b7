"""Whether clips known by heart are told from others: made-up codes, and models that answer as they are made to."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.recall import main, memorised
from tests.blown_up import blown_up
from trainer.errors import ConfigError
from trainer.evaluation import nearest as nearest_place
from trainer.evaluation.memorisation import (
    GREEDY,
    Clip,
    Prompted,
    Row,
    Shares,
    compared_frames,
    played,
    rows_of,
    shares_of,
    trained_cells,
)
from trainer.evaluation.nearest import Match, nearest
from trainer.evaluation.recall import Findings
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


@pytest.mark.parametrize("name", ["debug", "debug-stereo", "debug-melody"])
def test_what_a_model_made_is_continued_by_it_exactly_wherever_it_is_cut(name: str) -> None:
    # What a model makes greedily of its own beginning is what it made: a clip known by heart, without training one.
    model = blown_up(open_model(name))
    asked = Prompted(name=name, model=model, texts={"": None})
    codebooks, segment = model.decoder.num_codebooks, 68
    melody = torch.arange(235) % 12 if name == "debug-melody" else None
    beginnings = [clip_from(codes_of(codebooks, 10, seed=seed), melody=melody) for seed in (1, 2)]
    made = played(asked, beginnings, [70, 66], GREEDY, given_frames=10)
    assert [codes.shape for codes in made] == [(codebooks, 70), (codebooks, 66)]
    # The first is longer than a segment, so that its last frames are never trained whole; the second ends in it.
    clips = [clip_from(codes[:, :segment], segment, asked.channels, melody) for codes in made]

    def rows(clips: list[Clip], frames: int, *prompts: float) -> list[Row]:
        return rows_of(
            asked, clips, group="training", model="after", prompt_seconds=prompts, continued_frames=frames,
            frame_rate_hz=50,
        )  # fmt: skip

    found = [*rows(clips, 20, 0.2, 0.5, 1.2), *rows(clips, 58, 0.2)]
    assert [(row.prompt_seconds, row.clips) for row in found] == [(0.2, 2), (0.5, 2), (0.2, 2)]
    assert all(row.all_codebooks.exact == row.first_codebook.exact == 1 for row in found)
    # After another beginning it goes on otherwise.
    other = torch.cat([clips[1].codes_KT[:, :10], clips[0].codes_KT[:, 10:]], dim=1)
    [row] = rows([replace(clips[0], codes_KT=other)], 20, 0.2)
    assert row.all_codebooks.exact == 0


@pytest.mark.parametrize("channels", [1, 2])
def test_the_nearest_place_is_that_of_a_planted_copy(channels: int) -> None:
    tracks = [codes_of(4 * channels, frames, seed=frames).numpy() for frames in (1500, 700, 49, 1100)]
    output = codes_of(4 * channels, 500, seed=7).numpy()
    output[:, 120:370] = tracks[3][:, 640:890]
    [found, none] = search([output, codes_of(4 * channels, 500, seed=8).numpy()], tracks, channels=channels)
    assert found == Match(clip=3, output_frame=120, clip_frame=640, frames=250, first_codebook=1, equal=1)
    # A copy of which every second frame is another is still found, and is said to be half of one.
    output[:, 120:370:2] = codes_of(4 * channels, 125, seed=9).numpy()
    [half] = search([output], tracks, channels=channels)
    assert half is not None and (half.clip, half.output_frame - half.clip_frame) == (3, 120 - 640)
    assert half.equal == pytest.approx(0.5, abs=0.02) and half.first_codebook == pytest.approx(0.5, abs=0.02)
    # Of about 4 million places, none has by chance more than a few of 250 codes of 2,048 kinds.
    assert none is not None and none.first_codebook < 0.03


def test_the_search_is_that_of_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_place, "FRAMES_AT_ONCE", 64)  # so that clips lie in several pieces, and one is longer
    for seed in range(12):
        random = np.random.default_rng(seed)
        channels = 1 + seed % 2
        tracks = [random.integers(3, size=(2 * channels, frames)) for frames in (30, 9, 9, 70, 21, 8, 25, 4)]
        output = random.integers(3, size=(2 * channels, random.integers(6, 40)))
        window, least = min(12, output.shape[1]), 5
        best = -1.0
        for track in tracks:
            width = min(window, track.shape[1])
            for start in range(output.shape[1] - width + 1):
                for place in range(track.shape[1] - width + 1) if track.shape[1] >= least else ():
                    here = output[:channels, start : start + width] == track[:channels, place : place + width]
                    best = max(best, here.mean())
        [found] = search([output], tracks, window=12, least=least, channels=channels)
        assert found is not None and found.first_codebook == pytest.approx(best, abs=1e-12)
        there = tracks[found.clip][:, found.clip_frame : found.clip_frame + found.frames]
        made = output[:, found.output_frame : found.output_frame + found.frames]
        assert (there[:channels] == made[:channels]).mean() == pytest.approx(best)
        assert (there == made).mean() == found.equal


def search(
    outputs: list[np.ndarray], tracks: list[np.ndarray], *, window: int = 250, least: int = 50, channels: int = 1
) -> list[Match | None]:
    lengths = [track.shape[1] for track in tracks]
    return nearest(
        outputs, lambda clip: tracks[clip], lengths, window_frames=window, least_frames=least, channels=channels
    )


def test_the_sentence_says_by_heart_where_training_clips_are_continued_and_held_out_ones_are_not() -> None:
    def row(group: str, seconds: float, clips: int, partial: float, equal: float) -> Row:
        shares = Shares(exact=0, partial=partial, equal=equal, chance=0.012)
        return Row(
            group=group, model="after", prompt_seconds=seconds, clips=clips, first_codebook=shares, all_codebooks=shares
        )

    def said(*rows: Row) -> str:
        return memorised(Findings(
            played_back=(), rows=rows, nearest=(), continued_seconds=5, searched_clips=1, training_clips=1, remarks=()
        ))  # fmt: skip

    known, control = row("training", 1, 8, 0.75, 0.9), row("held out", 1, 2, 0, 0.008)
    text = said(row("training", 0, 8, 0.5, 0.6), known, row("held out", 0, 2, 0, 0.01), control)
    assert "By heart: after 1 s of a clip the trained model continues 6 of 8 clips that it was trained on" in text
    assert "and 0 of 2 held-out ones (80 % of the first codebook or more)" in text
    assert "Of its codes there, 90.0% are right, in held-out clips 0.8%; by chance 1.2%." in text
    assert "Nothing is known by heart" in said(row("training", 5, 8, 0, 0.02), row("held out", 5, 2, 0, 0.02))
    assert "held-out" not in said(known)
    assert "as anybody would guess" in said(known, row("held out", 5, 2, 0.5, 0.8))
    assert "No verdict: after 1 s" in said(known, row("held out", 1, 2, 0.5, 0.8))
    # Two clips of two are fewer than six of eight.
    assert "after 1 s of a clip" in said(known, row("training", 10, 2, 1, 1))


@pytest.mark.parametrize(
    "flags", ["--clips 0", "--continued_seconds 0", "--prompt_seconds 0 31", "--sampled -1", "--prompt 3"]
)
def test_what_cannot_be_measured_is_refused_by_its_flag(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", "nowhere", *flags.split()]) == ConfigError.exit_code
    assert flags.split()[0] in capsys.readouterr().err
