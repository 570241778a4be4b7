"""The model on its devices, one optimizer step at a time.

Below launch.py, only this room imports accelerate, deepspeed and torch.distributed; tests/test_layers.py holds that.
"""

from trainer.engine.accelerator import build_accelerator, start_trackers
from trainer.engine.engine import Engine, StepResult
from trainer.engine.free_memory import check_free_memory
from trainer.engine.hardware import find_cluster, own_device
from trainer.engine.link_rate import say_link_rate
from trainer.engine.meeting import meet
from trainer.engine.ranks import Ranks

__all__ = [
    "Engine",
    "Ranks",
    "StepResult",
    "build_accelerator",
    "check_free_memory",
    "find_cluster",
    "meet",
    "own_device",
    "say_link_rate",
    "start_trackers",
]
