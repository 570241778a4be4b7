"""The strategies of torch itself: single, ddp, fsdp (FSDP2, full shard) and hsdp (FSDP2, one full copy per node)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainer.engine import adamw_8bit
from trainer.engine.accelerator import shard_by_layers
from trainer.engine.settings import ADAMW_BETAS, COMPUTE_DTYPE, EngineSettings
from trainer.engine.shards import MOMENTS, Read, Shard
from trainer.model.language_model import LanguageModel, materialize
from trainer.plan.plan import Plan
from trainer.run.checkpoint import WEIGHT, Checkpoint, FlatSlice

if TYPE_CHECKING:
    from trainer.engine.quantized_base import QuantizedLinear

# On a CPU, so many squares are summed in float32, and these sums are added in float64; see _squared_norm.
NORM_ROW = 1024


class TorchBackend:
    """Owns the wrapped model and AdamW; see Backend for what the methods promise.

    Trained weights are float32 under every one of these strategies. Forward and backward run in the compute precision:
    under autocast, or for fsdp and hsdp by FSDP2's own policy (trainer/engine/accelerator.py).
    """

    def __init__(self, accelerator: Accelerator, model: LanguageModel, plan: Plan, settings: EngineSettings):
        """The order of the steps is explained in Engine.__init__."""
        self._accelerator = accelerator
        self._sharded = plan.strategy in ("fsdp", "hsdp")
        self._gathers_once, self._reduces_once = plan.layout.gathers_once, plan.layout.reduces_once
        self._max_grad_norm = settings.max_grad_norm
        self._loss_scale = float(plan.world_size)
        self._quantized = _quantize_frozen(model, plan, settings)
        _shrink_frozen(model, plan)
        materialize(model, torch.device("cpu") if self._sharded else accelerator.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._eight_bit = settings.optimizer == "adamw8bit"
        optimizer = (
            adamw_8bit.eight_bit_adamw(trained, settings.weight_decay)
            if self._eight_bit
            else torch.optim.AdamW(trained, lr=0.0, betas=ADAMW_BETAS, weight_decay=settings.weight_decay, fused=True)
        )
        if self._sharded:
            shard_by_layers(accelerator, model)
        self.model: nn.Module
        self.model, self._optimizer = accelerator.prepare(model, optimizer)
        if isinstance(self.model, DistributedDataParallel):
            # The table of positions never changes (see Engine), and DDP would send it at every step. The argument of
            # its constructor is deprecated in torch 2.13, and its successor is not there in 2.8.
            self.model.broadcast_buffers = False
        # What FSDP gathers and reduces at once: each of the decoder's layers, and all that lies outside of them.
        self._units = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        if self._gathers_once:
            for unit in self._units:
                unit.set_reshard_after_forward(False, recurse=False)
        # Taken once, now: between forward and backward an FSDP module's parameters are other tensors, whole ones.
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self._stepped = self._give_optimizer_local_values() if self._sharded else [p for _, p in self._parameters]
        self.reset_moments(0)

    @torch.no_grad()
    def _give_optimizer_local_values(self) -> list[Tensor]:
        """Let AdamW step on plain tensors, which share the memory of this rank's shards, in the parameters' order.

        Of a DTensor every operation costs the host some 20 microseconds more: for the 768 parameters of `large`, fused
        AdamW took 35 ms and collecting the gradients 14 ms, on plain tensors 6 and 2 (2 CPU cores, 2026-11-26).
        """
        local = [parameter.to_local().detach().requires_grad_() for _, parameter in self._parameters]  # type: ignore[attr-defined]
        [group] = self._optimizer.param_groups
        group["params"] = local
        return local

    def reset_moments(self, steps: int) -> None:
        """Set the moments to zero and the count of steps to `steps`; gradients go too."""
        self._drop_gradients()
        if self._eight_bit:
            adamw_8bit.reset(self._optimizer.optimizer, steps)
            return
        for values in self._stepped:
            self._optimizer.state[values] = {
                "step": torch.tensor(float(steps), device=self._accelerator.device),
                **{kind: torch.zeros_like(values) for kind in MOMENTS},
            }

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients; `accumulating` has decided whether they are reduced over the ranks here."""
        self._accelerator.backward(loss * self._loss_scale)

    def around_micro_batches(self) -> AbstractContextManager[None]:
        """Nothing to do: `accumulating` says of each micro-batch what is to be reduced."""
        return nullcontext()

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """DDP reduces gradients over the ranks at the step's last micro-batch only, which saves traffic.

        fsdp and hsdp do what the plan had memory for. Every call sets all of it, so that a step may have any number of
        micro-batches, and after the last one all is sharded.
        """
        if not self._sharded:
            return nullcontext() if last else self._accelerator.no_sync(self.model)
        for unit in self._units:
            unit.set_reshard_after_backward(last or not self._gathers_once, recurse=False)
            unit.set_requires_gradient_sync(last or not self._reduces_once, recurse=False)
            # The line above sets this too. Until the last micro-batch each node has a sum of its own, of shards.
            unit.set_requires_all_reduce(last, recurse=False)
        return nullcontext()

    def after_evaluation(self) -> None:
        """Shard again what FSDP left gathered after a forward, for a backward pass that did not come."""
        for unit in self._units:
            unit.reshard()

    @torch.no_grad()
    def finish(self, learning_rate: float) -> Tensor:
        """See Backend; clipping and the optimizer's step are left to `update`, once the norm is known."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._accelerator.unscale_gradients()
        if self._sharded:
            for values, (_, parameter) in zip(self._stepped, self._parameters, strict=True):
                values.grad = None if parameter.grad is None else parameter.grad.to_local()  # type: ignore[attr-defined]
        square = _squared_norm(self._gradients(), self._accelerator.device)
        _, replica, _ = _position(self._parameters[0][1])
        return square if replica == 0 else torch.zeros_like(square)  # its copies are not counted again

    @torch.no_grad()
    def update(self, norm: Tensor, finite: Tensor) -> None:
        """Clip the gradients to `max_grad_norm` and let AdamW step.

        torch's fused AdamW divides by its attribute `grad_scale` while it reads the gradients, which saves a pass over
        them, and where its attribute `found_inf` is 1 it changes nothing and counts no step. Both were made for loss
        scales and are float32 scalars on the device (torch 2.13, torch/optim/adam.py, _fused_adam).
        """
        # As torch.nn.utils.clip_grad_norm_ has it. Division by 1 changes no gradient.
        divisor = ((norm + 1e-6) / self._max_grad_norm).clamp(min=1)
        if self._eight_bit or self.scales_losses:
            self._update_knowing(divisor.item(), bool(finite.item()))
        else:
            optimizer = self._optimizer.optimizer
            optimizer.grad_scale, optimizer.found_inf = divisor.float(), (~finite).float()
            self._optimizer.step()
            optimizer.grad_scale = optimizer.found_inf = None
        self._drop_gradients()

    def _update_knowing(self, divisor: float, finite: bool) -> None:
        """As `update`, by values on the host: bitsandbytes' AdamW has neither attribute, and fp16's scaler sets both.

        A step whose norm is not finite is handed to that scaler all the same: it has seen the overflow when gradients
        were unscaled, changes nothing, and lowers its scale.
        """
        overflowed = self.scales_losses and not math.isfinite(divisor)
        if finite or overflowed:
            if divisor > 1:
                torch._foreach_div_(self._gradients(), divisor)
            self._optimizer.step()

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        if self._sharded:  # the optimizer knows this rank's values only, not the parameters that FSDP adds to
            for _, parameter in self._parameters:
                parameter.grad = None

    def _gradients(self) -> list[Tensor]:
        """This rank's gradients, flat, without empty ones; from `finish` to the end of `update`."""
        return [values.grad.view(-1) for values in self._stepped if values.grad is not None and values.numel()]

    @property
    def scales_losses(self) -> bool:
        """True under fp16: a step that overflowed is computed again at a lower loss scale, which `update` sets."""
        return self._accelerator.scaler is not None

    def shards(self) -> Iterator[Shard]:
        """This rank's shard of every trained parameter; weights are live views, and so are moments of float32."""
        for values, (name, parameter) in zip(self._stepped, self._parameters, strict=True):
            state = self._optimizer.state[values]
            moments = adamw_8bit.Moments(state) if self._eight_bit else {kind: _local(state[kind]) for kind in MOMENTS}
            start, replica, replicas = _position(parameter)
            yield Shard(
                name=name,
                shape=tuple(parameter.shape),
                start=start,
                weight=_local(values),
                moments=moments,
                replica=replica,
                replicas=replicas,
            )

    @torch.no_grad()
    def fill_model(self, read: Read) -> None:
        """Fill the frozen parameters, which are in no shard. Trained parameters are their shards."""
        if self._quantized:
            from trainer.engine import quantized_base

            quantized_base.fill(self._quantized, read, self._accelerator.device)
        for name, parameter in self._frozen:
            local, (start, _, _) = _local(parameter), _position(parameter)
            if len(local):
                local.copy_(read(WEIGHT + name, start, start + len(local)))

    def load_moments(self, checkpoint: Checkpoint) -> None:
        """Put this rank's shards of a checkpoint's moments in place."""
        stored = frozenset(checkpoint.names()) if self._eight_bit else frozenset()
        for shard, (name, parameter) in zip(self.shards(), self._parameters, strict=True):
            if self._eight_bit:
                adamw_8bit.fill(name, self._optimizer.state[parameter], checkpoint.read, stored)
            else:
                shard.fill([f"{kind}/{name}" for kind in MOMENTS], checkpoint.read)

    def extra_slices(self) -> dict[str, FlatSlice]:
        """With 8-bit moments, the scales of their blocks, from rank 0; all ranks have the same."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        if not (self._eight_bit and first):
            return {}
        states = {name: self._optimizer.state[parameter] for name, parameter in self._parameters}
        return {key: piece for name, state in states.items() for key, piece in adamw_8bit.scales(name, state).items()}

    def refresh_model(self) -> None:
        """Nothing to do: the model computes with the shards' own memory."""

    def gradient_bytes(self) -> int:
        """Bytes of gradients that this rank holds between the last backward and `update`.

        Whole ones, which `reduces_once` keeps until then, are reduced to shards by the last backward.
        """
        held = [parameter.grad for _, parameter in self._parameters if parameter.grad is not None]
        return sum(_local(gradient).numel() * gradient.element_size() for gradient in held)

    def optimizer_bytes(self) -> int:
        """Bytes of moments that this rank holds."""
        states = [self._optimizer.state[values] for values in self._stepped]
        others = ("step", "qmap1", "qmap2")  # bitsandbytes' tables exist once for all parameters
        held = [_local(value) for state in states for key, value in state.items() if key not in others]
        return sum(values.numel() * values.element_size() for values in held)

    def weight_bytes(self) -> int:
        """Bytes of all weights that this rank holds, frozen ones included."""
        held = [parameter for _, parameter in (*self._parameters, *self._frozen)]
        codes = sum(layer.held_bytes() for layer in self._quantized.values())
        return codes + sum(_local(parameter).numel() * parameter.element_size() for parameter in held)


