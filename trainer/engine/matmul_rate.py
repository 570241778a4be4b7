"""How many FLOPs per second this device reaches in one large matrix product: MFU is measured against it."""

from __future__ import annotations

import time

import torch

from trainer.engine.settings import COMPUTE_DTYPE
from trainer.plan.rates import gpu_of

# Rows and columns: large enough that the device runs at its full rate, small enough that measuring takes a moment.
SIDE = {"cpu": 1024, "cuda": 8192}
WARM_UPS, PRODUCTS = 1, 3


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOPs per second of the fastest of a few products of square matrices.

    precision  no (float32), bf16 or fp16

    On a machine that others use too, this is what was free at that moment. Datasheets say more: no product reaches it.
    """
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(COMPUTE_DTYPE[precision]) for _ in range(2))
    seconds = [_seconds(left, right) for _ in range(WARM_UPS + PRODUCTS)]
    return 2 * side**3 / min(seconds[WARM_UPS:])


def rate_in_words(flops_per_second: float, device: torch.device, precision: str) -> str:
    """What one large product reaches, beside what the datasheet says of this GPU where it is known."""
    gpu = gpu_of(torch.cuda.get_device_properties(device).name)
    of = "" if gpu is None else f", of {gpu.datasheet_flops_per_second(precision) / 1e12:.4g} by the datasheet"
    return f"one large product: {flops_per_second / 1e12:.3g} TFLOP/s measured{of}"


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    since = time.perf_counter()
    left @ right
    _wait(left.device)
    return time.perf_counter() - since


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
