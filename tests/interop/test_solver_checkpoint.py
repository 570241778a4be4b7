"""audiocraft's checkpoint.th, made by its own classes: read without running any of them, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.interop.audiocraft_modules import require_audiocraft
from trainer.errors import ModelError
from trainer.exports.audiocraft_config import lm_config, text_encoder_name
from trainer.exports.audiocraft_files import read_audiocraft
from trainer.exports.init_from import find_starting_point, start_from
from trainer.exports.pickled import load_pickled, plain_config
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import Source, open_model

require_audiocraft()

from audiocraft.models.lm import LMModel
from audiocraft.optim import CosineLRScheduler
from audiocraft.optim.ema import ModuleDictEMA
from audiocraft.utils.best_state import BestStateDictManager
from audiocraft.utils.checkpoint import save_checkpoint
from flashy.state import AttributeWrapper, StateManager
from omegaconf import DictConfig, OmegaConf

from tests.interop.audiocraft_models import build_lm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source() -> Source:
    return open_model("debug")


@pytest.fixture(scope="module")
def best(source: Source) -> LanguageModel:
    torch.manual_seed(8)
    model = load_language_model(source).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def lm(source: Source, best: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> LMModel:
    return build_lm(source, best.state_dict(), tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def config(source: Source) -> DictConfig:
    """A solver's configuration, with what omegaconf can hold: references, lists, None, a missing value, a path."""
    name = text_encoder_name(source.config)
    config = OmegaConf.create(lm_config(source.config, text_encoder_name=name, segment_seconds=30.0, cfg_dropout=0.1))
    config.dora = {"dir": Path("/tmp/me"), "exclude": ["device", None], "copy": "${sample_rate}", "sig": "???"}
    OmegaConf.set_struct(config, True)
    assert isinstance(config, DictConfig)
    return config


@pytest.fixture(scope="module")
def checkpoint(lm: LMModel, config: DictConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint.th: the best state is not the last one, and that is not the average."""
    file = tmp_path_factory.mktemp("xps") / "checkpoint.th"
    save_checkpoint(solver_state(lm, config), file)
    return file


def solver_state(lm: LMModel, config: DictConfig, **changes: Any) -> dict[str, Any]:
    """What solvers/base.py registers with flashy and saves, under the same names by the same classes."""
    best_state = BestStateDictManager()
    best_state.register("model", lm)
    last = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(last.parameters())
    last(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    solver = SimpleNamespace(
        xp=SimpleNamespace(cfg=config, sig="0a1b2c3d"),
        history=[{"train": {"ce": 3.5, "ppl": 30.0}, "valid": {"ce": 3.25}}],
        best_state=best_state,
        fsdp_best_state={},
        model=last,
        ema=ModuleDictEMA(nn.ModuleDict({"model": last})),
        optimizer=optimizer,
        lr_scheduler=CosineLRScheduler(optimizer, total_steps=9, warmup_steps=2),
        scaler=torch.amp.GradScaler("cpu"),
    )
    manager = StateManager()
    for name in vars(solver):
        if name != "xp":
            manager.register(name, AttributeWrapper(solver, name))
    for name in ("cfg", "sig"):
        manager.register(f"xp.{name}", AttributeWrapper(solver.xp, name), write_only=True)
    return {**manager.state_dict(), **changes}


def logits(model: LanguageModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    inputs_BKT = torch.randint(0, 2049, (2, 4, 12), generator=draw)
    text_BSD = torch.randn(2, 5, model.enc_to_dec_proj.in_features, generator=draw)
    with torch.inference_mode():
        return model.eval()(inputs_BKT, text_BSD, torch.ones(2, 5))


def test_a_solvers_checkpoint_gives_the_logits_of_its_best_state(
    source: Source, best: LanguageModel, checkpoint: Path
) -> None:
    for path in (checkpoint, checkpoint.parent):
        started = start_from(source, find_starting_point(str(path)))
        assert torch.equal(logits(load_language_model(started)), logits(best))


def test_its_configuration_is_read_as_omegaconf_reads_it(checkpoint: Path, config: DictConfig) -> None:
    package = load_pickled(checkpoint)
    plain, expected = plain_config(package["xp.cfg"]), OmegaConf.to_container(config)
    assert isinstance(expected, dict) and isinstance(expected["dora"], dict)
    del plain["dora"]["dir"], expected["dora"]["dir"]  # a path, of which nothing is built
    assert plain == expected
    read = read_audiocraft(checkpoint).config
    assert read is not None and (read.width, read.layers, read.heads, read.activation) == (128, 2, 4, "gelu")


def test_the_state_that_fsdp_gathered_comes_first(
    source: Source, best: LanguageModel, lm: LMModel, config: DictConfig, tmp_path: Path
) -> None:
    """Under FSDP the other states are sharded tensors, which are not built either."""
    file = tmp_path / "checkpoint.th"
    save_checkpoint(solver_state(lm, config, fsdp_best_state={"model": lm.state_dict()}), file)
    done = subprocess.run([sys.executable, "-c", SHARD, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    started = start_from(source, find_starting_point(str(file)))
    assert torch.equal(logits(load_language_model(started)), logits(best))


# In a process of its own, which may have a process group.
SHARD = """
import sys, torch, torch.distributed as distributed
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
state = torch.load(sys.argv[1], weights_only=False)
shard = Shard.from_tensor_and_offsets(torch.ones(4), [0], 0)
state["model"] = state["best_state"]["model"] = {"flat_param": init_from_local_shards([shard], 4)}
torch.save(state, sys.argv[1])
"""


def test_it_is_read_where_omegaconf_is_not_installed(checkpoint: Path) -> None:
    code = (
        "import sys; sys.modules['omegaconf'] = None\n"
        "from pathlib import Path; from trainer.exports.audiocraft_files import read_audiocraft\n"
        f"print(read_audiocraft(Path({str(checkpoint)!r})).config.heads)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4", done.stderr


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("function", ["touch", "system", "eval", "legacy"])
def test_a_malicious_checkpoint_is_refused_and_runs_nothing(
    lm: LMModel, config: DictConfig, tmp_path: Path, function: str
) -> None:
    ran, file = tmp_path / "ran", tmp_path / "checkpoint.th"
    evil = {
        "touch": Call(Path.touch, ran),
        "system": Call(os.system, f"touch {ran}"),
        "eval": Call(eval, f"open({str(ran)!r}, 'w')"),
        "legacy": Call(os.system, f"touch {ran}"),
    }[function]
    state = solver_state(lm, config, history=[evil])
    torch.save(state, file, _use_new_zipfile_serialization=function != "legacy")
    with pytest.raises(ModelError, match=r"checkpoint\.th cannot be read"):
        find_starting_point(str(file))
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists(), "the file would have done nothing, whoever reads it"


def test_what_is_named_like_an_allowed_class_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "omegaconf"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef call(*words): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "omegaconf"]:
        monkeypatch.delitem(sys.modules, name)
    import omegaconf.evil  # type: ignore[import-not-found]

    torch.save({"history": Call(omegaconf.evil.call, 1)}, tmp_path / "checkpoint.th")
    (tmp_path / "ran").unlink()
    monkeypatch.delitem(sys.modules, "omegaconf.evil")
    load_pickled(tmp_path / "checkpoint.th")
    assert not (tmp_path / "ran").exists() and "omegaconf.evil" not in sys.modules
