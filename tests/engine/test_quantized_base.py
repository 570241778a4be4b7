"""A frozen base in 4 or 8 bits: bitsandbytes' numbers, in the plan's bytes, and adapters as beside any other base.

Run on the CPU, for which bitsandbytes has the same codes, below the plan's refusal; tests/gpu has the same on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.plans import engine_for, plan_for
from tests.ranks.cases import differences, steps
from tests.ranks.harness import run_ranks
from tests.rounding import LOSS, NORM
from tests.runs import ROOT
from tests.synthetic import HEADER, random_examples
from trainer.data.order import Row, valid_cells
from trainer.engine import Engine
from trainer.errors import ConfigError, MemoryShortError
from trainer.flags.config import Config, parse
from trainer.model.debug_model import build_debug_model
from trainer.model.language_model import materialize
from trainer.model.source import Source, open_model, source_of
from trainer.model.trained_model import build_trained_model, merged
from trainer.model.weights import weights_in_memory
from trainer.plan import strategies
from trainer.plan.launcher import Launch
from trainer.plan.memory import GIB
from trainer.plan.plan import Plan, make_plan
from trainer.plan.request import batch_flags, request_of
from trainer.preflight import refuse_early
from trainer.run.checkpoint import Saver, newest
from trainer.spec.shapes import KNOWN
from trainer.spec.trainable import LAYER
from trainer.wiring import model_settings

bitsandbytes = pytest.importorskip("bitsandbytes")
from trainer.engine.quantized_base import QuantizedLinear, fill, quantize_layers  # noqa: E402  bitsandbytes is optional

LENGTHS = [20, 35, 12]


def engine_of(bits: int | None, precision: str = "no", source: Source | None = None, **flags: object) -> Engine:
    flags = flags or {"lora_rank": 4}
    config = Config(dataset_path="unused", base_bits=bits, **flags)  # type: ignore[arg-type]
    plan = plan_for(precision=precision, micro_batch=3, base_bits=bits, selection=config.selection)
    return engine_for(plan, config, source)


def losses(engine: Engine, steps: int = 4, new_tokens: int = 0, first: int = 0) -> list[float]:
    rows = [Row(clip=clip, epoch=0, view=0, start=0, frames=n, drop_caption=False) for clip, n in enumerate(LENGTHS)]
    cells, batch = valid_cells(rows, 4, 40), random_examples(LENGTHS, new_tokens=new_tokens).batch(rows)
    return [engine.step([batch], cells, step=first + step, learning_rate=1e-2).loss for step in range(steps)]


def rounded(source: Source, bits: int) -> Source:
    """The source with the linear layers of its decoder's layers as bitsandbytes' own layers give them back."""
    tensors = {name: source.weights[name] for name in source.weights}
    for name, weight in tensors.items():
        if LAYER.match(name) and weight.dim() == 2:
            tensors[name] = given_back(weight, bits)
    return replace(source, weights=weights_in_memory(tensors))


def given_back(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What a bitsandbytes layer makes of the unit vectors: its weight."""
    with torch.no_grad():
        return bitsandbytes_layer(weight, bits)(torch.eye(weight.shape[1])).t().contiguous()


def bitsandbytes_layer(weight: torch.Tensor, bits: int) -> torch.nn.Module:
    outputs, inputs = weight.shape
    layer: torch.nn.Module
    if bits == 4:
        layer = bitsandbytes.nn.LinearNF4(inputs, outputs, bias=False, compute_dtype=torch.float32)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu").train()


@pytest.mark.numbers
@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_and_its_gradient_are_those_of_bitsandbytes_own_layer(bits: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 128, generator=draw) * 0.02, torch.randn(2, 7, 128, generator=draw)
    ours, theirs = QuantizedLinear(128, 96, bits=bits, dtype=torch.float32), bitsandbytes_layer(weight, bits)
    ours.fill(weight)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    products, others = ours(found), theirs(expected)
    torch.testing.assert_close(products, others, rtol=1e-6, atol=1e-6)
    products.square().sum().backward()
    others.square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)
    half = QuantizedLinear(128, 96, bits=bits, dtype=torch.bfloat16)
    half.fill(weight)
    assert half(x).dtype == half.weight().dtype == torch.bfloat16
    error = (ours.weight() - weight).norm() / weight.norm()
    assert (0.05 < error < 0.12) if bits == 4 else (0.001 < error < 0.012), error


