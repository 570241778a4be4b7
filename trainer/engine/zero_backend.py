"""zero2 and zero3 by DeepSpeed.

DeepSpeed keeps the trained weights twice: float32 masters, flattened and cut into one partition per rank, which the
optimizer changes; and the copies that the model computes with, in float32 or bf16, whole (stage 2) or cut (stage 3).

Warning for a new version of DeepSpeed: it has no public interface for parts of this. Tested with the versions in
constraints.txt are its attributes _hp_mapping, ds_tensor, single_partition_of_fp32_groups,
fp32_partitioned_groups_flat, grad_position, averaged_gradients, the methods update_lp_params and
set_gradient_accumulation_boundary, and that stage 2 takes gradients of another dtype than their parameters. tests/ranks
notices wrong numbers and counts of bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trainer.engine.settings import ADAMW_BETAS, EngineSettings
from trainer.engine.shards import MOMENTS, Read, Shard
from trainer.model.language_model import LanguageModel, materialize
from trainer.plan.plan import Plan
from trainer.run.checkpoint import WEIGHT, Checkpoint, FlatSlice


class ZeroBackend:
    """Owns DeepSpeed's engine; see Backend for what the methods promise."""

    scales_losses = False  # the plan refuses fp16 under the sharded strategies

    def __init__(self, accelerator: Accelerator, model: LanguageModel, plan: Plan, settings: EngineSettings):
        """The order of the steps is explained in Engine.__init__."""
        self._stage = 2 if plan.strategy == "zero2" else 3
        self._rank, self._world_size = accelerator.process_index, plan.world_size
        self._device = accelerator.device
        self._loss_scale = float(plan.world_size)
        self._threads = _threads_of_step(plan)
        self._reduces_once = plan.layout.reduces_once
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        materialize(model, accelerator.device if self._stage == 2 else torch.device("cpu"))
        table = model.decoder.model.decoder.embed_positions.weights
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=0.0,
            betas=ADAMW_BETAS,
            weight_decay=settings.weight_decay,
            fused=True,  # in host memory too, for --offload_optimizer: a ninth of the time (docs/benchmarks.md)
        )
        self._engine: Any
        self._engine, _ = accelerator.prepare(model, optimizer)
        self.model = self._engine
        # Any, because DeepSpeed adds attributes of its own to parameters (ds_tensor, _hp_mapping).
        self._parameters: list[tuple[str, Any]] = list(model.named_parameters())
        self._zero = self._engine.optimizer
        if plan.mixed_precision == "bf16":
            _add_positions_in_float32(model, table.to(self._device))
        if self._reduces_once:
            for _, parameter in self._parameters:
                # What micro-batches add up here is added in float32, as DeepSpeed adds what it has reduced. In bf16 the
                # error of a gradient would grow with their number: 1.2 times as large with 8, 2.4 times with 32.
                parameter.grad_dtype = torch.float32
        self.reset_moments(0)

    def reset_moments(self, steps: int) -> None:
        """Set the moments to zero and the count of steps to `steps`."""
        for flat in self._flats():
            self._zero.optimizer.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }

    @contextmanager
    def around_micro_batches(self) -> Iterator[None]:
        """Where gradients are reduced once for a step, DeepSpeed's block, whose end reduces what they have left whole.

        It reduces after errors too, and would wait for ranks that met none, so that this one would not say why it ends.
        What has no gradient is not sent.
        """
        if not self._reduces_once:
            yield
            return
        with self._engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                self._zero.zero_grad()
                raise
        # The block puts back what was said before it: without this line DeepSpeed would not step, and have no norm.
        self._engine.set_gradient_accumulation_boundary(True)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Nothing to do: `backward` tells DeepSpeed which micro-batch is the last."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients, reduced into the partitions.

        Not by accelerator.backward, inside which DeepSpeed would step by itself. Here we tell it which micro-batch is
        the last, and `finish` sets the learning rate and steps: so a short last step may have fewer micro-batches than
        DeepSpeed was configured for, the rate is that of the step, and the norm is read before the next step begins.
        scale_wrt_gas=False because the loss is a sum over the micro-batches: it must not be divided by their number.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._loss_scale, scale_wrt_gas=False)

    def after_evaluation(self) -> None:
        """Nothing to do: DeepSpeed's hooks release what a forward gathered."""

    def finish(self, learning_rate: float) -> Tensor:
        """Clip and step; see Backend for what is returned. DeepSpeed skips a step whose norm is not finite.

        It reads the norm itself before it steps, and waits for the device to do so. All ranks have the same norm, which
        is in the first one's part.
        """
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        with _threads(self._threads):
            self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        square = norm * norm if self._rank == 0 else 0.0
        return torch.full((), square, dtype=torch.float64, device=self._device)

    def update(self, norm: Tensor, finite: Tensor) -> None:
        """Nothing to do: DeepSpeed has stepped in `finish`."""

    def shards(self) -> Iterator[Shard]:
        """This rank's shard of every trained parameter: live views of the float32 masters and moments."""
        find = self._find_in_stage2 if self._stage == 2 else self._find_in_stage3
        for name, parameter in self._parameters:
            if not parameter.requires_grad:
                continue
            start, flat, offset, length = find(parameter, self._shapes[name])
            state = self._zero.optimizer.state[flat]
            yield Shard(
                name=name,
                shape=self._shapes[name],
                start=start,
                weight=flat.data[offset : offset + length],
                moments={kind: state[kind][offset : offset + length] for kind in MOMENTS},
            )

    @torch.no_grad()
    def fill_model(self, read: Read) -> None:
        """Fill the copies that the model computes with: whole parameters under ZeRO-2, this rank's cut under ZeRO-3.

        The copies of frozen parameters too, which have no master.
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
        """Put this rank's shards of a checkpoint's moments in place."""
        for shard in self.shards():
            shard.fill([f"{kind}/{shard.name}" for kind in MOMENTS], checkpoint.read)

    def extra_slices(self) -> dict[str, FlatSlice]:
        """Nothing is saved besides the shards."""
        return {}

    @torch.no_grad()
    def refresh_model(self) -> None:
        """Copy the masters into what the model computes with; a collective under ZeRO-2."""
        if self._stage == 2:
            self._zero.update_lp_params()
            return
        trained = (parameter for _, parameter in self._parameters if parameter.requires_grad)
        for parameter, shard in zip(trained, self.shards(), strict=True):
            parameter.ds_tensor.view(-1)[: len(shard.weight)].copy_(shard.weight)

    def weight_bytes(self) -> int:
        """Bytes of the copies that the model computes with."""
        held = [p.ds_tensor if self._stage == 3 else p for _, p in self._parameters]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def gradient_bytes(self) -> int:
        """Bytes of this rank's partitions of the gradients, between the last backward and `finish`."""
        groups = [group for group in self._zero.averaged_gradients.values() if group]
        return sum(part.numel() * part.element_size() for group in groups for part in group)

    def optimizer_bytes(self) -> int:
        """Bytes of float32 masters and moments that this rank holds."""
        return sum(flat.numel() * flat.element_size() * (1 + len(MOMENTS)) for flat in self._flats())

    def _flats(self) -> list[Tensor]:
        """This rank's flat float32 masters, one per group of parameters."""
        zero = self._zero
        return zero.single_partition_of_fp32_groups if self._stage == 2 else zero.fp32_partitioned_groups_flat

    def _find_in_stage2(self, parameter: Any, shape: tuple[int, ...]) -> tuple[int, Tensor, int, int]:
        """Where this rank's part of a parameter lies: (start, flat, offset, length).

        Values [start, start + length) of the flattened parameter are values [offset, offset + length) of `flat`.
        """
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it lies in other ranks' partitions
            return 0, self._flats()[0], 0, 0
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return here.start, self._flats()[mapping.param_group_index], there.start, there.numel

    def _find_in_stage3(self, parameter: Any, shape: tuple[int, ...]) -> tuple[int, Tensor, int, int]:
        """As _find_in_stage2. ZeRO-3 cuts every parameter by itself into equal parts, the last one padded."""
        group, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
        numel = torch.Size(shape).numel()
        start = min(self._rank * padded, numel)
        return start, self._flats()[group], offset, min((self._rank + 1) * padded, numel) - start


