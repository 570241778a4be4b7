"""EnCodec over tracks of any length, window by window, with the codes of one pass over the whole track.

Each window of audio goes through the convolutions together with the audio on both sides of it, as far as their outputs
depend on it. The LSTM goes on from its state after the window before, and the last convolution has the LSTM's outputs
on both sides of the window. Windows that are encoded independently give other codes, however much audio around them is
encoded too, because the LSTM remembers over longer times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EncodecModel
from transformers.models.encodec.modeling_encodec import EncodecConv1d, EncodecLSTM, EncodecResnetBlock

from trainer.errors import ModelError

# Frames of audio on each side of a window. With MusicGen's EnCodec a frame is 640 samples long, and the convolutions
# depend on 482 samples before it and 466 after it.
LEAST_CONTEXT_FRAMES = 2


def view_offsets(views: int, frame_samples: int) -> list[int]:
    """Sample offsets of `views` views, evenly spread inside one frame: 4 of 640 are 0, 160, 320, 480."""
    return [view * frame_samples // views for view in range(views)]


def codebooks_of(codec: EncodecModel) -> int:
    """How many codebooks `codec.encode` uses at its default (first) bandwidth: 4 for MusicGen's."""
    return codec.quantizer.get_num_quantizers_for_bandwidth(codec.config.target_bandwidths[0])


