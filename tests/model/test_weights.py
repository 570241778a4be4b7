"""Weight files of a model folder: however stored, under whichever names, the tensors are the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MusicgenForConditionalGeneration, MusicgenProcessor

from trainer.errors import ModelError
from trainer.model.debug_model import build_debug_model, debug_feature_extractor, debug_tokenizer
from trainer.model.language_model import load_language_model
from trainer.model.source import load_codec, load_text_encoder, open_model
from trainer.model.weights import Computed, Weights, weights_in_folder, weights_in_memory

EMBEDDING = "text_encoder.encoder.embed_tokens.weight"
POSITIONS = "decoder.model.decoder.embed_positions.weights"


def tensors() -> dict[str, Tensor]:
    """Of 0 to 4 axes, of several dtypes, one of them not contiguous in memory when it is made."""
    draw = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 5, generator=draw),
        "vector": torch.randn(11, generator=draw),
        "four": torch.randn(3, 2, 4, 5, generator=draw),
        "one row": torch.randn(1, 9, generator=draw),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(6, 4, generator=draw).bfloat16(),
        "whole numbers": torch.arange(10).reshape(5, 2),
        "transposed": torch.randn(5, 8, generator=draw).T.contiguous(),
    }


def save_one(values: dict[str, Tensor], folder: Path) -> None:
    save_file(values, folder / "model.safetensors")


def save_pickled(values: dict[str, Tensor], folder: Path) -> None:
    torch.save(values, folder / "pytorch_model.bin")


def save_shards(values: dict[str, Tensor], folder: Path) -> None:
    """Two shards and their index."""
    write_shards(values, folder, "model-{}-of-2.safetensors", "model.safetensors.index.json", save_file)


def save_pickled_shards(values: dict[str, Tensor], folder: Path) -> None:
    write_shards(values, folder, "pytorch_model-{}-of-2.bin", "pytorch_model.bin.index.json", torch.save)


def write_shards(
    values: dict[str, Tensor], folder: Path, shard: str, index: str, save: Callable[[dict[str, Tensor], Path], object]
) -> None:
    shard_of = {name: shard.format(1 + number % 2) for number, name in enumerate(values)}
    for file in set(shard_of.values()):
        save({name: values[name] for name in values if shard_of[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))


STORED = {
    "safetensors": save_one,
    "shards": save_shards,
    "pickled": save_pickled,
    "pickled shards": save_pickled_shards,
}


@pytest.mark.parametrize("stored", [*STORED, "memory"])
def test_shapes_and_any_range_are_those_of_the_tensors(stored, tmp_path):
    expected = tensors()
    weights: Weights = weights_in_memory(expected)
    if stored != "memory":
        STORED[stored](expected, tmp_path)
        weights = weights_in_folder(tmp_path)
    assert set(weights) == set(expected) and len(weights) == len(expected)
    for name, tensor in expected.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert_equal(weights[name], tensor)
        for start in range(tensor.numel() + 1):
            for stop in range(start, tensor.numel() + 1):
                assert_equal(weights.read(name, start, stop), tensor.reshape(-1)[start:stop])


def assert_equal(tensor: Tensor, expected: Tensor) -> None:
    assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


@pytest.fixture(scope="module")
def model() -> MusicgenForConditionalGeneration:
    return build_debug_model()


def published(model: MusicgenForConditionalGeneration) -> dict[str, Tensor]:
    """The tensors under the names of the folders on the hub, which old versions of torch and transformers wrote."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    positions = model.decoder.model.decoder.embed_positions
    old = {
        re.sub(r"\.parametrizations\.weight\.original([01])$", lambda m: ".weight_" + "gv"[int(m[1])], name): value
        for name, value in state.items()
    }
    assert sum(name.endswith("weight_g") for name in old) == sum(name.endswith("weight_v") for name in old) > 0
    old[POSITIONS] = positions.weights[:1500].clone()
    old[EMBEDDING] = state["text_encoder.shared.weight"].clone()
    return old


@pytest.mark.parametrize("stored", STORED)
def test_a_folder_of_the_published_layout_is_the_model_in_memory(stored, model, tmp_path):
    model.config.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    MusicgenProcessor(debug_feature_extractor(), debug_tokenizer()).save_pretrained(tmp_path)
    STORED[stored](published(model), tmp_path)
    stored_model, expected = open_model(str(tmp_path)), open_model("debug")
    assert set(stored_model.weights) == set(expected.weights)
    assert stored_model.codec_identity() == expected.codec_identity()
    assert stored_model.text_identity() == expected.text_identity()
    for load in (load_codec, load_text_encoder, load_language_model):
        parts = [dict(load(source).state_dict()) for source in (stored_model, expected)]
        assert parts[0].keys() == parts[1].keys() and len(parts[0]) > 10
        for name in parts[0]:
            assert torch.equal(parts[0][name], parts[1][name]), name


@pytest.mark.parametrize("stored", ["shards", "pickled shards"])
def test_a_missing_shard_is_named(stored, tmp_path):
    STORED[stored](tensors(), tmp_path)
    gone = sorted(path for path in tmp_path.iterdir() if "2-of-2" in path.name)[0]
    gone.unlink()
    with pytest.raises(ModelError, match=f"lacks {re.escape(gone.name)}: download the model again"):
        weights_in_folder(tmp_path)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(stored, kept, tmp_path):
    STORED[stored](tensors(), tmp_path)
    path = sorted(path for path in tmp_path.iterdir() if path.suffix != ".json")[0]
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ModelError, match=f"{re.escape(str(path))} cannot be read .*download the model again"):
        weights_in_folder(tmp_path)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    class Malicious:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"matrix": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin cannot be read: it holds other things than tensors"):
        weights_in_folder(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    with pytest.raises(ModelError, match=r"holds no weights: expected one of model\.safetensors, pytorch_model\.bin"):
        weights_in_folder(tmp_path)


def test_safetensors_are_read_before_pickled_ones(tmp_path):
    save_one(tensors(), tmp_path)
    save_pickled({"other": torch.zeros(1)}, tmp_path)
    assert set(weights_in_folder(tmp_path)) == set(tensors())


def test_putting_weights_together_reads_none_of_them():
    def read() -> Tensor:
        raise AssertionError("a tensor was read")

    first, second = (
        Weights({name: Computed(shape=(2, 3), compute=read) for name in names})
        for names in (("a.x", "a.y", "b.x"), ("a.x",))
    )
    together = first.replaced(second).starting_with("a.")
    assert list(together) == ["a.x", "a.y"] and "a.x" in together and together.shape("a.x") == (2, 3)
    with pytest.raises(AssertionError, match="a tensor was read"):
        together.read("a.x", 0, 1)


def test_replacing_keeps_the_names_and_takes_the_others_tensors():
    first = weights_in_memory({"x": torch.zeros(2), "y": torch.ones(2)})
    replaced = first.replaced(weights_in_memory({"y": torch.full((3,), 2.0), "z": torch.zeros(1)}))
    assert {name: tensor.tolist() for name, tensor in replaced.items()} == {"x": [0, 0], "y": [2, 2, 2]}
