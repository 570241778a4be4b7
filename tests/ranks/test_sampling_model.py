"""The model that sounds are made with: its weights are those of an export, and training does not notice it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks.cases import steps
from tests.ranks.harness import run_ranks
from tests.runs import assert_bit_equal
from trainer.engine import Engine
from trainer.errors import MemoryShortError, ModelError, StorageError
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.new_word import embedding_of, with_embedding
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import load_text_encoder, open_model
from trainer.model.trained_model import merged
from trainer.run.checkpoint import Checkpoint, newest
from trainer.spec.trainable import Placeholder, selection_of_flags

STEPS = 3
WORD = Placeholder(word="<my-style>", vectors=4)
FREEZE, LORA = {"freeze": "embeddings,layers.0"}, {"lora_rank": 4}
LEARN = {"tune_text": True, "placeholder_vectors": WORD.vectors, "lr": 0.5}
EMA: dict[str, Any] = {"ema_decay": 0.8}
STEREO, MELODY, BOTH = ({"model": f"debug-{kind}"} for kind in ("stereo", "melody", "stereo-melody"))
PROJECTIONS = {"lora_rank": 4, "lora_targets": "q_proj,fc1,enc_to_dec_proj,audio_enc_to_dec_proj"}
# Ranks, strategy, and what else `steps` is told.
QUICK: dict[str, tuple[int, str, dict[str, Any]]] = {
    "fsdp ema bf16 stereo melody": (2, "fsdp", {**EMA, **BOTH, "precision": "bf16"})
}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "fsdp ema bf16": (2, "fsdp", {**EMA, "precision": "bf16"}),
    "single": (1, "single", {}),
    "single bf16": (1, "single", {"precision": "bf16"}),
    "single compiled": (1, "single", {"compiled": True}),
    "adamw8bit": (1, "single", {"optimizer": "adamw8bit"}),
    "zero2 offloaded ema": (2, "zero2", {**EMA, "offload": True}),
    "hsdp of one node": (2, "hsdp", {}),
    "hsdp of two nodes": (4, "hsdp", {"nodes": 2, **EMA}),
    **{f"{name} {n}": (n, name, {}) for name in ("ddp", "zero2", "zero3", "fsdp") for n in (2, 4)},
    **{f"{name} bf16": (2, name, {"precision": "bf16"}) for name in ("ddp", "zero2", "zero3")},
    **{f"{name} freeze": (n, name, {"flags": FREEZE}) for name, n in (("single", 1), ("zero3", 2), ("fsdp", 2))},
    **{f"{name} lora": (n, name, {"flags": LORA}) for name, n in (("single", 1), ("ddp", 2), ("zero2", 2))},
    "fsdp lora bf16 ema": (3, "fsdp", {"flags": LORA, "precision": "bf16", **EMA}),
    "a base of 4 bits": (1, "single", {"flags": {**LORA, "base_bits": 4}}),
    **{f"{name} word": (n, name, {"flags": LEARN}) for name, n in (("single", 1), ("fsdp", 2), ("zero2", 2))},
    "zero2 stereo ema": (2, "zero2", {**EMA, **STEREO}),
    "zero3 stereo": (2, "zero3", STEREO),
    "single melody": (1, "single", MELODY),
    "zero2 melody bf16": (2, "zero2", {**MELODY, "precision": "bf16"}),
    "zero3 melody ema": (2, "zero3", {**MELODY, **EMA}),
    "fsdp melody freeze": (2, "fsdp", {**MELODY, "flags": {"freeze": "projection,layers.0"}}),
    "ddp melody lora": (2, "ddp", {**MELODY, "flags": PROJECTIONS}),
    "fsdp stereo melody lora bf16": (2, "fsdp", {**BOTH, "flags": PROJECTIONS, "precision": "bf16"}),
    "zero2 stereo melody word": (2, "zero2", {**BOTH, "flags": LEARN}),
    "a melody base of 4 bits": (1, "single", {**MELODY, "flags": {**LORA, "base_bits": 4}}),
    "a word of one row, bf16": (2, "fsdp", {"flags": {**LEARN, "placeholder_vectors": 1}, "precision": "bf16"}),
}


@torch.no_grad()
def logits_of(model: LanguageModel) -> Tensor:
    """Of 20 random codes in each codebook, behind a random melody and text in a melody model."""
    draw = torch.Generator().manual_seed(1)
    codes_KT = torch.randint(0, 2048, (model.decoder.num_codebooks, 20), generator=draw)
    if model.audio_enc_to_dec_proj is None:
        return model.decoder(codes_KT, use_cache=False).logits
    text, melody = torch.randn(1, 3, 512, generator=draw), torch.randint(0, 12, (1, 235), generator=draw)
    # Not `model(...)`: where a word is learned, that reads token ids.
    return LanguageModel.forward(model, codes_KT[None], text, torch.ones(1, 3), melody_BC=melody)


class Sampled:
    """Makes the copy before the first step and after each, computes with it, and leaves what it found in a file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, engine: Engine) -> None:
        before, live = torch.get_rng_state(), states_of(engine.backend.model)
        with engine.sampling_model() as model:
            assert not torch.is_grad_enabled()
            assert not any(module.training or module._forward_pre_hooks for module in model.modules())
            found = {
                "weights": {name: parameter.clone() for name, parameter in model.named_parameters()},
                "logits": logits_of(model),
                "text": model.text_states(new_tokens(len(model.text_rows)), None)
                if isinstance(model, TextTunedModel)
                else None,
            }
            torch.save(found, self.folder / f"sampled-{engine.ranks.rank}.pt")
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), before) and states_of(engine.backend.model) == live


