"""The layouts that a run may have, in another order where the model of time says that it is much faster.

The order of allowed_layouts is that of one GPU, and of several whose links are fast. Where links are slow for the GPUs,
each micro-batch waits for them, so that few large ones, with all activations recomputed, may take a fraction of the
time of many small ones. And under fsdp weights and gradients go over the network between machines, where under hsdp
they stay within each machine and the network carries gradients once a step; in return a machine's GPUs hold all that is
sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trainer.plan.allowed_layouts import EstimatedLayout, Job, allowed_layouts, fits
from trainer.plan.exchange import plain
from trainer.plan.layout import CHECKPOINTING_IN_WORDS, Layout
from trainer.plan.strategies import Cluster
from trainer.plan.time import step_time

# How many times as fast another layout must be by the model of time, whose rates of links are assumed, to be preferred.
WORTHWHILE = 1.2


def wanted_layouts(cluster: Cluster, job: Job) -> list[EstimatedLayout]:
    """Every layout that the flags allow, the most wanted first; without hsdp where it is neither named nor worth it.

    Raises ConfigError where the flags allow none on this cluster.
    """
    layouts = _faster_first(cluster, job, list(allowed_layouts(cluster, job)))
    if job.request.strategy != "auto" or cluster.nodes == 1 or cluster.gpus_per_node == 1:
        return layouts
    fsdp = _first_that_fits(cluster, layouts)
    if fsdp is None or layouts[fsdp].layout.strategy != "fsdp":
        return layouts
    of_hsdp = list(allowed_layouts(cluster, replace(job, request=replace(job.request, strategy="hsdp"))))
    within = _faster_first(cluster, job, of_hsdp)
    hsdp = _first_that_fits(cluster, within)
    reason = "" if hsdp is None else _worth(cluster, job, layouts[fsdp], within[hsdp])
    if not reason:
        return layouts
    named = [replace(one, candidate=replace(one.candidate, reason=reason)) for one in within]
    before = [one for one in layouts[:fsdp] if one.layout.strategy != "fsdp"]
    return [*before, *named, *layouts[len(before) :]]


def _first_that_fits(cluster: Cluster, layouts: Sequence[EstimatedLayout]) -> int | None:
    return next((index for index, one in enumerate(layouts) if fits(cluster, one)), None)


def _faster_first(cluster: Cluster, job: Job, layouts: list[EstimatedLayout]) -> list[EstimatedLayout]:
    """The layouts, with the fastest before the first that fits where it is so much faster.

    Compared are those that fit, of the first one's strategy; of those that differ only in when weights and gradients
    travel, the one that sends the fewest bytes.
    """
    first = _first_that_fits(cluster, layouts)
    if first is None or cluster.gpu_memory_bytes is None:
        return layouts
    rivals: dict[Layout, EstimatedLayout] = {}
    for one in layouts[first:]:
        if one.candidate == layouts[first].candidate and fits(cluster, one):
            rivals.setdefault(plain(one.layout), one)
    seconds = {key: time.seconds for key, one in rivals.items() if (time := step_time(job.shape, one.layout, cluster))}
    if not seconds:
        return layouts
    usual, fastest = seconds[plain(layouts[first].layout)], min(seconds, key=lambda layout: seconds[layout])
    if usual < WORTHWHILE * seconds[fastest]:
        return layouts
    reason = (
        f"{_in_words(fastest)}: a step should take {seconds[fastest]:.2f} s; with"
        f" {_in_words(layouts[first].layout)} it would take {usual:.2f} s"
    )
    return [*layouts[:first], replace(rivals[fastest], reason=reason), *layouts[first:]]


def _in_words(layout: Layout) -> str:
    return f"micro-batch {layout.micro_batch} and checkpointing {CHECKPOINTING_IN_WORDS[layout.gradient_checkpointing]}"


def _worth(cluster: Cluster, job: Job, fsdp: EstimatedLayout, hsdp: EstimatedLayout) -> str:
    """Why hsdp is taken in place of fsdp, in words; empty where it is not so much faster, or where nothing is known."""
    across, within = (step_time(job.shape, one.layout, cluster) for one in (fsdp, hsdp))
    if across is None or within is None or across.seconds < WORTHWHILE * within.seconds:
        return ""
    return (
        f"{job.shape.parameters / 1e6:.0f} M parameters on {cluster.nodes} machines: hsdp, sharded within each, whose"
        f" step should take {within.seconds:.2f} s; fsdp, sharded over all, would take {across.seconds:.2f} s"
    )
