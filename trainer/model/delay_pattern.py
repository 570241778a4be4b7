"""MusicGen's delay pattern: codebook k comes k steps late, so that its code may depend on the frame's other codes.

In stereo the codebooks of the left and the right channel stand side by side, 1L, 1R, 2L, 2R and so on, and a pair has
one delay: codebook k comes k // 2 steps late.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # a label that adds nothing to the loss: the default of torch's cross_entropy


def delay(codes_BKT: Tensor, fill: int, channels: int = 1) -> Tensor:
    """Shift codebook k right by d = k // channels frames, so that each step predicts one diagonal.

    codes_BKT  (B, K, T) int64
    channels   of the sound: 1, or 2 for codebooks in pairs of left and right
    returns    (B, K, T) int64; cells before a codebook's first frame hold `fill`, its last d frames fall off

    Source: MusicGen, arXiv 2306.05284, section 2.2; audiocraft 1.3.0, DelayedPatternProvider, and for stereo its
    docs/MUSICGEN.md.
    """
    delayed = torch.full_like(codes_BKT, fill)
    frames = codes_BKT.shape[-1]
    for k in range(codes_BKT.shape[1]):
        late = min(k // channels, frames)
        delayed[:, k, late:] = codes_BKT[:, k, : frames - late]
    return delayed


def inputs_and_labels(codes_BKT: Tensor, special: int, channels: int = 1) -> tuple[Tensor, Tensor]:
    """What the decoder reads at each step, and what it is to predict there.

    codes_BKT  (B, K, T) int64 in [0, special]; frames behind a clip's end hold `special`
    returns    inputs (B, K, T) int64: the delayed codes one step later, with `special` at the first step
               labels (B, K, T) int64: the delayed codes; IGNORED where there is no code

    channels  of the sound, see `delay`

    There are T steps for T frames, so the last frames of delayed codebooks fall off and are not trained. `special` is
    read and never predicted. Source: audiocraft 1.3.0, LMModel.compute_predictions with keep_only_valid_steps, and
    MusicGenSolver with tokens.padding_with_special_token for padded audio.
    """
    delayed = delay(codes_BKT, special, channels)
    inputs = torch.cat([torch.full_like(delayed[..., :1], special), delayed[..., :-1]], dim=-1)
    return inputs, delayed.masked_fill(delayed == special, IGNORED)
