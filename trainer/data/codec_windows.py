"""One EnCodec, cut before and after its LSTM, and tracks on their way through it, window by window.

Everything here runs on the codec's device and waits for nothing there: of a GPU, codes are fetched later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EncodecModel
from transformers.models.encodec.modeling_encodec import EncodecLSTM

from trainer.data.audio_fault import AudioFault
from trainer.data.codec_layers import Layer, layers_of, reach, run
from trainer.data.codec_state import Place, State, joined
from trainer.errors import ModelError
from trainer.spec.encoding import EncodingPass

# Frames of audio on each side of a window. With MusicGen's EnCodec a frame is 640 samples long, and the convolutions
# depend on 482 samples before it and 466 after it.
LEAST_CONTEXT_FRAMES = 2
# Of a pass over ends of tracks. Fewer would save next to nothing: starting the pass takes as long.
LEAST_END_FRAMES = 8

Key = TypeVar("Key")


def codebooks_of(codec: EncodecModel) -> int:
    """How many codebooks `codec.encode` uses at its default (first) bandwidth: 4 for MusicGen's."""
    return codec.quantizer.get_num_quantizers_for_bandwidth(codec.config.target_bandwidths[0])


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


@dataclass(kw_only=True, eq=False)
class Track(Generic[Key]):
    """A track that is being encoded.

    held     audio that still is to be encoded, (C, n) for its channels, from `place.lead` frames before the next window
    samples  of each channel, as far as it was read
    pieces   codes that came back: of each window (R, K, n), and of an end that shared a pass; the channels of the first
             view, then those of the next
    end      codes of an end that was encoded by itself, (C, K, n) for each view
    """

    key: Key
    blocks: Iterator[np.ndarray]
    windowed: Windowed
    held: np.ndarray = field(init=False)
    samples: int = 0
    place: Place = field(default_factory=Place)
    state: State | None = None
    pieces: list[np.ndarray] = field(default_factory=list)
    end: dict[int, np.ndarray] = field(default_factory=dict)
    ended: bool = False
    fault: AudioFault | None = None

    def __post_init__(self) -> None:
        self.held = np.zeros((self.windowed.channels, 0), np.float32)

    def take(self) -> np.ndarray | None:
        """The audio (C, n) of the next window, with what its views and convolutions need; None where the track has
        ended."""
        windowed, lead = self.windowed, self.place.lead
        length = windowed.samples(lead)
        while self.held.shape[1] < length:
            try:
                block = next(self.blocks, None)
            except AudioFault as fault:
                self.fault, block = fault, None
            if block is None:
                self.ended = True
                return None
            channels_CN = block.reshape(len(block), windowed.channels).T
            self.held, self.samples = np.concatenate((self.held, channels_CN), axis=1), self.samples + len(block)
        audio = self.held[:, :length]
        self.place = windowed.after_window(self.place)
        self.held = self.held[:, (lead + windowed.frames - self.place.lead) * windowed.hop :]
        return audio

    def waiting(self) -> Track[Key]:
        """The same track, which holds no more memory than it needs until its end is encoded."""
        self.held = self.held.copy()
        self.state = None if self.state is None else self.state.copied()
        return self

    def whole_frames(self, view: int) -> int:
        return max(0, (self.samples - self.windowed.offsets[view]) // self.windowed.hop)

    def codes(self) -> list[np.ndarray]:
        """For each view (K * C, frames) int16: the first codebook of each channel, then the second, and so on."""
        windowed, codebooks = self.windowed, codebooks_of(self.windowed.codec)
        empty = np.zeros((windowed.channels, codebooks, 0), np.int16)
        tracks = []
        for view in range(len(windowed.offsets)):
            rows = windowed.rows_of_view(view)
            pieces = [empty, *(piece[rows] for piece in self.pieces), self.end.get(view, empty)]
            codes_CKT = np.concatenate(pieces, axis=2)[..., : self.whole_frames(view)]
            tracks.append(codes_CKT.transpose(1, 0, 2).reshape(codebooks * windowed.channels, -1))
        return tracks


@dataclass(frozen=True, kw_only=True)
class UnderWay(Generic[Key]):
    """Codes that were asked of the device, on their way into host memory.

    windows   for each call of the LSTM its codes (B, K, n) int16, and the tracks whose views they hold, in order
    ended     the tracks that are complete with these codes
    views     codes (C, K, n) by view, of the one track that ended by itself
    """

    windows: Sequence[tuple[Tensor, Sequence[Track[Key]]]] = ()
    ended: Sequence[Track[Key]] = ()
    views: dict[int, Tensor] = field(default_factory=dict)
    arrived: torch.cuda.Event | None = None

    def fetch(self) -> Sequence[Track[Key]]:
        """Wait for the codes and hand them to their tracks; those that are complete with them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        for codes_BKT, tracks in self.windows:
            rows = tracks[0].windowed.rows
            for number, track in enumerate(tracks):
                track.pieces.append(codes_BKT[number * rows : (number + 1) * rows].numpy().copy())
        for track in self.ended:
            track.end.update({view: codes.numpy() for view, codes in self.views.items()})
        return self.ended


@dataclass(frozen=True, kw_only=True)
class Windowed:
    """An EnCodec, taken apart before and after its LSTM.

    offsets      of the views
    channels     of the sound, C. Each channel of each view is a row of a pass: EnCodec itself is a mono one
    size         of a pass
    before       the encoder's convolutions before the LSTM
    lstm         of the encoder
    after        the encoder's convolutions after the LSTM
    hop          samples per frame
    frames       of a window
    context      frames of audio that `before` needs on each side of a window
    left, right  frames of LSTM output that `after` needs on each side of a frame
    """

    codec: EncodecModel
    offsets: tuple[int, ...]
    channels: int
    size: EncodingPass
    before: tuple[Layer, ...]
    lstm: nn.LSTM
    after: tuple[Layer, ...]
    hop: int
    frames: int
    context: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        """Rows of a pass that a window takes: the channels of the first view, then those of the next, and so on."""
        return len(self.offsets) * self.channels

    def rows_of_view(self, view: int) -> slice:
        return slice(view * self.channels, (view + 1) * self.channels)

    def samples(self, lead: int) -> int:
        """Samples of a channel that all views of a window need together."""
        return (lead + self.frames + self.context) * self.hop + max(self.offsets)

    def after_window(self, place: Place) -> Place:
        """The place of the window behind one at `place`."""
        outputs = place.kept + self.frames
        certain = max(outputs - self.right, place.emitted)
        keep_from = max(0, certain - self.left)
        lead = min(self.context, place.lead + self.frames)
        return Place(lead=lead, kept=outputs - keep_from, emitted=certain - keep_from)

    def launch(self, place: Place, chosen: Sequence[tuple[Track[Key], np.ndarray]]) -> UnderWay[Key]:
        """Start one pass over windows that stand at `place`, and leave each track the state behind its own."""
        device, samples = self.codec.device, self.samples(place.lead)
        held = torch.zeros((self.size.windows, self.channels, samples), pin_memory=device.type == "cuda")
        for slot, (_, audio) in enumerate(chosen):
            held[slot] = torch.from_numpy(audio)
        length = samples - max(self.offsets)
        with torch.inference_mode(), reproducible(device):
            audio_WCL = held.to(device, non_blocking=True).to(self.codec.dtype)
            audio_WVCL = torch.stack([audio_WCL[..., offset : offset + length] for offset in self.offsets], dim=1)
            features = run(self.before, audio_WVCL.reshape(-1, 1, length), ours=True)
            features = features[..., place.lead : place.lead + self.frames]
            windows = []
            for slots in _rounds([track for track, _ in chosen]):
                tracks = [chosen[slot][0] for slot in slots]
                codes = self._advance(tracks, place, _rows(features, slots, self.rows))
                windows.append((_to_host(codes), tracks))
            return UnderWay(windows=windows, arrived=_arrival(device))

    def launch_last(self, track: Track[Key]) -> UnderWay[Key]:
        """Start on the end of a track by itself, one view after the other."""
        device, place = self.codec.device, track.place
        views: dict[int, Tensor] = {}
        with torch.inference_mode(), reproducible(device):
            for view, offset in enumerate(self.offsets):
                if track.whole_frames(view) == 0:
                    continue
                audio = torch.from_numpy(np.ascontiguousarray(track.held[:, offset:]))
                audio = audio.pin_memory() if device.type == "cuda" else audio
                audio = audio.to(device, non_blocking=True).to(self.codec.dtype)
                features = run(self.before, audio[:, None])[..., place.lead :]
                state = None if track.state is None else track.state.of_rows(self.rows_of_view(view))
                outputs, _ = self._outputs(features, state)
                views[view] = _to_host(self._codes(outputs, place.emitted, max(outputs.shape[-1], place.emitted)))
            return UnderWay(ended=[track], views=views, arrived=_arrival(device))

    def end_frames(self, track: Track[Key]) -> int:
        """Frames of audio that a pass over the end of this track and others has: a half, a quarter and so on of the
        most, by the length of its own end alone, so that its codes do not depend on the others."""
        frames, needed = -(-self.samples(track.place.lead) // self.hop), -(-track.held.shape[1] // self.hop)
        while frames // 2 >= max(needed, LEAST_END_FRAMES):
            frames //= 2
        return frames

    def launch_ends(self, frames: int, tracks: Sequence[Track[Key]]) -> UnderWay[Key]:
        """Start one pass over the ends of tracks that stand at one place, all of them with these `end_frames`.

        Each row is padded where its own audio ends. A row without audio is full of zeros.
        """
        device, place = self.codec.device, tracks[0].place
        pinned = device.type == "cuda"
        held = torch.zeros((self.size.windows * self.rows, 1, frames * self.hop), pin_memory=pinned)
        lengths = torch.full((len(held),), held.shape[-1], pin_memory=pinned)
        for row, (track, offset, channel) in enumerate(product(tracks, self.offsets, range(self.channels))):
            audio = torch.from_numpy(track.held[channel, offset:])
            if len(audio):
                held[row, 0, : len(audio)], lengths[row] = audio, len(audio)
        with torch.inference_mode(), reproducible(device):
            lengths_B = lengths.to(device, non_blocking=True)
            audio_BDL = held.to(device, non_blocking=True).to(self.codec.dtype)
            features = run(self.before, audio_BDL, ours=True, lengths_B=lengths_B)[..., place.lead :]
            states = [track.state for track in tracks if track.state is not None]
            outputs, _ = self._outputs(features, joined(states, len(features)) if states else None)
            lengths_B = -(-lengths_B // self.hop) - place.lead + place.kept
            codes = self._codes(outputs, place.emitted, outputs.shape[-1], lengths_B)
            return UnderWay(windows=[(_to_host(codes), tracks)], ended=tracks, arrived=_arrival(device))

    def _advance(self, tracks: Sequence[Track[Key]], place: Place, features_BDT: Tensor) -> Tensor:
        """The codes (B, K, n) for which all is known with this window of each track; the tracks get their states."""
        states = [track.state for track in tracks if track.state is not None]
        outputs, lstm = self._outputs(features_BDT, joined(states, len(features_BDT)) if states else None)
        behind = self.after_window(place)
        keep_from = outputs.shape[-1] - behind.kept
        kept = outputs[..., keep_from:].clone()
        for number, track in enumerate(tracks):
            rows = slice(number * self.rows, (number + 1) * self.rows)
            track.state = State(lstm=(lstm[0][:, rows], lstm[1][:, rows]), outputs=kept[rows])
        return self._codes(outputs, place.emitted, keep_from + behind.emitted)

    def _outputs(self, features_BDT: Tensor, state: State | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the LSTM makes of the features, behind the outputs that the state has kept; and its own state."""
        hidden, lstm = self.lstm(features_BDT.permute(2, 0, 1), None if state is None else state.lstm)
        outputs = hidden.permute(1, 2, 0) + features_BDT
        return outputs if state is None else torch.cat((state.outputs, outputs), dim=-1), lstm

    def _codes(self, outputs_BDT: Tensor, start: int, end: int, lengths_B: Tensor | None = None) -> Tensor:
        """The codes (B, K, end - start) int16 of these frames of the outputs; `lengths_B` as `run` has it."""
        embeddings = run(self.after, outputs_BDT, lengths_B=lengths_B)[..., start:end]
        codes = self.codec.quantizer.encode(embeddings, self.codec.config.target_bandwidths[0])
        return codes.transpose(0, 1).to(torch.int16)


def _rounds(tracks: Sequence[object]) -> list[list[int]]:
    """The slots of a pass in the order in which the LSTM must go over them: a track's windows one after the other."""
    rounds: list[list[int]] = []
    seen: dict[int, int] = {}
    for slot, track in enumerate(tracks):
        number = seen[id(track)] = seen.get(id(track), -1) + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(slot)
    return rounds


def _rows(features_BDT: Tensor, slots: Sequence[int], rows: int) -> Tensor:
    """The features of these windows, of so many rows each, from the first row on, in a batch of the same shape. What is
    in the other rows does not matter: no row depends on another."""
    if slots == list(range(len(slots))):
        return features_BDT
    parts = [features_BDT[slot * rows : (slot + 1) * rows] for slot in slots]
    return torch.cat([*parts, torch.zeros_like(features_BDT[len(slots) * rows :])])


def _to_host(codes: Tensor) -> Tensor:
    """The same codes in host memory; of a GPU they are there once `_arrival` has come."""
    if codes.device.type != "cuda":
        return codes.cpu()
    host = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=True)
    return host.copy_(codes, non_blocking=True)


