"""Compiled layers: whether torch.compile works on this machine, and how it is asked for."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext

import torch
import torch._functorch.config

from trainer.model.language_model import LanguageModel
from trainer.plan.plan import Plan

# Graphs of one layer: training and evaluation, with and without a mask, one clip and more, one text token and more.
MOST_GRAPHS = 32
# The share of the activations' memory that the compiler may keep where it is to recompute: at 0.9 every matrix product
# is kept and everything between them made again (measured on an H100 and a CPU, 2026-11-23, docs/benchmarks.md).
SELECTIVE_BUDGET = 0.9


def compile_layers(model: LanguageModel, plan: Plan) -> None:
    """Compile each layer of the decoder by itself, in place, at its first use: names stay, and all layers share what
    is compiled for the first."""
    selective = plan.gradient_checkpointing == "selective"
    torch._functorch.config.activation_memory_budget = SELECTIVE_BUDGET if selective else 1.0
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in model.decoder.model.decoder.layers:
        layer.compile(dynamic=True)  # for any length at once, since batches differ in theirs


def compiles(device: torch.device) -> bool:
    """Whether torch.compile makes a small function for this device; what it says where it does not is printed.

    Usual reasons: no C compiler, no headers of Python, no Triton.
    """
    # As the current device: the compiler asks for its properties, and would open another one's context for that.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with current:
            torch.compile(_small)(torch.ones(8, device=device))
    # torch makes a RuntimeError of most that its backend raises; Triton's own call of gcc ends in a SubprocessError.
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        lines = str(error).strip().splitlines()
        print(f"torch.compile does not work here: {type(error).__name__}: {lines[0] if lines else ''}", flush=True)
        return False
    return True


def _small(values: torch.Tensor) -> torch.Tensor:
    return values.sin() + 1
