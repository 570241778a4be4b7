"""Positions are transformers' own, and no pass through a model makes the host wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MusicgenForCausalLM, MusicgenMelodyForCausalLM

from trainer.model.language_model import LanguageModel, empty_language_model, load_language_model
from trainer.model.loss import IGNORED
from trainer.model.positions import CodePositions, RowPositions
from trainer.model.source import open_model

CPU, META = torch.device("cpu"), torch.device("meta")
MODELS = ("debug", "debug-melody")
OURS = {"debug": CodePositions, "debug-melody": RowPositions}
OWN = {"debug": MusicgenForCausalLM, "debug-melody": MusicgenMelodyForCausalLM}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("past,count", [(0, 1), (0, 40), (7, 1), (30, 11), (0, 60), (55, 6)])
def test_rows_are_those_of_transformers(name: str, past: int, count: int) -> None:
    source = open_model(name)
    ours = load_language_model(source).decoder.model.decoder.embed_positions
    theirs = OWN[name]._from_config(source.config.decoder).model.decoder.embed_positions
    assert type(ours) is OURS[name], "whatever transformers' own do in the version that is here"
    ours.make_weights(41, ours.embedding_dim)
    theirs.make_weights(100, theirs.embedding_dim)  # what transformers does beyond the table's end differs by version
    width = ours.embedding_dim
    places = torch.zeros(2, count, width) if name == "debug-melody" else torch.zeros(2, 4, count, dtype=torch.int64)
    assert torch.equal(ours(places, past), theirs(places, past))
    assert len(ours.weights) == max(41, past + count), "as many rows as were asked for"


class _Copies(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None):
        result = function(*arguments, **(named or {}))
        name = function.overloadpacket.__name__
        given = [value for value in tree_leaves((arguments, named)) if isinstance(value, Tensor)]
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        # A number of the host travels as an argument of a kernel, and waits for nothing.
        if {CPU, META} <= {value.device for value in [*given, *made] if value.dim() or value.device == META}:
            self._found.append(name)
        return result


@contextmanager
def copies() -> Iterator[list[str]]:
    """What goes between host and device inside the block, of tensors on the meta device; a read raises an error."""
    found: list[str] = []
    with _Copies(found):
        yield found


def model_of(name: str) -> LanguageModel:
    return empty_language_model(open_model(name))


def pass_through(model: LanguageModel, name: str, *, masked: bool) -> None:
    """Forward and backward on the meta device, which has no values that the host could read."""
    rows, codebooks, steps, words = 2, model.decoder.config.num_codebooks, 30, 5
    codes = torch.zeros(rows, codebooks, steps, dtype=torch.int64, device=META)
    mask = torch.zeros(rows, words, dtype=torch.bool, device=META) if masked else None
    sums = model(
        codes,
        torch.zeros(rows, words, model.enc_to_dec_proj.in_features, device=META),
        torch.ones(rows, words, device=META),
        mask,
        labels_BKT=torch.full_like(codes, IGNORED),
        melody_BC=torch.zeros(rows, 8, dtype=torch.int64, device=META) if name == "debug-melody" else None,
    )
    sums.sum().backward()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_pass_copies_nothing_between_host_and_device(name: str, masked: bool) -> None:
    model = model_of(name)
    with copies() as found:
        pass_through(model, name, masked=masked)
    assert found == []


def test_what_transformers_did_before_is_seen() -> None:
    model = model_of("debug")
    positions = model.decoder.model.decoder.embed_positions

    def forward(input_ids: Tensor, past_key_values_length: int = 0) -> Tensor:
        places = (torch.arange(input_ids.shape[-1]) + past_key_values_length).to(input_ids.device)  # transformers 5.17
        return positions.weights.index_select(0, places).detach()

    positions.forward = forward
    with copies() as found:
        pass_through(model, "debug", masked=True)
    assert found == ["_to_copy"]
    with pytest.raises(RuntimeError, match="meta"), copies():
        torch.zeros(2, device=META).max().item()
