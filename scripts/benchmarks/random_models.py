"""Models of the published sizes and kinds with random weights: what is measured does not depend on their values."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    MusicgenForConditionalGeneration,
    MusicgenMelodyConfig,
    MusicgenMelodyDecoderConfig,
    MusicgenMelodyForCausalLM,
    MusicgenMelodyForConditionalGeneration,
    T5Config,
)

from trainer.model.debug_model import codec_config, debug_feature_extractor, debug_tokenizer, set_codebooks
from trainer.model.language_model import LanguageModel
from trainer.model.source import Source
from trainer.model.weights import StoredTensor, Weights
from trainer.spec.shapes import KNOWN

SPECIAL = 2048
STARTS = 1_000_003  # positions in the block of values where a tensor may start


@dataclass(frozen=True, kw_only=True, eq=False)
class RandomTensor(StoredTensor):
    """Normal values of deviation 0.02, or ones for a norm's weight: the same at every look-up.

    The values are those of `block` from a start that the name decides: billions of draws would take minutes.
    """

    name: str
    block: Tensor

    def read(self, start: int, stop: int) -> Tensor:
        if "norm" in self.name and self.name.endswith("weight"):
            return torch.ones(stop - start)
        first = start + zlib.crc32(self.name.encode()) % STARTS
        return self.block[first : first + stop - start]


def random_weights(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Random tensors of these shapes by name, which share one block of values in memory."""
    largest = max(map(math.prod, shapes.values()))
    block = torch.randn(largest + STARTS, generator=torch.Generator().manual_seed(0)) * 0.02
    return Weights({name: RandomTensor(shape=shape, name=name, block=block) for name, shape in shapes.items()})


def random_source(size: str, layers: int | None = None) -> Source:
    """A Source with the decoder of `size` (any known name), or that many layers of it, for training only."""
    return Source(
        name=size,
        config=_config(size, layers, real_encoders=False),
        generation_config=None,  # type: ignore[arg-type]
        weights=random_weights(_trained_shapes(size, layers)),
        load_tokenizer=debug_tokenizer,
        load_feature_extractor=lambda: debug_feature_extractor(KNOWN[size].audio_channels),
    )


def random_model(
    size: str, layers: int | None = None, *, real_encoders: bool = True
) -> MusicgenForConditionalGeneration | MusicgenMelodyForConditionalGeneration:
    """The whole model in eval mode, float32.

    real_encoders  EnCodec and T5-base of the published sizes; False for the debug model's small ones
    """
    torch.manual_seed(0)
    kind = MusicgenMelodyForConditionalGeneration if KNOWN[size].melody else MusicgenForConditionalGeneration
    model = kind(_config(size, layers, real_encoders=real_encoders))
    set_codebooks(model.audio_encoder)
    model.config.decoder.decoder_start_token_id = SPECIAL
    model.generation_config = GenerationConfig(
        bos_token_id=SPECIAL, pad_token_id=SPECIAL, decoder_start_token_id=SPECIAL, max_length=1500
    )
    return model.eval()


def write_model(folder: Path, size: str, layers: int | None, *, real_encoders: bool) -> Path:
    """A local model folder for --model_id."""
    random_model(size, layers, real_encoders=real_encoders).save_pretrained(folder)
    debug_tokenizer().save_pretrained(folder)
    debug_feature_extractor(KNOWN[size].audio_channels).save_pretrained(folder)
    return folder


def random_decoder(size: str, layers: int | None) -> MusicgenForCausalLM | MusicgenMelodyForCausalLM:
    """The decoder alone, on torch's default device."""
    kind = MusicgenMelodyForCausalLM if KNOWN[size].melody else MusicgenForCausalLM
    return kind._from_config(_decoder_config(size, layers))


def _decoder_config(size: str, layers: int | None) -> MusicgenDecoderConfig | MusicgenMelodyDecoderConfig:
    shape = KNOWN[size]
    return (MusicgenMelodyDecoderConfig if shape.melody else MusicgenDecoderConfig)(
        vocab_size=shape.codes,
        hidden_size=shape.width,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        ffn_dim=shape.ffn,
        num_codebooks=shape.codebooks,
        audio_channels=shape.audio_channels,
        dropout=0.0,
        pad_token_id=SPECIAL,
        bos_token_id=SPECIAL,
    )


def _config(size: str, layers: int | None, *, real_encoders: bool) -> MusicgenConfig | MusicgenMelodyConfig:
    text_width = KNOWN[size].text_width
    text = T5Config(d_model=text_width, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    if not real_encoders:
        text = T5Config(d_model=text_width, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
    text.vocab_size, text.decoder_start_token_id = len(debug_tokenizer()), 0
    codec = codec_config(filters=64, width=128) if real_encoders else codec_config()
    return (MusicgenMelodyConfig if KNOWN[size].melody else MusicgenConfig)(
        text_encoder=text.to_dict(), audio_encoder=codec.to_dict(), decoder=_decoder_config(size, layers).to_dict()
    )


def _trained_shapes(size: str, layers: int | None) -> dict[str, tuple[int, ...]]:
    shape = KNOWN[size]
    with torch.device("meta"):
        melody = nn.Linear(shape.chroma_bins, shape.width) if shape.melody else None
        model = LanguageModel(random_decoder(size, layers), nn.Linear(shape.text_width, shape.width), melody)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