def _quantize_frozen(model: LanguageModel, plan: Plan, settings: EngineSettings) -> dict[str, QuantizedLinear]:
    """Replace the model's frozen linear layers as --base_bits says; returns the new ones by their weights' names."""
    if settings.base_bits is None:
        return {}
    from trainer.engine import quantized_base  # bitsandbytes takes seconds, and is an optional dependency

    return quantized_base.quantize_layers(model, bits=settings.base_bits, dtype=COMPUTE_DTYPE[plan.mixed_precision])


def _shrink_frozen(model: LanguageModel, plan: Plan) -> None:
    """Hold frozen linear layers in the compute precision. Autocast would cast them at every use, to equal numbers."""
    if plan.mixed_precision == "no":
        return
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(COMPUTE_DTYPE[plan.mixed_precision])


def _squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of flat float32 gradients, as a float64 scalar on `device`.

    Do not sum in float32 alone: the norm of a few million values is then off by some 1e-6, and differently for every
    way of sharding (measured on a CPU, 2026-11-22: 4e-6 and more), so that strategies would disagree. A GPU sums in
    float64 while it reads, all gradients in a few kernels. A CPU would first make a float64 copy of them; so there
    short rows are summed in float32, and the rows' sums in float64. That is off by 1e-8, in a twentieth of the copy's
    time.
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
    """The values of `tensor` that this rank holds, flat, as a live view."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def _position(parameter: Tensor) -> tuple[int, int, int]:
    """The index in the flattened parameter at which this rank's values start; which replica they are, and of how many.

    FSDP2 cuts the first dimension into blocks of rows as torch.chunk does: all of the same size, the last ones shorter
    or empty. hsdp's mesh has two dimensions, replicas first.
    """
    if not isinstance(parameter, DTensor):
        group = dist.is_initialized()
        return 0, dist.get_rank() if group else 0, dist.get_world_size() if group else 1
    mesh = parameter.device_mesh
    shard_dim = mesh.ndim - 1
    shards, shard = mesh.size(shard_dim), mesh.get_local_rank(shard_dim)
    rows_each = -(-parameter.shape[0] // shards)
    start = min(shard * rows_each, parameter.shape[0]) * (parameter.numel() // parameter.shape[0])
    replicas = mesh.size(0) if mesh.ndim == 2 else 1
    return start, mesh.get_local_rank(0) if mesh.ndim == 2 else 0, replicas
