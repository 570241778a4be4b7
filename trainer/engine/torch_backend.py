"""Strategies by torch alone: one process, DDP, FSDP2 full shard and hybrid shard; float32 weights everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.engine import adamw_8bit
from trainer.engine.settings import EngineSettings
from trainer.engine.shards import MOMENTS, Read, Share
from trainer.model.language_model import LanguageModel, materialize
from trainer.plan.plan import Plan
from trainer.run.checkpoint import WEIGHT, Checkpoint, FlatSlice

if TYPE_CHECKING:
    from trainer.engine.quantized_base import QuantizedLinear

COMPUTE = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Values whose squares are summed in float32 before the sums are added in float64.
NORM_ROW = 1024


class TorchBackend:
    """Owns the wrapped model and AdamW. Gradients are averaged over ranks, so the loss is scaled by their number."""

    def __init__(self, accelerator: Accelerator, model: LanguageModel, plan: Plan, settings: EngineSettings):
        self._accelerator = accelerator
        self._sharded = plan.strategy in ("fsdp", "hsdp")
        self._replicas = plan.nodes if plan.strategy == "hsdp" else 1
        self._max_grad_norm = settings.max_grad_norm
        self.loss_scale = float(plan.world_size)
        self._quantized = _quantized(model, plan, settings)
        _shrink_frozen(model, plan)
        materialize(model, torch.device("cpu") if self._sharded else accelerator.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._eight_bit = settings.optimizer == "adamw8bit"
        optimizer = (
            adamw_8bit.eight_bit_adamw(trained, settings.weight_decay)
            if self._eight_bit
            else torch.optim.AdamW(
                trained, lr=0.0, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
            )
        )
        self.model: nn.Module
        self.model, self._optimizer = accelerator.prepare(model, optimizer)
        # Taken once: between an FSDP module's forward and backward its parameters are others, whole ones.
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self.reset_moments(0)

    def reset_moments(self, steps: int) -> None:
        """Moments of zero after `steps` optimizer steps, allocated now, so that memory is known before step 1."""
        self._optimizer.zero_grad(set_to_none=True)
        if self._eight_bit:
            adamw_8bit.reset(self._optimizer.optimizer, steps)
            return
        for _, parameter in self._parameters:
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(steps), device=self._accelerator.device),
                **{kind: torch.zeros_like(parameter) for kind in MOMENTS},
            }

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients. Sharded gradients are reduced at once, so that they stay sharded."""
        self._accelerator.backward(loss * self.loss_scale)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: DDP sums over ranks at the last one only."""
        return nullcontext() if last or self._sharded else self._accelerator.no_sync(self.model)

    def evaluated(self) -> None:
        """Shard again what a forward without a backward left whole."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def finish(self, learning_rate: float) -> Tensor:
        """The gradients' norm. They are clipped and the weights changed in `update`, once the norm is seen."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._accelerator.unscale_gradients()
        square = _squared_norm(self._gradients(), self._accelerator.device)
        if self._sharded:
            dist.all_reduce(square)
            square /= self._replicas
        return square.sqrt()

    @torch.no_grad()
    def update(self, norm: float) -> None:
        """Step with gradients scaled to `max_grad_norm` where their norm is above it."""
        divisor = (norm + 1e-6) / self._max_grad_norm  # torch.nn.utils.clip_grad_norm_
        if divisor > 1:
            self._divide(divisor)
        self._optimizer.step()
        self._optimizer.optimizer.grad_scale = None
        self._optimizer.zero_grad(set_to_none=True)

    def _divide(self, divisor: float) -> None:
        """Divide the gradients: in AdamW's own pass over them, where that is fused and its divisor is free."""
        if self._eight_bit or self._sharded or self.scales_losses:
            torch._foreach_div_(self._gradients(), divisor)
        else:
            self._optimizer.optimizer.grad_scale = torch.full((), divisor, device=self._accelerator.device)

    def _gradients(self) -> list[Tensor]:
        """The values of this rank's gradients, flat."""
        gradients = (_local(p.grad) for _, p in self._parameters if p.grad is not None)
        return [gradient for gradient in gradients if len(gradient)]

    @property
    def scales_losses(self) -> bool:
        """fp16: a step that overflowed is repeated at a lower scale, which `update` sets."""
        return self._accelerator.scaler is not None

    def shares(self) -> Iterator[Share]:
        """This rank's share of every trained parameter, in the model's order."""
        for name, parameter in self._parameters:
            state = self._optimizer.state[parameter]
            moments = adamw_8bit.moments(state) if self._eight_bit else {kind: _local(state[kind]) for kind in MOMENTS}
            start, replica, replicas = _place(parameter)
            yield Share(
                name=name,
                shape=tuple(parameter.shape),
                start=start,
                weight=_local(parameter),
                moments=moments,
                replica=replica,
                replicas=replicas,
            )

    @torch.no_grad()
    def publish(self, read: Read) -> None:
        """Fill what no share holds, the frozen parameters; the trained ones are their shares."""
        if self._quantized:
            from trainer.engine import quantized_base

            quantized_base.fill(self._quantized, read, self._accelerator.device)
        for name, parameter in self._frozen:
            local, (start, _, _) = _local(parameter), _place(parameter)
            if len(local):
                local.copy_(read(WEIGHT + name, start, start + len(local)))

    def load_moments(self, checkpoint: Checkpoint) -> None:
        """Put this rank's share of a checkpoint's moments in place."""
        stored = frozenset(checkpoint.names()) if self._eight_bit else frozenset()
        for share, (name, parameter) in zip(self.shares(), self._parameters, strict=True):
            if self._eight_bit:
                adamw_8bit.fill(name, self._optimizer.state[parameter], checkpoint.read, stored)
            else:
                share.fill([f"{kind}/{name}" for kind in MOMENTS], checkpoint.read)

    def extras(self) -> dict[str, FlatSlice]:
        """What a checkpoint holds besides the shares, saved by one rank."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        if not (self._eight_bit and first):
            return {}
        states = {name: self._optimizer.state[parameter] for name, parameter in self._parameters}
        return {key: piece for name, state in states.items() for key, piece in adamw_8bit.scales(name, state).items()}

    def refresh(self) -> None:
        """Nothing to do: the float32 shares are the weights."""

    def gradient_bytes(self) -> int:
        """Bytes of gradients that this rank holds."""
        held = [parameter.grad for _, parameter in self._parameters if parameter.grad is not None]
        return sum(_local(gradient).numel() * gradient.element_size() for gradient in held)

    def optimizer_bytes(self) -> int:
        """Bytes of moments that this rank holds."""
        states = [self._optimizer.state[parameter] for _, parameter in self._parameters]
        others = ("step", "qmap1", "qmap2")  # tables that all parameters share
        held = [_local(value) for state in states for key, value in state.items() if key not in others]
        return sum(values.numel() * values.element_size() for values in held)

    def weight_bytes(self) -> int:
        """Bytes of all weights that this rank holds, frozen ones included."""
        held = [parameter for _, parameter in (*self._parameters, *self._frozen)]
        codes = sum(layer.held_bytes() for layer in self._quantized.values())
        return codes + sum(_local(parameter).numel() * parameter.element_size() for parameter in held)


def _quantized(model: LanguageModel, plan: Plan, settings: EngineSettings) -> dict[str, QuantizedLinear]:
    """The frozen linear layers that --base_bits replaced in the model, by their weights' names; none without it."""
    if settings.base_bits is None:
        return {}
    from trainer.engine import quantized_base  # bitsandbytes takes seconds, and is an optional dependency

    return quantized_base.quantize_layers(model, bits=settings.base_bits, dtype=COMPUTE[plan.mixed_precision])


