"""Strength: base + strength x (tuned - base), against exact fractions, peft, and what was stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.errors import ConfigError, ModelError
from trainer.exports.strength import at_strength, embedding_at_strength
from trainer.flags.config import Config
from trainer.model.lora import UP, read_adapter, save_adapter
from trainer.model.new_word import TABLE, TextEmbedding, start_rows, with_embedding
from trainer.model.source import LANGUAGE_MODEL, Source
from trainer.model.stereo import in_stereo
from trainer.model.trained_model import build_trained_model, merged
from trainer.model.weights import StoredTensor, Weights, weights_in_memory
from trainer.spec.trainable import NewWord, Placeholder
from trainer.wiring import model_settings

BIAS = "enc_to_dec_proj.bias"


@pytest.fixture(scope="module")
def tuned(source: Source, state: dict[str, Tensor]) -> Source:
    return replace(source, name="tuned", weights=source.weights.replaced(weights_in_memory(state)))


def of_language_model(source: Source) -> Weights:
    return source.weights.starting_with(*LANGUAGE_MODEL)


def nearest_float32(exact: Fraction) -> np.float32:
    """The float32 next to a number, the even one of two that are as near: slow and obvious."""
    guess = np.float32(float(exact))
    around = (np.nextafter(guess, np.float32(-math.inf)), guess, np.nextafter(guess, np.float32(math.inf)))
    return min(around, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.uint32)) & 1))


def odd_floats(count: int, seed: int) -> Tensor:
    """(count,) float32 of all bit patterns: large and tiny, subnormal, zero; none that is no finite number."""
    bits = np.random.default_rng(seed).integers(0, 2**32, 2 * count, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 1e38)][: count - 2]
    return torch.from_numpy(np.concatenate([values, np.float32([0.0, -0.0])]))


@pytest.mark.parametrize("strength", [0, 1, 0.0, 1.0])
def test_at_zero_and_one_the_tensors_are_the_stored_ones(source: Source, tuned: Source, strength: float) -> None:
    half = {name: InHalf(shape=tensor.shape, of=tensor) for name, tensor in of_language_model(source).stored.items()}
    base = replace(source, weights=Weights({**source.weights.stored, **half}))
    made = at_strength(base, tuned, strength)
    wanted = tuned if strength else base
    for name, tensor in made.weights.stored.items():
        expected = wanted if name.startswith(LANGUAGE_MODEL) else tuned
        assert tensor is expected.weights.stored[name], name
    assert made.weights[BIAS].dtype == (torch.float32 if strength else torch.float16)


@dataclass(frozen=True, kw_only=True, eq=False)
class InHalf(StoredTensor):
    """A tensor as float16, as folders of the hub may have it."""

    of: StoredTensor

    def read(self, start: int, stop: int) -> Tensor:
        return self.of.read(start, stop).half()


def test_at_a_half_it_is_the_mean_bit_for_bit(source: Source) -> None:
    near = torch.randn(3000, generator=torch.Generator().manual_seed(4))
    base = torch.cat([odd_floats(3000, 1), near])
    tuned = torch.cat([odd_floats(3000, 2), near + 0.003 * torch.randn(3000)])
    pairs = zip(base.tolist(), tuned.tolist(), strict=True)
    expected = [nearest_float32((Fraction(a) + Fraction(b)) / 2) for a, b in pairs]
    assert torch.equal(mixed(source, base, tuned, 0.5), torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize("strength", [0.1, 0.6, 1.3, 2.0])
def test_at_any_strength_it_is_the_formula_rounded_once(source: Source, strength: float) -> None:
    """The three operations in float64 round by 2**-53 of the largest operand each, so that a number beside the middle
    of two float32 may fall to the other side, and no further than that."""
    base, tuned = odd_floats(2000, 3).clamp(-1e30, 1e30), odd_floats(2000, 4).clamp(-1e30, 1e30)
    made = mixed(source, base, tuned, strength)
    for a, b, value in zip(base.tolist(), tuned.tolist(), made.tolist(), strict=True):
        exact = Fraction(a) + Fraction(strength) * (Fraction(b) - Fraction(a))
        nearest = nearest_float32(exact)
        slack = 8 * max(abs(Fraction(a)), abs(Fraction(b))) / 2**53
        assert abs(Fraction(value) - exact) <= abs(Fraction(float(nearest)) - exact) + slack


def mixed(source: Source, base: Tensor, tuned: Tensor, strength: float) -> Tensor:
    """A tensor of a model with such values in base and tuned."""
    first, second = (
        replace(source, weights=Weights({**source.weights.stored, **weights_in_memory({BIAS: values}).stored}))
        for values in (base, tuned)
    )
    return at_strength(first, second, strength).weights[BIAS]


def test_more_strength_moves_every_value_further_from_the_base(source: Source, tuned: Source) -> None:
    steps = [at_strength(source, tuned, strength).weights for strength in (0, 0.25, 0.5, 0.75, 1, 1.5, 2)]
    for name in of_language_model(source):
        start, end = source.weights[name].double(), tuned.weights[name].double()
        shares = [((weights[name].double() - start) * (end - start).sign()) for weights in steps]
        assert all((after >= before).all() for before, after in pairwise(shares)), name
        assert (shares[-1] > shares[0]).all()


def test_half_precision_weights_count_as_the_float32_that_they_are(source: Source) -> None:
    base, tuned = torch.randn(1000).half(), torch.randn(1000).bfloat16()
    made = mixed(source, base, tuned, 0.5)
    assert made.dtype == torch.float32 and torch.equal(made, ((base.double() + tuned.double()) / 2).float())


def test_a_tensor_is_read_only_when_it_is_asked_for_and_a_range_is_that_of_the_whole(
    source: Source, tuned: Source
) -> None:
    read: list[str] = []
    watched = [
        replace(one, weights=Weights({name: Watched(shape=one.weights.shape(name), of=one, name=name, read_=read)
                                      for name in one.weights}))
        for one in (source, tuned)
    ]  # fmt: skip
    made = at_strength(*watched, 0.6)
    assert read == []
    name = "decoder.lm_heads.1.weight"
    part = made.weights.read(name, 5, 77)
    assert read == [name, name]
    assert torch.equal(part, made.weights[name].reshape(-1)[5:77]) and part.dtype == torch.float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Watched(StoredTensor):
    """Notes that it is read."""

    of: Source
    name: str
    read_: list[str] = field(default_factory=list)

    def read(self, start: int, stop: int) -> Tensor:
        self.read_.append(self.name)
        return self.of.weights.read(self.name, start, stop)


def test_models_of_other_shapes_are_refused_with_both_and_what_to_do(source: Source, tuned: Source) -> None:
    stereo = replace(in_stereo(source), name="of two channels")
    with pytest.raises(ModelError, match=r"of two channels and tuned: .*lm_heads\.4.*absent here.*Give --base"):
        at_strength(stereo, tuned, 0.5)
    with pytest.raises(ModelError, match="debug and of two channels"):
        at_strength(source, stereo, 0.5)
    for strength in (1, 0):  # also where no tensor would be computed
        with pytest.raises(ModelError):
            at_strength(stereo, tuned, strength)


@pytest.mark.parametrize("strength", [-0.1, 2.01, math.nan, math.inf])
def test_a_strength_outside_of_its_range_is_refused(source: Source, tuned: Source, strength: float) -> None:
    with pytest.raises(ConfigError, match=r"--strength .* takes a number from 0"):
        at_strength(source, tuned, strength)


@pytest.mark.parametrize("strength", [0.6, *(pytest.param(full, marks=pytest.mark.full) for full in (0.0, 1.0, 1.5))])
def test_a_loras_merged_model_at_a_strength_is_the_base_with_the_scaled_adapter(
    source: Source, tmp_path: Path, strength: float
) -> None:
    """peft merges the second; the two are rounded to float32 once and twice."""
    from peft import PeftModel
    from transformers import MusicgenForConditionalGeneration

    config = Config(dataset_path="unused", lora_rank=4, lora_targets="v_proj,fc1")
    selection, draw = config.selection, torch.Generator().manual_seed(8)
    assert selection.lora is not None
    start = build_trained_model(source, model_settings(config)).start
    adapters = {
        name: torch.randn(start.shape(name), generator=draw) / 8 for name in start if ".lora_" in name
    }
    trained = replace(source, weights=source.weights.replaced(merged(source, adapters, selection)))
    made = at_strength(source, trained, strength)
    save_adapter(tmp_path, adapters, replace(selection.lora, alpha=selection.lora.alpha * strength), None)
    assert read_adapter(tmp_path)[0].alpha == selection.lora.alpha * strength
    model = MusicgenForConditionalGeneration(source.config)
    model.load_state_dict({name: source.weights[name] for name in source.weights}, strict=False)
    peft_merged = PeftModel.from_pretrained(model, tmp_path).merge_and_unload().state_dict()
    moved = 0
    for name in of_language_model(source):
        difference = (made.weights[name] - peft_merged[name]).abs().max()
        assert difference <= 4 * torch.finfo(torch.float32).eps * peft_merged[name].abs().max(), name
        moved += not torch.equal(peft_merged[name], source.weights[name])
    assert moved == (len([name for name in adapters if name.endswith(UP)]) if strength else 0)


def test_a_learned_word_is_between_what_it_started_from_and_what_was_learned(source: Source) -> None:
    word = NewWord(placeholder=Placeholder(word="<my-style>", vectors=2), init_word="music")
    start, learned = start_rows(source, word), torch.randn(2, source.weights.shape(TABLE)[1])
    first, last = (
        with_embedding(source, TextEmbedding(
            placeholder=word.placeholder, rows_ND=rows, base_model="debug", text_encoder=source.text_identity()
        ))
        for rows in (start, learned)
    )  # fmt: skip
    for strength, expected in ((0, start), (1, learned), (0.5, ((start.double() + learned.double()) / 2).float())):
        made, table = at_strength(first, last, strength), first.weights[TABLE]
        changed = (made.weights[TABLE] != table).any(dim=1).nonzero().flatten()
        token = made.load_tokenizer().convert_tokens_to_ids("<my-style:0>")
        assert torch.equal(made.weights[TABLE][token : token + 2], expected)
        assert len(changed) == (0 if strength == 0 else 2)
        embedding = TextEmbedding(
            placeholder=word.placeholder, rows_ND=learned, base_model="debug", text_encoder=source.text_identity()
        )
        assert torch.equal(embedding_at_strength(source, word, embedding, strength).rows_ND, expected)
        assert all(torch.equal(made.weights[name], source.weights[name]) for name in of_language_model(source))
    with pytest.raises(ModelError, match=r"knows <my-style:0>, <my-style:1>, that of the first no learned word"):
        at_strength(source, last, 0.5)


def test_the_frozen_models_are_the_tuned_ones(source: Source, tuned: Source) -> None:
    others = {name: tensor for name, tensor in source.weights.stored.items() if not name.startswith(LANGUAGE_MODEL)}
    changed = weights_in_memory({name: torch.zeros(tensor.shape) for name, tensor in others.items()})
    made = at_strength(source, replace(tuned, weights=tuned.weights.replaced(changed)), 0.5)
    assert all(made.weights.stored[name] is changed.stored[name] for name in others)
    assert made.name == "tuned at strength 0.5"
