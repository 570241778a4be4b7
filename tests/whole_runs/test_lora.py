"""LoRA and frozen parts on one process: what is saved, resumed, merged and loaded elsewhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import MusicgenForConditionalGeneration

from tests.plans import engine_for, plan_for
from tests.runs import assert_bit_equal, final_state, launch_here, metrics
from tests.synthetic import random_examples
from trainer.data.order import Row, valid_cells
from trainer.engine import torch_backend
from trainer.errors import CheckpointError, ConfigError, ModelError
from trainer.exports.audiocraft_names import lm_to_audiocraft
from trainer.exports.export import ExportSettings, export_all
from trainer.exports.init_from import find_starting_point, start_from
from trainer.flags.config import Config
from trainer.model.debug_model import build_debug_model
from trainer.model.language_model import load_language_model, materialize
from trainer.model.lora import read_adapter
from trainer.model.source import open_model, source_of
from trainer.model.trained_model import build_trained_model
from trainer.plan.layout import Layout, Workload
from trainer.plan.memory import expected_bytes
from trainer.run.checkpoint import Checkpoint, newest
from trainer.spec.shapes import KNOWN, Shape
from trainer.spec.trainable import count, selection_of
from trainer.wiring import model_settings

LORA = ("--lora_rank", "4", "--lora_dropout", "0.1")
FLAGS = ("--batch_size", "2", "--grad_acc", "1", "--warmup_steps", "1", "--lr", "1e-2", "--lr_schedule", "constant")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/, a finished LoRA of four steps, with lm_2.pt."""
    folder = tmp_path_factory.mktemp("lora")
    launch_here(folder, *FLAGS, *LORA, "--max_steps", "4", "--save_step", "2")
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    codes, text = torch.randint(0, 2048, (4, 20), generator=draw), torch.randn(1, 5, 512, generator=draw)
    with torch.no_grad():
        return model.eval()(encoder_outputs=(text,), decoder_input_ids=codes).logits


def trained_weights(run: Path, step: int) -> Checkpoint:
    return Checkpoint(run / f"models/checkpoints/step-{step:08d}")


@pytest.mark.numbers
def test_peft_loads_the_adapter_alone_and_the_merged_model_has_its_logits(run: Path) -> None:
    adapted = PeftModel.from_pretrained(build_debug_model(), str(run / "models/adapter"))
    expected = logits(adapted)
    assert (expected - logits(build_debug_model())).abs().max() > 0.05, "the adapter does nothing"
    merged = MusicgenForConditionalGeneration.from_pretrained(run / "models/huggingface")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-6)
    by_peft = lm_to_audiocraft(lm_of(adapted.merge_and_unload().state_dict()))
    ours = torch.load(run / "models/lm_final.pt", weights_only=True)
    assert ours.keys() == by_peft.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, by_peft[name], rtol=0, atol=1e-7)
    beside = torch.load(run / "models/audiocraft/state_dict.bin", weights_only=False)["best_state"]
    assert_bit_equal(dict(beside), dict(ours))


def lm_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in state.items()
        if name.startswith(("decoder.", "enc_to_dec_proj.")) and "embed_positions" not in name
    }


def test_a_step_of_save_step_is_merged_too(run: Path, tmp_path: Path) -> None:
    source, lora = open_model("debug"), selection_of(lora_rank=4)
    settings = ExportSettings(card="", segment_seconds=30.0, cfg_dropout=0.0, selection=lora)
    export_all(source, trained_weights(run, 4).weights(), tmp_path, settings)
    final = torch.load(tmp_path / "lm_final.pt", weights_only=True)
    assert_bit_equal(final, torch.load(run / "models/lm_4.pt", weights_only=True))
    assert_bit_equal(final, torch.load(run / "models/lm_final.pt", weights_only=True))
    assert not torch.equal(
        *(torch.load(run / f"models/lm_{step}.pt", weights_only=True)["transformer.layers.0.linear1.weight"]
          for step in (2, 4))
    )  # fmt: skip


def test_a_checkpoint_holds_adapters_and_nothing_else(run: Path) -> None:
    checkpoint = trained_weights(run, 4)
    values = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names())
    assert values == 3 * count(KNOWN["debug"], selection_of(lora_rank=4)).trained
    assert all(".lora_" in name for name in checkpoint.names())


@pytest.mark.parametrize("mode", [LORA, ("--freeze", "embeddings,layers.0")], ids=["lora", "freeze"])
def test_a_stopped_run_continues_bit_for_bit_and_frozen_weights_come_from_the_base(
    run: Path, tmp_path: Path, mode: tuple[str, ...]
) -> None:
    shutil.copytree(run / "cache", tmp_path / "cache")
    launch_here(tmp_path, *FLAGS, *mode, "--max_steps", "4")
    whole, losses = final_state(tmp_path), metrics(tmp_path)
    exported = load_file(tmp_path / "models/huggingface/model.safetensors")
    shutil.rmtree(tmp_path / "models")
    launch_here(tmp_path, *FLAGS, *mode, "--max_steps", "2")
    assert "resuming" in launch_here(tmp_path, *FLAGS, *mode, "--max_steps", "4")
    assert_bit_equal(final_state(tmp_path), whole)
    assert metrics(tmp_path) == losses
    assert_bit_equal(load_file(tmp_path / "models/huggingface/model.safetensors"), exported)
    base = build_debug_model().state_dict()
    frozen = "decoder.model.decoder.embed_tokens.0.weight"
    assert torch.equal(exported[frozen], base[frozen])


