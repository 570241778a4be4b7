"""How far one set of embeddings is from another: kernel audio distance and Fréchet distance, in float64.

Both take weights, so that a bootstrap needs no copies: a row drawn twice has the weight 2. No array of N x N is held:
kernels come in blocks of rows, and go at once into the sums that they are needed for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# MMD^2 is small and is shown times 100, as in kadtk 1.1.0 (SCALE_FACTOR).
KAD_SCALE = 100.0
BLOCK_VALUES = 1 << 22  # distances that are held at once: 32 MiB
BINS = 4096  # among which the median is looked for in one pass


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A set of embeddings under R weightings.

    rows_ND     an embedding a row
    weights_RN  whole numbers, how often each row stands in the set
    """

    rows_ND: np.ndarray
    weights_RN: np.ndarray

    @classmethod
    def once(cls, rows_ND: np.ndarray) -> Weighted:
        """Each row once, R = 1."""
        return cls(rows_ND=rows_ND, weights_RN=np.ones((1, len(rows_ND))))


def kernel_audio_distance(generated_ND: np.ndarray, reference_MD: np.ndarray) -> float:
    """KAD: the unbiased MMD^2 of two sets with a Gaussian kernel, times KAD_SCALE; below 0 too, by chance.

    The kernel is exp(-d^2 / (2 b^2)) with b = `median_distance` of the reference. Both sets have two rows or more.

    Source: arXiv 2502.15602, and kadtk 1.1.0, calc_kernel_audio_distance(generated, reference).
    """
    sets, reference = [Weighted.once(generated_ND)], Weighted.once(reference_MD)
    return float(kernel_audio_distances(sets, reference, median_distance(reference_MD))[0, 0])


def kernel_audio_distances(sets: Sequence[Weighted], reference: Weighted, bandwidth: float) -> np.ndarray:
    """The KAD of each set from the reference under each weighting, (sets, R).

    A pair of a row with itself is left out whatever its weight. It would have the kernel's largest value, 1, so that a
    bootstrap, which draws rows twice, would give larger distances than there are.
    """
    of_reference = _kernel_within(reference, bandwidth)
    return np.stack([
        KAD_SCALE
        * (_kernel_within(one, bandwidth) + of_reference - 2 * _kernel_between(one, reference, bandwidth))
        for one in sets
    ])


def median_distance(rows_ND: np.ndarray) -> float:
    """The median of the Euclidean distances of all pairs of rows; of an even number of pairs the lower one of the
    middle two, as torch.median has it. Raises ValueError for fewer than two rows.

    20,000 rows have 200 million pairs. So distances are counted in bins, pass by pass in finer ones, until the bin that
    the median is in has few.
    """
    count = len(rows_ND) * (len(rows_ND) - 1) // 2
    if count == 0:
        raise ValueError(f"{len(rows_ND)} rows have no distances between them")
    rank = (count - 1) // 2  # of the median, from 0, among the distances in [low, high]
    low, high = np.inf, 0.0
    for squares in _pairs(rows_ND):
        low, high = min(low, squares.min()), max(high, squares.max())
    while True:
        edges = np.linspace(low, high, BINS + 1)
        inside = np.zeros(BINS, np.int64)
        for squares in _pairs(rows_ND):
            inside += np.histogram(squares, edges)[0]
        up_to = np.cumsum(inside)
        found = int(np.searchsorted(up_to, rank, side="right"))
        rank -= int(up_to[found - 1]) if found else 0
        low, high = edges[found], edges[found + 1]
        if inside[found] * 8 <= BLOCK_VALUES or not edges[0] < edges[1] < edges[2]:
            break
    # The bins are [low, high), but for the last one, which has its upper edge.
    is_last = found == BINS - 1
    held = [
        squares[(squares >= low) & ((squares <= high) if is_last else (squares < high))] for squares in _pairs(rows_ND)
    ]
    return float(np.sqrt(np.partition(np.concatenate(held), rank)[rank]))


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A mean (D,), and a factor (n, D) with factor^T factor = covariance, that of n - 1."""

    mean: np.ndarray
    factor: np.ndarray


def gaussian_of(rows_ND: np.ndarray, weights_N: np.ndarray | None = None) -> Gaussian:
    """Mean and covariance of rows, of which each stands there so many times. Raises ValueError for fewer than two."""
    weights_N = np.ones(len(rows_ND)) if weights_N is None else weights_N
    total = weights_N.sum()
    if total < 2:
        raise ValueError(f"{total:g} embeddings have no covariance")
    rows_ND, weights_N = rows_ND[weights_N > 0].astype(np.float64), weights_N[weights_N > 0]
    mean = weights_N @ rows_ND / total
    factor = (rows_ND - mean) * np.sqrt(weights_N / (total - 1))[:, None]
    if len(factor) > factor.shape[1]:
        factor = np.asarray(np.linalg.qr(factor, mode="r"))
    return Gaussian(mean=mean, factor=factor)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With C = A^T A the trace of the root is the sum of the singular values of A1 A2^T. So covariances are never
    multiplied: of fewer rows than columns they are singular, and what rounding makes of their product has no usable
    root.

    Source: the formula of fadtk 1.1.0 and frechet-audio-distance 0.3.4.
    """
    root = np.linalg.svd(first.factor @ second.factor.T, compute_uv=False).sum()
    away = first.mean - second.mean
    return float(away @ away + (first.factor**2).sum() + (second.factor**2).sum() - 2 * root)


