"""Models of the published sizes with random weights, made as they are read: nothing is downloaded or kept."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import MusicgenConfig, MusicgenDecoderConfig, T5Config

from trainer.debug_model import build_debug_model, debug_feature_extractor, debug_tokenizer
from trainer.models import Source
from trainer.shapes import KNOWN
from trainer.weights import Weights


class RandomWeights(Weights):
    """Normal values of deviation 0.02 by name; norms' weights are 1. Every look-up makes them anew, equal."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self._shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        if "norm" in name and name.endswith("weight"):
            return torch.ones(self._shapes[name])
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(self._shapes[name], generator=generator) * 0.02

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self[name].reshape(-1)[start:stop]


def random_source(size: str) -> Source:
    """A Source with the decoder of `size` (small, medium, large) over T5-base's width, for training only."""
    shape = KNOWN[size]
    config = MusicgenConfig(
        text_encoder=T5Config(d_model=shape.text_width).to_dict(),
        audio_encoder=build_debug_model().config.audio_encoder.to_dict(),
        decoder=MusicgenDecoderConfig(
            vocab_size=2048,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            ffn_dim=shape.ffn,
            num_codebooks=shape.codebooks,
            pad_token_id=2048,
            bos_token_id=2048,
        ).to_dict(),
    )
    return Source(
        name=size,
        config=config,
        generation_config=None,  # type: ignore[arg-type]
        weights=RandomWeights(_shapes(config)),
        load_tokenizer=debug_tokenizer,
        load_feature_extractor=debug_feature_extractor,
    )


def _shapes(config: MusicgenConfig) -> dict[str, tuple[int, ...]]:
    from torch import nn
    from transformers import MusicgenForCausalLM

    from trainer.models import LanguageModel

    with torch.device("meta"):
        decoder = MusicgenForCausalLM._from_config(config.decoder)
        model = LanguageModel(decoder, nn.Linear(config.text_encoder.hidden_size, config.decoder.hidden_size))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
