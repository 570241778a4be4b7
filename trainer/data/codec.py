"""EnCodec over tracks of any length, window by window, with the codes of one pass over the whole track.

Each window of audio goes through the convolutions together with the audio on both sides of it, as far as their outputs
depend on it. The LSTM goes on from its state after the window before, and the last convolution has the LSTM's outputs
on both sides of the window. Windows that are encoded independently give other codes, however much audio around them is
encoded too, because the LSTM remembers over longer times.

A pass holds one window of each of several tracks, each with its own state. Its shape is always the same, so that what
becomes of one track does not depend on those beside it. Ends of tracks share passes too, each row padded where its own
audio ends; the shape follows from the length of the end alone.

EnCodec is a mono codec: the channels of a stereo track go through it as two tracks, in rows of the same passes. Their
codebooks stand as 1L, 1R, 2L, 2R and so on, as in audiocraft 1.3.0 (InterleaveStereoCompressionModel).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from transformers import EncodecModel

from trainer.data.audio_fault import AudioFault
from trainer.data.codec_state import Place
from trainer.data.codec_windows import Key, Track, UnderWay, windowed_codec
from trainer.spec.encoding import EncodingPass

# Passes that a GPU has been given and whose codes have not been fetched: with one more it never waits for the host.
PASSES_AHEAD = 2


def view_offsets(views: int, frame_samples: int) -> list[int]:
    """Sample offsets of `views` views, evenly spread inside one frame: 4 of 640 are 0, 160, 320, 480."""
    return [view * frame_samples // views for view in range(views)]


def encode(
    codec: EncodecModel,
    blocks: Iterable[np.ndarray],
    *,
    offsets: Sequence[int],
    channels: int = 1,
    window_seconds: float = 10.0,
    windows: int = 1,
) -> list[np.ndarray]:
    """For each offset o the codes of the track from sample o on, shape (K * channels, T_o) int16.

    Those of channel c, rows c, c + channels and so on, equal `codec.encode(track[o:, c])` without its last partial
    frame: T_o = floor((samples - o) / hop), at least 0. No more audio is held than goes through one pass.

    blocks   consecutive pieces of one track at the codec's rate, float, shape (n, channels), or (n,) of a mono one, any
             n
    offsets  samples, 0 <= o; all views go through the codec as one batch, the track's end excepted
    window_seconds, windows  of one pass (EncodingPass), which bound memory and do not change the codes

    Runs on the codec's device in the codec's precision (float32 as loaded), see `reproducible`. Raises what `blocks`
    raises, and ModelError for an EnCodec that cannot be cut into windows: one that is causal, normalises loudness,
    encodes in chunks by itself, or has another norm than weight norm.
    """
    waiting = [(None, iter(blocks))]
    size = EncodingPass(windows=windows, window_seconds=window_seconds)
    tracks = encode_tracks(
        codec, lambda: waiting.pop() if waiting else None, offsets=offsets, size=size, channels=channels
    )
    [(_, codes)] = tracks
    if isinstance(codes, AudioFault):
        raise codes
    return codes


def encode_tracks(
    codec: EncodecModel,
    next_track: Callable[[], tuple[Key, Iterator[np.ndarray]] | None],
    *,
    offsets: Sequence[int],
    size: EncodingPass,
    channels: int = 1,
) -> Iterator[tuple[Key, list[np.ndarray] | AudioFault]]:
    """Each track's key with its codes, as `encode` gives them, or with what its blocks raised; as they are finished.

    next_track  a track's key and blocks; None where there is none. It is asked again after each track that is given
    size        of a pass. With several windows, twice as many tracks are in hand: those that begin wait until they
                fill a pass, because a track's first window is shorter than the others. Where fewer tracks are left,
                a pass takes several windows of each, and the LSTM goes over them one after the other. What is left of
                a track behind its last window waits for as many others of about its length
    """
    windowed = windowed_codec(codec, offsets, size, channels)
    in_hand: list[Track[Key]] = []
    under_way: deque[UnderWay[Key]] = deque()
    ends: defaultdict[tuple[Place, int], list[Track[Key]]] = defaultdict(list)
    most = 1 if size.windows == 1 else 2 * size.windows
    while True:
        while len(in_hand) < most and (coming := next_track()) is not None:
            in_hand.append(Track(key=coming[0], blocks=coming[1], windowed=windowed))
        if not (in_hand or under_way or any(ends.values())):
            return
        is_last = not in_hand  # no more tracks come: ends wait for no others
        place, chosen = _choose(in_hand, size.windows)
        if chosen:
            under_way.append(windowed.launch(place, chosen))
        ended = [track for track in in_hand if track.ended]
        in_hand = [track for track in in_hand if not track.ended]
        for track in ended:
            if track.fault is not None:
                yield track.key, track.fault
            elif size.windows == 1:
                under_way.append(windowed.launch_last(track))
            else:
                ends[track.place, windowed.end_frames(track)].append(track.waiting())
        for (_, frames), tracks in ends.items():
            while len(tracks) >= size.windows or (is_last and tracks):
                under_way.append(windowed.launch_ends(frames, tracks[: size.windows]))
                del tracks[: size.windows]
        ahead = PASSES_AHEAD if codec.device.type == "cuda" and not is_last else 0
        while len(under_way) > ahead:
            for track in under_way.popleft().fetch():
                yield track.key, track.codes()


def _choose(
    tracks: Sequence[Track[Key]], most: int
) -> tuple[Place, list[tuple[Track[Key], np.ndarray]]]:
    """The windows of the next pass with their audio, all of one place; none where all tracks there have ended."""
    at: dict[Place, list[Track[Key]]] = {}
    for track in tracks:
        at.setdefault(track.place, []).append(track)
    first = at.pop(Place(), [])
    members = first if len(first) >= most or not at else max(at.values(), key=len)
    place = members[0].place if members else Place()
    chosen: list[tuple[Track[Key], np.ndarray]] = []
    while members and len(chosen) < most:
        for track in members[: most - len(chosen)]:
            audio = track.take()
            if audio is not None:
                chosen.append((track, audio))
        members = [track for track in members if track.place == place and not track.ended]
    return place, chosen
