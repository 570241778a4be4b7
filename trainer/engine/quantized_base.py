"""A frozen base in 4 or 8 bits (--base_bits): linear layers that hold bitsandbytes' codes in place of their weights.

4 bits: NF4, whose scales are rounded too (QLoRA, arXiv 2305.14314, section 3). 8 bits: int8 with one scale per output,
as LLM.int8() stores weights (arXiv 2208.07339, section 2.1). Only weights are rounded, never inputs: a layer computes
what a linear layer would whose weight has the values that the codes stand for. Nothing here is sharded: single and ddp
only.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn

from trainer.engine.shards import Read
from trainer.run.checkpoint import WEIGHT
from trainer.spec.trainable import LAYER

# With 4 bits, so many values have one scale. Scales are rounded too, in blocks of 256 (bitsandbytes 0.50, Linear4bit).
BLOCK = 64


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weight is held in codes and has no gradient. Empty until `fill` is called.

    Keep the codes plain attributes. As parameters or buffers they would be broadcast by DDP, cast by Accelerate, moved
    by to_empty and saved in checkpoints.

    bitsandbytes' own layers were tried and left (docs/decisions.md): under autocast Linear4bit gives float32 for
    float32 inputs, which doubles the activations; Linear8bitLt rounds activations too, keeps every input for the
    backward pass, and waits for the GPU in each forward, to look for outliers.
    """

    def __init__(self, inputs: int, outputs: int, *, bits: int, dtype: torch.dtype):
        """dtype  the compute precision: inputs are cast to it, and outputs have it"""
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self._bits, self._dtype = bits, dtype
        self._codes: Tensor
        self._scales: Any  # bitsandbytes' state of the 4 bits; or of the 8 bits the scales, (outputs,) float32

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) of any float dtype, to (..., outputs) in the compute precision."""
        return _Product.apply(x.to(self._dtype), self)

    @torch.no_grad()
    def fill(self, weight_OI: Tensor) -> None:
        """Hold the codes of `weight_OI` (outputs, inputs) float32, on its device."""
        if self._bits == 4:
            self._codes, self._scales = bnb.quantize_4bit(
                weight_OI, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
            self._scales.dtype = self._dtype  # the dtype that dequantize_4bit returns
        else:
            self._codes, self._scales, _ = bnb.int8_vectorwise_quant(weight_OI.half())

    def weight(self) -> Tensor:
        """The values that the codes stand for, (outputs, inputs) in the compute precision; made anew at each call."""
        if self._bits == 4:
            return bnb.dequantize_4bit(self._codes, self._scales)
        return self._codes.to(self._dtype).mul_(self._scales[:, None] / 127)

    def held_bytes(self) -> int:
        """Bytes of codes and scales. bitsandbytes' tables, 1 KiB per layer, are left out."""
        scales = [self._scales]
        if self._bits == 4:
            scales = [self._scales.absmax, self._scales.state2.absmax]
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._codes, *scales))


class _Product(torch.autograd.Function):
    """x (..., I) times a layer's weight, with a gradient for x alone.

    Nothing is kept for the backward pass: it makes the weight from the codes again, and needs no input because the
    weight is frozen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.weight(), None


def quantize_layers(model: nn.Module, *, bits: int, dtype: torch.dtype) -> dict[str, QuantizedLinear]:
    """Replace the frozen linear layers inside the decoder's layers by empty ones of `bits` bits, in place.

    Returns the new layers, by the names of the weights that they are to be filled with. Embeddings, heads and the text
    projection stay as they are, and so do adapters, which are trained. dtype: see QuantizedLinear.
    """
    names = [name for name, module in model.named_modules() if LAYER.match(name) and _is_frozen_linear(module)]
    made = {}
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        quantized = QuantizedLinear(layer.in_features, layer.out_features, bits=bits, dtype=dtype)
        model.set_submodule(name, quantized)
        made[f"{name}.weight"] = quantized
    return made


def fill(layers: dict[str, QuantizedLinear], read: Read, device: torch.device) -> None:
    """Fill each layer with the weight that `read` returns for its name.

    One after the other, each rounded on `device`, so that at most one weight is held unrounded at any time.
    """
    for name, layer in layers.items():
        shape = layer.out_features, layer.in_features
        layer.fill(read(WEIGHT + name, 0, shape[0] * shape[1]).to(device).view(shape))


def _is_frozen_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.bias is None and not module.weight.requires_grad
