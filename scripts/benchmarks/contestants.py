"""Who does the work: our step, the plain decoder, and the systems that users would take instead."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.random_models import random_decoder, random_model, random_source
from benchmarks.turns import Turn
from benchmarks.work import CODES, Work
from trainer.data.batches import Batch
from trainer.spec.shapes import CHROMA_BINS

LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-5, (0.9, 0.95), 1e-5, 1.0
MELODY, TEXT = "self_wav", "description"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(name: str, work: Work, turn: Turn) -> None:
    """Do `work` as the contestant `name` does it: one step at each turn, until there are no more turns."""
    {"step": _step, "bare": _bare, "seq2seq": _seq2seq, "audiocraft": _audiocraft}[name](work, turn)


def _step(work: Work, turn: Turn) -> None:
    """Ours: trainer/engine, with clipping, the checks and the one host read of every step."""
    from trainer.engine import Engine, Ranks, build_accelerator, find_cluster
    from trainer.flags.config import Config
    from trainer.model.source import quiet_libraries
    from trainer.plan.launcher import Launch
    from trainer.wiring import engine_settings

    quiet_libraries()
    settings = engine_settings(Config(dataset_path="unused"))
    plan = work.plan(gpu_memory_bytes=find_cluster(Launch()).gpu_memory_bytes)
    accelerator = build_accelerator(plan, settings, Path("."))
    with Ranks(timeout_seconds=3600) as ranks:
        engine = Engine(accelerator, ranks, random_source(work.model, work.layers), plan, settings)
        batch = work.batch()
        step = 0
        while turn.begins():
            engine.step([batch] * work.accumulation, work.cells, step=step, learning_rate=LEARNING_RATE)
            turn.ends()
            step += 1


def _bare(work: Work, turn: Turn) -> None:
    """transformers' decoder, forward, backward and fused AdamW, and nothing else: the floor."""
    torch.manual_seed(0)
    with turn.device:
        decoder, projections = random_decoder(work.model, work.layers), _projections(work)
    model = nn.ModuleList([decoder, projections]).train()
    if work.gradient_checkpointing is True:
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = _adamw(model)
    scaler = torch.amp.GradScaler(turn.device.type, enabled=work.precision == "fp16")
    batch = work.batch().to(turn.device)
    while turn.begins():
        for _ in range(work.accumulation):
            with _autocast(work, turn):
                logits = decoder(
                    input_ids=batch.inputs_BKT.flatten(0, 1),
                    encoder_hidden_states=torch.cat(list(_conditions(projections, batch).values()), dim=1),
                    use_cache=False,
                ).logits.unflatten(0, batch.inputs_BKT.shape[:2])
                # A melody model's places before the codes have logits too.
                loss = _mean_loss(logits[:, :, -work.frames :], batch.labels_BKT) / work.accumulation
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        turn.ends()


