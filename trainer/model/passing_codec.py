"""An EnCodec of MusicGen's kind that passes sound through: the latent of a frame is its 640 samples.

No package ships the weights of MusicGen's codec, and one with random weights decodes everything to noise. Here the
convolutions only rearrange samples: one of stride r in the encoder puts r neighbours into r channels, its counterpart
in the decoder takes them apart again. The residual branches and the LSTM give zero, so that their skip connections
pass what they get. With codebooks fitted to some clips (trainer/model/fitted_codebooks.py) that is a codec which gives
these clips back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import EncodecModel
from transformers.models.encodec.modeling_encodec import (
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecDecoder,
    EncodecEncoder,
    EncodecLSTM,
    EncodecResnetBlock,
)

from trainer.model.debug_model import codec_config

# The first convolution adds this much and the last one takes it away, so that no sample above -4, 12 dB beyond full
# scale, comes to where ELU bends. What it costs: samples are rounded to multiples of 2**-21, as float32 has them there.
HEADROOM = 4.0
SAMPLE_RATE_HZ, FRAME_SAMPLES = 32_000, 640
# Each of the four strided convolutions doubles the channels: 40 filters become the 640 channels that a frame needs.
FILTERS = 40

Convolution = nn.Conv1d | nn.ConvTranspose1d


@torch.no_grad()
def passing_codec() -> EncodecModel:
    """An EncodecModel in eval mode, float32, 32 kHz, 50 Hz, 4 codebooks of 2048 rows that are still zero.

    Its encoder maps samples (B, 1, T x 640) above -HEADROOM to latents (B, 640, T), its decoder latents to samples.
    """
    config = codec_config(filters=FILTERS, width=FRAME_SAMPLES)
    with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
        codec = EncodecModel(config).eval()
    _pass_through(codec.encoder)
    _pass_through(codec.decoder)
    return codec


def latents_of(samples: Tensor) -> Tensor:
    """What the encoder makes of samples (T x 640,) float32 above -HEADROOM, bit for bit: (T, 640) float32."""
    return ((samples + HEADROOM) - HEADROOM).reshape(-1, FRAME_SAMPLES)


def _pass_through(part: EncodecEncoder | EncodecDecoder) -> None:
    """Set the weights of an encoder or a decoder so that it only rearranges samples."""
    samples = 1 if isinstance(part, EncodecEncoder) else FRAME_SAMPLES  # in each step of a layer's input
    convolutions = []
    for layer in part.layers:
        if isinstance(layer, EncodecResnetBlock):
            for inner in layer.block:
                if isinstance(inner, EncodecConv1d):
                    _set(inner.conv, torch.zeros_like(inner.conv.weight))
        elif isinstance(layer, EncodecLSTM):
            for parameter in layer.parameters():
                parameter.zero_()
        elif isinstance(layer, EncodecConvTranspose1d):
            samples //= layer.conv.stride[0]
            _set(layer.conv, _rearranging(layer.conv, samples))
        elif isinstance(layer, EncodecConv1d):
            _set(layer.conv, _rearranging(layer.conv, samples))
            samples *= layer.conv.stride[0]
            convolutions.append((layer.conv, samples))
    (first, samples_of_first), (last, samples_of_last) = convolutions[0], convolutions[-1]
    dict(first.named_parameters())["bias"][:samples_of_first] = HEADROOM
    dict(last.named_parameters())["bias"][:samples_of_last] = -HEADROOM


def _rearranging(conv: Convolution, samples: int) -> Tensor:
    """Weights by which one step of the longer side is `stride` steps of the shorter one, one behind the other.

    samples  of a step of the shorter side

    A transposed convolution has weights (in, out, kernel) and goes from long to short, the other kind has (out, in,
    kernel) and goes from short to long: so both have the same. With stride 1 they copy.
    """
    weight, stride = torch.zeros_like(conv.weight), conv.stride[0]
    # EnCodec pads (kernel - stride) samples in all, the larger half on the left.
    left = conv.kernel_size[0] - stride - (conv.kernel_size[0] - stride) // 2
    for step in range(stride):
        for sample in range(samples):
            weight[step * samples + sample, sample, left + step] = 1
    return weight


def _set(conv: Convolution, weight: Tensor) -> None:
    """Give a convolution with weight norm this weight, each row of which has the norm 1 or 0, and a bias of zero.

    Where a row is zero, its length is and its direction is anything: dividing zero by its norm would give NaN.
    """
    parameters = dict(conv.named_parameters())
    length, direction = (parameters[f"parametrizations.weight.original{part}"] for part in (0, 1))
    norm = weight.flatten(1).norm(dim=1).view(length.shape)
    length.copy_(norm)
    direction.copy_(torch.where(norm > 0, weight, torch.ones_like(weight)))
    parameters["bias"].zero_()
