"""Examples made of random codes and text states, for tests that need no audio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.data.batches import Examples
from trainer.run.checkpoint import RunHeader
from trainer.spec.shapes import KNOWN

# What a checkpoint belongs to, where a test does not mind.
HEADER = RunHeader(identity={}, global_batch=8, flags={})


class RandomCodes:
    """Codes in memory: one array (V, K, T) a clip."""

    def __init__(self, lengths: Sequence[int], views: int = 2, codebooks: int = 4, seed: int = 0):
        draw = np.random.default_rng(seed)
        self.clips = [draw.integers(0, 2048, (views, codebooks, length), dtype=np.int16) for length in lengths]
        self.frames = np.array([[length] * views for length in lengths], dtype=np.int64)

    def crop(self, clip: int, view: int, start: int, frames: int) -> np.ndarray:
        return self.clips[clip][view, :, start : start + frames]


class RandomMelodies:
    """Notes in memory: of a crop as many as it lasts, drawn from its clip, view and place."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def crop(self, clip: int, view: int, start: int, frames: int) -> np.ndarray:
        draw = np.random.default_rng([self.seed, clip, view, start])
        return draw.integers(0, 12, 1 + frames * 640 // 4096, dtype=np.uint8)


class RandomText:
    """States in memory: a caption of n words has n tokens."""

    def __init__(self, width: int = 512):
        self.width = width

    def states(self, caption: str) -> np.ndarray:
        draw = np.random.default_rng(list(caption.encode()))
        return draw.standard_normal((len(caption.split()), self.width), dtype=np.float32) * 0.2

    def tokens(self, caption: str) -> int:
        return len(caption.split())


class RandomTokens:
    """Ids in memory: those of the debug tokenizer's new tokens (from 199), one for each word, and </s>."""

    def __init__(self, new_tokens: int):
        self.new = np.arange(199, 199 + new_tokens)

    def states(self, caption: str) -> np.ndarray:
        draw = np.random.default_rng(list(caption.encode()))
        words = draw.integers(3, 199, len(caption.split()))
        return np.concatenate([self.new, words, [1]])

    def tokens(self, caption: str) -> int:
        return len(self.states(caption))


def random_examples(
    lengths: Sequence[int],
    captions: Sequence[str | None] | None = None,
    *,
    segment_frames: int = 40,
    seed: int = 0,
    new_tokens: int = 0,
    model: str = "debug",
) -> Examples:
    """Clips of these lengths in frames; every third has no caption unless captions are given.

    model       the name of the model that reads them, whose kind decides about channels and melodies
    new_tokens  of a learned word in each text, which then is for a T5 in the loop; 0 for cached states
    """
    if captions is None:
        captions = [None if clip % 3 == 2 else "word " * (1 + clip % 5) + str(clip) for clip in range(len(lengths))]
    shape = KNOWN[model]
    return Examples(
        codes=RandomCodes(lengths, codebooks=shape.codebooks, seed=seed),
        text=RandomTokens(new_tokens) if new_tokens else RandomText(),
        token_ids=new_tokens > 0,
        captions=captions,
        names=[f"clip{clip}.wav" for clip in range(len(lengths))],
        shape=shape,
        melodies=RandomMelodies(seed) if shape.melody else None,
        special_token=2048,
        segment_frames=segment_frames,
    )
