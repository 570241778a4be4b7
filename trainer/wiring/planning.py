"""From the flags to a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trainer.plan.dry_run import plan_of_shape
from trainer.plan.plan import Plan
from trainer.plan.strategies import Cluster
from trainer.spec.shapes import FRAME_RATE_HZ, published, shape_to_train

if TYPE_CHECKING:
    from trainer.flags.config import Config
    from trainer.model.source import Source
    from trainer.plan.launcher import Launch
    from trainer.run.checkpoint import Checkpoint


def plan_of(
    config: Config,
    typed: frozenset[str],
    cluster: Cluster,
    launch: Launch,
    source: Source,
    checkpoint: Checkpoint | None,
) -> Plan:
    """The plan for this cluster; a resumed run keeps its global batch."""
    global_batch = None if checkpoint is None else checkpoint.run.global_batch
    return plan_of_shape(config, typed, cluster, launch, source.shape, source.frame_rate_hz, global_batch)


def refuse_before_fetching(
    config: Config, typed: frozenset[str], cluster: Cluster, launch: Launch, checkpoint: Checkpoint | None
) -> None:
    """Raise what the plan will raise, where the model's size is known before gigabytes of it are fetched.

    cluster  as this process alone finds it, without asking whether torch.compile works
    """
    shape = published(config.model_id)
    if shape is not None:
        shape = shape_to_train(shape, stereo=config.stereo)
        global_batch = None if checkpoint is None else checkpoint.run.global_batch
        plan_of_shape(config, typed, replace(cluster, compiles=True), launch, shape, FRAME_RATE_HZ, global_batch)
