"""EnCodec's convolutions as transformers' modules compute them, bit for bit, for use in a row of passes.

The modules (transformers 5.17 to 5.23) keep strides and paddings as tensors on the device, so that on a GPU the host
waits for it several times in every layer, and they make each weight anew from its norm in every pass. Here paddings are
Python's integers, weights are made once, and what nobody else holds is changed in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.encodec.modeling_encodec import EncodecConv1d, EncodecResnetBlock

from trainer.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution over time with the padding of EncodecConv1d.forward.

    weight  (out, in, kernel) float, its norm applied; bias (out,)
    """

    weight: Tensor
    bias: Tensor | None
    stride: int
    dilation: int
    pad_mode: str

    @property
    def span(self) -> int:
        """How many inputs an output sees, those between them included."""
        return (self.weight.shape[-1] - 1) * self.dilation + 1

    @property
    def pad_left(self) -> int:
        """Where the padding is uneven, the larger half is on the left."""
        return (self.span - self.stride) - (self.span - self.stride) // 2

    @property
    def pad_right(self) -> int:
        """The smaller half. What fills up the last stride comes on top of it."""
        return (self.span - self.stride) // 2

    def padded(self, x_BDL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """The input with its padding, a copy; the input itself where there is none. `lengths_B`: see `run`."""
        paddings = self.pad_left, self.pad_right + -x_BDL.shape[-1] % self.stride
        if paddings == (0, 0):
            return x_BDL
        if lengths_B is None:
            return EncodecConv1d._pad1d(x_BDL, paddings, mode=self.pad_mode)
        sources_BP, targets_BP = self._borders(lengths_B)
        missing_BP = sources_BP >= lengths_B[:, None]
        rows = (-1, x_BDL.shape[1], -1)
        copied = x_BDL.gather(-1, sources_BP.clamp(max=x_BDL.shape[-1] - 1)[:, None].expand(rows))
        copied.masked_fill_(missing_BP[:, None], 0)
        return nn.functional.pad(x_BDL, paddings).scatter_(-1, targets_BP[:, None].expand(rows), copied)

    def _borders(self, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """For rows of these lengths: which inputs the padding copies, and where in the padded rows it stands.

        Both (B, P) int64. A source behind a row's end stands for zero: a row that is shorter than its padding is
        filled up with zeros before it is reflected, as `EncodecConv1d._pad1d` does it. Where a row has less padding
        than others, its last value is there several times.
        """
        n_B1 = lengths_B[:, None]
        right_B1 = self.pad_right + -n_B1 % self.stride
        filled_B1 = n_B1 + (right_B1.clamp(min=self.pad_left) + 1 - n_B1).clamp(min=0)
        most = self.pad_right + self.stride - 1
        left_P = torch.arange(self.pad_left, 0, -1, device=lengths_B.device)
        right_BP = n_B1 + torch.arange(most, device=lengths_B.device).minimum(right_B1 - 1)
        # Mirrored at the last place of what was filled up; what lies before that is the row, or the zeros.
        mirrored_BP = right_BP.minimum(2 * (filled_B1 - 1) - right_BP)
        sources_BP = torch.cat((left_P.expand(len(n_B1), -1), mirrored_BP), dim=1)
        targets_BP = torch.cat(((self.pad_left - left_P).expand(len(n_B1), -1), self.pad_left + right_BP), dim=1)
        return sources_BP, targets_BP

    def __call__(self, x_BDL: Tensor) -> Tensor:
        """(B, in, L), padded, to (B, out, L / stride)."""
        return nn.functional.conv1d(x_BDL, self.weight, self.bias, self.stride, 0, self.dilation)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A residual block: what `block` makes of the input, added to the input or to what `shortcut` makes of it."""

    block: tuple[Layer, ...]
    shortcut: Convolution | None


@dataclass(frozen=True)
class Elu:
    """The activation."""


Layer = Convolution | Residual | Elu


def layers_of(modules: Iterable[nn.Module]) -> tuple[Layer, ...]:
    """The layers that these modules are. Raises ModelError for one that is no part of EnCodec's convolutions."""
    return tuple(_layer(module) for module in modules)


def run(
    layers: Sequence[Layer], x_BDL: Tensor, *, ours: bool = False, lengths_B: Tensor | None = None
) -> Tensor:
    """What the layers make of `x_BDL` one after the other; `ours`: nobody else holds it, it may be overwritten.

    lengths_B  (B,) int64 on the same device: how much of each row is there, at least 1, and padded as if nothing came
               behind it. So many outputs of the row are those of the row alone as there would be then; what else comes
               out of it means nothing. None: all rows are as long as the tensor

    An activation before a convolution comes after its padding, which gives the same values and holds a copy less: on a
    GPU these passes over large tensors are half of the time, and the plan counts their memory.
    """
    for number, layer in enumerate(layers):
        match layer:
            case Convolution():
                if not (number and isinstance(layers[number - 1], Elu)):
                    x_BDL = layer.padded(x_BDL, lengths_B)
                x_BDL = layer(x_BDL)
                lengths_B = None if lengths_B is None else -(-lengths_B // layer.stride)
            case Elu():
                following = layers[number + 1] if number + 1 < len(layers) else None
                if isinstance(following, Convolution):
                    held, x_BDL = x_BDL, following.padded(x_BDL, lengths_B)
                    ours = ours or x_BDL is not held
                    del held
                x_BDL = nn.functional.elu(x_BDL, inplace=ours)
            case Residual():
                changed = run(layer.block, x_BDL, lengths_B=lengths_B)
                if layer.shortcut is not None:
                    x_BDL = layer.shortcut(layer.shortcut.padded(x_BDL, lengths_B))
                x_BDL = changed.add_(x_BDL)
        ours = True
    return x_BDL


def reach(layers: Iterable[Layer]) -> tuple[int, int, int]:
    """On how many inputs to the left and to the right of its own an output depends, and how many inputs are its own.

    For layers with a total stride of 640, an output's own inputs are 640. A residual block's shortcut reaches less far
    than its block.
    """
    first, last, own = 0, 0, 1
    for conv in reversed(list(_convolutions(layers))):
        first, last, own = (
            first * conv.stride - conv.pad_left,
            last * conv.stride - conv.pad_left + conv.span - 1,
            own * conv.stride,
        )
    return max(0, -first), max(0, last - (own - 1)), own


def _convolutions(layers: Iterable[Layer]) -> Iterable[Convolution]:
    """In the order in which a sample passes them."""
    for layer in layers:
        if isinstance(layer, Residual):
            yield from _convolutions(layer.block)
        elif isinstance(layer, Convolution):
            yield layer


def _layer(module: nn.Module) -> Layer:
    if isinstance(module, EncodecConv1d):
        conv = module.conv
        with torch.no_grad():
            weight = conv.weight.detach()  # made of direction and norm at each look-up
        bias = None if conv.bias is None else conv.bias.detach()
        return Convolution(
            weight=weight, bias=bias, stride=conv.stride[0], dilation=conv.dilation[0], pad_mode=module.pad_mode
        )
    if isinstance(module, EncodecResnetBlock):
        shortcut = None if isinstance(module.shortcut, nn.Identity) else _layer(module.shortcut)
        assert shortcut is None or isinstance(shortcut, Convolution)
        return Residual(block=layers_of(module.block), shortcut=shortcut)
    if isinstance(module, nn.ELU):
        if module.alpha != 1:
            raise ModelError(f"this EnCodec has an ELU of alpha {module.alpha}: only 1 can be encoded in windows")
        return Elu()
    raise ModelError(
        f"this EnCodec has a layer {type(module).__name__} among its convolutions, which cannot be encoded in windows"
    )
