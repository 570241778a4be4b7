"""Which layers are compiled, what the compiler recomputes, and how a machine without a compiler is found out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.engine.compiled import compiles
from trainer.errors import ConfigError, MemoryShortError
from trainer.flags.config import parse
from trainer.plan.launcher import Launch
from trainer.plan.memory import GIB
from trainer.plan.plan import Plan, make_plan
from trainer.plan.request import BatchFlags, request_of
from trainer.plan.strategies import Cluster
from trainer.spec.shapes import FRAME_RATE_HZ, KNOWN

ROOT = Path(__file__).resolve().parents[2]


def gpus(count: int = 1, gib: float = 80, *, compiles: bool = True) -> Cluster:
    return Cluster(
        nodes=1,
        gpus_per_node=count,
        device="cuda",
        gpu_memory_bytes=round(gib * GIB),
        host_memory_bytes=None,
        supports_bf16=True,
        compiles=compiles,
    )


def cpus() -> Cluster:
    return replace(gpus(compiles=False), device="cpu", gpu_memory_bytes=None, supports_bf16=False)


def plan(cluster: Cluster, model: str = "small", *words: str) -> Plan:
    """The plan of flags as they are typed, with micro-batches of at most 8 clips, and two of them."""
    words = (*words, *(["--device", "cpu"] if cluster.device == "cpu" else []))
    config, typed = parse(["--dataset", "music", *words])
    asked = request_of(config, typed, Launch(), frame_rate_hz=FRAME_RATE_HZ, deepspeed_available=True)
    return make_plan(
        cluster, KNOWN[model], BatchFlags(batch_size=8, grad_acc=2, global_batch=None, grad_acc_typed=False), asked
    )


def micro_batch(cluster: Cluster, model: str, *words: str) -> int:
    """The largest that fits with these flags; 0 where none does."""
    try:
        return plan(cluster, model, *words).micro_batch
    except MemoryShortError:
        return 0


LORA = ("--strategy", "single", "--lora_rank", "16")


@pytest.mark.parametrize("gib", [12, 14, 16, 18, 24, 28])
def test_the_largest_micro_batch_comes_first_then_recomputing_nothing_and_whole_layers_last(gib: int) -> None:
    none, selective, full = (
        micro_batch(gpus(1, gib), "large", *LORA, "--gradient_checkpointing", way) for way in ("0", "selective", "1")
    )
    assert none <= selective <= full > 0  # each needs less memory than the one before
    made = plan(gpus(1, gib), "large", *LORA)
    expected = (full, True) if selective == 0 else (none, False) if none == selective else (selective, "selective")
    assert (made.micro_batch, made.gradient_checkpointing) == expected == EXPECTED[gib]
    assert made.compiled and any("layers are compiled from --compile auto" in reason for reason in made.reasons)


# Found by the above on 2026-11-23, so that it is known to see each of the three.
EXPECTED = {
    12: (4, True),
    14: (1, "selective"),
    16: (1, False),
    18: (2, "selective"),
    24: (2, False),
    28: (4, "selective"),
}


def test_without_a_compiler_nothing_is_selective() -> None:
    for gib in EXPECTED:
        made = plan(gpus(1, gib, compiles=False), "large", *LORA)
        assert not made.compiled and made.gradient_checkpointing in (False, True)
        assert any("torch.compile does not work here" in reason for reason in made.reasons)
    asked_for = plan(gpus(compiles=False), "small", "--compile", "0")
    assert not any("torch.compile" in reason for reason in asked_for.reasons)


def test_zero3_is_never_compiled() -> None:
    for gib in (19, 20, 24, 40, 80):
        made = plan(gpus(4, gib), "large", "--strategy", "zero3")
        assert not made.compiled and made.gradient_checkpointing in (False, True)
        assert plan(gpus(4, gib), "large", "--strategy", "fsdp").compiled


def test_on_a_cpu_layers_are_compiled_only_when_asked_for() -> None:
    assert not plan(cpus()).compiled
    assert not plan(replace(cpus(), compiles=True)).compiled
    assert plan(cpus(), "small", "--compile", "1").compiled
    assert plan(cpus(), "small", "--compile", "1", "--gradient_checkpointing", "selective").compiled


def test_a_typed_0_compiles_nothing_and_recomputes_nothing() -> None:
    assert not plan(gpus(), "small", "--compile", "0").compiled
    for gib in (14, 18, 28):
        assert plan(gpus(1, gib), "large", *LORA).gradient_checkpointing == "selective"
    for gib in (18, 28):
        assert plan(gpus(1, gib), "large", *LORA, "--gradient_checkpointing", "0").gradient_checkpointing is False
    with pytest.raises(MemoryShortError):
        plan(gpus(1, 14), "large", *LORA, "--gradient_checkpointing", "0")


@pytest.mark.parametrize(
    ("cluster", "words", "parts"),
    [
        (gpus(2), "--compile 1 --strategy zero3", ["--compile 1", "zero3", "use fsdp"]),
        (gpus(), "--compile 0 --gradient_checkpointing selective", ["selective", "use --compile 1"]),
        (gpus(compiles=False), "--gradient_checkpointing selective", ["selective", "--gradient_checkpointing 1"]),
        (gpus(compiles=False), "--compile 1", ["C compiler", "--compile 0"]),
        (cpus(), "--gradient_checkpointing selective", ["selective", "--compile 1"]),
        (gpus(2), "--strategy zero3 --gradient_checkpointing selective", ["selective", "without zero3"]),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_what_works(cluster: Cluster, words: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(cluster, "small", *words.split())
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiler_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    assert compiles(torch.device("cpu"))
    assert capsys.readouterr().out == ""


@pytest.mark.full
def test_a_missing_compiler_is_told_and_ends_nothing(tmp_path: Path) -> None:
    code = "import torch; from trainer.engine.compiled import compiles; print(compiles(torch.device('cpu')))"
    environment = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("torch.compile does not work here: ") and "No working C++ compiler" in first
    assert (done.returncode, second) == (0, "False")
