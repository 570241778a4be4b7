"""What can be refused without torch, a GPU or a network is refused before any of them is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, environ
from trainer.errors import EXIT_DATA, EXIT_USAGE, DataError, TrainerError
from trainer.flags.config import parse
from trainer.plan.launcher import Launch
from trainer.preflight import check_folders, refuse_early

WITHOUT_TORCH = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "huggingface_hub", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
import launch
sys.exit(launch.main(sys.argv[1:]))
"""


def refused(folder: Path, *flags: str, launch: Launch | None = None) -> str:
    config, typed = parse(["--dataset", str(folder), *flags])
    with pytest.raises(TrainerError) as caught:
        refuse_early(config, typed, launch or Launch())
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "launch", "words"),
    [
        ("--validation nowhere", Launch(), "nowhere cannot be opened"),
        ("--sample_every 5 --sample_prompts no.txt", Launch(), "--sample_prompts no.txt cannot be read"),
        ("--resume nowhere", Launch(), "--resume nowhere: there is no such folder"),
        ("--model_id ./nowhere", Launch(), "--model_id ./nowhere: there is no such folder"),
        ("--strategy single", Launch(world_size=2, local_world_size=2), "is for one process, and 2 were started"),
        ("--strategy fsdp", Launch(strategy="zero2"), "--strategy fsdp contradicts zero2"),
        ("--strategy fsdp --optimizer adamw8bit", Launch(), "cannot shard --optimizer adamw8bit"),
        ("--freeze layers.90", Launch(), "layers.90"),
        ("--global_batch 5 --grad_acc 2", Launch(), "--global_batch 5 contradicts"),
        ("--mixed_precision fp16", Launch(use_cpu=True), "fp16 needs a GPU"),
        ("--device cuda", Launch(use_cpu=True), "--device cuda contradicts"),
        ("--lr 1e-4", Launch(restarts=1, world_size=2, local_world_size=1), "works on one machine here"),
        ("--max_minutes 10", Launch(restarts=3), "--max_minutes 10 ends the run with code 75"),
    ],
)
@pytest.mark.parametrize("model", ["large", "debug"])
def test_each_is_refused_whatever_the_hardware(
    tmp_path: Path, flags: str, launch: Launch, words: str, model: str
) -> None:
    assert words in refused(tmp_path, "--model_id", model, *flags.split(), launch=launch)


@pytest.mark.parametrize("model", ["melody", "facebook/musicgen-stereo-melody", "debug-melody"])
def test_samples_of_a_melody_model_need_a_transformers_that_hears_melodies(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "5.17.0")
    message = refused(tmp_path, "--model_id", model, "--sample_every", "5")
    assert f"--sample_every 5 with --model_id {model}" in message and "pip install 'transformers>=5.18'" in message
    assert "5.17.0 is installed" in message and "training works" in message
    config, typed = parse(["--dataset", str(tmp_path), "--model_id", "debug-melody"])
    refuse_early(config, typed, Launch())
    config, typed = parse(["--dataset", str(tmp_path), "--model_id", "debug-stereo", "--sample_every", "5"])
    refuse_early(config, typed, Launch())
    monkeypatch.setattr("importlib.metadata.version", lambda package: "5.18.0.dev0")
    config, typed = parse(["--dataset", str(tmp_path), "--model_id", "debug-melody", "--sample_every", "5"])
    refuse_early(config, typed, Launch())


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag, name in (("--use_wandb", "wandb"), ("--optimizer=adamw8bit", "bitsandbytes")):
        monkeypatch.setitem(sys.modules, name, None)
        assert f"needs the package {name}: pip install" in refused(tmp_path, flag)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_looks_at_the_folders_once_they_have_met(rank: int, tmp_path: Path) -> None:
    config, typed = parse(["--dataset", str(tmp_path / "nowhere")])
    refuse_early(config, typed, Launch(rank=rank, world_size=2, local_world_size=1))
    with pytest.raises(DataError, match="cannot be opened"):
        check_folders(config)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--dataset nowhere", EXIT_DATA, "the dataset folder nowhere cannot be opened"),
        ("--dataset . --output_dir ../out --cache_dir ../cache --freeze layers.90", EXIT_USAGE, "layers.90"),
    ],
)
def test_a_run_is_refused_before_torch_is_loaded_or_the_model_asked_for(
    tmp_path: Path, flags: str, code: int, words: str
) -> None:
    """With torch and the hub's library made impossible to import, and no network needed."""
    (tmp_path / "music").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *flags.split()],
        cwd=tmp_path / "music",
        env=environ(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code and words in done.stderr, done.stdout + done.stderr


ON_WINDOWS = """
import dataclasses, os, pathlib, signal, sys, time
sys.modules["fcntl"] = None
del signal.SIGUSR1, signal.SIGALRM, signal.SIGHUP
sys.platform = "win32"
import launch
"""


def test_on_windows_wsl2_is_named_and_no_module_is_missed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_WINDOWS], cwd=tmp_path, env=environ(PYTHONPATH=str(ROOT)), capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "WSL2" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_on_macos_the_first_line_says_what_works_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import launch

    monkeypatch.setattr(sys, "platform", "darwin")
    code = launch.main(["--dataset", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")])
    assert code == EXIT_DATA and capsys.readouterr().out.startswith("macOS: this program computes on the CPU here")
