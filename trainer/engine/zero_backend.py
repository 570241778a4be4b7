"""ZeRO-2 and ZeRO-3 by DeepSpeed: float32 masters in flat partitions, computed in float32 or in its own bf16 mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trainer.engine.settings import EngineSettings
from trainer.engine.shards import MOMENTS, Read, Share
from trainer.model.language_model import LanguageModel, materialize
from trainer.plan.plan import Plan
from trainer.run.checkpoint import WEIGHT, Checkpoint, FlatSlice


class ZeroBackend:
    """Owns DeepSpeed's engine, which averages over ranks, clips, and steps by itself once told the last micro-batch."""

    scales_losses = False

    def __init__(self, accelerator: Accelerator, model: LanguageModel, plan: Plan, settings: EngineSettings):
        self._stage = 2 if plan.strategy == "zero2" else 3
        self._rank, self._world_size = accelerator.process_index, plan.world_size
        self._device = accelerator.device
        self.loss_scale = float(plan.world_size)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        materialize(model, accelerator.device if self._stage == 2 else torch.device("cpu"))
        table = model.decoder.model.decoder.embed_positions.weights
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=0.0,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=not plan.offload_optimizer,
        )
        accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = settings.max_grad_norm
        self._engine: Any
        self._engine, _ = accelerator.prepare(model, optimizer)
        self.model = self._engine
        # DeepSpeed hangs attributes of its own on them (ds_tensor, _hp_mapping).
        self._parameters: list[tuple[str, Any]] = list(model.named_parameters())
        self._zero = self._engine.optimizer
        if plan.mixed_precision == "bf16":
            _add_positions_in_float32(model, table.to(self._device))
        self.reset_moments(0)

    def reset_moments(self, steps: int) -> None:
        """Moments of zero after `steps` optimizer steps, allocated now, so that memory is known before step 1."""
        for flat in self._flats():
            self._zero.optimizer.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Nothing to do: the boundary is told to DeepSpeed in `backward`."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients, reduced into the partitions."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.loss_scale, scale_wrt_gas=False)

    def evaluated(self) -> None:
        """Nothing to do: DeepSpeed's hooks release what a forward gathered."""

    def finish(self, learning_rate: float) -> Tensor:
        """Clip and step; returns the norm before clipping. A norm that is not finite changes nothing."""
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return torch.as_tensor(float(self._engine.get_global_grad_norm()), device=self._device)

    def update(self, norm: float) -> None:
        """Nothing to do: DeepSpeed has stepped in `finish`, unless it saw an overflow."""

    def shares(self) -> Iterator[Share]:
        """This rank's share of every trained parameter, in the model's order."""
        place = self._place_in_stage2 if self._stage == 2 else self._place_in_stage3
        for name, parameter in self._parameters:
            if not parameter.requires_grad:
                continue
            start, flat, offset, length = place(parameter, self._shapes[name])
            state = self._zero.optimizer.state[flat]
            yield Share(
                name=name,
                shape=self._shapes[name],
                start=start,
                weight=flat.data[offset : offset + length],
                moments={kind: state[kind][offset : offset + length] for kind in MOMENTS},
            )

    @torch.no_grad()
    def publish(self, read: Read) -> None:
        """Give the computing copies the masters' values: whole parameters under ZeRO-2, slices under ZeRO-3.

        Frozen parameters have no master, and get theirs here.
        """
        for name, parameter in self._parameters:
            numel = torch.Size(self._shapes[name]).numel()
            if self._stage == 2:
                parameter.copy_(read(WEIGHT + name, 0, numel).view(self._shapes[name]))
            else:
                size = parameter.ds_tensor.numel()
                start, stop = min(self._rank * size, numel), min((self._rank + 1) * size, numel)
                if stop > start:
                    parameter.ds_tensor.view(-1)[: stop - start].copy_(read(WEIGHT + name, start, stop))

    def load_moments(self, checkpoint: Checkpoint) -> None:
        """Put this rank's share of a checkpoint's moments in place."""
        for share in self.shares():
            share.fill([f"{kind}/{share.name}" for kind in MOMENTS], checkpoint.read)

    def extras(self) -> dict[str, FlatSlice]:
        """Nothing is saved besides the shares."""
        return {}

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the computing copies the masters' values, which were changed in place."""
        if self._stage == 2:
            self._zero.update_lp_params()
            return
        for (_, parameter), share in zip(self._parameters, self.shares(), strict=True):
            parameter.ds_tensor.view(-1)[: len(share.weight)].copy_(share.weight)

    def weight_bytes(self) -> int:
        """Bytes of the computing copies."""
        held = [p.ds_tensor if self._stage == 3 else p for _, p in self._parameters]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def gradient_bytes(self) -> int:
        """Bytes of partitioned gradients, between backward and step."""
        groups = [group for group in self._zero.averaged_gradients.values() if group]
        return sum(part.numel() * part.element_size() for group in groups for part in group)

    def optimizer_bytes(self) -> int:
        """Bytes of float32 masters and moments that this rank holds."""
        return sum(flat.numel() * flat.element_size() * (1 + len(MOMENTS)) for flat in self._flats())

    def _flats(self) -> list[Tensor]:
        zero = self._zero
        return zero.single_partition_of_fp32_groups if self._stage == 2 else zero.fp32_partitioned_groups_flat

    def _place_in_stage2(self, parameter: Any, shape: tuple[int, ...]) -> tuple[int, Tensor, int, int]:
        mapping = parameter._hp_mapping
        if mapping is None:  # it lies in other ranks' partitions
            return 0, self._flats()[0], 0, 0
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return here.start, self._flats()[mapping.param_group_index], there.start, there.numel

    def _place_in_stage3(self, parameter: Any, shape: tuple[int, ...]) -> tuple[int, Tensor, int, int]:
        group, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
        numel = torch.Size(shape).numel()
        start = min(self._rank * padded, numel)
        return start, self._flats()[group], offset, min((self._rank + 1) * padded, numel) - start


def _add_positions_in_float32(model: LanguageModel, table: Tensor) -> None:
    """Keep the sinusoids in float32 beside bf16 weights, and cast their sum with the embeddings.

    DeepSpeed casts buffers too, which costs positions up to 2e-3; a float32 table alone would promote every
    hidden state.
    """
    decoder = model.decoder.model.decoder
    decoder.embed_positions.register_buffer("weights", table, persistent=False)
    decoder.layers[0].register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(torch.bfloat16), *inputs[1:]))
    model.register_forward_pre_hook(_cast_text, with_kwargs=True)


def _cast_text(model: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    cast = [x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    return tuple(cast), named


