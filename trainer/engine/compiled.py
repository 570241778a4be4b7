"""Compiled layers: where torch.compile pays, whether it works on this machine, and how it is asked for."""

from __future__ import annotations

import torch

from trainer.config import Config
from trainer.engine.ranks import Ranks
from trainer.errors import ConfigError
from trainer.models import LanguageModel
from trainer.plan import Plan

# Graphs of one layer: training and evaluation, with and without a mask, one clip and more, one text token and more.
MOST_GRAPHS = 32


def compile_layers(model: LanguageModel, plan: Plan, config: Config, device: torch.device, ranks: Ranks) -> None:
    """Compile each layer by itself, in place, if `--compile` says so: names stay, and all layers share what is
    compiled for the first.

    auto compiles on a GPU where a first small function can be compiled, on every rank. Raises ConfigError for 1 with
    zero3.
    """
    if config.compile == "0" or (config.compile == "auto" and (device.type != "cuda" or plan.strategy == "zero3")):
        return
    if plan.strategy == "zero3":
        raise ConfigError("--compile 1 does not work with zero3, which gathers weights by hooks: use fsdp")
    if config.compile == "auto":
        failures = [failure for failure in ranks.gather(why_not(device)) if failure is not None]
        if failures:
            ranks.say(f"layers are not compiled, because torch.compile does not work here: {failures[0]}")
            return
        ranks.say("layers are compiled: the first step takes up to a minute longer (--compile 0 for none)")
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in model.decoder.model.decoder.layers:
        layer.compile(dynamic=True)  # for any length at once, since batches differ in theirs


def why_not(device: torch.device) -> str | None:
    """The first line of what torch.compile says of a small function on this device; None where it works.

    Usual reasons: no C compiler, no headers of Python, no Triton.
    """
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:  # whatever its backend raises becomes a RuntimeError
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None


def _small(values: torch.Tensor) -> torch.Tensor:
    return values.sin() + 1