def test_another_selection_is_refused_with_both(run: Path) -> None:
    said = launch_here(run, *FLAGS, "--lora_rank", "8", "--max_steps", "6", expect=1)
    assert "trained: LoRA of rank 4, alpha 8, on " in said and "then, LoRA of rank 8, alpha 16, on " in said
    said = launch_here(run, *FLAGS, "--max_steps", "6", expect=1)
    assert "then, None now" in said


def test_another_frozen_base_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("cache", "models"):
        shutil.copytree(run / name, tmp_path / name)
    flags = (*FLAGS, *LORA, "--max_steps", "2", "--output_dir", "second")
    launch_here(tmp_path, *flags, "--init_from", "models")
    state = torch.load(tmp_path / "models/lm_2.pt", weights_only=True)
    shutil.rmtree(tmp_path / "models")
    (tmp_path / "models").mkdir()
    torch.save(state, tmp_path / "models/lm_final.pt")
    said = launch_here(tmp_path, *flags, "--init_from", "models", expect=1)
    assert "frozen weights: " in said


def test_a_lora_is_a_starting_point_as_a_run_as_an_adapter_and_merged(run: Path) -> None:
    source = open_model("debug")
    starts = [run / "models", run / "models/adapter", run / "models/lm_final.pt"]
    first, *others = [load_language_model(start_from(source, find_starting_point(str(start)))) for start in starts]
    for other in others:
        assert_bit_equal(other.state_dict(), first.state_dict())
    assert not torch.equal(first.state_dict()["enc_to_dec_proj.weight"], torch.zeros(1))
    started = start_from(source, find_starting_point(str(run / "models")))
    for name in ("decoder.model.decoder.layers.0.fc1.weight", "enc_to_dec_proj.bias"):
        whole = started.weights[name].reshape(-1)
        assert torch.equal(started.weights.read(name, 3, len(whole) - 5), whole[3:-5])
    with pytest.raises(ModelError, match=r"not the frozen rest.*give the run's lm_final.pt"):
        start_from(started, find_starting_point(str(run / "models")))


def test_an_adapter_that_is_no_plain_lora_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "models/adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(ModelError, match=r"no plain LoRA .*use_dora.*merge it in peft"):
        read_adapter(tmp_path / "adapter")
    path.write_text("{")
    with pytest.raises(ModelError, match="no readable adapter"):
        find_starting_point(str(tmp_path / "adapter"))


@pytest.mark.numbers
@pytest.mark.parametrize("flags", [{"lora_rank": 4}, {"freeze": "layers.1,projection"}], ids=["lora", "freeze"])
def test_frozen_linear_layers_in_bf16_give_the_same_losses_in_less_memory(flags, monkeypatch) -> None:
    counts = count(KNOWN["debug"], selection_of(**flags))
    kept, kept_bytes = bf16_losses(flags)
    monkeypatch.setattr(torch_backend, "_shrink_frozen", lambda model, plan: None)
    plain, plain_bytes = bf16_losses(flags)
    assert kept == plain and len(set(kept)) == len(kept)
    assert plain_bytes - kept_bytes == 2 * counts.frozen_linear > 0


def bf16_losses(flags: dict[str, object]) -> tuple[list[float], int]:
    config = Config(dataset_path="unused", **flags)  # type: ignore[arg-type]
    engine = engine_for(plan_for(precision="bf16", micro_batch=3), config)
    lengths = [20, 35, 12]
    examples = random_examples(lengths)
    rows = [Row(clip=clip, epoch=0, view=0, start=0, frames=n, drop_caption=False) for clip, n in enumerate(lengths)]
    cells, batch = valid_cells(rows, 4, 40), examples.batch(rows)
    losses = [engine.step([batch], cells, step=step, learning_rate=1e-2).loss for step in range(4)]
    return losses, engine.backend.weight_bytes()


@pytest.mark.parametrize(
    "model_id,targets",
    [
        *(
            (name, targets)
            for name in ("debug", "debug-stereo-melody")
            for targets in ("q_proj,v_proj", "enc_to_dec_proj", None)
        ),
        ("debug", "encoder_attn.k_proj,fc2"),
        ("debug-stereo-melody", "fc2,audio_enc_to_dec_proj"),
    ],
)
def test_adapters_are_counted_as_peft_makes_them(model_id: str, targets: str | None) -> None:
    flags = {"lora_rank": 3} | ({} if targets is None else {"lora_targets": targets})
    config = Config(dataset_path="unused", **flags)  # type: ignore[arg-type]
    model = build_trained_model(open_model(model_id), model_settings(config)).model
    made = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert made == count(KNOWN[model_id], config.selection).trained > 0


