"""What scripts/recall.py says of how like two sounds are, on the console and in its file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.recall import near, table, write
from tests.synthetic import HEADER
from trainer.evaluation.memorisation import Clip, Row, Shares, trained_cells
from trainer.evaluation.recall import Findings, Near, Recall, equal_codes, snr_db
from trainer.exports.shared_card import figures_of
from trainer.flags.config import Config
from trainer.model.delay_pattern import IGNORED, inputs_and_labels
from trainer.report.memorisation import memorisation_of
from trainer.run.checkpoint import FlatSlice, Saver
from trainer.wiring.finished_run import with_stems_of_run
from trainer.wiring.identity import STEMS


def test_signal_to_noise_is_that_of_the_textbook() -> None:
    random = np.random.default_rng(0)
    true, other = random.standard_normal((2, 100_000)).astype(np.float32)
    assert snr_db(true, true) == math.inf
    assert snr_db(true, np.zeros_like(true)) == 0
    assert snr_db(true, -true) == pytest.approx(-10 * math.log10(4))
    # A thousandth of the amplitude is -60 dB; independent sounds add their powers: 1 to 2. Powers of 100,000 values
    # vary by sqrt(2 / 100,000), which is 0.02 dB; five times that is allowed.
    assert snr_db(true, true + 1e-3 * other) == pytest.approx(60, abs=0.1)
    assert snr_db(true, other) == pytest.approx(-10 * math.log10(2), abs=0.1)


def test_in_stereo_the_codes_that_a_full_segment_has_no_room_for_are_counted_by_pairs() -> None:
    segment = 20
    codes = torch.zeros(1, 8, segment, dtype=torch.int64)
    for channels in (1, 2):
        _, labels = inputs_and_labels(codes, 2048, channels)
        trained = trained_cells(codes[0], segment, channels)
        assert trained.sum(1).tolist() == (labels[0] != IGNORED).sum(1).tolist()
    short = trained_cells(codes[0, :, :10], segment, 2)
    clip = Clip(name="", caption="", codes_KT=codes[0], trained_KT=trained, melody_C=None, whole=True)
    assert short.all() and equal_codes(codes[0], clip) == 8 * 20 - 2 * (1 + 2 + 3)


def test_the_signal_to_noise_of_a_stereo_sound_counts_both_channels() -> None:
    random = np.random.default_rng(1)
    true = random.standard_normal((1000, 2)).astype(np.float32)
    made = true * np.float32([1, 0])
    assert snr_db(true, made) == pytest.approx(10 * math.log10(np.square(true).sum() / np.square(true[:, 1]).sum()))


def test_melodies_are_heard_as_the_run_heard_them_whatever_auto_comes_to_here(tmp_path: Path) -> None:
    auto = Config(dataset_path="unused", model_id="debug-melody")
    assert auto.stems == "auto" and with_stems_of_run(tmp_path, auto) == auto  # no checkpoint says anything
    saver = Saver(tmp_path / "checkpoints")
    for step, identity, stems in ((1, {}, "auto"), (2, {STEMS: "mix"}, "mix"), (3, {STEMS: "demucs-0a1b"}, "demucs")):
        piece = FlatSlice(shape=(1,), start=0, values=torch.zeros(1))
        saver.save(step, {"weight/a": piece}, replace(HEADER, identity=identity))
        saver.wait()
        assert with_stems_of_run(tmp_path, auto) == replace(auto, stems=stems)
    assert with_stems_of_run(tmp_path, replace(auto, stems="mix")).stems == "mix"


def test_what_is_written_is_what_the_page_and_the_card_show(tmp_path: Path) -> None:
    share = Shares(exact=0, partial=0.5, equal=0.75, chance=0.0625)
    row = Row(group="training", model="after", prompt_seconds=5, clips=2, first_codebook=share, all_codebooks=share)
    alone = replace(share, chance=None)  # of one clip there is no other one to compare with
    only = replace(row, group="held out", clips=1, first_codebook=alone, all_codebooks=alone)
    one = Near(
        model="after", prompt="slow rock", clip="rock.wav", output_seconds=1.5, clip_seconds=12.0, seconds=5.0,
        first_codebook=0.625, equal=0.5, chance=0.25, first_codebook_chance=0.375,
    )  # fmt: skip
    played = Recall(
        clip="a.wav", caption="", codes=100, before=1, after=90, snr_before_db=-3.04, snr_after_db=None
    )
    findings = Findings(
        played_back=(played,), rows=(row, only), nearest=(one,), continued_seconds=5, searched_clips=7,
        training_clips=9, remarks=("said besides",),
    )  # fmt: skip
    write(tmp_path, findings)
    written = json.loads((tmp_path / "recall.json").read_text())
    card = figures_of(None, written)
    assert not card.unread and "| held out | after | 5 s | 1 | 0.0 % | 50.0 % | 75.0 % | - |" in card.section
    found = memorisation_of(written)
    assert found is not None and found.remarks == ["said besides"] and found.played_share("after") == 0.9
    line = found.line("training", "after")
    assert line is not None and line.shares[5]["first_codebook"].chance == 0.0625
    assert (found.searched, found.training_clips) == (7, 9)
    [shown] = found.nearest
    expected = asdict(one)
    assert shown == {name: expected[name] for name in shown} and len(shown) == len(expected) - 1  # without seconds


def test_an_output_that_is_as_near_backwards_repeats_no_clip() -> None:
    def said(forwards: float, backwards: float) -> str:
        one = Near(
            model="after", prompt="", clip="a.wav", output_seconds=0, clip_seconds=0, seconds=5, equal=0, chance=0,
            first_codebook=forwards, first_codebook_chance=backwards,
        )  # fmt: skip
        return near(Findings(
            played_back=(), rows=(), nearest=(one,), continued_seconds=5, searched_clips=1, training_clips=1, remarks=()
        ))  # fmt: skip

    assert "1 of 1 outputs" in said(0.5, 0.1) and "0 of 1 outputs" in said(0.49, 0.1)
    assert "0 of 1 outputs" in said(0.9, 0.9)  # silence, say


def test_the_table_counts_the_clips_that_cannot_be_told_from_the_true_ones() -> None:
    def row(clip: str, after: int, ratio_db: float | None) -> Recall:
        return Recall(
            clip=clip, caption="", codes=100, before=1, after=after, snr_before_db=-3.04, snr_after_db=ratio_db
        )

    rows = [row("a.wav", 100, None), row("b.wav", 99, 31.7), row("c.wav", 99, 60.1)]
    lines = table(rows).splitlines()
    assert lines[2].split() == ["a.wav", "100", "1.00%", "100.00%", "-3.0", "the", "same"]
    assert lines[3].split() == ["b.wav", "100", "1.00%", "99.00%", "-3.0", "31.7"]
    assert lines[5].split() == ["all", "300", "1.00%", "99.33%"]
    assert lines[6] == "2 of 3 clips cannot be told from the true ones after the training"
    assert "Infinity" not in json.dumps([asdict(one) for one in rows])