def encode(
    codec: EncodecModel,
    blocks: Iterable[np.ndarray],
    *,
    offsets: Sequence[int],
    window_seconds: float = 10.0,
) -> list[np.ndarray]:
    """For each offset o the codes of the track from sample o on, shape (K, T_o) int16.

    They equal `codec.encode(track[o:])` without its last partial frame: T_o = floor((samples - o) / hop),
    at least 0. Only one window of audio is held at a time.

    blocks          consecutive pieces of one mono track at the codec's rate, float, shape (n,), any n
    offsets         samples, 0 <= o; all views go through the codec as one batch, the track's end excepted
    window_seconds  audio of one pass and view, which bounds memory and does not change the codes

    Runs on the codec's device in the codec's precision (float32 as loaded), see `reproducible`. Raises ModelError for
    an EnCodec that cannot be cut into windows: one that is causal, normalises loudness, encodes in chunks by itself, or
    has another norm than weight norm.
    """
    windowed = _windowed(codec)
    window_frames = max(1, round(window_seconds * codec.config.sampling_rate / windowed.hop))
    with torch.inference_mode(), reproducible(codec.device):
        return _encode(windowed, blocks, list(offsets), window_frames)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Inside it there is no autocast and no TF32, and cuDNN takes fixed, deterministic algorithms.

    What is cached therefore does not depend on the precision that was set for training.
    """
    matmul_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)


@dataclass(frozen=True, kw_only=True)
class _State:
    """What a window leaves for the next one.

    lstm     hidden and cell state, each (layers, B, D), after the last frame seen; None before the first
    outputs  (B, D, n), the LSTM's last n outputs: those that the last convolution needs to the left of the next frame,
             then those whose codes depend on outputs to come; None before the first window
    emitted  how many of these n frames, from the left, have had their codes returned
    """

    lstm: tuple[Tensor, Tensor] | None = None
    outputs: Tensor | None = None
    emitted: int = 0

    def of_view(self, view: int) -> _State:
        """The state of one view alone, as a batch of 1."""
        if self.lstm is None or self.outputs is None:
            return self
        hidden, cell = (part[:, view : view + 1].contiguous() for part in self.lstm)
        return _State(lstm=(hidden, cell), outputs=self.outputs[view : view + 1], emitted=self.emitted)


@dataclass(frozen=True, kw_only=True)
class _Windowed:
    """An EnCodec, taken apart before and after its LSTM.

    before       the encoder's convolutions before the LSTM
    lstm         of the encoder
    after        the encoder's convolutions after the LSTM
    hop          samples per frame
    context      frames of audio that `before` needs on each side of a window
    left, right  frames of LSTM output that `after` needs on each side of a frame
    """

    codec: EncodecModel
    before: nn.Sequential
    lstm: nn.LSTM
    after: nn.Sequential
    hop: int
    context: int
    left: int
    right: int

    def advance(
        self, state: _State, audio_BL: Tensor, *, skip: int, frames: int | None
    ) -> tuple[Tensor, _State]:
        """Codes (B, K, n) int16 of the n frames for which all is known now, and the state for the next window.

        audio_BL  (B, samples) float: `skip` frames of context, the window, then context again
        frames    frames of the window; None where the track ends with `audio_BL`, so that nothing more will be known
        """
        audio = audio_BL.to(self.codec.device, self.codec.dtype)[:, None]
        end = None if frames is None else skip + frames
        features = self.before(audio)[..., skip:end]
        hidden, lstm = self.lstm(features.permute(2, 0, 1), state.lstm)
        outputs = hidden.permute(1, 2, 0) + features
        if state.outputs is not None:
            outputs = torch.cat((state.outputs, outputs), dim=-1)
        certain = outputs.shape[-1] - (0 if frames is None else self.right)
        certain = max(certain, state.emitted)
        embeddings = self.after(outputs)[..., state.emitted : certain]
        codes = self.codec.quantizer.encode(embeddings, self.codec.config.target_bandwidths[0])
        keep_from = max(0, certain - self.left)
        kept = _State(lstm=lstm, outputs=outputs[..., keep_from:], emitted=certain - keep_from)
        return codes.transpose(0, 1).to(torch.int16).cpu(), kept


def _encode(
    windowed: _Windowed, blocks: Iterable[np.ndarray], offsets: list[int], frames: int
) -> list[np.ndarray]:
    hop, context = windowed.hop, windowed.context
    pieces: list[list[Tensor]] = [[] for _ in offsets]
    held, samples = np.zeros(0, np.float32), 0
    state, lead = _State(), 0  # `held` begins `lead` frames before the next window
    for block in blocks:
        held, samples = np.concatenate((held, block)), samples + len(block)
        while len(held) >= (lead + frames + context) * hop + max(offsets):
            length = (lead + frames + context) * hop
            audio = np.stack([held[offset : offset + length] for offset in offsets])
            codes, state = windowed.advance(state, torch.from_numpy(audio), skip=lead, frames=frames)
            for view, piece in enumerate(codes):
                pieces[view].append(piece)
            next_lead = min(context, lead + frames)
            held, lead = held[(lead + frames - next_lead) * hop :], next_lead
    empty = torch.zeros((codebooks_of(windowed.codec), 0), dtype=torch.int16)
    tracks = []
    for view, offset in enumerate(offsets):
        whole_frames = max(0, (samples - offset) // hop)
        if whole_frames > 0:
            audio = np.ascontiguousarray(held[None, offset:])
            codes, _ = windowed.advance(state.of_view(view), torch.from_numpy(audio), skip=lead, frames=None)
            pieces[view].append(codes[0])
        tracks.append(torch.cat([empty, *pieces[view]], dim=1)[:, :whole_frames].numpy())
    return tracks


def _windowed(codec: EncodecModel) -> _Windowed:
    config = codec.config
    if config.use_causal_conv or config.normalize or config.chunk_length_s is not None:
        raise ModelError(
            "this EnCodec is causal, normalises or encodes in chunks: only EnCodec as MusicGen has it"
            " (facebook/encodec_32khz) can be encoded in windows"
        )
    if config.norm_type != "weight_norm" or config.codebook_size > 2**15:
        raise ModelError(
            f"this EnCodec has norm_type {config.norm_type} and codebooks of {config.codebook_size}: only"
            " weight_norm and at most 32768 codes can be encoded in windows"
        )
    layers = list(codec.encoder.layers)
    middle = next(index for index, layer in enumerate(layers) if isinstance(layer, EncodecLSTM))
    left_samples, right_samples, hop = _reach(layers[:middle])
    left, right, _ = _reach(layers[middle + 1 :])
    return _Windowed(
        codec=codec,
        before=nn.Sequential(*layers[:middle]),
        lstm=layers[middle].lstm,
        after=nn.Sequential(*layers[middle + 1 :]),
        hop=hop,
        context=max(LEAST_CONTEXT_FRAMES, -(-max(left_samples, right_samples) // hop)),
        left=left,
        right=right,
    )


def _reach(layers: Sequence[nn.Module]) -> tuple[int, int, int]:
    """On how many inputs to the left and to the right of its own an output depends, and how many inputs are its own.

    For layers with a total stride of 640, an output's own inputs are 640. The paddings are those of
    EncodecConv1d.forward in transformers 5.23: where they are uneven, the larger half is on the left.
    """
    first, last, own = 0, 0, 1
    for conv in reversed(list(_convolutions(layers))):
        stride, dilation = conv.stride[0], conv.dilation[0]
        span = (conv.kernel_size[0] - 1) * dilation + 1
        pad_left = (span - stride) - (span - stride) // 2
        first, last, own = first * stride - pad_left, last * stride - pad_left + span - 1, own * stride
    return max(0, -first), max(0, last - (own - 1)), own


def _convolutions(layers: Sequence[nn.Module]) -> Iterator[nn.Conv1d]:
    """The convolutions in the order in which a sample passes them; a residual block's shortcut reaches less far."""
    for layer in layers:
        if isinstance(layer, EncodecResnetBlock):
            yield from _convolutions(list(layer.block))
        elif isinstance(layer, EncodecConv1d):
            yield layer.conv
