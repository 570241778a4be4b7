"""Cross entropy per codebook, as sums: the division by the step's global counts comes last."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trainer.model.delay_pattern import IGNORED


def summed_cross_entropy(logits_BKTV: Tensor, labels_BKT: Tensor) -> Tensor:
    """Summed cross entropy of each codebook, (K,) float32, in nats.

    logits_BKTV  any float dtype; the cross entropy is computed in float32
    labels_BKT   int64 in [0, V), or IGNORED, which adds exactly 0

    Source: audiocraft 1.3.0, MusicGenSolver._compute_cross_entropy, before its mean over valid cells.
    """
    pairs = zip(logits_BKTV.unbind(1), labels_BKT.unbind(1), strict=True)
    return torch.stack([codebook_cross_entropy(logits_BTV, labels_BT) for logits_BTV, labels_BT in pairs])


def codebook_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Summed cross entropy of one codebook, a float32 scalar; see summed_cross_entropy."""
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def step_loss(sums_K: Tensor, cells_K: Tensor) -> Tensor:
    """The share of the optimizer step's loss that these sums are: mean over codebooks of sum / cells.

    sums_K   (K,) float32, of one micro-batch
    cells_K  (K,) float32, valid cells of the whole optimizer step, over all ranks and micro-batches

    Added over the micro-batches of all ranks this is the loss of the step, however it was split.
    A codebook without any valid cell (clips shorter than K frames, alone) counts as 0.
    """
    return (sums_K / cells_K.clamp(min=1)).mean()