@pytest.mark.numbers
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_is_that_beside_a_base_of_the_codes_values_in_the_bytes_of_the_plan(bits: int, precision: str) -> None:
    engine = engine_of(bits, precision)
    found, planned = losses(engine), expected_memory(bits, precision).weights
    assert engine.backend.weight_bytes() == pytest.approx(planned, rel=1e-3)
    expected = losses(engine_of(None, precision, rounded(open_model("debug"), bits)))
    # In bf16 a code's value is rounded to it from float32 either way, and the products are the same.
    assert found == pytest.approx(expected, rel=1e-6 if precision == "no" else 1e-4)
    assert found[-1] < found[0] - 0.05


def expected_memory(bits: int, precision: str):
    config = Config(dataset_path="unused", base_bits=bits, lora_rank=4)  # type: ignore[arg-type]
    return plan_for(precision=precision, base_bits=bits, selection=config.selection).memory


@pytest.mark.numbers
def test_a_word_is_learned_through_a_base_of_4_bits() -> None:
    flags = {"tune_text": True}
    found = losses(engine_of(4, **flags), 2, new_tokens=4)
    expected = losses(engine_of(None, source=rounded(open_model("debug"), 4), **flags), 2, new_tokens=4)
    assert found == pytest.approx(expected, rel=1e-6) and found[0] != found[1]


