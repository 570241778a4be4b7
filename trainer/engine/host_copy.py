"""A few values of the device, copied to the host beside what the device does next."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """The copy of a small tensor, begun when this is made.

    `tensor.tolist()` would wait for everything that the device was given before it is called, while it is given nothing
    new. This waits for what was given before the copy alone: what is launched between the constructor and `read` keeps
    the device busy. On a CPU there is nothing to wait for.
    """

    def __init__(self, values: Tensor):
        """values  of one dimension; they may change only by what is launched later"""
        self._values = values.to("cpu", non_blocking=True)  # torch takes pinned memory for that
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The values; waits until they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on `device`, where it is needed at every step.

    From memory that is not pinned the copy would wait for all that the device still has to do.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
