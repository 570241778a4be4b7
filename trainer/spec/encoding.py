"""How much sound goes through EnCodec at once, on which its memory depends."""

from __future__ import annotations

from dataclasses import dataclass

GPU_WINDOWS = 16
GPU_WINDOW_SECONDS = 5.12  # 256 frames of MusicGen's EnCodec, shared by the views
CPU_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class EncodingPass:
    """One pass: `windows` windows of `window_seconds`, each with every view and every channel as a row of its own.

    windows  1: a pass holds the rows of one track, and nothing of another. Above that the windows are of several
             tracks, and the shape of a pass is always the same: what is missing is filled with zeros
    """

    windows: int
    window_seconds: float


def encoding_pass(*, on_gpu: bool, views: int, channels: int = 1) -> EncodingPass:
    """The pass on a device: the same for every machine of its kind, whatever memory is free, so that codes are too.

    On a GPU the LSTM, which goes from frame to frame, needs many rows at once to keep it busy; the seconds are divided
    by the views so that memory does not depend on them. On a CPU one track at a time keeps all cores busy. On both they
    are divided by the channels, so that stereo takes the memory of mono.
    """
    if on_gpu:
        return EncodingPass(windows=GPU_WINDOWS, window_seconds=GPU_WINDOW_SECONDS / (views * channels))
    return EncodingPass(windows=1, window_seconds=CPU_WINDOW_SECONDS / channels)