def states_of(model: nn.Module) -> list[object]:
    """Mode, hooks and compiled calls of each module, and identity and version of all its parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        *((m.training, len(m._forward_hooks), m._compiled_call_impl, len(m._buffers)) for m in model.modules()),
        *((id(tensor), tensor.requires_grad, tensor._version, tensor.dtype, tensor.device) for tensor in tensors),
    ]


def new_tokens(rows: int) -> Tensor:
    """Ids (1, S): the debug tokenizer's new ones, from 199 on, two known ones and </s>."""
    return torch.tensor([[7, *range(199, 199 + rows), 11, 1]])


def checkpoint_of(folder: Path) -> Checkpoint:
    checkpoint = newest(folder)
    assert checkpoint is not None and checkpoint.step == STEPS
    return checkpoint


def everything(folder: Path) -> dict[str, Tensor]:
    checkpoint = checkpoint_of(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def exported(checkpoint: Checkpoint, flags: dict[str, Any], name: str) -> LanguageModel:
    """The whole model of a checkpoint as exports have it, in float32."""
    source = open_model(name)
    weights = merged(source, checkpoint.weights(), selection_of_flags(flags))
    return load_language_model(replace(source, weights=weights)).eval()


@torch.no_grad()
def expected(checkpoint: Checkpoint, flags: dict[str, Any], precision: str, name: str) -> dict[str, Any]:
    """What the copy must hold and compute: an export's weights, linear layers cast, and what `single` computes."""
    model, text = exported(checkpoint, flags, name), None
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = logits_of(model)
    if precision == "bf16":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    weights = {of: parameter.detach() for of, parameter in model.named_parameters()}
    if "tune_text" in flags:
        word = replace(WORD, vectors=flags["placeholder_vectors"])
        embedding = embedding_of(open_model(name), word, checkpoint.weights())
        encoder = load_text_encoder(with_embedding(open_model(name), embedding))
        text = encoder(new_tokens(word.vectors)).last_hidden_state
        weights["text_rows"] = embedding.rows_ND
    return {"weights": weights, "logits": logits, "text": text}


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.full) for case in CASES)])
def test_it_holds_the_weights_of_an_export_and_leaves_the_run_bit_for_bit_as_it_was(case: str, tmp_path: Path) -> None:
    ranks, strategy, named = (QUICK | CASES)[case]
    if "base of 4 bits" in case or "optimizer" in named:
        pytest.importorskip("bitsandbytes")
    for folder, watch in ((tmp_path / "with", Sampled(tmp_path)), (tmp_path / "without", None)):
        run = {"count": STEPS, "save_at": STEPS, "folder": str(folder), "watch": watch}
        run_ranks(ranks, steps, strategy, 1, **run, **named)
    assert_bit_equal(everything(tmp_path / "with"), everything(tmp_path / "without"))
    flags = named.get("flags", {})
    precision, model = named.get("precision", "no"), named.get("model", "debug")
    wanted = expected(checkpoint_of(tmp_path / "with"), flags, precision, model)
    for rank in range(ranks):
        found = torch.load(tmp_path / f"sampled-{rank}.pt")
        assert {name: tensor.dtype for name, tensor in found["weights"].items()} == {
            name: tensor.dtype for name, tensor in wanted["weights"].items()
        }
        assert_bit_equal(found["weights"], wanted["weights"])
        assert torch.equal(found["logits"], wanted["logits"])
        assert wanted["text"] is None or torch.equal(found["text"], wanted["text"])


class Failing:
    """On the second rank, no memory for the copy before step 1, and no source of the frozen weights after it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, engine: Engine) -> None:
        from trainer.engine import sampling_model

        self.calls += 1
        second, whole_merged = engine.ranks.rank == 1, sampling_model.merged
        if self.calls == 1:
            if second:
                LanguageModel.to_empty = out_of_memory  # type: ignore[assignment,method-assign]
            with pytest.raises(MemoryShortError, match=r"rank 1: tried to allocate"), engine.sampling_model():
                raise AssertionError("there is no copy")
            if second:
                del LanguageModel.to_empty
        if self.calls == 2:
            if second:
                sampling_model.merged = unreadable  # type: ignore[assignment]
            with pytest.raises(ModelError, match=r"the disk is gone"), engine.sampling_model():
                raise AssertionError("there is no copy")
            sampling_model.merged = whole_merged
        with engine.sampling_model() as model:
            assert torch.isfinite(logits_of(model)).all()


def out_of_memory(model: LanguageModel, *, device: torch.device) -> None:
    nn.Module.to_empty(model, device=device)  # `_free` comes here too
    if device.type != "meta":
        raise torch.OutOfMemoryError("tried to allocate 2 GiB\nand more")


def unreadable(*arguments: Any) -> Any:
    raise StorageError("the disk is gone")


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_what_one_rank_lacks_is_an_error_on_all_and_the_run_goes_on(strategy: str, tmp_path: Path) -> None:
    run = {"count": STEPS, "save_at": STEPS, "flags": FREEZE}
    run_ranks(2, steps, strategy, 1, **run, folder=str(tmp_path / "with"), watch=Failing())
    run_ranks(2, steps, strategy, 1, **run, folder=str(tmp_path / "without"))
    assert_bit_equal(everything(tmp_path / "with"), everything(tmp_path / "without"))