def _shrink_frozen(model: LanguageModel, plan: Plan) -> None:
    """Hold frozen linear layers in the compute precision, in which they are used anyway: the same numbers."""
    if plan.mixed_precision == "no":
        return
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(COMPUTE[plan.mixed_precision])


def _squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of flat float32 gradients, as a float64 scalar.

    Summed in float32 alone the norm of a few million values is off by some 1e-6, differently for every way of sharding
    (measured on a CPU, 2026-11-22: 4e-6 and more). A GPU sums in float64 as it reads, all gradients in a few kernels.
    A CPU would make a float64 copy of them first: there float32 sums of short rows are added in float64 (1e-8, in a
    twentieth of the copy's time).
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cuda":
        return torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum()
    return torch.stack([_squared_norm_by_rows(gradient) for gradient in gradients]).sum()


def _squared_norm_by_rows(values: Tensor) -> Tensor:
    rows = len(values) // NORM_ROW
    norms = torch.linalg.vector_norm(values[: rows * NORM_ROW].view(rows, NORM_ROW), dim=1)
    rest = torch.linalg.vector_norm(values[rows * NORM_ROW :])
    return norms.double().square().sum() + rest.double().square()


def _local(tensor: Tensor) -> Tensor:
    """The flat values that this rank holds, as a view."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def _place(parameter: Tensor) -> tuple[int, int, int]:
    """Where the local values start in the flattened parameter, and which replica of how many they are."""
    if not isinstance(parameter, DTensor):
        group = dist.is_initialized()
        return 0, dist.get_rank() if group else 0, dist.get_world_size() if group else 1
    mesh = parameter.device_mesh
    shard_dim = mesh.ndim - 1
    shards, shard = mesh.size(shard_dim), mesh.get_local_rank(shard_dim)
    rows_each = -(-parameter.shape[0] // shards)  # torch.chunk's blocks of rows
    start = min(shard * rows_each, parameter.shape[0]) * (parameter.numel() // parameter.shape[0])
    replicas = mesh.size(0) if mesh.ndim == 2 else 1
    return start, mesh.get_local_rank(0) if mesh.ndim == 2 else 0, replicas
