"""The exponential moving average of the weights over the steps (--ema_decay), sharded as the weights are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from trainer.engine.shards import Shard


class Ema:
    """Owns one float32 tensor per shard, beside the shard's weight and on its device.

    The average starts as a copy of the starting weights, without Adam's correction for a start from zero: when
    fine-tuning, the starting weights are a good model (docs/decisions.md).
    """

    def __init__(self, shards: Iterable[Shard], decay: float):
        """Keeps the shards' weights as they are now, live, so these must not be replaced later.

        decay  in (0, 1), the fraction of the average that stays at each step
        """
        self._decay = decay
        self._weights = {shard.name: shard.weight for shard in shards}
        self._values = {name: weight.clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """ema = decay * ema + (1 - decay) * weight. To be called once after each optimizer step.

        One operation over all tensors, of which nothing is read back: the host does not wait for the device.
        """
        held = [name for name, values in self._values.items() if len(values)]
        torch._foreach_lerp_(
            [self._values[name] for name in held], [self._weights[name] for name in held], 1 - self._decay
        )

    def attach_to(self, shard: Shard) -> Shard:
        """The shard with its average as a live view, so that it is saved and loaded with the rest of the shard."""
        return replace(shard, ema=self._values[shard.name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block the weights hold the average and the average holds the weights.

        After the block both are bit for bit what they were, after an error too. Copies of the weights that a backend
        computes with are not updated here: see Backend.refresh_model.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():  # tensor by tensor, so that there is never a second copy of all
            kept = weight.clone()
            weight.copy_(self._values[name])
            self._values[name].copy_(kept)
