"""Adapters beside a base of 4 and 8 bits on a CUDA device: the products, the memory, the losses, a whole run.

Skipped without one. `bash scripts/test.sh full tests/gpu/test_base_bits.py` runs them alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu import base_bits
from tests.gpu.one_card import gib, say_figure
from tests.runs import ROOT, environ, import_path, launch, metrics
from trainer.model.source import open_model
from trainer.model.trained_model import merged
from trainer.run.checkpoint import newest
from trainer.spec.trainable import selection_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GIB = 2**30


@cache
def measured(size: str, strategy: str, bits: int, compiled: bool = False) -> dict:
    """What tests/gpu/base_bits.py prints, run in a process of its own, so that memory starts from nothing."""
    if bits:
        pytest.importorskip("bitsandbytes")
    words = [size, strategy, str(bits), str(int(compiled))]
    environment = environ(PYTHONPATH=import_path())
    command = [sys.executable, "-m", base_bits.__name__, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    assert lines, done.stdout + done.stderr
    print(*words, lines[0])
    return json.loads(lines[0].removeprefix("MEASURED "))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_and_its_gradient_are_those_of_the_codes_values(bits: int, dtype: torch.dtype) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from trainer.engine.quantized_base import QuantizedLinear

    torch.manual_seed(0)
    weight, x = torch.randn(2048, 1024, device="cuda") * 0.02, torch.randn(3, 50, 1024, device="cuda", dtype=dtype)
    layer = QuantizedLinear(1024, 2048, bits=bits, dtype=dtype)
    layer.fill(weight)
    if bits == 4:
        packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        values = bitsandbytes.functional.dequantize_4bit(packed, state).to(dtype)
    else:
        parameter = bitsandbytes.nn.Int8Params(weight.cpu(), has_fp16_weights=False, requires_grad=False).to("cuda")
        values = (parameter.CB.float() * parameter.SCB[:, None] / 127).to(dtype)
    torch.testing.assert_close(layer.weight(), values, rtol=2**-7 if dtype != torch.float32 else 1e-6, atol=0)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    products, others = layer(found), expected @ layer.weight().t()
    products.sum().backward()
    others.sum().backward()
    torch.testing.assert_close(products, others)
    torch.testing.assert_close(found.grad, expected.grad)
    error = (layer.weight().float() - weight).norm() / weight.norm()
    assert (0.05 < error < 0.12) if bits == 4 else (0.001 < error < 0.015), error


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_memory_is_what_the_plan_expects_and_the_loss_falls(size: str, bits: int) -> None:
    found = measured(size, "single", bits)
    peak, expected, weights = (gib(found[f"{name}_bytes"]) for name in ("peak", "expected", "weight"))
    say_figure(f"peak {peak} of planned {expected}, weights {weights}")
    assert found["weight_bytes"] == pytest.approx(found["expected_weight_bytes"], rel=0.01)
    assert found["peak_bytes"] == pytest.approx(found["expected_bytes"], rel=0.10)
    assert found["built_bytes"] < found["weight_bytes"] + 1.5 * GIB, "more than one layer was held unrounded"
    assert found["losses"][-1] < found["losses"][0] - 0.02


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_a_resumed_run_goes_on_bit_for_bit(bits: int) -> None:
    found = measured("small", "single", bits)
    expected = found["losses"][-len(found["resumed"]) :]
    say_figure(f"losses after the resumption {found['resumed']}, without it {expected}")
    assert found["resumed"] == expected


def test_losses_are_near_those_beside_a_base_in_bf16_and_ddp_gives_the_same() -> None:
    plain, rounded = measured("small", "single", 0), measured("small", "single", 4)
    assert rounded["losses"] == pytest.approx(plain["losses"], rel=0.02)
    assert rounded["peak_bytes"] < plain["peak_bytes"] - 0.3 * GIB
    assert measured("small", "ddp", 4)["losses"] == pytest.approx(rounded["losses"], rel=2e-3)


def test_compiled_layers_give_the_same_losses() -> None:
    found, plain = measured("small", "single", 4, True), measured("small", "single", 4)
    assert found["losses"] == pytest.approx(plain["losses"], rel=5e-3)


def test_a_run_resumes_with_other_bits_and_exports_the_unrounded_base_with_its_adapters(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    flags = ("--batch_size", "2", "--grad_acc", "1", "--warmup_steps", "1", "--lr", "1e-2", "--lora_rank", "4")
    said = launch(tmp_path, *flags, "--base_bits", "4", "--max_steps", "4")
    assert "frozen parameters in 4 bits from --base_bits" in said
    said = launch(tmp_path, *flags, "--base_bits", "8", "--max_steps", "8")
    assert "resuming from" in said
    assert len(metrics(tmp_path)) == 8
    checkpoint = newest(tmp_path / "models/checkpoints")
    assert checkpoint is not None
    expected = merged(open_model("debug"), checkpoint.weights(), selection_of(lora_rank=4))
    exported = load_file(tmp_path / "models/huggingface/model.safetensors")
    for name in expected:
        torch.testing.assert_close(exported[name], expected[name], rtol=0, atol=1e-6)
