"""A rank's share of one parameter: flat float32 views of its weight, moments and average, wherever these are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.run.checkpoint import EMA, WEIGHT, FlatSlice

# AdamW's two moments, float32, each of its parameter's shape.
MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[str, int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Values [start, start + len(weight)) of a parameter's flattened form, as live views.

    average            of the weight over the steps, where the run keeps one (trainer/engine/average.py)
    replica, replicas  which of how many ranks with this same share this one is: each saves its part of it
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor
    moments: dict[str, Tensor]
    average: Tensor | None = None
    replica: int = 0
    replicas: int = 1

    def tensors(self) -> dict[str, Tensor]:
        """The views by the names that a checkpoint gives them."""
        average = {} if self.average is None else {EMA + self.name: self.average}
        moments = {f"{kind}/{self.name}": view for kind, view in self.moments.items()}
        return {WEIGHT + self.name: self.weight, **moments, **average}

    def slices(self) -> dict[str, FlatSlice]:
        """What this rank saves of it; all ranks together save every value once."""
        length = len(self.weight)
        first, last = (length * index // self.replicas for index in (self.replica, self.replica + 1))
        return {
            key: FlatSlice(shape=self.shape, start=self.start + first, values=view[first:last])
            for key, view in self.tensors().items()
        }

    @torch.no_grad()
    def fill(self, keys: Iterable[str], read: Read) -> None:
        """Copy read(key, start, stop) into the views of `keys`."""
        views = self.tensors()
        for key in keys:
            if len(self.weight):
                views[key].copy_(read(key, self.start, self.start + len(self.weight)))
