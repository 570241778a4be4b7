"""How many FLOPs a second this device gives one large matrix product: the yardstick of MFU."""

from __future__ import annotations

import time

import torch

# Large enough that a device runs at its full rate, small enough that measuring takes a moment.
SIDE = {"cpu": 1024, "cuda": 8192}
WARM_UPS, PRODUCTS = 1, 3
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOPs a second of the fastest of a few square products in the precision of the computation.

    precision  no (float32), bf16 or fp16

    On a shared machine it is what was free at that moment. A datasheet's figure is higher: no product reaches it.
    """
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    seconds = [_seconds(left, right) for _ in range(WARM_UPS + PRODUCTS)]
    return 2 * side**3 / min(seconds[WARM_UPS:])


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    since = time.perf_counter()
    left @ right
    _wait(left.device)
    return time.perf_counter() - since


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
