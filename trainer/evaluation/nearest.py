"""The place in a set of clips that is most like an output: the window of codes of which most are equal.

It is searched by the first codebook of each channel, which holds the coarse sound, as the papers on memorisation
compare by it: later codebooks refine what came before and differ at once where that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

# Frames that are searched at once: few enough for the processor's cache, many enough for numpy.
FRAMES_AT_ONCE = 65_536


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where an output and a clip have most codes in common.

    clip            index
    output_frame    where the window starts in the output
    clip_frame      and in the clip
    frames          of the window
    first_codebook  share of equal codes there in the first codebook of each channel, in [0, 1]
    equal           the same of all codebooks
    """

    clip: int
    output_frame: int
    clip_frame: int
    frames: int
    first_codebook: float
    equal: float = 0.0


def nearest(
    outputs: Sequence[np.ndarray],
    codes_of: Callable[[int], np.ndarray],
    frames: Sequence[int],
    *,
    window_frames: int,
    least_frames: int,
    channels: int = 1,
) -> list[Match | None]:
    """The nearest place of each output, exactly: every clip and every pair of offsets is looked at.

    outputs        each (K, T) integers
    codes_of       a clip's codes (K, its frames), by index
    frames         of each clip
    window_frames  of the places that are compared; an output or a clip that is shorter is compared whole
    least_frames   a clip of fewer is left out

    None where there is no clip as long as that.
    """
    best: list[Match | None] = [None] * len(outputs)

    def search(clips: list[int]) -> None:
        tracks = [codes_of(clip)[:channels] for clip in clips]
        for at, output in enumerate(outputs):
            found = _in_clips(output[:channels], clips, tracks, min(window_frames, output.shape[1]), best[at])
            best[at] = found or best[at]

    for clips in _pieces(frames, window_frames, least_frames):
        search(clips)
    return [None if match is None else _with_all_codebooks(match, output, codes_of)
            for match, output in zip(best, outputs, strict=True)]  # fmt: skip


def _pieces(frames: Sequence[int], window_frames: int, least_frames: int) -> list[list[int]]:
    """The clips in pieces of about FRAMES_AT_ONCE: those shorter than a window by equal length, then the others."""
    order = sorted((clip for clip, length in enumerate(frames) if length >= least_frames),
                   key=lambda clip: (min(frames[clip], window_frames), clip))  # fmt: skip
    pieces: list[list[int]] = []
    room, length = 0, 0
    for clip in order:
        if frames[clip] > room or min(frames[clip], window_frames) != length:
            pieces.append([])
            room, length = max(FRAMES_AT_ONCE, frames[clip]), min(frames[clip], window_frames)
        pieces[-1].append(clip)
        room -= frames[clip]
    return pieces


def _in_clips(
    output_CT: np.ndarray, clips: Sequence[int], tracks: Sequence[np.ndarray], window_frames: int, best: Match | None
) -> Match | None:
    """The best place in these clips that is better than `best`, or None.

    tracks  (C, frames) of each clip; those shorter than a window are equally long
    """
    window = min(window_frames, tracks[0].shape[1])
    stream_CS = np.ascontiguousarray(np.concatenate(tracks, axis=1), dtype=np.int16)
    output_CT = output_CT.astype(np.int16)
    starts = np.cumsum([0, *(track.shape[1] for track in tracks)])
    places, last = stream_CS.shape[1] - window + 1, output_CT.shape[1] - window
    inside = np.zeros(places, dtype=bool)  # windows that lie in one clip
    for start, end in pairwise(starts):
        inside[start : end - window + 1] = True
    codes = window * len(stream_CS)
    most = -1 if best is None else int(best.first_codebook * codes + 1e-6)
    # Element `last - a + p` counts the equal codes of the window at frame a of the output and frame p of the stream, so
    # that an element keeps its place as both windows move on by a frame: one pair of frames comes in, one goes out.
    counts = np.zeros(last + places, dtype=np.int16)
    found = None
    for at in range(last + 1):
        here = counts[last - at : last - at + places]
        if at == 0:
            for frame in range(window):
                _count(here, stream_CS[:, frame : frame + places], output_CT[:, frame])
        else:
            here[0] = np.count_nonzero(stream_CS[:, :window] == output_CT[:, at : at + window])
            _count(here[1:], stream_CS[:, window:], output_CT[:, at + window - 1])
            _count(here[1:], stream_CS[:, : places - 1], output_CT[:, at - 1], sign=-1)
        if here.max() > most:  # rare once something was found; most windows across two clips end here too
            counted = np.where(inside, here, -1)
            place = int(counted.argmax())
            if counted[place] > most:
                most, found = int(counted[place]), (at, place)
    if found is None:
        return None
    row = int(np.searchsorted(starts, found[1], side="right")) - 1
    return Match(
        clip=clips[row], output_frame=found[0], clip_frame=found[1] - int(starts[row]), frames=window,
        first_codebook=most / codes,
    )  # fmt: skip


def _count(counts_P: np.ndarray, stream_CP: np.ndarray, codes_C: np.ndarray, sign: int = 1) -> None:
    for stream_P, code in zip(stream_CP, codes_C, strict=True):
        equal = stream_P == code
        (np.add if sign > 0 else np.subtract)(counts_P, equal, out=counts_P)


def _with_all_codebooks(match: Match, output_KT: np.ndarray, codes_of: Callable[[int], np.ndarray]) -> Match:
    of_clip = codes_of(match.clip)[:, match.clip_frame : match.clip_frame + match.frames]
    made = output_KT[:, match.output_frame : match.output_frame + match.frames]
    return replace(match, equal=float((of_clip == made).mean()))
