"""What torch says of itself where it finds no GPU."""

from __future__ import annotations

import functools
import os

import torch

from trainer.plan.unused_gpu import TorchBuild, ask_driver, cards_on_the_bus, why_unused


@functools.cache
def why_gpus_are_unused() -> str:
    """Why no GPU is used though an NVIDIA GPU is in this machine, and what to do; empty where there is none."""
    return why_unused(torch_build(), ask_driver(), cards_on_the_bus(), os.environ)


def torch_build() -> TorchBuild:
    """The build of torch, with what it raises when CUDA is asked for."""
    error = ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as raised:  # AssertionError: a build without CUDA
        error = str(raised).strip().partition("\n")[0]
    return TorchBuild(version=torch.__version__, cuda=torch.version.cuda, error=error)
