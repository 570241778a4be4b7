"""The average of the weights over the steps (--ema_decay): a rank's share of it beside its share of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from trainer.engine.shards import Share


class Average:
    """Owns a float32 copy of each share's weight, on the same device, so that it is sharded as the weights are."""

    def __init__(self, shares: Iterable[Share], decay: float):
        """Starts as a copy of the weights. decay: in (0, 1)."""
        self._decay = decay
        self._weights = {share.name: share.weight for share in shares}
        self._values = {name: weight.clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average = decay * average + (1 - decay) * weight, once after each optimizer step; nothing is read back."""
        held = [name for name, values in self._values.items() if len(values)]
        torch._foreach_lerp_(
            [self._values[name] for name in held], [self._weights[name] for name in held], 1 - self._decay
        )

    def beside(self, share: Share) -> Share:
        """The share with its average, as a live view."""
        return replace(share, average=self._values[share.name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the weights hold the average and the average the weights; both are as before after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():  # one at a time, so that no second copy of all is needed
            kept = weight.clone()
            weight.copy_(self._values[name])
            self._values[name].copy_(kept)
