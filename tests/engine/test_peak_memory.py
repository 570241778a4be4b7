"""The most that a step holds at once, by PyTorch's own record of its CPU allocations, is what the plan expects."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState
from benchmarks.parts import engine_of
from benchmarks.work import Work

from tests import allocations


def peak_bytes(work: Work) -> int:
    """Weights and moments, and the most that one step allocates beside them."""
    AcceleratorState._reset_state(True)
    with engine_of(work) as (engine, step):
        step()
        most = allocations.peak_bytes(step)
        return engine.backend.weight_bytes() + engine.backend.optimizer_bytes() + most


@pytest.mark.parametrize(
    "changes,tolerance",
    [
        ({}, 0.02),
        ({"layers": 8}, 0.02),
        ({"layers": 8, "gradient_checkpointing": True}, 0.02),
        # With one micro-batch gradients take the place of activations: without that 8 and 14 % would be missing.
        ({"layers": 8, "accumulation": 1}, 0.02),
        ({"layers": 8, "accumulation": 1, "gradient_checkpointing": True}, 0.02),
        # Autocast keeps and frees its casts in an order of its own; what it adds to a frame is an estimate.
        ({"layers": 8, "precision": "bf16", "gradient_checkpointing": True}, 0.10),
        ({"layers": 8, "precision": "bf16"}, 0.10),
        ({"model": "small", "micro_batch": 1, "frames": 300}, 0.02),
        ({"model": "debug-stereo-melody", "accumulation": 1}, 0.02),
        *(
            pytest.param({"model": model, "layers": 8, **changes}, tolerance, marks=pytest.mark.full)
            for model, changes, tolerance in [
                ("debug-stereo", {}, 0.02),
                ("debug-stereo", {"accumulation": 1}, 0.02),
                ("debug-melody", {}, 0.02),
                ("debug-melody", {"accumulation": 1}, 0.02),
                ("debug-melody", {"gradient_checkpointing": True}, 0.02),
                ("debug-melody", {"precision": "bf16"}, 0.10),
                ("debug-stereo-melody", {"text_tokens": 128}, 0.02),
                ("melody", {"layers": 2, "micro_batch": 1, "frames": 300}, 0.02),
            ]
        ),
    ],
)
def test_a_step_peaks_where_the_plan_says(changes, tolerance):
    work = Work(**{"model": "debug", "layers": 2, "frames": 500, "micro_batch": 2, "accumulation": 2, **changes})
    expected = work.plan(gpu_memory_bytes=None).memory.allocated
    assert peak_bytes(work) == pytest.approx(expected, rel=tolerance)