def _seq2seq(work: Work, turn: Turn) -> None:
    """transformers' Seq2SeqTrainer on the whole model, as musicgen-dreamboothing sets it up: codes made before,
    the frozen T5 in every step with its attention mask, Trainer's clipping and schedule."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    from trainer.model.source import quiet_libraries

    quiet_libraries()
    with turn.device:
        model = random_model(work.model, work.layers).train()
    model.freeze_text_encoder()
    model.freeze_audio_encoder()
    labels_BTK = work.batch().labels_BKT.transpose(1, 2)
    caption = torch.randint(3, model.config.text_encoder.vocab_size, (work.text_tokens,))
    example = {"labels": labels_BTK[0], "input_ids": caption, "attention_mask": torch.ones_like(caption)}

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Trainer asks only after a step: the last one is not timed.
            control.should_training_stop = not turn.begins()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not control.should_training_stop:
                turn.ends()

    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=work.accumulation,
            max_steps=1_000_000,
            learning_rate=LEARNING_RATE,
            bf16=work.precision == "bf16",
            fp16=work.precision == "fp16",
            gradient_checkpointing=work.gradient_checkpointing is True,
            remove_unused_columns=False,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=turn.device.type == "cpu",
        )
        Seq2SeqTrainer(
            model=model,
            args=arguments,
            train_dataset=[example] * (64 * work.clips),  # type: ignore[arg-type]
            data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
            callbacks=[Turns()],
        ).train()


def _audiocraft(work: Work, turn: Turn) -> None:
    """audiocraft's own LMModel, the solver's cross entropy, clipping and AdamW, in its own precision settings.

    Its text conditioner is given states, as ours is: no T5 in the step.
    """
    from benchmarks.audiocraft_stub import import_audiocraft  # it pins a torch that is not this one

    import_audiocraft()
    from audiocraft.models.lm import LMModel
    from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
    from audiocraft.modules.conditioners import ConditionFuser, ConditioningProvider
    from audiocraft.solvers.musicgen import MusicGenSolver

    shape = work.shape
    torch.manual_seed(0)
    fused: dict[str, list[str]] = {"cross": [], "sum": [], "prepend": [], "input_interpolate": []}
    fused["prepend" if shape.melody else "cross"] = [MELODY, TEXT] if shape.melody else [TEXT]
    model = LMModel(
        DelayedPatternProvider(shape.codebooks, [k // shape.audio_channels for k in range(shape.codebooks)]),
        ConditioningProvider({}),
        ConditionFuser(fused),
        n_q=shape.codebooks,
        card=CODES,
        dim=shape.width,
        num_heads=shape.heads,
        num_layers=shape.layers,
        hidden_scale=shape.ffn // shape.width,
        norm_first=True,
        bias_proj=False,
        bias_ff=False,
        bias_attn=False,
        causal=True,
        custom=False,
        memory_efficient=True,
        cross_attention=shape.cross_attention,
        activation="gelu",
        checkpointing="torch" if work.gradient_checkpointing else "none",
    )
    projections = _projections(work)  # what its conditioners end with
    both = nn.ModuleList([model, projections]).to(turn.device).train()
    optimizer = torch.optim.AdamW(both.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    batch = work.batch().to(turn.device)
    codes_BKT = batch.labels_BKT.clamp(min=0)
    while turn.begins():
        for _ in range(work.accumulation):
            with _autocast(work, turn):
                states = _conditions(projections, batch)
                # Each is put before what is there already, so the text first.
                condition = {name: (states[name], torch.ones_like(states[name][..., 0])) for name in reversed(states)}
                output = model.compute_predictions(codes_BKT, [], condition)
                solver = MusicGenSolver._compute_cross_entropy
                loss, _ = solver(cast(Any, None), output.logits.float(), codes_BKT, output.mask)
            (loss / work.accumulation).backward()
        nn.utils.clip_grad_norm_(both.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        turn.ends()


def _projections(work: Work) -> nn.ModuleDict:
    """Those of a model's conditions, by the names that audiocraft gives the conditions."""
    inputs = {MELODY: work.shape.chroma_bins, TEXT: work.shape.text_width}
    return nn.ModuleDict({name: nn.Linear(size, work.shape.width) for name, size in inputs.items() if size})


def _conditions(projections: nn.ModuleDict, batch: Batch) -> dict[str, Tensor]:
    """The projected conditions (B, places, D), in the order in which a melody model reads them."""
    found = {}
    if batch.melody_BC is not None:
        notes = functional.one_hot(batch.melody_BC, CHROMA_BINS).to(batch.text_BSD.dtype)
        found[MELODY] = projections[MELODY](notes)
    return found | {TEXT: projections[TEXT](batch.text_BSD)}


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def _autocast(work: Work, turn: Turn) -> torch.autocast:
    return torch.autocast(turn.device.type, AUTOCAST.get(work.precision), enabled=work.precision != "no")


def _mean_loss(logits_BKTV: Tensor, labels_BKT: Tensor) -> Tensor:
    pairs = zip(logits_BKTV.unbind(1), labels_BKT.unbind(1), strict=True)
    losses = [functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) for logits, labels in pairs]
    return torch.stack(losses).mean()
