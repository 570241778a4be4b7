"""Steps of all contestants, side by side: throughput, share of the device's matrix product, memory against the plan."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from benchmarks import contestants
from benchmarks.report import Row
from benchmarks.turns import Timing, take_turns
from benchmarks.work import Work
from trainer.plan.memory import expected_bytes
from trainer.plan.rates import gpu_of

CONTESTANTS = ("step", "bare", "seq2seq", "audiocraft")


def measure(names: Sequence[str], work: Work, rounds: int) -> list[Row]:
    """One row per contestant. On a CPU all exist at once and step in turn, on a GPU one after the other."""
    cuda = torch.cuda.is_available()
    timings = take_turns(names, contestants.run, work, rounds, together=not cuda)
    expected = expected_bytes(work.shape, work.layout(on_gpu=cuda)).allocated
    return [_row(name, work, timings[name], timings.get("bare"), expected) for name in names]


def _row(name: str, work: Work, timing: Timing, bare: Timing | None, expected: int) -> Row:
    row: Row = {
        "case": name,
        "model": work.model,
        "layers": work.shape.layers,
        "frames": work.frames,
        "clips": work.clips,
        "micro_batch": work.micro_batch,
        "precision": work.precision,
        "strategy": work.strategy if name == "step" else "",
        "checkpointing": work.gradient_checkpointing,
        "compiled": work.compiled,
    }
    if timing.failure is not None:
        return row | {"failure": timing.failure}
    seconds = statistics.median(timing.seconds)
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    row |= {
        "seconds": seconds,
        "frames_per_second": work.clips * work.frames / seconds,
        "clips_per_second": work.clips / seconds,
        "tera_flops_per_second": work.flops / seconds / 1e12,
        "mfu": statistics.median(
            work.flops / own / rate for own, rate in zip(timing.seconds, timing.matmul_rates, strict=True)
        ),
        "of_datasheet": of_datasheet(work, seconds, card),
        "first_seconds": timing.first_seconds,
        "peak_gib": timing.peak_bytes / 2**30,
    }
    if name == "step" and torch.cuda.is_available():  # a CPU's process grows by what it imports, too
        row |= {"plan_gib": expected / 2**30, "peak_of_plan": timing.peak_bytes / expected}
    if bare is not None and bare.failure is None:
        # Round by round, so that a slow minute of a shared machine counts in both.
        ratios = [floor / own for floor, own in zip(bare.seconds, timing.seconds, strict=True)]
        row |= {"throughput_of_bare": statistics.median(ratios), "throughput_of_bare_best": _best(bare, timing)}
    return row


def of_datasheet(work: Work, seconds: float, card: str) -> float | None:
    """The step's FLOPs per second as a share of what the datasheet says of this card; None for one that is not known.

    This is the unit in which others report MFU. The column `mfu` is a share of what the card's own large product
    reached right before each step.
    """
    gpu = gpu_of(card)
    return None if gpu is None else work.flops / seconds / gpu.datasheet_flops_per_second(work.precision)


def _best(bare: Timing, timing: Timing) -> float:
    """Throughput against bare's by the fastest step of each, which other work on the machine disturbed least."""
    return min(bare.seconds) / min(timing.seconds)
