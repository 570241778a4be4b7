"""The model on its devices. Only in here, accelerate, deepspeed and torch.distributed are known."""

from trainer.engine.accelerator import build_accelerator, find_cluster, start_trackers
from trainer.engine.engine import Engine, StepResult
from trainer.engine.ranks import Ranks

__all__ = ["Engine", "Ranks", "StepResult", "build_accelerator", "find_cluster", "start_trackers"]
