"""KAD and Fréchet distance: against published implementations, closed forms, and what must not change them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.evaluation.published_distances import BANDWIDTH, FILE, embeddings
from trainer.evaluation import distances
from trainer.evaluation.distances import (
    KAD_SCALE,
    Weighted,
    frechet_distance,
    gaussian_of,
    kernel_audio_distance,
    kernel_audio_distances,
    median_distance,
)

PUBLISHED = json.loads(FILE.read_text())


def normal(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns))


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    return frechet_distance(gaussian_of(first), gaussian_of(second))


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row['generated']}x{row['columns']}")
def test_both_distances_are_those_of_published_implementations(row: dict[str, float]) -> None:
    generated = embeddings(int(row["generated"]), int(row["columns"]), 1.0)
    reference = embeddings(int(row["reference"]), int(row["columns"]), 0.0)
    [[at_bandwidth]] = kernel_audio_distances([Weighted.once(generated)], Weighted.once(reference), BANDWIDTH)
    # kadtk adds 1e-8 to 2 b^2 = 12.5, which changes a kernel's exponent by 8e-10 of itself. A kernel x exp(-x) with it
    # moves by 3e-10 at most, and 4 means of such, times 100, by 1.2e-7.
    assert at_bandwidth == pytest.approx(row["kadtk_at_bandwidth"], abs=1.2e-7)
    # kadtk takes the median in float32: 2^-24 for each of the numbers and the sum, some 3e-7 of it in all, and twice
    # that of the exponent: 4 x 100 x 0.37 x 6e-7.
    assert median_distance(reference) == pytest.approx(row["kadtk_median"], rel=3e-7)
    assert kernel_audio_distance(generated, reference) == pytest.approx(row["kadtk"], abs=9e-5)
    # The root of a product of covariances by eigenvalues: rounding of the product, 2^-53 x columns x its norm, may
    # move the smallest of them by so much; here they lie above 1e-3 of the largest.
    assert frechet(generated, reference) == pytest.approx(row["fadtk"], abs=1e-9)
    assert frechet(generated, reference) == pytest.approx(row["frechet_audio_distance"], abs=1e-9)


def test_kad_is_the_plain_sum_over_pairs() -> None:
    generated, reference = normal(0, 7, 3), normal(1, 5, 3) + 0.5
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(reference) for b in reference[i + 1 :]]
    bandwidth = sorted(pairs)[(len(pairs) - 1) // 2]

    def mean(first: np.ndarray, second: np.ndarray, same: bool) -> float:
        kernels = [
            np.exp(-(np.linalg.norm(a - b) ** 2) / (2 * bandwidth**2))
            for i, a in enumerate(first)
            for j, b in enumerate(second)
            if not (same and i == j)
        ]
        return float(np.mean(kernels))

    expected = mean(generated, generated, True) + mean(reference, reference, True)
    expected -= 2 * mean(generated, reference, False)
    assert kernel_audio_distance(generated, reference) == pytest.approx(KAD_SCALE * expected, abs=1e-12)


def test_kad_of_one_distribution_is_zero_on_average() -> None:
    values = [kernel_audio_distance(normal(2 * n, 20, 4), normal(2 * n + 1, 30, 4)) for n in range(400)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    # With the pairs of a row with itself it would be 100 (1 - mean kernel) (1/20 + 1/30), far away from zero.
    assert 10 * error < 100 * 0.3 * (1 / 20 + 1 / 30)


def test_blocks_do_not_change_a_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, reference = normal(0, 301, 6), normal(1, 203, 6) * 1.3
    whole = kernel_audio_distance(generated, reference)
    monkeypatch.setattr(distances, "BLOCK_VALUES", 1000)  # 4 rows a block, and a median found in several passes
    monkeypatch.setattr(distances, "BINS", 16)
    assert kernel_audio_distance(generated, reference) == pytest.approx(whole, abs=1e-11)
    pairs = np.linalg.norm(reference[:, None] - reference[None], axis=2)[np.triu_indices(203, 1)]
    assert median_distance(reference) == pytest.approx(np.sort(pairs)[(len(pairs) - 1) // 2], rel=1e-12)
    assert median_distance(np.repeat([[1.0], [2.0]], [30, 2], axis=0)) == 0
    assert median_distance(np.array([[0.0], [3.0], [4.0]])) == pytest.approx(3)
    with pytest.raises(ValueError, match="no distances"):
        median_distance(np.zeros((1, 3)))


def test_distances_do_not_depend_on_place_and_rotation() -> None:
    generated, reference = normal(0, 40, 5), normal(1, 50, 5) * 2
    rotation, _ = np.linalg.qr(normal(2, 5, 5))
    for distance in (kernel_audio_distance, frechet):
        moved = distance(generated @ rotation + 1000, reference @ rotation + 1000)
        assert moved == pytest.approx(distance(generated, reference), rel=1e-8)
        assert distance(reference, reference[::-1]) == pytest.approx(distance(reference, reference), abs=1e-9)
    # KAD has no unit; that of a Fréchet distance is the square of the embeddings'.
    kad, squared = kernel_audio_distance(generated * 3, reference * 3), frechet(generated * 3, reference * 3)
    assert kad == pytest.approx(kernel_audio_distance(generated, reference), rel=1e-10)
    assert squared == pytest.approx(9 * frechet(generated, reference), rel=1e-10)
    assert frechet(generated, reference) == pytest.approx(frechet(reference, generated), rel=1e-12)
    one_way, other = (
        kernel_audio_distances([Weighted.once(a)], Weighted.once(b), 2.0)
        for a, b in ((generated, reference), (reference, generated))
    )
    assert one_way[0, 0] == pytest.approx(other[0, 0], rel=1e-10)


@pytest.mark.parametrize("rows", [200, 10], ids=["whole rank", "fewer rows than columns"])
def test_frechet_has_its_closed_forms(rows: int) -> None:
    """Where covariances commute: |shift|^2 + tr(C) (1 - scale)^2; and |shift|^2 + both traces where they have no
    direction in common."""
    values = normal(0, rows, 40)
    trace = np.trace(np.cov(values, rowvar=False))
    made = (values - values.mean(axis=0)) * 1.5 + values.mean(axis=0) + 0.3
    assert frechet(values, values) == pytest.approx(0, abs=1e-10 * trace)
    assert frechet(made, values) == pytest.approx(40 * 0.3**2 + trace * 0.5**2, rel=1e-10)
    apart = np.hstack([values, np.zeros_like(values)]), np.hstack([np.zeros_like(values), values])
    away = 2 * values.mean(axis=0) @ values.mean(axis=0)
    assert frechet(*apart) == pytest.approx(away + 2 * trace, rel=1e-12)


def test_weights_are_copies_of_rows() -> None:
    rows, reference = normal(0, 9, 4), normal(1, 12, 4)
    weights = np.array([2, 0, 1, 1, 3, 1, 0, 1, 1.0])
    copied = np.repeat(rows, weights.astype(int), axis=0)
    assert frechet_distance(gaussian_of(rows, weights), gaussian_of(reference)) == pytest.approx(
        frechet(copied, reference), rel=1e-10
    )
    # But for the pairs of a row with its copies, which KAD leaves out: all others are there.
    of_copies = np.repeat(np.arange(9), weights.astype(int))
    kernel = np.exp(-(np.linalg.norm(copied[:, None] - copied[None], axis=2) ** 2) / 8)
    within = kernel[of_copies[:, None] != of_copies[None]].mean()
    between = np.exp(-(np.linalg.norm(copied[:, None] - reference[None], axis=2) ** 2) / 8).mean()
    own = np.exp(-(np.linalg.norm(reference[:, None] - reference[None], axis=2) ** 2) / 8)
    expected = within + own[~np.eye(12, dtype=bool)].mean() - 2 * between
    weighted = Weighted(rows_ND=rows, weights_RN=weights[None])
    [[value]] = kernel_audio_distances([weighted], Weighted.once(reference), 2.0)
    assert value == pytest.approx(KAD_SCALE * expected, abs=1e-11)