@pytest.mark.numbers
def test_codes_stay_and_checkpoints_go_to_and_from_any_base(tmp_path: Path) -> None:
    engine = engine_of(4)
    layers = [module for module in engine.backend.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 2 * (2 * 4 + 2)  # of two layers: attention twice, and the feed-forward pair
    before = [layer.weight().clone() for layer in layers]
    whole = losses(engine, 2)
    assert all(torch.equal(layer.weight(), value) for layer, value in zip(layers, before, strict=True))
    saver = Saver(tmp_path, rank=0, world_size=1)
    saver.save(2, engine.state(), HEADER)
    saver.wait()
    whole += losses(engine, 2, first=2)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None and all(".lora_" in name for name in checkpoint.names())

    again, other = engine_of(4), engine_of(None)
    again.load(checkpoint)
    assert losses(again, 2, first=2) == whole[2:]
    other.load(checkpoint)
    assert losses(other, 2, first=2) == pytest.approx(whole[2:], abs=0.02)

    source, selection = open_model("debug"), Config(dataset_path="x", lora_rank=4).selection
    exported, adapters = merged(source, checkpoint.weights(), selection), checkpoint.weights()
    name = "decoder.model.decoder.layers.1.fc1"
    down, up = (adapters[f"{name}.lora_{side}.default.weight"].double() for side in "AB")
    expected = source.weights[f"{name}.weight"].double() + 2 * up @ down
    torch.testing.assert_close(exported[f"{name}.weight"].double(), expected, rtol=0, atol=1e-6)
    assert up.abs().max() > 1e-3


def test_activations_are_those_of_adapters_beside_a_base_in_bf16() -> None:
    kept = [kept_bytes(bits) for bits in (None, 4, 8)]
    assert kept[0] == kept[1] == kept[2] > 0


def kept_bytes(bits: int | None) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass of one clip, parameters excluded."""
    source = source_of(build_debug_model(width=64, layers=2, heads=1), name="measured")
    trainee = build_trained_model(source, model_settings(Config(dataset_path="unused", lora_rank=2)))
    layers = {} if bits is None else quantize_layers(trainee.model, bits=bits, dtype=torch.bfloat16)
    for module in trainee.model.modules():  # as the engine holds the others
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            module.to(torch.bfloat16)
    materialize(trainee.model, torch.device("cpu"))
    fill(layers, lambda key, *ends: trainee.start.read(key.removeprefix("weight/"), *ends), torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in trainee.model.named_parameters():
            parameter.copy_(trainee.start[name])
    codes, text = torch.randint(0, 2048, (1, 4, 32)), torch.randn(1, 1, 512)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        trainee.model(codes, text, torch.ones(1, 1), None, labels_BKT=codes)
    own = {parameter.untyped_storage().data_ptr() for parameter in trainee.model.parameters()}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


def planned(gib: float, gpus: int = 1, device: str = "cuda", **flags: object) -> Plan:
    config = Config(dataset_path="x", device=device, **flags)  # type: ignore[arg-type]
    cluster = strategies.Cluster(
        nodes=1,
        gpus_per_node=gpus,
        device=device,  # type: ignore[arg-type]
        gpu_memory_bytes=round(gib * GIB) if device == "cuda" else None,
        host_memory_bytes=None,
        supports_bf16=device == "cuda",
    )
    asked = request_of(config, frozenset(), Launch(), frame_rate_hz=50, deepspeed_available=True)
    return make_plan(cluster, KNOWN["large"], batch_flags(config, frozenset()), asked)


def test_large_fits_smaller_gpus_with_fewer_bits_and_a_refusal_says_so() -> None:
    weights = [planned(80, lora_rank=16, base_bits=bits).memory.weights / GIB for bits in (4, 8, None)]
    # 48 x 67,108,864 = 3 x 2^30 values, of 0.5 + 1/64 + 1/4096, 1 + 1/512 and 2 bytes; adapters and all else 0.25 GiB.
    assert weights == pytest.approx([1.548 + 0.25, 3.006 + 0.25, 6 + 0.25], abs=0.005)
    assert planned(12, lora_rank=16, base_bits=4).micro_batch >= 1
    with pytest.raises(MemoryShortError, match=r"What would fit: --base_bits 4; or"):
        planned(8, lora_rank=16)
    with pytest.raises(MemoryShortError, match=r"--lora_rank 16 --base_bits 4, which trains adapters beside"):
        planned(8, strategy="single")
    plan = planned(24, gpus=4, lora_rank=16, base_bits=4)
    assert plan.strategy == "ddp" and any("3221 M frozen parameters in 4 bits" in reason for reason in plan.reasons)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"strategy": "fsdp", "gpus": 2},
            r"cannot shard a base of 4 bits: use --strategy ddp, or leave out --base_bits",
        ),
        ({"strategy": "zero2"}, r"cannot shard a base of 4 bits: use --strategy single"),
        ({"offload_optimizer": True}, r"--base_bits 4 does not run with an offloaded optimizer"),
        ({"device": "cpu"}, r"--base_bits 4 needs a CUDA GPU, and this run has none: leave it out"),
    ],
)
def test_what_cannot_hold_such_a_base_is_refused(flags: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(80, lora_rank=16, base_bits=4, **flags)


@pytest.mark.parametrize("flags", [["--base_bits", "4"], ["--base_bits", "8", "--freeze", "layers.0-3"]])
def test_a_base_of_few_bits_is_not_trained_itself(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be trained itself. Add adapters, as in --lora_rank 16, or learn"):
        parse(["--dataset", "x", *flags])


def test_4_and_8_are_all_the_bits_there_are() -> None:
    assert parse(["--dataset", "x", "--base_bits=8", "--lora_rank=2"])[0].base_bits == 8
    with pytest.raises(ConfigError, match=r"--base_bits 16 cannot be used: it takes 4 or 8, or none"):
        parse(["--dataset", "x", "--base_bits", "16", "--lora_rank", "2"])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config, typed = parse(["--dataset", "examples", "--lora_rank", "4", "--base_bits", "4"])
    with pytest.raises(ConfigError, match=r"--base_bits 4 needs the package bitsandbytes: .*'bitsandbytes>=0.50'"):
        refuse_early(config, typed, Launch())


@pytest.mark.full
@pytest.mark.numbers
def test_two_ranks_of_ddp_give_the_losses_of_one_process() -> None:
    flags = {"lora_rank": 4, "base_bits": 4}
    single = run_ranks(1, steps, "single", 2, count=4, flags=flags)[0]
    loss, norm = differences(run_ranks(2, steps, "ddp", 1, count=4, flags=flags)[0], single)
    assert loss <= LOSS and norm <= NORM, (loss, norm)
    assert single.weight_bytes == expected_memory(4, "no").weights


@pytest.mark.full
def test_a_run_without_adapters_imports_no_peft_and_one_with_them_prints_nothing_about_kernels_for_cpus() -> None:
    lines = [
        "import sys, trainer.engine, trainer.exports.export, trainer.model.source",
        "print([name for name in ('peft', 'bitsandbytes') if name in sys.modules])",
        "trainer.model.source.quiet_libraries()",
        "import peft, bitsandbytes",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n")
    assert "gemm_4bit" not in done.stderr


def test_the_working_copy_of_the_largest_matrix_is_counted() -> None:
    held = [planned(80, lora_rank=16, base_bits=bits).memory.buffers for bits in (4, 8, None)]
    largest = 2048 * 8192  # in bf16, and in 4 bits a float32 for each 64 values
    assert (held[0] - held[2], held[1] - held[2]) == (largest * (2 + 4 / 64), largest * 2)
