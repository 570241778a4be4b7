"""What of a sound its melody is heard in: what is chosen, what is said, and demucs' stems in windows."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from tests.audio_files import noise
from tests.data.test_shared_scan import on_each_rank
from trainer.data import demucs_files
from trainer.data.excerpt import Excerpt
from trainer.data.peers import Alone, Peers
from trainer.data.stems import Demucs, Mix, stems_of, tell
from trainer.errors import EXIT_USAGE, ConfigError
from trainer.flags.config import Config, parse
from trainer.model.source import open_model
from trainer.plan.launcher import Launch
from trainer.preflight import refuse_early
from trainer.wiring import identity_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PACKAGES = ("demucs==4.1.0", "lameenc==1.9.0", "sphn==0.2.1", "julius==0.2.8", "einops==0.8.2")


@pytest.fixture
def without_demucs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra "stems" was not installed."""
    monkeypatch.setattr(demucs_files, "_package", lambda: None)


def test_the_mix_is_the_mean_of_all_channels(tmp_path: Path) -> None:
    samples = noise(2, 32_000, 3)
    soundfile.write(tmp_path / "a.wav", samples, 32_000, subtype="FLOAT")
    excerpt = Excerpt(first_frame=1_000, frames=40_000, gain=0.5)
    blocks = list(stems_of("mix", CPU).blocks(tmp_path / "a.wav", 32_000, 0.5, excerpt))
    expected = samples[1_000:41_000].mean(axis=1) / 2
    np.testing.assert_allclose(np.concatenate(blocks), expected, rtol=0, atol=1e-7)
    assert max(map(len, blocks)) <= 16_000


@pytest.mark.usefixtures("without_demucs")
def test_auto_without_demucs_is_the_mix_and_one_line_says_what_that_means(capsys: pytest.CaptureFixture[str]) -> None:
    stems = stems_of("auto", CPU)
    assert isinstance(stems, Mix)
    tell(stems, ["a melody file"], Alone())
    assert capsys.readouterr().out == ""  # no clip's own sound is heard
    for _ in range(2):
        tell(stems, ["a melody file", ""], Alone())
    (line,) = capsys.readouterr().out.splitlines()
    words = ("full mix", "drums and bass", "4 of 10 notes", "bash scripts/setup.sh stems", "name.melody.wav")
    assert line.startswith("warning: --stems auto") and all(word in line for word in words)
    tell(stems_of("mix", CPU), [""], Alone())
    assert capsys.readouterr().out == ""


def test_auto_is_what_a_prepared_folder_of_the_run_was_made_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demucs_files, "what_is_missing", lambda: "")
    stems = stems_of("auto", torch.device("cuda"), made={"mix"})  # where it would be demucs by itself
    tell(stems, [""], Alone())
    assert isinstance(stems, Mix) and "--stems mix, as those of the prepared folder" in capsys.readouterr().out
    monkeypatch.setattr(demucs_files, "what_is_missing", lambda: "the package demucs is not installed")
    with pytest.raises(ConfigError, match=r"prepared folder were heard in demucs' stems.*demucs is not installed"):
        stems_of("auto", CPU, made={"demucs-0123"})


@pytest.mark.usefixtures("without_demucs")
def test_the_first_process_chooses_for_all_and_it_alone_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("auto", "demucs", "demucs")  # of each; what others have is not asked

    def chosen(rank: int, peers: Peers) -> Mix | Demucs:
        stems = stems_of(flags[rank], CPU, peers)
        tell(stems, [""], peers)
        return stems

    found = on_each_rank(chosen, 3)
    assert [one.key for one in found] == ["mix"] * 3
    assert capsys.readouterr().out.count("warning") == 1


@pytest.mark.usefixtures("without_demucs")
@pytest.mark.parametrize("model", ["debug-melody", "melody", "melody-large", "a/repository"])
def test_demucs_that_is_missing_is_refused_at_the_start(tmp_path: Path, model: str) -> None:
    config, typed = parse(["--dataset", str(tmp_path), "--model_id", model, "--stems", "demucs"])
    with pytest.raises(ConfigError, match=r"demucs is not installed: bash scripts/setup\.sh stems") as caught:
        refuse_early(config, typed, Launch())
    assert caught.value.exit_code == EXIT_USAGE
    with pytest.raises(ConfigError, match="demucs is not installed"):
        stems_of("demucs", CPU)


@pytest.mark.parametrize("variables", [{"TORCH_HOME": "~/x"}, {"XDG_CACHE_HOME": "/cache"}, {}], ids=str)
def test_weights_are_looked_for_where_torch_hub_keeps_them(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert demucs_files._torch_hub() == Path(torch.hub.get_dir()) / "checkpoints"


def test_a_run_is_known_by_its_stems_only_where_it_reads_melodies(tmp_path: Path) -> None:
    config = Config(dataset_path=str(tmp_path))
    data: Any = SimpleNamespace(clips=1, digest="d", stems="demucs-12ab")
    name = "stems of melodies (--stems)"
    assert identity_of(config, open_model("debug-melody"), data)[name] == "demucs-12ab"
    assert name not in identity_of(config, open_model("debug"), data)


def with_demucs(folder: Path) -> dict[str, Any]:
    """What tests/data/demucs_elsewhere.py found, with the package that is installed, or else one that is fetched."""
    path = [str(ROOT)]
    if importlib.util.find_spec("demucs") is None:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command = [*install, "--target", str(folder / "site"), *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            message = f"NOT TESTED: stems of the real demucs, which cannot be installed ({done.stderr[-300:]})"
            warnings.warn(message, stacklevel=2)
            pytest.skip(message)
        path.insert(0, str(folder / "site"))
    command = [sys.executable, str(ROOT / "tests/data/demucs_elsewhere.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return with_demucs(tmp_path_factory.mktemp("demucs"))


@pytest.mark.full
def test_windows_of_demucs_give_every_sample_of_one_pass_over_the_whole(found: dict[str, Any]) -> None:
    # Equal to the bit: both compute the same pieces, and add the same two of them in the same order.
    assert len(found["furthest"]) == 7 and set(found["furthest"].values()) == {0.0}


@pytest.mark.full
def test_demucs_hears_two_channels_at_its_own_rate_whatever_the_file_has(found: dict[str, Any]) -> None:
    # Whether soxr resamples in blocks or at once may differ in rounding alone.
    assert len(found["furthest of inputs"]) == 3 and max(found["furthest of inputs"].values()) < 1e-5
    assert not found["torchaudio"]


@pytest.mark.full
def test_weights_are_found_in_both_places_under_one_key_and_bad_ones_are_refused_unrun(found: dict[str, Any]) -> None:
    assert "are not on this disk" in found["before"] and found["before"] in found["refused"]
    assert found["hub of torch"].endswith("checkpoints/955717e8-8726e21a.th")
    assert found["hub"].endswith("/955717e8.safetensors")
    assert found["key of it"] == found["key"] == found["key again"] and found["key"].startswith("demucs-")
    assert "other things than weights" in found["foreign"] and not found["called"]
    for what in ("cut", "foreign", "another class"):
        assert "cannot be read as the weights of htdemucs" in found[what] and "get_model('htdemucs')" in found[what]
