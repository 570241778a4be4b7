"""The model on its devices, one optimizer step at a time.

Below launch.py, only this room imports accelerate, deepspeed and torch.distributed; tests/test_layers.py holds that.
"""

from trainer.engine.accelerator import build_accelerator, find_cluster, start_trackers
from trainer.engine.engine import Engine, StepResult
from trainer.engine.ranks import Ranks

__all__ = ["Engine", "Ranks", "StepResult", "build_accelerator", "find_cluster", "start_trackers"]