def _threads_of_step(plan: Plan) -> int:
    """How many threads an optimizer step takes that is computed in host memory: this process's share of the cores.

    torchrun and accelerate set OMP_NUM_THREADS=1 for processes that compute on GPUs, and AdamW on a share of `large`
    would take seconds. Another number of threads than 1 was asked for by somebody, and stays.
    """
    given = torch.get_num_threads()
    if not plan.offload_optimizer or given > 1:
        return given
    return max(1, len(os.sched_getaffinity(0)) // (plan.world_size // plan.nodes))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside the block torch computes on the CPU with so many threads.

    Not for the whole run: on a CPU, sums of the forward and backward pass would be rounded otherwise. What a step
    computes of its own values, each by itself, is the same with any number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _add_positions_in_float32(model: LanguageModel, table: Tensor) -> None:
    """Keep the table of sinusoidal positions in float32 beside bf16 weights.

    In its bf16 mode DeepSpeed casts buffers too, which moves positions by up to 2e-3. A float32 table alone would make
    every hidden state float32; so the sum of embeddings and positions is cast where the first layer receives it, and
    the text states, which are float32 as well, where the model receives them.

    table  (positions, D) float32 on the model's device
    """
    decoder = model.decoder.model.decoder
    decoder.embed_positions.register_buffer("weights", table, persistent=False)
    decoder.layers[0].register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(torch.bfloat16), *inputs[1:]))
    model.register_forward_pre_hook(_cast_text, with_kwargs=True)


def _cast_text(model: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook before the model's forward: its floating-point inputs in bf16."""
    cast = [x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    return tuple(cast), named
