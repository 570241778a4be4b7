"""A shard: the part of one trained parameter that one rank holds, with the moments and the EMA of that part.

Both backends describe what they hold as shards, so that loading, saving and the EMA are written once for every
strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.run.checkpoint import EMA, WEIGHT, FlatSlice

# AdamW's two moments, float32, each of its parameter's shape. Checkpoints store them under these names.
MOMENTS = ("exp_avg", "exp_avg_sq")
# read(key, start, stop): values [start, stop) of a flattened tensor, (stop - start,) float32 on the CPU. `key` is the
# tensor's name in a checkpoint, for example weight/decoder.lm_heads.0.weight.
Read = Callable[[str, int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Values [start, start + N) of one flattened parameter, where N is len(weight); N may be 0.

    weight    (N,) float32, a live view: writing to it changes what is trained
    moments   (N,) float32 for each name in MOMENTS; live views, but copies with --optimizer adamw8bit
    ema       (N,) float32, the exponential moving average of `weight` over the steps (trainer/engine/ema.py), a live
              view; None without --ema_decay
    replicas  how many ranks hold these same values, as under ddp, and with hsdp one per node
    replica   which of them this rank is: each replica saves its own part of the shard, so that no value is saved twice
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor
    moments: Mapping[str, Tensor]
    ema: Tensor | None = None
    replica: int = 0
    replicas: int = 1

    def tensors(self) -> dict[str, Tensor]:
        """Weight, moments and EMA by the names that a checkpoint gives them."""
        ema = {} if self.ema is None else {EMA + self.name: self.ema}
        moments = {f"{kind}/{self.name}": view for kind, view in self.moments.items()}
        return {WEIGHT + self.name: self.weight, **moments, **ema}

    def slices(self) -> dict[str, FlatSlice]:
        """The part of the shard that this rank saves; all ranks together save every value exactly once."""
        length = len(self.weight)
        first, last = (length * index // self.replicas for index in (self.replica, self.replica + 1))
        return {
            key: FlatSlice(shape=self.shape, start=self.start + first, values=view[first:last])
            for key, view in self.tensors().items()
        }

    @torch.no_grad()
    def fill(self, keys: Iterable[str], read: Read) -> None:
        """Copy what `read` returns for each key of `keys` into the tensor of that name."""
        views = self.tensors()
        for key in keys:
            if len(self.weight):
                views[key].copy_(read(key, self.start, self.start + len(self.weight)))
