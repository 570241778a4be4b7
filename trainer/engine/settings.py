"""What the engine is told about a run besides its plan, and the optimizer's settings that no flag changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trainer.model.trained_model import ModelSettings

# The dtype of forward and backward, by the plan's mixed_precision. Trained weights and their moments stay float32.
COMPUTE_DTYPE = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# As MusicGen was trained (audiocraft 1.3.0, config/solver/musicgen/musicgen_base_32khz.yaml). Weight decay applies to
# every trained parameter, as there.
ADAMW_BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a model is trained, on whatever hardware.

    optimizer        adamw8bit keeps the moments in 8 bits (trainer/engine/adamw_8bit.py)
    max_grad_norm    gradients of a larger norm are scaled down to it
    ema_decay        fraction of itself that the moving average of the weights keeps at each step; None for no average
    base_bits        bits of the frozen linear layers of the decoder's layers; None for the compute precision
    timeout_minutes  how long a process may be silent before the run ends; a collective may wait 2 minutes more
    trackers         which of wandb and tensorboard get the run's reports
    tracker_project  the project under which they file the run
    """

    model: ModelSettings
    optimizer: Literal["adamw", "adamw8bit"]
    weight_decay: float
    max_grad_norm: float
    ema_decay: float | None
    base_bits: Literal[4, 8] | None
    timeout_minutes: float
    trackers: tuple[str, ...]
    tracker_project: str

    @property
    def has_dropout(self) -> bool:
        """Whether anything is drawn at random while the model computes."""
        lora = self.model.selection.lora
        return self.model.dropout > 0 or (lora is not None and lora.dropout > 0)
