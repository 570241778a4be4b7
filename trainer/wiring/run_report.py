"""From the flags to run.json, which says what a run is about to do, and to the thread that writes report.html."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from trainer.data.heard import heard_of
from trainer.flags.config import Config
from trainer.flags.flag import defaults_of
from trainer.report.reporter import Reporter
from trainer.report.run_facts import START
from trainer.spec.trainable import count

if TYPE_CHECKING:
    from trainer.model.source import Source
    from trainer.run.output_dir import OutputDir
    from trainer.training.loop import Run


def record_start(config: Config, run: Run, source: Source, folder: OutputDir, start_step: int) -> None:
    """Write run.json. Starts that led to the checkpoint of `start_step` stay in its list; those of later steps go."""
    earlier = folder.read_json(START) if start_step > 0 else {}
    before = earlier.get("starts")
    known = before if isinstance(before, list) else []
    starts = [one for one in known if isinstance(one, dict) and one.get("start_step", start_step) < start_step]
    now = {"started": time.time(), "start_step": start_step}
    counts = count(source.shape, config.selection)
    folder.write_json(START, {
        "steps": run.order.steps,
        "steps_per_epoch": run.order.crops_per_epoch / run.order.global_batch,
        "global_batch": run.plan.global_batch,
        "melody": source.melody,
        "clips": run.order.clips,
        "hours": run.hours,
        "times_heard": heard_of(run.order, source.frame_rate_hz).times,  # each second of it, in the whole run
        "parameters": source.shape.parameters,
        "trained_parameters": counts.trained,
        "channels": run.order.channels,
        # A run that goes on does not look at --init_from again.
        "made_stereo": earlier.get("made_stereo") if start_step > 0 else source.copied,
        # Of a model of scripts/demo_model.py: how many clips its codec knows; null of any other model.
        "codec_fitted_clips": source.config.audio_encoder.to_dict().get("fitted_clips"),
        "device": torch.cuda.get_device_name() if run.plan.layout.on_gpu else "CPU",
        **now,
        "starts": [*starts, now],
    })  # fmt: skip


def reporter_of(folder: OutputDir, *, first: bool) -> Reporter:
    """The thread that writes the page of the run, on the first process; on others nothing."""
    return Reporter(folder.root if first else None, defaults_of(Config))
