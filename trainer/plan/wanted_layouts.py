"""The layouts that a run may have, with hsdp before fsdp where the network between machines makes fsdp slow.

Under fsdp every micro-batch may gather all weights, and sum all gradients, over the network between machines. Under
hsdp that stays within each machine, and the network carries gradients once a step; in return a machine's GPUs hold all
that is sharded. So hsdp is for machines whose network is slow for their GPUs, and is taken there where it fits.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

from trainer.plan.allowed_layouts import EstimatedLayout, Job, allowed_layouts, fits
from trainer.plan.strategies import Cluster
from trainer.plan.time import step_time

# How many times as fast hsdp must be by the model of time, whose rates of links are assumed, to be taken by itself.
WORTHWHILE = 1.2


def wanted_layouts(cluster: Cluster, job: Job) -> list[EstimatedLayout]:
    """Every layout that the flags allow, the most wanted first; without hsdp where it is neither named nor worth it.

    Raises ConfigError where the flags allow none on this cluster.
    """
    allowed = list(allowed_layouts(cluster, job))
    if job.request.strategy != "auto" or cluster.nodes == 1 or cluster.gpus_per_node == 1:
        return allowed
    fsdp = next((estimated for estimated in allowed if fits(cluster, estimated)), None)
    if fsdp is None or fsdp.layout.strategy != "fsdp":
        return allowed
    within = list(allowed_layouts(cluster, replace(job, request=replace(job.request, strategy="hsdp"))))
    hsdp = next((estimated for estimated in within if fits(cluster, estimated)), None)
    reason = "" if hsdp is None else _worth(cluster, job, fsdp, hsdp)
    if not reason:
        return allowed
    named = [replace(one, candidate=replace(one.candidate, reason=reason)) for one in within]
    before = list(takewhile(lambda estimated: estimated.layout.strategy != "fsdp", allowed))
    return [*before, *named, *allowed[len(before) :]]


def _worth(cluster: Cluster, job: Job, fsdp: EstimatedLayout, hsdp: EstimatedLayout) -> str:
    """Why hsdp is taken in place of fsdp, in words; empty where it is not so much faster, or where nothing is known."""
    across, within = (step_time(job.shape, one.layout, cluster) for one in (fsdp, hsdp))
    if across is None or within is None or across.seconds < WORTHWHILE * within.seconds:
        return ""
    return (
        f"{job.shape.parameters / 1e6:.0f} M parameters on {cluster.nodes} machines: hsdp, sharded within each, whose"
        f" step should take {within.seconds:.2f} s; fsdp, sharded over all, would take {across.seconds:.2f} s"
    )