@pytest.mark.parametrize("model_id", ["debug", "debug-stereo-melody"])
@pytest.mark.parametrize("freeze", ["embeddings", "heads", "projection", "layers.1", "layers.0-1,heads"])
def test_frozen_parts_are_counted_as_the_model_has_them(freeze: str, model_id: str) -> None:
    config = Config(dataset_path="unused", freeze=freeze)
    model = build_trained_model(open_model(model_id), model_settings(config)).model
    counts = count(KNOWN[model_id], config.selection)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counts.trained
    linear = [p for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters(recurse=False)]
    assert sum(p.numel() for p in linear if not p.requires_grad) == counts.frozen_linear


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"freeze": "layers.2-1"}, "'layers.2-1' is no part of the model"),
        ({"freeze": "encoder"}, "'encoder' is no part"),
        ({"lora_rank": 4, "lora_targets": "q_proj,lm_heads"}, "'lm_heads' is no linear layer"),
        ({"lora_rank": 4, "freeze": "heads"}, "--freeze has no effect with --lora_rank"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_the_flags(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(dataset_path="x", **flags)  # type: ignore[arg-type]


def test_what_the_model_does_not_have_is_refused_by_its_size() -> None:
    with pytest.raises(ConfigError, match=r"layers.2: debug has layers.0-1"):
        count(KNOWN["debug"], selection_of("layers.1-2"))
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        count(KNOWN["debug"], selection_of("layers.0-1,embeddings,heads,projection"))


def test_an_engine_refuses_a_checkpoint_of_other_parameters(run: Path) -> None:
    engine = engine_for(plan_for(), Config(dataset_path="unused", freeze="heads"))
    checkpoint = newest(run / "models/checkpoints")
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match="what is trained now has"):
        engine.load(checkpoint)


def test_adapters_start_by_seed_within_their_bound_and_change_nothing() -> None:
    config = Config(dataset_path="unused", lora_rank=4)
    made = [build_trained_model(open_model("debug"), model_settings(config)) for _ in range(2)]
    other = build_trained_model(open_model("debug"), model_settings(Config(dataset_path="unused", lora_rank=4, seed=1)))
    downs = [name for name in made[0].start if ".lora_A." in name]
    for name in downs:
        values = made[0].start[name]
        assert torch.equal(values, made[1].start[name]) and not torch.equal(values, other.start[name])
        assert 0.8 < values.abs().max() * values.shape[1] ** 0.5 <= 1
    assert len({float(made[0].start[name][0, 0]) for name in downs}) == len(downs)
    ups = [made[0].start[name] for name in made[0].start if ".lora_B." in name]
    assert len(ups) == len(downs) and not any(np.any(values.numpy()) for values in ups)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_adapters_keep_no_more_activations_than_the_plan_counts_for_the_whole_model(precision: str) -> None:
    # Beside the plan's values, each adapter keeps `rank` values a frame for its second matrix.
    rank, width = 2, 256
    shape = Shape(name="measured", layers=2, width=width, heads=4, ffn=4 * width, text_width=512)
    kept = [kept_bytes(layers, frames, rank, precision) for layers in (2, 4) for frames in (128, 192)]
    measured = ((kept[3] - kept[2]) - (kept[1] - kept[0])) / 2 / 64
    asked = Layout(
        workload=Workload(segment_frames=1),
        strategy="single",
        on_gpu=False,
        mixed_precision=precision,  # type: ignore[arg-type]
        micro_batch=1,
        accumulation=1,
    )
    of_layers = [expected_bytes(replace(shape, layers=layers), asked).activations for layers in (2, 4)]
    expected = (of_layers[1] - of_layers[0]) / 2
    assert 0.85 * expected < measured <= 1.01 * expected + 10 * rank * 4, (measured, expected)


def kept_bytes(layers: int, frames: int, rank: int, precision: str) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass of one clip, parameters excluded."""
    source = source_of(build_debug_model(width=256, layers=layers, heads=4), name="measured")
    config = Config(dataset_path="unused", lora_rank=rank)
    adapted = build_trained_model(source, model_settings(config))
    if precision == "bf16":
        torch_backend._shrink_frozen(adapted.model, plan_for(precision="bf16"))
    materialize(adapted.model, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            parameter.copy_(adapted.start[name])
    codes, text = torch.randint(0, 2048, (1, 4, frames)), torch.randn(1, 1, 512)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        adapted.model(codes, text, torch.ones(1, 1), None, labels_BKT=codes)
    own = {parameter.untyped_storage().data_ptr() for parameter in adapted.model.parameters()}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)
