"""The formulas of model states that the ZeRO paper and DeepSpeed's documentation publish, to compare ours with."""

from __future__ import annotations

from typing import Literal


def zero_paper_bytes(parameters: int, gpus: int, stage: Literal[0, 1, 2, 3]) -> float:
    """Bytes of model states per GPU as the ZeRO paper counts them: 2 + 2 + 12 bytes per parameter.

    These are 16-bit weights, 16-bit gradients, and float32 master weights and moments. Stage 1 shards the last, stage 2
    gradients as well, stage 3 everything. Source: arXiv 1910.02054, figure 1.
    """
    weights, gradients, optimizer = 2.0 * parameters, 2.0 * parameters, 12.0 * parameters
    return (
        weights / (gpus if stage >= 3 else 1)
        + gradients / (gpus if stage >= 2 else 1)
        + optimizer / (gpus if stage >= 1 else 1)
    )


def deepspeed_zero2_bytes(parameters: int, gpus: int, *, offload: bool = False) -> float:
    """Bytes of model states per GPU under ZeRO-2: 4P + 16P/N, or 2P with the optimizer offloaded.

    P is the number of parameters, N that of GPUs. Source: DeepSpeed, docs/code-docs/source/memory.rst; the estimate
    function of DeepSpeed 0.19.8 itself says 2P + 18P/N.
    """
    return 2.0 * parameters if offload else 4.0 * parameters + 16.0 * parameters / gpus


def deepspeed_zero3_bytes(parameters: int, gpus: int, largest_layer: int, *, offload: bool = False) -> float:
    """Bytes of model states per GPU under ZeRO-3: 18P/N or, offloaded, 2P/N, plus 4 x the largest layer.

    Source: DeepSpeed, docs/code-docs/source/memory.rst.
    """
    return (2.0 if offload else 18.0) * parameters / gpus + 4.0 * largest_layer
