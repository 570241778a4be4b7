"""What the plan counts as trained is what the model trains, of every kind of model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.flags.config import Config
from trainer.model.source import open_model
from trainer.model.trained_model import build_trained_model
from trainer.spec.shapes import DEBUG_NAMES, KNOWN
from trainer.spec.trainable import count, selection_of
from trainer.wiring import model_settings

PROJECTIONS = {"enc_to_dec_proj", "audio_enc_to_dec_proj"}


source_of = cache(open_model)


def trained_parameters(name: str, **flags: Any) -> dict[str, int]:
    """How many values each trained parameter of a debug model has."""
    settings = model_settings(Config(dataset_path="unused", **flags))
    model = build_trained_model(source_of(name), settings).model
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", DEBUG_NAMES)
@pytest.mark.parametrize(
    "flags",
    [
        {"freeze": "projection"},
        {"freeze": "embeddings,layers.0"},
        {"freeze": "heads,layers.0-1"},
        {"lora_rank": 3},
        {"lora_rank": 3, "lora_targets": "self_attn.q_proj,fc2,enc_to_dec_proj"},
    ],
    ids=str,
)
def test_the_counted_parameters_are_those_of_the_model(name: str, flags: dict[str, Any]) -> None:
    trained = trained_parameters(name, **flags)
    assert count(KNOWN[name], selection_of(**flags)).trained == sum(trained.values())
    if flags.get("freeze") == "projection":
        assert not any(PROJECTIONS & set(parameter.split(".")) for parameter in trained)


@pytest.mark.parametrize("name", ["debug-melody", "debug-stereo-melody"])
def test_each_of_a_melody_models_projections_takes_an_adapter_of_its_own(name: str) -> None:
    for targets in (PROJECTIONS, {"enc_to_dec_proj"}, {"audio_enc_to_dec_proj"}):
        flags = {"lora_rank": 3, "lora_targets": ",".join(targets)}
        trained = trained_parameters(name, **flags)
        assert {parameter.split(".")[0] for parameter in trained} == targets
        assert count(KNOWN[name], selection_of(**flags)).trained == sum(trained.values())


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("small", "audio_enc_to_dec_proj", "only melody models read"),
        ("stereo-small", "audio_enc_to_dec_proj", "only melody models read"),
        ("melody", "encoder_attn.v_proj", "melody models read the text in front of the codes"),
        ("stereo-melody", "encoder_attn.q_proj", "melody models read the text in front of the codes"),
    ],
)
def test_an_adapter_of_a_layer_that_the_model_has_not_is_refused_with_the_reason(
    name: str, target: str, reason: str
) -> None:
    for targets in (target, f"fc1,{target}"):
        with pytest.raises(ConfigError, match=f"--lora_targets {target}: {name} has no such layer.*{reason}"):
            count(KNOWN[name], selection_of(lora_rank=4, lora_targets=targets))
