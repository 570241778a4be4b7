"""Cross entropy per codebook, as sums: the division by the step's global counts comes last."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trainer.patterns import IGNORED


def summed_cross_entropy(logits_BKTV: Tensor, labels_BKT: Tensor) -> Tensor:
    """Summed cross entropy of each codebook, (K,) float32, in nats.

    logits_BKTV  any float dtype; the cross entropy is computed in float32
    labels_BKT   int64 in [0, V), or IGNORED, which adds exactly 0

    Source: audiocraft 1.3.0, MusicGenSolver._compute_cross_entropy, before its mean over valid cells.
    """
    sums = [
        functional.cross_entropy(
            logits_BKTV[:, k].flatten(0, 1).float(),
            labels_BKT[:, k].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        for k in range(labels_BKT.shape[1])
    ]
    return torch.stack(sums)


def step_loss(sums_K: Tensor, cells_K: Tensor) -> Tensor:
    """The share of the optimizer step's loss that these sums are: mean over codebooks of sum / cells.

    sums_K   (K,) float32, of one micro-batch
    cells_K  (K,) float32, valid cells of the whole optimizer step, over all ranks and micro-batches

    Added over the micro-batches of all ranks this is the loss of the step, however it was split.
    A codebook without any valid cell (clips shorter than K frames, alone) counts as 0.
    """
    return (sums_K / cells_K.clamp(min=1)).mean()