def _arrival(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def windowed_codec(
    codec: EncodecModel, offsets: Sequence[int], size: EncodingPass, channels: int = 1
) -> Windowed:
    config = codec.config
    if config.use_causal_conv or config.normalize or config.chunk_length_s is not None:
        raise ModelError(
            "this EnCodec is causal, normalises or encodes in chunks: only EnCodec as MusicGen has it"
            " (facebook/encodec_32khz) can be encoded in windows"
        )
    if config.pad_mode != "reflect":
        raise ModelError(
            f"this EnCodec has pad_mode {config.pad_mode}: only reflect, as MusicGen has it, can be encoded in windows"
        )
    if config.norm_type != "weight_norm" or config.codebook_size > 2**15:
        raise ModelError(
            f"this EnCodec has norm_type {config.norm_type} and codebooks of {config.codebook_size}: only"
            " weight_norm and at most 32768 codes can be encoded in windows"
        )
    layers = list(codec.encoder.layers)
    middle = next(index for index, layer in enumerate(layers) if isinstance(layer, EncodecLSTM))
    before, after = layers_of(layers[:middle]), layers_of(layers[middle + 1 :])
    left_samples, right_samples, hop = reach(before)
    left, right, _ = reach(after)
    return Windowed(
        codec=codec,
        offsets=tuple(offsets),
        channels=channels,
        size=size,
        before=before,
        lstm=layers[middle].lstm,
        after=after,
        hop=hop,
        frames=max(1, round(size.window_seconds * config.sampling_rate / hop)),
        context=max(LEAST_CONTEXT_FRAMES, -(-max(left_samples, right_samples) // hop)),
        left=left,
        right=right,
    )
