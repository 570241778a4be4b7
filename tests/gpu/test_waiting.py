"""The host waits for the device once in a step: for the results' copy, which was begun before AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.engine.test_host_reads import Watch
from tests.gpu.one_card import run_ranks
from tests.ranks.cases import steps

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
CASES = [("single", 1, "no", False), ("ddp", 2, "no", False), ("fsdp", 2, "no", False), ("fsdp", 2, "bf16", False)]
COMPILED = [("single", 1, "bf16", True)]
NAMES = ("strategy", "ranks", "precision", "compiled")
# What only the first steps of a process wait for: libraries' handles, DDP's buckets, the compiler.
FIRST = 3


class Waits:
    """Called with an engine, lets each of its steps after the first ones tell in `found` what the host waited for."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []
        self._begun = False

    def __call__(self, engine: Any) -> None:
        if self._begun:
            return
        self._begun = True
        step = engine.step

        def observed(*arguments: Any, **named: Any) -> Any:
            if engine.ranks.steps_begun < FIRST:
                return step(*arguments, **named)
            with waits_on_a_gpu() if engine.device.type == "cuda" else waits_on_a_cpu() as found:
                result = step(*arguments, **named)
            self.found.append(found)
            return result

        engine.step = observed


@contextmanager
def waits_on_a_gpu() -> Iterator[list[str]]:
    """Raises RuntimeError inside the block at each operation that waits for the device, but for waits for an event.

    Those are in the list, and so are AdamW's launches.
    """
    found, synchronize, launch = [], torch.cuda.Event.synchronize, torch._fused_adamw_

    def noted_wait(event: torch.cuda.Event) -> None:
        found.append("waited")
        synchronize(event)

    def noted_launch(*arguments: Any, **named: Any) -> Any:
        found.append("adamw")
        return launch(*arguments, **named)

    torch.cuda.Event.synchronize, torch._fused_adamw_ = noted_wait, noted_launch  # type: ignore[method-assign]
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.Event.synchronize, torch._fused_adamw_ = synchronize, launch  # type: ignore[method-assign]


@contextmanager
def waits_on_a_cpu() -> Iterator[list[str]]:
    """The same of a CPU, where a read takes the place of a wait."""
    found: list[str] = []
    with Watch() as watch:
        yield found
    found += ["waited" if event == "tolist" else event for event in watch.events]


def waits_of(strategy: str, precision: str, compiled: bool) -> list[list[str]]:
    watch = Waits()
    steps(strategy, 2, count=FIRST + 2, precision=precision, compiled=compiled, ema_decay=0.9, watch=watch)
    return watch.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(NAMES, CASES + COMPILED)
def test_the_host_waits_once_in_a_step_and_after_adamw_was_launched(
    strategy: str, ranks: int, precision: str, compiled: bool
) -> None:
    assert run_ranks(ranks, waits_of, strategy, precision, compiled) == [[["adamw", "waited"]] * 2] * ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="is of a CPU")
@pytest.mark.parametrize(NAMES, CASES)
def test_the_same_is_read_once_on_a_cpu(strategy: str, ranks: int, precision: str, compiled: bool) -> None:
    assert run_ranks(ranks, waits_of, strategy, precision, compiled) == [[["adamw", "waited"]] * 2] * ranks
