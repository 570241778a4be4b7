"""Which clips of a dataset validate, where --validation is a share; and which of them are trained on all the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.batches import Examples


def share_of(contents: Sequence[str], seed: int, share: float) -> np.ndarray:
    """Which clips validate: bool (n,), True for about `share` of the distinct contents.

    Each answer depends on (seed, content, share) alone: added files move nothing, equal files stay
    together, and a larger share keeps what a smaller one chose. Raises ConfigError unless 0 <= share <= 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"a validation share of {share} is no share of the clips: use 0 to 1, such as 0.05")
    limit = share * 2**64
    return np.array([_hash64(f"{seed}:{content}") < limit for content in contents], dtype=bool)


def trained_on_too(train: Examples, others: Examples) -> list[int]:
    """Which of the other clips, by index, have the codes of a training clip, under whatever name: the whole clip, in
    its first view. Excerpts of it, and other takes of the same piece, have other codes and are not found."""
    known = {_codes_digest(train, clip) for clip in range(len(train.names))}
    return [clip for clip in range(len(others.names)) if _codes_digest(others, clip) in known]


def _codes_digest(examples: Examples, clip: int) -> bytes:
    codes = examples.codes.crop(clip, 0, 0, int(examples.codes.frames[clip, 0]))
    return hashlib.blake2b(codes.tobytes(), digest_size=16).digest()


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
