"""Where a GPU is there and not used, the cause is told as torch and nvidia-smi tell it, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.engine.torch_build import torch_build
from trainer.plan.unused_gpu import (
    Driver,
    TorchBuild,
    ask_driver,
    cards_on_the_bus,
    driver_of_listing,
    why_unused,
)

# As `nvidia-smi -q -x` writes it (driver 470), cut to what is read.
LISTING = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v11.dtd">
<nvidia_smi_log>
\t<driver_version>470.57.02</driver_version>
\t<cuda_version>11.4</cuda_version>
\t<attached_gpus>2</attached_gpus>
\t<gpu id="00000000:01:00.0"><product_name>NVIDIA GeForce RTX 3060</product_name></gpu>
\t<gpu id="00000000:02:00.0"><product_name>NVIDIA GeForce RTX 3060</product_name></gpu>
</nvidia_smi_log>
"""
OLD = driver_of_listing(LISTING)
NEW = Driver(gpus=("H100",), version="600.1", cuda="13.0")
# What torch 2.13 raises, by its source (torch/cuda/__init__.py, c10/cuda/CUDAFunctions.cpp).
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."
CUDA_WHEEL = TorchBuild(version="2.13.0+cu130", cuda="13.0", error=TOO_OLD)
CPU_WHEEL = TorchBuild(version="2.13.0+cpu", cuda=None, error="Torch not compiled with CUDA enabled")


def test_a_listing_is_read() -> None:
    assert Driver(gpus=2 * ("NVIDIA GeForce RTX 3060",), version="470.57.02", cuda="11.4") == OLD
    assert driver_of_listing("<nvidia_smi_log></nvidia_smi_log>").error and driver_of_listing("no XML").error


@pytest.mark.parametrize(
    ("build", "driver", "cards", "environment", "parts"),
    [
        (CUDA_WHEEL, OLD, 2, {}, ["2 GPU(s) (NVIDIA GeForce RTX 3060)", "470.57.02", "up to 11.4", TOO_OLD, "update"]),
        (CPU_WHEEL, OLD, 2, {}, ["2.13.0+cpu is a build without CUDA", "for CUDA 11.4 or older", "pytorch.org"]),
        (CUDA_WHEEL, NEW, 1, {"CUDA_VISIBLE_DEVICES": ""}, ["CUDA_VISIBLE_DEVICES is ''", "unset it"]),
        (CUDA_WHEEL, NEW, 1, {}, ["driver 600.1", TOO_OLD]),
        (CUDA_WHEEL, Driver(error="nvidia-smi is not found"), 1, {}, ["1 NVIDIA card(s)", "no driver", "--gpus all"]),
        (CUDA_WHEEL, Driver(error="nvidia-smi says: Driver/library version mismatch"), 1, {}, ["mismatch", "anew"]),
    ],
)
def test_each_cause_is_told_with_what_to_do(
    build: TorchBuild, driver: Driver, cards: int, environment: dict[str, str], parts: list[str]
) -> None:
    message = why_unused(build, driver, cards, environment)
    assert all(part in message for part in parts), message


def test_where_no_nvidia_gpu_is_nothing_is_said() -> None:
    assert why_unused(CPU_WHEEL, Driver(error="nvidia-smi is not found"), 0, {"CUDA_VISIBLE_DEVICES": ""}) == ""


def test_a_program_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML:\nDriver/library version mismatch'; exit 18\n")
    program.chmod(0o755)
    assert ask_driver().error == "nvidia-smi says: Failed to initialize NVML: Driver/library version mismatch"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    assert ask_driver() == OLD


def test_cards_are_counted_by_vendor_and_class(tmp_path: Path) -> None:
    for name, vendor, kind in (("a", "0x10de", "0x030000"), ("b", "0x10de", "0x040300"), ("c", "0x8086", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    assert cards_on_the_bus(tmp_path) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that is used")
def test_torch_says_why_it_has_no_gpu() -> None:
    build = torch_build()
    assert build.version == torch.__version__ and build.error and "\n" not in build.error
