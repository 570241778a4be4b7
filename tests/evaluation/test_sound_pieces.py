"""Codes that are decoded piece by piece give the sound of one pass over all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import EncodecModel

from trainer.errors import ModelError
from trainer.evaluation import sound_pieces
from trainer.evaluation.sound_pieces import decode_channel
from trainer.model.source import load_codec, open_model

FRAMES = 130


@pytest.fixture(scope="module")
def codec() -> Iterator[EncodecModel]:
    """In float64, so that nothing but rounding to float32 is left of convolutions of another length.

    Its LSTM's forget gates are open, so that it remembers from piece to piece.
    """
    codec = load_codec(open_model("debug")).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in codec.decoder.named_parameters():
            if "lstm.bias" in name:
                width = len(parameter) // 4
                parameter[width : 2 * width] += 2.0
            elif "lstm.weight" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    yield codec


def codes() -> Tensor:
    return torch.randint(2048, (4, FRAMES), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def in_one_pass(codec: EncodecModel) -> Tensor:
    return codec.decode(codes()[None, None], audio_scales=[None]).audio_values[0, 0].float()


@pytest.mark.parametrize("piece", [1, 10, 37, 65, 129, 130, 1500])
def test_pieces_are_the_whole(codec: EncodecModel, piece: int) -> None:
    whole = in_one_pass(codec)
    made = decode_channel(codec, codes(), piece)
    assert made.shape == whole.shape == (FRAMES * 640,) and made.dtype == torch.float32
    assert (made - whole).abs().max() <= 1e-7 * whole.abs().max()


def test_neither_a_forgetful_lstm_nor_pieces_without_neighbours_would_do(
    codec: EncodecModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = in_one_pass(codec)
    parts = [decode_channel(codec, part_KT) for part_KT in codes().split(65, dim=1)]
    assert (torch.cat(parts)[70 * 640 :] - whole[70 * 640 :]).abs().max() > 1e-3 * whole.abs().max()
    monkeypatch.setattr(sound_pieces, "CONTEXT_FRAMES", 0)
    assert (decode_channel(codec, codes(), 65) - whole).abs().max() > 1e-3 * whole.abs().max()


def test_a_codec_that_cannot_be_cut_is_refused_for_long_sounds_alone() -> None:
    codec = load_codec(open_model("debug"))
    codec.config.norm_type = "time_group_norm"
    assert decode_channel(codec, codes(), FRAMES).shape == (FRAMES * 640,)
    with pytest.raises(ModelError, match="cannot decode more than 100 frames"):
        decode_channel(codec, codes(), 100)
