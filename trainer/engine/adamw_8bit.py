"""AdamW with moments of 8 bits (bitsandbytes), whose checkpoints hold float32 moments as every other optimizer's do.

Each block of 256 values is stored as codes into a table of 256 numbers in [-1, 1], times the block's largest
magnitude. Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861. Tensors of less than 4096 values
keep float32 moments. Nothing here is sharded: single and ddp only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainer.engine.shards import MOMENTS, Read
from trainer.run.checkpoint import FlatSlice

BLOCK = 256
# bitsandbytes' names of a moment, its table and its blocks' magnitudes, and our name of the last.
KEYS = {kind: (f"state{number}", f"qmap{number}", f"absmax{number}") for number, kind in enumerate(MOMENTS, start=1)}
SCALE = "{kind}_scale/{name}"


def eight_bit_adamw(parameters: Iterable[Tensor], weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer, without state; betas are MusicGen's."""
    import bitsandbytes  # seconds, and an optional dependency

    return bitsandbytes.optim.AdamW8bit(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay)


def reset(optimizer: Any, steps: int) -> None:
    """Moments of zero after `steps` optimizer steps."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.state[parameter].clear()
            optimizer.init_state(group, parameter, group_index, index)
            optimizer.state[parameter]["step"] = steps


def moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """One parameter's moments, flat float32 in host memory: copies, so that a GPU needs no room for them."""
    return {
        kind: _dequantized(state[key], state.get(table), state.get(scale))
        for kind, (key, table, scale) in KEYS.items()
    }


def scales(name: str, state: dict[str, Any]) -> dict[str, FlatSlice]:
    """The blocks' magnitudes, by their names in a checkpoint: with them, the same codes are found again."""
    return {
        SCALE.format(kind=kind, name=name): FlatSlice(shape=tuple(state[scale].shape), start=0, values=state[scale])
        for kind, (_, _, scale) in KEYS.items()
        if scale in state
    }


def fill(name: str, state: dict[str, Any], read: Read, stored: frozenset[str]) -> None:
    """Put a checkpoint's float32 moments in place.

    stored  names in the checkpoint: where it has scales, the state becomes what it was, bit for bit
    """
    for kind, (key, table, scale) in KEYS.items():
        values = read(f"{kind}/{name}", 0, state[key].numel())
        if state[key].dtype == torch.uint8:
            given = SCALE.format(kind=kind, name=name)
            known = read(given, 0, state[scale].numel()) if given in stored else None
            values, magnitudes = _quantized(values, state[table].cpu(), known)
            state[scale].copy_(magnitudes)
        state[key].view(-1).copy_(values)


def _dequantized(values: Tensor, table: Tensor | None, scale: Tensor | None) -> Tensor:
    values = values.detach().cpu().view(-1)
    if table is None or scale is None:
        return values.clone()
    return table.cpu()[values.long()] * scale.cpu().repeat_interleave(BLOCK)[: len(values)]


def _quantized(values: Tensor, table: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of the nearest table entries, and the magnitudes: `scale`, or where None each block's largest."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1) if scale is None else scale
    fractions = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(fractions, (table[1:] + table[:-1]) / 2)
    return codes.to(torch.uint8).view(-1)[: len(values)], scale
