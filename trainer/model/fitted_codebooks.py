"""Codebooks fitted to given latents, so that a residual quantizer gives each of them back.

The first codebooks hold centres of the latents and of what these leave (k-means), as a trained codec's do: a wrong code
there is heard as another sound, one in a later codebook as noise. The others hold what is then left, row by row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import EncodecModel

from trainer.errors import DataError
from trainer.model.debug_model import one_thread

CODES = 2048  # rows of a codebook
CENTRES = (256, 512)  # of the first codebooks
ROUNDS = 12  # of k-means
# The two codebooks behind them hold what is left as it is, each with a row of zeros for what needs no more.
MOST_LATENTS = 2 * (CODES - 1)
# All rows are multiples of this, and so are the latents of sound (trainer/model/passing_codec.py). float32 then holds
# all differences and sums exactly: what a codebook leaves is the same here, in the codec and on any processor.
GRID = 2.0**-22
# The codec compares squared distances in float32, and processors round differently. Of rows whose distances differ by
# less than this share of (|latent| + |row|)**2, 67 times float32's rounding, any may be taken for the nearest.
UNCLEAR = 4e-6
LEAST_LOUDNESS = 1e-3  # of rows that nothing is fitted to


@torch.no_grad()
def fit_codebooks(codec: EncodecModel, latents_ND: Tensor, *, seed: int) -> None:
    """Set the four codebooks of `codec` so that it gives back each of these latents.

    latents_ND  (N, D) float32, of which at most MOST_LATENTS are different

    The same set of latents gives the same rows, whatever their order and the number of threads. Rows to which nothing
    is fitted hold noise as loud as what their codebook gets: a model that has learned nothing picks them, and is heard.

    Raises DataError where the latents are too many.
    """
    random = np.random.default_rng(seed)
    with one_thread():
        left_ND = torch.unique(latents_ND.double(), dim=0)
        if len(left_ND) > MOST_LATENTS:
            raise DataError(f"{len(left_ND):,} different latents are too many: {MOST_LATENTS:,} can be given back")
        for stage, layer in enumerate(codec.quantizer.layers):
            rows = _centres(left_ND, CENTRES[stage], random) if stage < len(CENTRES) else _loudest(left_ND)
            table_VD = torch.cat([rows, _noise(left_ND, CODES - len(rows), random)])
            for buffer in (layer.codebook.embed, layer.codebook.embed_avg):
                buffer.copy_(table_VD)
            left_ND = _left(left_ND, table_VD)


def _centres(rows_ND: Tensor, most: int, random: np.random.Generator) -> Tensor:
    """At most so many centres of the rows, (k, D) on the grid."""
    start = random.permutation(len(rows_ND))[:most]
    centres_KD = rows_ND[torch.from_numpy(start)]
    for _ in range(ROUNDS):
        nearest = _distances(rows_ND, centres_KD).argmin(dim=1)
        members = nearest.bincount(minlength=len(centres_KD))[:, None]
        # A sum of multiples of the grid is exact in float64, so that the order in which it is taken does not matter.
        sums_KD = torch.zeros_like(centres_KD).index_add_(0, nearest, rows_ND)
        centres_KD = torch.where(members > 0, _on_grid(sums_KD / members.clamp(min=1)), centres_KD)
    return torch.unique(centres_KD, dim=0)


def _loudest(rows_ND: Tensor) -> Tensor:
    """A row of zeros and the loudest of the rows, as many as a codebook holds."""
    loudness_N = rows_ND.square().sum(dim=1)
    order = loudness_N.argsort(descending=True, stable=True)[: CODES - 1]
    return torch.cat([rows_ND.new_zeros(1, rows_ND.shape[1]), rows_ND[order[loudness_N[order] > 0]]])


def _noise(rows_ND: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """So many rows of noise on the grid, as loud as the given ones."""
    loudness = max(float(rows_ND.square().mean().sqrt()), LEAST_LOUDNESS)
    return _on_grid(torch.from_numpy(loudness * random.standard_normal((count, rows_ND.shape[1]))))


def _left(rows_ND: Tensor, table_VD: Tensor) -> Tensor:
    """The different rows that remain once the nearest row of the table is taken away, or any that is as near."""
    distances_NV = _distances(rows_ND, table_VD)
    sums_NV = rows_ND.norm(dim=1)[:, None] + table_VD.norm(dim=1)
    is_near = distances_NV <= distances_NV.min(dim=1, keepdim=True).values + UNCLEAR * sums_NV.square()
    row, code = is_near.nonzero(as_tuple=True)
    return torch.unique(rows_ND[row] - table_VD[code], dim=0)


def _distances(rows_ND: Tensor, table_VD: Tensor) -> Tensor:
    """Squared distances (N, V) of all rows from all of the table."""
    return rows_ND.square().sum(dim=1)[:, None] - 2 * rows_ND @ table_VD.T + table_VD.square().sum(dim=1)


def _on_grid(values: Tensor) -> Tensor:
    return (values / GRID).round() * GRID
