"""The bounds on trained weights let rounding pass and nothing else, on AdamW as torch has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rounding import BETAS, REACH, ROUNDING, assert_same_training

RATES = [1e-3] * 6
SHAPE = (128, 64)


def trained(gradients: list[Tensor], *, rates: list[float] = RATES, **changes: Any) -> dict[str, Tensor]:
    """A weight after AdamW's steps with these gradients."""
    weight = torch.nn.Parameter(0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([weight], **{"betas": BETAS, "weight_decay": 0.01, **changes})
    for rate, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = gradient.clone()
        optimizer.step()
    return {"weight": weight.detach()}


def gradients(rounding: float = 0.0) -> list[Tensor]:
    """Normally distributed, with errors of so many times their size on top."""
    draw, errors = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    return [
        torch.randn(SHAPE, generator=draw) + rounding * torch.randn(SHAPE, generator=errors) for _ in range(len(RATES))
    ]


def test_gradients_rounded_otherwise_pass_and_so_does_a_value_whose_gradient_is_rounding() -> None:
    found, expected = gradients(20 * ROUNDING), gradients()
    for step in range(len(RATES)):
        found[step][0, 0], expected[step][0, 0] = 1e-7, -1e-7
    assert_same_training(trained(found), trained(expected), RATES)


def fewer(steps: int) -> dict[str, Tensor]:
    return trained(gradients()[:steps], rates=RATES[:steps])


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda: fewer(5), id="a step skipped"),
        pytest.param(lambda: trained(gradients()[::-1]), id="steps in another order"),
        pytest.param(lambda: trained(gradients(), rates=[1.01e-3] * 6), id="a rate off by a hundredth"),
        pytest.param(lambda: trained(gradients(), betas=(0.9, 0.999)), id="another beta"),
        pytest.param(lambda: trained(gradients(1e-2)), id="gradients off by a hundredth"),
        pytest.param(lambda: trained(gradients(), weight_decay=0.5), id="another decay"),
    ],
)
def test_what_is_wrong_fails(wrong: Any) -> None:
    with pytest.raises(AssertionError, match=r"weight: \d+ of 8192 values differ"):
        assert_same_training(wrong(), trained(gradients()), RATES)


def test_a_value_of_a_tensor_that_went_elsewhere_fails() -> None:
    found = trained(gradients())
    found["weight"][0, 0] += 1.0
    with pytest.raises(AssertionError, match="weight: 1 of"):
        assert_same_training(found, trained(gradients()), RATES)


def test_no_gradients_move_a_value_by_more_than_the_reach_and_the_worst_come_near() -> None:
    # Where Cauchy and Schwarz hold with equality: each gradient as the quotient of its two weights.
    steps = 200
    worst = [torch.full(SHAPE, (BETAS[0] / BETAS[1]) ** (steps - step)) for step in range(steps)]
    before = trained(worst[:-1], rates=[1.0] * (steps - 1), weight_decay=0.0, eps=0.0)["weight"]
    after = trained(worst, rates=[1.0] * steps, weight_decay=0.0, eps=0.0)["weight"]
    moved = float((after - before).abs().max())
    assert 0.99 * REACH < moved < REACH * (1 + 1e-3)
