"""A save that has to wait for the one before it holds no rank in a collective, whose time limit it might exceed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.plans import plan_for
from tests.ranks.harness import run_ranks


def steps_with_a_slow_export(folder: str) -> tuple[list[bool], list[str]]:
    """6 steps that export every second one. The first export ends only when the other rank waits for it outside of any
    collective: whether it did so within 20 s, and which checkpoints are there."""
    from tests.training.test_loop import run_of
    from trainer.engine import Engine, Ranks, build_accelerator
    from trainer.engine.peer_watch import connect_to_store
    from trainer.flags.config import Config
    from trainer.model.source import open_model
    from trainer.run.checkpoint import Saver, complete_checkpoints
    from trainer.run.signals import StopRequest
    from trainer.training.loop import train
    from trainer.wiring import engine_settings

    class Unreported:
        def log(self, values: Any) -> None: ...

    waited: list[bool] = []

    def export(checkpoint: Any) -> None:
        if checkpoint.step == 2:
            store, deadline = connect_to_store(), time.monotonic() + 20
            while not store.add("trainer/wait/saved/1", 0) and time.monotonic() < deadline:
                time.sleep(0.01)
            waited.append(store.add("trainer/wait/saved/1", 0) > 0)

    settings = engine_settings(Config(dataset_path="unused"))
    plan = plan_for("ddp", world_size=2, micro_batch=1, accumulation=2, global_batch=4)
    run = replace(run_of(steps=6, save_step=2), plan=plan, on_save_step=export)
    accelerator = build_accelerator(plan, settings, Path("."))
    with Ranks(timeout_seconds=60) as ranks, StopRequest() as stop:
        engine = Engine(accelerator, ranks, open_model("debug"), plan, settings)
        saver = Saver(Path(folder), rank=ranks.rank, world_size=2)
        train(run, engine, saver, Unreported(), stop, 0)  # type: ignore[arg-type]
        ranks.wait("all saved")
        return waited, [path.name for path in complete_checkpoints(Path(folder))]


@pytest.mark.full
def test_all_ranks_wait_for_the_save_in_flight_before_the_next_export(tmp_path):
    first, second = run_ranks(2, steps_with_a_slow_export, str(tmp_path))
    assert first[0] == [True] and second[0] == [], "the other rank sat in a collective"
    assert first[1] == second[1] == ["step-00000006", "step-00000004"]
