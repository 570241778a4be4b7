"""Music longer than a model's own segment, made window by window: each begins with the end of the one before it.

As audiocraft 1.3.0 makes it (MusicGen._generate_tokens, extend_stride): at 30 s and a stride of 18 s, the first window
makes 30 s; each next one is given the last 12 s as a prefix and makes up to 18 s more; the last one is as short as the
whole demands. Here lengths are whole numbers of frames. audiocraft computes them from seconds in float and cuts them by
int(), so that of 31.7 s, for example, it makes a frame less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.evaluation.decoding import Decoding
from trainer.evaluation.generation import PLAIN, Pace, Request, Sampling, generate_all
from trainer.model.language_model import LanguageModel

# Of the published models, at 50 frames a second: trained on 30 s; audiocraft's stride is 18 s.
WINDOW_FRAMES, STRIDE_FRAMES = 1500, 900


def window_starts(frames: int, window_frames: int, stride_frames: int) -> range:
    """The frames of the whole at which its windows begin: 0, 900 and 1800 of 3000, with windows of 1500.

    The last window holds at least one frame that those before it do not have.
    """
    return range(0, max(1, frames - window_frames + stride_frames), stride_frames)


def generate_long(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    frames: int,
    sampling: Sampling,
    window_frames: int = WINDOW_FRAMES,
    stride_frames: int = STRIDE_FRAMES,
    melody_at: Callable[[int], Tensor | None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    decoding: Decoding = PLAIN,
    pace: Pace | None = None,
) -> list[Tensor] | None:
    """The codes (K, frames) int64 of each request, in their order, on the CPU; None where it was stopped.

    Of `frames` that fit into one window it is `generate_all`. Else each window is a call of it, whose draws go on in
    the requests' generators.

    window_frames  the most that the model makes at once
    stride_frames  between the beginnings of two windows; the frames that both have are the later one's prefix
    melody_at      the melody (C,) of all requests in the window that begins at a frame; None: each request's own
    should_stop, decoding, pace  as in `generate_all`

    Raises ValueError for a stride that leaves no prefix, and for a request's prefix that is as long as a window;
    besides that what `generate_all` raises.
    """
    if not 0 < stride_frames < window_frames:
        raise ValueError(f"a stride of {stride_frames} frames for windows of {window_frames}")
    longest = max((0 if one.prefix_KT is None else one.prefix_KT.shape[1] for one in requests), default=0)
    if longest >= min(frames, window_frames):
        raise ValueError(f"a prefix of {longest} frames for {frames} frames in windows of {window_frames}")
    whole: list[Tensor] = []
    for start in window_starts(frames, window_frames, stride_frames):
        asked = [_in_window(one, number, start, whole, melody_at) for number, one in enumerate(requests)]
        end = min(start + window_frames, frames)
        made = generate_all(
            model, asked, frames=end - start, sampling=sampling, should_stop=should_stop, decoding=decoding, pace=pace
        )
        if made is None:
            return None
        # A window gives back its prefix as it was given.
        pairs = zip(whole or made, made, strict=True)
        whole = [torch.cat([before_KT[:, :start], codes_KT], dim=1) for before_KT, codes_KT in pairs]
    return whole


def _in_window(
    request: Request,
    number: int,
    start: int,
    whole: Sequence[Tensor],
    melody_at: Callable[[int], Tensor | None] | None,
) -> Request:
    """The request for the window from `start` on: its prefix is what was made of it from there."""
    if melody_at is not None:
        request = replace(request, melody_C=melody_at(start))
    return replace(request, prefix_KT=whole[number][:, start:]) if start else request
