"""AdamW with moments of 8 bits (bitsandbytes 0.50), saved in checkpoints as float32 like every other optimizer's.

A moment is cut into blocks of 256 values. A block is stored as one scale, its largest magnitude, in float32, and one
code per value: an index into a table of 256 numbers in [-1, 1]. Source: 8-bit Optimizers via Block-wise Quantization,
arXiv 2110.02861. Parameters of less than 4096 values keep float32 moments. Nothing here is sharded: single and ddp
only.

Saved as codes alone, a checkpoint could be continued by this optimizer only. Saved as float32 values alone, it would
not give the same codes again, because a block's largest magnitude need not be among its rounded values. So it holds
the values, and the scales beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.engine.settings import ADAMW_BETAS
from trainer.engine.shards import MOMENTS, Read
from trainer.run.checkpoint import FlatSlice

BLOCK = 256
# By our name of a moment, the keys of bitsandbytes' state: the codes (or float32 values), their table, the scales.
KEYS = {kind: (f"state{number}", f"qmap{number}", f"absmax{number}") for number, kind in enumerate(MOMENTS, start=1)}
SCALE = "{kind}_scale/{name}"  # what a checkpoint calls a parameter's scales


def eight_bit_adamw(parameters: Iterable[Tensor], weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer, without state yet: see `reset`."""
    import bitsandbytes  # seconds, and an optional dependency

    return bitsandbytes.optim.AdamW8bit(parameters, lr=0.0, betas=ADAMW_BETAS, weight_decay=weight_decay)


def reset(optimizer: Any, steps: int) -> None:
    """Set all moments to zero and the count of steps to `steps`; allocates what is not there yet."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.state[parameter].clear()
            optimizer.init_state(group, parameter, group_index, index)
            optimizer.state[parameter]["step"] = steps


class Moments(Mapping[str, Tensor]):
    """One parameter's moments by name, flat float32, made anew at each look-up.

    They are copies in host memory, so that a GPU needs no room for them: writing to them changes nothing. Whoever wants
    the weights alone, as Engine.sampling_model does, must not wait for all moments.
    """

    def __init__(self, state: dict[str, Any]):
        """state  the optimizer's state of the parameter"""
        self._state = state

    def __getitem__(self, kind: str) -> Tensor:
        key, table, scale = KEYS[kind]
        return _dequantized(self._state[key], self._state.get(table), self._state.get(scale))

    def __iter__(self) -> Iterator[str]:
        return iter(KEYS)

    def __len__(self) -> int:
        return len(KEYS)


def scales(name: str, state: dict[str, Any]) -> dict[str, FlatSlice]:
    """The scales of a parameter's moments, by their names in a checkpoint; empty where its moments are float32.

    With them, `fill` finds the same codes again.
    """
    return {
        SCALE.format(kind=kind, name=name): FlatSlice(shape=tuple(state[scale].shape), start=0, values=state[scale])
        for kind, (_, _, scale) in KEYS.items()
        if scale in state
    }


def fill(name: str, state: dict[str, Any], read: Read, stored: frozenset[str]) -> None:
    """Put a checkpoint's moments in place, rounding them where the state holds codes.

    state   the optimizer's state of the parameter `name`, changed in place
    stored  all names in the checkpoint. Where the scales are among them, the state becomes bit for bit what was saved;
            otherwise each block's largest magnitude becomes its scale
    """
    for kind, (key, table, scale) in KEYS.items():
        values = read(f"{kind}/{name}", 0, state[key].numel())
        if state[key].dtype == torch.uint8:
            given = SCALE.format(kind=kind, name=name)
            known = read(given, 0, state[scale].numel()) if given in stored else None
            values, scales_now = _quantized(values, state[table].cpu(), known)
            state[scale].copy_(scales_now)
        state[key].view(-1).copy_(values)


def _dequantized(values: Tensor, table: Tensor | None, scale: Tensor | None) -> Tensor:
    """The flat float32 values of codes; a copy of `values` itself where they are float32 and have no table."""
    values = values.detach().cpu().view(-1)
    if table is None or scale is None:
        return values.clone()
    return table.cpu()[values.long()] * scale.cpu().repeat_interleave(BLOCK)[: len(values)]


def _quantized(values: Tensor, table: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (N,) uint8 of flat float32 values (N,), each that of the table's nearest entry; and the blocks' scales.

    scale  (blocks,) float32; None to take each block's largest magnitude
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1) if scale is None else scale
    fractions = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(fractions, (table[1:] + table[:-1]) / 2)
    return codes.to(torch.uint8).view(-1)[: len(values)], scale
