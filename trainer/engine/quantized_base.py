"""A frozen base in 4 or 8 bits: linear layers that hold bitsandbytes' codes and multiply in the compute precision.

4 bits are NF4 with scales that are rounded themselves (QLoRA, arXiv 2305.14314, section 3). 8 bits have a scale for
each output, as LLM.int8() stores weights (arXiv 2208.07339, section 2.1). Only the weights are rounded: a product is
that of a linear layer whose weight is the codes' values. Nothing here is sharded: single and ddp only.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional as codes_of
from torch import Tensor, nn

from trainer.engine.shards import Read
from trainer.run.checkpoint import WEIGHT
from trainer.spec.trainable import LAYER

# Values that share a scale; the scales are rounded themselves, in blocks of 256 (bitsandbytes 0.50, Linear4bit).
BLOCK = 64


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weight is held in codes and has no gradient. Empty until it is filled.

    The codes are neither parameters nor buffers, so that nothing that moves, casts, broadcasts or saves the model
    touches them. bitsandbytes' own layers are not used: under autocast, Linear4bit gives float32 for float32 inputs,
    which doubles the activations; Linear8bitLt rounds activations too, keeps every input, and waits for the GPU in
    each forward to look for outliers.
    """

    def __init__(self, inputs: int, outputs: int, *, bits: int, dtype: torch.dtype):
        """dtype: of the products; inputs are cast to it, and outputs are of it."""
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self._bits, self._dtype = bits, dtype
        self._codes: Tensor
        self._scales: Any  # a float32 for each output (8 bits), or bitsandbytes' state (4 bits)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) to (..., outputs)."""
        return _Product.apply(x.to(self._dtype), self)

    @torch.no_grad()
    def fill(self, weight_OI: Tensor) -> None:
        """Hold the codes of `weight_OI` (outputs, inputs) float32, on its device."""
        if self._bits == 4:
            self._codes, self._scales = codes_of.quantize_4bit(
                weight_OI, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
            self._scales.dtype = self._dtype  # of what is made of the codes
        else:
            self._codes, self._scales, _ = codes_of.int8_vectorwise_quant(weight_OI.half())

    def weight(self) -> Tensor:
        """The codes' values (outputs, inputs), made anew at each call."""
        if self._bits == 4:
            return codes_of.dequantize_4bit(self._codes, self._scales)
        return self._codes.to(self._dtype).mul_(self._scales[:, None] / 127)

    def held_bytes(self) -> int:
        """Of codes and scales; tables that all layers share in content are left out (1 KiB each)."""
        scales = [self._scales]
        if self._bits == 4:
            scales = [self._scales.absmax, self._scales.state2.absmax]
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._codes, *scales))


class _Product(torch.autograd.Function):
    """x (..., I) times a layer's weight; of x alone there is a gradient, and nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.weight(), None


def quantize_layers(model: nn.Module, *, bits: int, dtype: torch.dtype) -> dict[str, QuantizedLinear]:
    """Put empty layers of 4 or 8 bits in the place of the frozen linear ones of the decoder's layers.

    Returns them by the names of the weights that they are to be filled with. Embeddings, heads and the text's
    projection stay as they are, and so do adapters, which are trained.
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
    """Fill each layer with `read`'s weight of its name, one after the other: no two are held unrounded at once."""
    for name, layer in layers.items():
        shape = layer.out_features, layer.in_features
        layer.fill(read(WEIGHT + name, 0, shape[0] * shape[1]).to(device).view(shape))


def _is_frozen_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.bias is None and not module.weight.requires_grad
