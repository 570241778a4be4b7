"""What the engine asks of a strategy.

torch_backend.py does it for single, ddp, fsdp and hsdp, zero_backend.py for zero2 and zero3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from trainer.engine.shards import Read, Shard
from trainer.run.checkpoint import Checkpoint, FlatSlice


class Backend(Protocol):
    """A wrapped, sharded model and its optimizer.

    An optimizer step is: inside `around_micro_batches`, for each micro-batch a forward and `backward` inside
    `accumulating`; then `finish`, then `update`. Every method is called on all ranks at the same point of the run,
    because most contain collectives under some strategy.
    """

    model: nn.Module  # to be called as LanguageModel.forward

    @property
    def scales_losses(self) -> bool:
        """Whether fp16 scales the losses, so that a gradient may overflow and the step must be computed again."""

    def around_micro_batches(self) -> AbstractContextManager[None]:
        """The context of all micro-batches of a step. An error that leaves it sends nothing to the other ranks."""

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch's forward and backward. `last`: whether it is the step's last one."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`, a float32 scalar: this micro-batch's part of the step's loss.

        All strategies average gradients over the ranks, but the step's loss is a sum over them. So a backend multiplies
        `loss` by the number of ranks.
        """

    def finish(self, learning_rate: float) -> Tensor:
        """This rank's part of the square of the gradients' norm before clipping, a float64 scalar on the device.

        The parts of all ranks add up to the square: a value that several ranks hold is in the part of one of them. So
        the engine sums it together with the losses. ZeRO changes the weights here already, the others in `update`.
        """

    def update(self, norm: Tensor, finite: Tensor) -> None:
        """Change the weights, unless `finish` has, or change no weight and no moment where `finite` is False.

        Either is decided on the device, and the host does not wait for it; under fp16 and with moments of 8 bits it
        does.

        norm    float64 scalar on the device, the norm of the step's gradients, the same on every rank
        finite  bool scalar on the device, whether losses and norm are, the same on every rank
        """

    def after_evaluation(self) -> None:
        """Release what forwards without a backward have left gathered."""

    def reset_moments(self, steps: int) -> None:
        """Set the moments to zero and the optimizer's count of steps to `steps`.

        Allocates the moments, so that all memory is taken before step 1 and a lack of it is noticed there.
        """

    def load_moments(self, checkpoint: Checkpoint) -> None:
        """Put this rank's shards of a checkpoint's moments in place."""

    def shards(self) -> Iterator[Shard]:
        """This rank's shard of every trained parameter, in the order of the model's parameters."""

    def fill_model(self, read: Read) -> None:
        """Fill all weights that are in no shard: frozen parameters, and under ZeRO the copies that it computes with."""

    def refresh_model(self) -> None:
        """Copy the shards' weights into what the model computes with, after they were changed in place."""

    def extra_slices(self) -> dict[str, FlatSlice]:
        """What a checkpoint holds besides the shards, by name; empty on all ranks but one."""

    def gradient_bytes(self) -> int:
        """Bytes of gradients that this rank holds between the last backward and `finish`."""

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state that this rank holds, ZeRO's float32 weights included."""

    def weight_bytes(self) -> int:
        """Bytes of all weights that this rank computes with, frozen ones included."""
