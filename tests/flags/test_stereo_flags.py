"""--stereo 1: what it cannot be used with, and the plan that it gets."""

from __future__ import annotations

import pytest

from trainer.errors import ConfigError
from trainer.flags.config import Config, parse
from trainer.plan.dry_run import dry_run

ALONE = {"lora_rank": 16}, {"freeze": "heads"}, {"freeze": "layers.0-3,embeddings"}, {"tune_text": True}


@pytest.mark.parametrize("what", ALONE)
def test_what_leaves_the_channels_equal_is_refused_but_where_a_start_may_be_stereo(what: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"--stereo 1 cannot be used with .*: --model_id models/huggingface"):
        Config(dataset_path="music", stereo=True, **what)
    assert Config(dataset_path="music", **what).embeddings_in_stereo is None
    assert Config(dataset_path="music", stereo=True, init_from="models", **what).embeddings_in_stereo == "halved"


@pytest.mark.parametrize("what", [{}, {"freeze": "layers.0-3"}, {"freeze": "projection"}, {"stereo_init": "copied"}])
def test_stereo_can_be_trained_beside_frozen_layers(what: dict[str, object]) -> None:
    assert Config(dataset_path="music", stereo=True, **what).stereo


def test_stereo_init_without_stereo_has_no_effect_and_is_refused() -> None:
    with pytest.raises(ConfigError, match="--stereo_init copied has no effect without --stereo 1"):
        parse(["--dataset", "music", "--stereo_init", "copied"])


@pytest.mark.parametrize("model_id", ["small", "melody-large", "debug"])
def test_the_plan_is_that_of_the_stereo_model(model_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "music", "--dry_run", "1", "--gpus", "8", "--gpu_memory_gib", "80", "--model_id"]
    stereo = "debug-stereo" if model_id == "debug" else f"stereo-{model_id}"
    shown = []
    for words in ([model_id, "--stereo", "1"], [stereo], [model_id]):
        assert dry_run(*parse([*flags, *words])) == 0
        shown.append(capsys.readouterr().out.replace(stereo, model_id))
    assert shown[0] == shown[1] != shown[2]
    with pytest.raises(ConfigError, match=f"{stereo} is stereo already: leave it out"):
        dry_run(*parse([*flags, stereo, "--stereo", "1"]))
