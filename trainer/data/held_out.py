"""Which clips of a dataset validate, where --validation is a share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from trainer.errors import ConfigError


def share_of(contents: Sequence[str], seed: int, share: float) -> np.ndarray:
    """Which clips validate: bool (n,), True for about `share` of the distinct contents.

    Each answer depends on (seed, content, share) alone: added files move nothing, equal files stay
    together, and a larger share keeps what a smaller one chose. Raises ConfigError unless 0 <= share <= 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"a validation share of {share} is no share of the clips: use 0 to 1, such as 0.05")
    limit = share * 2**64
    return np.array([_hash64(f"{seed}:{content}") < limit for content in contents], dtype=bool)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
