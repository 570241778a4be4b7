"""What the engine is told about a run beside its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.model.trained_model import ModelSettings


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a model is trained, on whatever hardware.

    optimizer        adamw8bit keeps the moments in 8 bits
    max_grad_norm    gradients of a larger norm are scaled down to it
    ema_decay        share of itself that the moving average of the weights keeps at each step; None for no average
    base_bits        of the frozen linear layers of the decoder's layers; None for the compute precision
    timeout_minutes  how long a process may be silent, or a collective may wait, before the run ends
    trackers         which of wandb and tensorboard are told about the run
    tracker_project  the project under which they file it
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
