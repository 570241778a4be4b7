"""torch.compile of the decoder's layers: whether it works on this machine, and how it is asked for."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext

import torch
import torch._functorch.config

from trainer.model.language_model import LanguageModel
from trainer.plan.plan import Plan

# A layer is compiled anew for each kind of input: training and evaluation, with and without a mask, one clip and more,
# one text token and more. Above torch's limit of graphs a layer would run uncompiled, with a warning.
MOST_GRAPHS = 32
# The fraction of the activations' memory that the compiler may keep under selective checkpointing. At 0.9 it keeps
# every matrix product and recomputes what lies between them (measured on an H100 and a CPU, 2026-11-23,
# docs/benchmarks.md).
SELECTIVE_BUDGET = 0.9


def compile_layers(model: LanguageModel, plan: Plan) -> None:
    """Have each layer of the decoder compiled at its first use.

    Each by itself and in place: so names of modules and parameters stay as checkpoints have them, and all layers share
    the graphs of the first. Changes settings of torch for the whole process.
    """
    selective = plan.gradient_checkpointing == "selective"
    torch._functorch.config.activation_memory_budget = SELECTIVE_BUDGET if selective else 1.0
    # Under ddp torch would cut a layer's graph wherever 25 MB of gradients are full, so that they are sent while the
    # rest of it is computed: 3 graphs for a layer of small. Nothing is fused across a cut, some versions of torch raise
    # where a part is recomputed (pytorch issue 104674), and gradients are sent between layers in any case.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in model.decoder.model.decoder.layers:
        layer.compile(dynamic=True)  # one graph for all lengths; the lengths of batches differ


def compiles(device: torch.device) -> bool:
    """Whether torch.compile can compile a small function for this device; prints the reason where it cannot.

    Usual reasons: no C compiler, no headers of Python, no Triton. Takes seconds.
    """
    # With `device` as the current one: the compiler asks the current device for its properties, which would otherwise
    # take memory on another rank's GPU.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with current:
            torch.compile(_small)(torch.ones(8, device=device))
    # torch turns most errors of its compilers into a RuntimeError; Triton's own call of gcc raises a SubprocessError.
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        lines = str(error).strip().splitlines()
        print(f"torch.compile does not work here: {type(error).__name__}: {lines[0] if lines else ''}", flush=True)
        return False
    return True


def _small(values: torch.Tensor) -> torch.Tensor:
    return values.sin() + 1
