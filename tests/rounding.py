"""How far rounding alone can take two runs of the same training apart: the bounds of tests, and where they come from.

The same steps on other ranks, threads or instructions add the same float32 numbers in another order. A gradient then
differs by some 1e-7 to 5e-6 of its tensor's norm (its first moments after six steps, compared over AVX-512, AVX2,
SSE4.1 and plain kernels of an AMD EPYC, 2026-11-26). Losses and norms feel no more than that. A single weight can feel
far more: AdamW divides a gradient by its own size, so that where it is as small as its rounding its sign is arbitrary,
and the weight moves by a whole rate this way or that. No bound far below the rate holds for every weight on every
machine; what does hold is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Relative error of rounding one number to float32.
ROUNDING = 2.0**-24
# Largest difference of a step's loss, in nats. Losses of 4 to 8 lie 2**-21 apart in float32. A codebook's sum over some
# 300 cells is eight levels of additions, each off by half of that distance at most: as a random walk 1.4 of it, in
# each of two runs. Measured over all those kernels: 6e-7, which is 1.25 of it.
LOSS = 4 * 2.0**-21
# Largest relative difference of gradient norms. The norm differs by no more than the norm of the difference, 6e-7 of it
# at most as measured, and by far less (4e-8) since errors of single values are not aligned with the gradient.
NORM = 3e-6
# The most that AdamW moves a value in one step, in learning rates, apart from weight decay. The moments are weighted
# means of the gradients, m with weights w_i, and of their squares, v with weights u_i: by Cauchy and Schwarz
# m / sqrt(v) is at most sqrt(sum of w_i**2 / u_i), which rises from 1 at the first step to this, with these betas
# 1.165. The paper gives about 1 (Adam, arXiv 1412.6980, section 2.1).
BETAS = (0.9, 0.95)
REACH = (1 - BETAS[0]) / math.sqrt((1 - BETAS[1]) * (1 - BETAS[0] ** 2 / BETAS[1]))
# A difference of this part of the way that a value can be moved needs a gradient below 1000 times its error, some 1e-3
# of the tensor's typical gradient: so small are about as many of the values, and of those few are so unlucky. Measured
# over all those kernels: 2 of 2.7 million values differ by more.
SMALL, FEW = 1e-3, 1e-3


def assert_same_training(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], learning_rates: Sequence[float]
) -> None:
    """Both are weights, or averages of weights, after AdamW's steps at these rates from the same start.

    In each tensor all but one value and a thousandth of the others must agree to a thousandth of the way that the steps
    can move a value, and every value to twice that way. A skipped step, another rate or other betas move most values
    by more than that thousandth.
    """
    assert found.keys() == expected.keys()
    way = REACH * sum(learning_rates)
    for name, values in expected.items():
        apart = (found[name].double() - values.double()).abs()
        # In each of the two runs a step rounds a weight twice, for its decay and for its update.
        stored = 4 * len(learning_rates) * ROUNDING * values.double().abs()
        far = int((apart > SMALL * way + stored).sum())
        message = f"{name}: {far} of {values.numel()} values differ, one by {float(apart.max()):.2g} of {way:.2g}"
        assert far <= 1 + FEW * values.numel(), message
        assert torch.isfinite(apart).all() and (apart <= 2 * way + stored).all(), message