def _kernel_within(of: Weighted, bandwidth: float) -> np.ndarray:
    """The mean kernel of two different rows of a set, (R,)."""
    weights_RN, sums = of.weights_RN, np.zeros(len(of.weights_RN))
    for start, squares in _blocks(of.rows_ND, of.rows_ND):
        kernel = np.exp(squares / (-2 * bandwidth**2))
        own = np.arange(len(kernel))
        kernel[own, start + own] = 0
        sums += ((weights_RN @ kernel.T) * weights_RN[:, start : start + len(kernel)]).sum(axis=1)
    return sums / (weights_RN.sum(axis=1) ** 2 - (weights_RN**2).sum(axis=1))


def _kernel_between(one: Weighted, other: Weighted, bandwidth: float) -> np.ndarray:
    """The mean kernel of a row of one set and a row of the other, (R,)."""
    sums = np.zeros(len(one.weights_RN))
    for start, squares in _blocks(one.rows_ND, other.rows_ND):
        kernel = np.exp(squares / (-2 * bandwidth**2))
        sums += ((other.weights_RN @ kernel.T) * one.weights_RN[:, start : start + len(kernel)]).sum(axis=1)
    return sums / (one.weights_RN.sum(axis=1) * other.weights_RN.sum(axis=1))


def _pairs(rows_ND: np.ndarray) -> Iterator[np.ndarray]:
    """The squared distances of all pairs of different rows, each once, in pieces; the same at every call."""
    for start, squares in _blocks(rows_ND, rows_ND):
        places = np.arange(squares.shape[1])[None] > start + np.arange(len(squares))[:, None]
        if places.any():
            yield squares[places]


def _blocks(rows_ND: np.ndarray, others_MD: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """From which row on, and the squared distances (n, M) of some rows from all others.

    Around the others' mean, since |a|^2 + |b|^2 - 2 ab loses digits where both are far from zero.
    """
    middle = others_MD.mean(axis=0, dtype=np.float64)
    rows_ND, others_MD = rows_ND - middle, others_MD - middle
    lengths = np.einsum("md,md->m", others_MD, others_MD)
    size = max(1, BLOCK_VALUES // len(others_MD))
    for start in range(0, len(rows_ND), size):
        block = rows_ND[start : start + size]
        squares = np.einsum("nd,nd->n", block, block)[:, None] + lengths - 2 * block @ others_MD.T
        yield start, np.maximum(squares, 0)
