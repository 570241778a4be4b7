"""What we export, opened by transformers 4 and peft of its time, in an environment of their own.

Many hosts and user interfaces are still on transformers 4, and audiocraft's own environment is.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import environ
from trainer.exports.export import ExportSettings, export_all, export_text, write_huggingface
from trainer.flags.config import Config
from trainer.model.language_model import materialize
from trainer.model.new_word import TextEmbedding
from trainer.model.source import LANGUAGE_MODEL, Source, open_model
from trainer.model.trained_model import build_trained_model
from trainer.spec.trainable import Placeholder
from trainer.wiring import model_settings

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tests/load_elsewhere.py")
TRANSFORMERS = "4.57.6"
# peft's own requirements, torch among them, are here already; it would bring another transformers.
PEFT = ("peft==0.17.1", "accelerate==1.10.1", "psutil")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with transformers 4, which finds all that it does not have itself in ours."""
    folder = tmp_path_factory.mktemp("older")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for packages in ([f"transformers=={TRANSFORMERS}"], ["--no-deps", *PEFT]):
        done = subprocess.run([*install, *packages], capture_output=True, text=True, check=False)
        if done.returncode:
            message = f"NOT TESTED: whether transformers {TRANSFORMERS} opens what is exported ({done.stderr[-300:]})"
            warnings.warn(message, stacklevel=2)
            pytest.skip(message)
    (site,) = folder.glob("lib/python*/site-packages")
    ours = Path(torch.__file__).parents[1]
    (site / "zz_ours.pth").write_text(f"{ours}\n")  # behind its own, so that those win
    return str(interpreter)


@pytest.fixture(scope="module")
def source() -> Source:
    return open_model("debug")


@pytest.fixture(scope="module")
def lora(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_lora(source, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def stereo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_lora(open_model("debug-stereo"), tmp_path_factory.mktemp("stereo"))


@pytest.fixture(scope="module")
def melody(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_lora(open_model("debug-melody"), tmp_path_factory.mktemp("melody"))


def export_lora(source: Source, folder: Path) -> Path:
    """What a LoRA's run exports, and the base of its adapter as base/."""
    config = Config(dataset_path="unused", lora_rank=4)
    adapted = build_trained_model(source, model_settings(config))
    materialize(adapted.model, torch.device("cpu"))
    draw, adapters = torch.Generator().manual_seed(6), {}
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            parameter.copy_(adapted.start[name])
            if ".lora_" in name:
                adapters[name] = parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    settings = ExportSettings(card="# card\n", segment_seconds=30.0, cfg_dropout=0.1, selection=config.selection)
    export_all(source, adapters, folder, settings)
    write_huggingface(source, source.weights.starting_with(*LANGUAGE_MODEL), folder / "base", "# card\n")
    return folder


@pytest.fixture(scope="module")
def word(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with --tune_text 1 exports."""
    rows = torch.randn(3, 512, generator=torch.Generator().manual_seed(3))
    placeholder, digest = Placeholder(word="<my-style>", vectors=3), source.text_identity()
    folder = tmp_path_factory.mktemp("word")
    embedding = TextEmbedding(placeholder=placeholder, rows_ND=rows, base_model="debug", text_encoder=digest)
    export_text(source, embedding, folder, card="# card\n")
    return folder


def found(interpreter: str, models: Path, tmp_path: Path) -> dict[str, Any]:
    output = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
    done = subprocess.run(
        [interpreter, SCRIPT, str(models), str(output)],
        capture_output=True, text=True, check=False, timeout=240, env=environ(PYTHONPATH=""),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(output)


@pytest.mark.parametrize("kind", ["lora", "word", "stereo", "melody"])
def test_transformers_4_makes_what_transformers_5_makes(
    kind: str, python: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    models = request.getfixturevalue(kind)
    theirs, ours = found(python, models, tmp_path), found(sys.executable, models, tmp_path)
    assert theirs.pop("transformers") == TRANSFORMERS and ours.pop("transformers").startswith("5.")
    assert theirs.keys() == ours.keys()
    assert theirs["rate"] == theirs["sampling rate"] == 32_000
    assert kind == "melody" or theirs["pipeline"].std() > 0
    assert kind != "stereo" or theirs["audio"].shape == (2, 2, 6400)
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert theirs[name].shape == value.shape, name
            # other sums of the same numbers: 5e-7 was measured
            assert (theirs[name] - value).abs().max() <= 1e-4 * max(1.0, value.abs().max().item()), name
        else:
            assert theirs[name] == value, name
    if kind != "word":
        assert (theirs["adapter"] - theirs["logits"]).abs().max() < 1e-4  # base and adapter are the merged model
        assert "T5's ids" in theirs


