"""A stereo model made of a mono one: each codebook becomes two, of the left and the right channel.

Codebook k of the stereo model, of 1L, 1R, 2L, 2R and so on, starts as codebook k // 2 of the mono one. The decoder adds
up the embeddings of all codebooks: halved, two of them add up to the mono one where both channels are equal, and the
logits of both channels are then those of the mono model exactly. Meta copied them whole (audiocraft 1.3.0,
docs/MUSICGEN.md) and trained on for 200,000 steps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from transformers import EncodecFeatureExtractor

from trainer.errors import ModelError
from trainer.model.source import Source
from trainer.model.weights import StoredTensor, Weights

Embeddings = Literal["halved", "copied"]
EMBEDDINGS, HEADS = "decoder.model.decoder.embed_tokens.", "decoder.lm_heads."


def in_stereo(source: Source, embeddings: Embeddings = "halved") -> Source:
    """`source`, a mono model, as a stereo one; no tensor is read.

    embeddings  whether a channel's embedding is half of the mono model's, or all of it

    Raises ModelError for a model that is stereo already.
    """
    if source.channels != 1:
        raise ModelError(f"--model_id {source.name} is a stereo model already: leave out --stereo 1")
    config = copy.deepcopy(source.config)
    config.decoder.num_codebooks, config.decoder.audio_channels = 2 * source.codebooks, 2
    stored: dict[str, StoredTensor] = {}
    for name, tensor in source.weights.stored.items():
        prefix = next((prefix for prefix in (EMBEDDINGS, HEADS) if name.startswith(prefix)), None)
        if prefix is None:
            stored[name] = tensor
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        share = 0.5 if prefix == EMBEDDINGS and embeddings == "halved" else 1.0
        for k in (2 * int(number), 2 * int(number) + 1):
            stored[f"{prefix}{k}.{rest}"] = _Copy(shape=tensor.shape, of=tensor, share=share)
    extractor = source.load_feature_extractor
    return replace(
        source,
        config=config,
        weights=Weights(stored),
        load_feature_extractor=lambda: _of_two_channels(extractor()),
        copied=True,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Copy(StoredTensor):
    """A tensor's values times a power of two, exactly; of a range only that is read.

    Never in the memory of the tensor itself, nor of another copy: transformers refuses to save weights that share it.
    """

    of: StoredTensor
    share: float

    def read(self, start: int, stop: int) -> Tensor:
        return self.of.read(start, stop) * self.share


def _of_two_channels(extractor: Any) -> Any:
    if not isinstance(extractor, EncodecFeatureExtractor):
        return extractor  # a melody model's, which hears melodies: its size is that of the notes
    extractor = copy.deepcopy(extractor)
    extractor.feature_size = 2
    return extractor
