"""The training loss: cross entropy summed per codebook, and divided by counts of the whole optimizer step.

Means per micro-batch would weigh the cells of short clips more than others, and the loss would change with the number
of ranks and micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trainer.model.delay_pattern import IGNORED


def summed_cross_entropy(logits_BKTV: Tensor, labels_BKT: Tensor) -> Tensor:
    """Summed cross entropy of each codebook, (K,) float32, in nats.

    logits_BKTV  (B, K, T, V), any float dtype; the cross entropy is computed in float32
    labels_BKT   (B, K, T) int64 in [0, V), or IGNORED, which adds exactly 0

    Source: audiocraft 1.3.0, MusicGenSolver._compute_cross_entropy, before its mean over valid cells.
    """
    pairs = zip(logits_BKTV.unbind(1), labels_BKT.unbind(1), strict=True)
    return torch.stack([codebook_cross_entropy(logits_BTV, labels_BT) for logits_BTV, labels_BT in pairs])


def codebook_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Summed cross entropy of one codebook, a float32 scalar, in nats.

    logits_BTV  (B, T, V), any float dtype
    labels_BT   (B, T) int64 in [0, V), or IGNORED
    """
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def step_loss(sums_K: Tensor, cells_K: Tensor) -> Tensor:
    """What one micro-batch adds to the loss of its optimizer step: the mean over codebooks of sum / cells, a scalar.

    sums_K   (K,) float32, summed cross entropy of the micro-batch
    cells_K  (K,) float32, labels that are not IGNORED in the whole optimizer step, over all ranks and micro-batches

    Added over all micro-batches of all ranks this is the loss of the step, however the step was split. A codebook
    without any such label, which happens where all clips are shorter than K frames, counts as 0.
    """
    return (sums_K / cells_K.clamp(min=1)).mean()
