"""The plan counts what making sounds takes, takes the largest need, and refuses sounds that do not fit beside a run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from tests.allocations import peak_bytes
from tests.plan.test_memory import MODELS, STRATEGIES, changed, layout
from tests.plans import engine_for, plan_for
from trainer.errors import ConfigError, MemoryShortError
from trainer.flags.config import Config
from trainer.model.debug_model import build_debug_model
from trainer.model.language_model import LanguageModel
from trainer.model.source import load_codec, source_of
from trainer.plan.launcher import Launch
from trainer.plan.layout import CAPTION_TOKENS, Samples
from trainer.plan.memory import GIB, PARTS, expected_bytes
from trainer.plan.plan import Plan, make_plan
from trainer.plan.request import batch_flags, request_of
from trainer.plan.sampling import copy_bytes, decoding_bytes, generating_bytes
from trainer.plan.strategies import Cluster
from trainer.spec.shapes import KNOWN, MELODY_PLACES
from trainer.spec.trainable import EVERYTHING, count

SAMPLES = Samples(sound_frames=500)
WIDTH, LAYERS = 256, 4


def generate(model: LanguageModel, samples: Samples) -> None:
    """Each step of a sound with guidance, on the keys and values of those before, kept as transformers keeps them."""
    projection, decoder = model.enc_to_dec_proj, model.decoder
    device = projection.weight.device
    prompt_BSD = projection(torch.randn(2, CAPTION_TOKENS, projection.in_features, device=device))
    cache = DynamicCache(config=decoder.config)
    if model.audio_enc_to_dec_proj is None:
        cache = EncoderDecoderCache(cache, DynamicCache(config=decoder.config))
        later_BSD = prompt_BSD
    else:  # the prompt is read with the first step, and stays among the steps
        melody_BCD = model.melody_states(torch.zeros(2, MELODY_PLACES, dtype=torch.int64, device=device))
        prompt_BSD, later_BSD = torch.cat([melody_BCD, prompt_BSD], dim=1), None
    largest_delay = (decoder.num_codebooks - 1) // decoder.config.audio_channels
    at_once = [samples.continued_frames] if samples.continued_frames else []
    for number, steps in enumerate(at_once + [1] * (samples.sound_frames + largest_delay)):
        hidden_BTD = decoder.model(
            input_ids=torch.zeros(2 * decoder.num_codebooks, steps, dtype=torch.int64, device=device),
            encoder_hidden_states=later_BSD if number else prompt_BSD,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        for head in decoder.lm_heads:
            head(hidden_BTD[:, -1:])
    assert cache.get_seq_length() == samples.frames + largest_delay + (
        0 if later_BSD is not None else prompt_BSD.shape[1]
    )


@pytest.mark.parametrize(
    ("model_id", "precision", "samples"),
    [
        ("debug", "no", Samples(sound_frames=150)),
        pytest.param("debug", "bf16", Samples(sound_frames=150), marks=pytest.mark.full),
        pytest.param("debug", "no", Samples(sound_frames=20, continued_frames=1000), marks=pytest.mark.full),
        pytest.param("debug", "bf16", Samples(sound_frames=20, continued_frames=1000), marks=pytest.mark.full),
        pytest.param("debug-stereo", "no", Samples(sound_frames=150), marks=pytest.mark.full),
        ("debug-melody", "no", Samples(sound_frames=50)),
        pytest.param("debug-melody", "bf16", Samples(sound_frames=50), marks=pytest.mark.full),
        pytest.param(
            "debug-stereo-melody", "no", Samples(sound_frames=20, continued_frames=500), marks=pytest.mark.full
        ),
    ],
)
def test_the_copy_and_its_caches_take_what_is_counted(model_id: str, precision: str, samples: Samples) -> None:
    stereo, melody = "stereo" in model_id, "melody" in model_id
    built = build_debug_model(width=WIDTH, layers=LAYERS, heads=4, stereo=stereo, melody=melody)
    source = source_of(built, name="measured")
    shape = replace(KNOWN[model_id], layers=LAYERS, width=WIDTH, ffn=4 * WIDTH)
    plan = plan_for(precision=precision)
    engine = engine_for(plan, Config(dataset_path="unused"), source)

    def make_a_sound() -> None:
        with engine.sampling_model() as model:
            generate(model, samples)

    copy = copy_bytes(shape, plan.layout, count(shape, EVERYTHING))
    expected = copy + generating_bytes(shape, plan.layout, samples)
    assert peak_bytes(make_a_sound) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("model_id", ["debug", "debug-stereo"])
def test_decoding_takes_no_more_than_is_counted(model_id: str) -> None:
    codec, frames, shape = load_codec(source_of(build_debug_model(), name="debug")), 500, KNOWN[model_id]
    codes = torch.randint(0, 2048, (1, 1, shape.codebooks, frames))

    def decode() -> None:
        with torch.no_grad():  # each channel by itself, as trainer/evaluation/generation.py does
            channels = shape.audio_channels
            [codec.decode(codes[:, :, channel::channels], [None])[0] for channel in range(channels)]

    counted = decoding_bytes(shape, frames)
    assert 0.7 * counted < peak_bytes(decode) <= counted


@pytest.mark.parametrize("model", MODELS)
def test_sounds_change_no_other_part_and_the_total_is_the_largest_need(model: str) -> None:
    for strategy in STRATEGIES:
        silent = layout(strategy, 4)
        before = expected_bytes(KNOWN[model], silent)
        memory = expected_bytes(KNOWN[model], changed(silent, samples=SAMPLES))
        assert all(getattr(memory, part) == getattr(before, part) for part in (*PARTS[:-1], "codec", "host"))
        assert before.samples == 0 < memory.samples
        assert memory.total == max(memory.allocated, memory.codec, memory.samples) + memory.reserve
        long = expected_bytes(KNOWN[model], changed(silent, samples=SAMPLES.lasting(200_000)))
        assert long.total == long.samples + long.reserve > memory.total


def plan_of(model: str, gpus: int, gpu_gib: float | None, **flags: Any) -> Plan:
    cluster = Cluster(
        nodes=1,
        gpus_per_node=gpus,
        device="cuda",
        gpu_memory_bytes=None if gpu_gib is None else round(gpu_gib * GIB),
        host_memory_bytes=None,
        supports_bf16=True,
        compiles=True,
    )
    config = Config(dataset_path="unused", **flags)
    request = request_of(config, frozenset(flags), Launch(), frame_rate_hz=50, deepspeed_available=True)
    return make_plan(cluster, KNOWN[model], batch_flags(config, frozenset(flags)), request)


def test_a_plan_without_sounds_says_whether_they_would_fit() -> None:
    roomy, tight, unknown = (plan_of("large", 8, gib) for gib in (80, 12, None))
    assert roomy.samples_fit and "of 80.0 GiB while making sounds: fits" in roomy.describe()
    assert not tight.samples_fit and tight.memory.samples == 0
    assert "of 12.0 GiB while making sounds: does not fit" in tight.describe()
    assert "scripts/generate.py --model" in tight.describe()
    assert unknown.samples_fit and "GiB while making sounds: whether that fits is not known" in unknown.describe()
    stored = json.loads(json.dumps(tight.to_dict()))
    assert stored["samples_fit"] is False and stored["sampling_bytes"] > 12 * GIB and stored["samples"] is None


@pytest.mark.parametrize(("model", "gpus", "gib"), [("small", 1, 16), ("large", 8, 40), ("medium", 2, 24)])
def test_where_sounds_fit_the_layout_is_the_one_without_them(model: str, gpus: int, gib: float) -> None:
    silent, sounding = plan_of(model, gpus, gib), plan_of(model, gpus, gib, sample_every=100)
    workload = replace(sounding.layout.workload, samples=None)
    assert replace(sounding.layout, workload=workload) == silent.layout
    assert silent.samples_fit and silent.sampling_bytes == sounding.sampling_bytes
    assert not any("sounds" in reason for reason in sounding.reasons)


def test_where_they_fit_with_more_sharding_alone_there_is_more() -> None:
    silent, sounding = (plan_of("large", 2, 16, lora_rank=16, sample_every=every) for every in (None, 100))
    assert (silent.strategy, silent.samples_fit) == ("ddp", False)
    assert sounding.strategy == "fsdp" and sounding.samples_fit and sounding.memory.total <= 16 * GIB
    assert "ddp with micro-batch 1 would fit but for the sounds of --sample_every" in "\n".join(sounding.reasons)


def test_sounds_that_do_not_fit_beside_a_run_are_refused_with_what_does() -> None:
    plan_of("large", 8, 12)
    with pytest.raises(
        ConfigError, match=r"--sample_every does not fit beside this run.*leave --sample_every"
    ) as error:
        plan_of("large", 8, 12, sample_every=50)
    assert "scripts/generate.py --model" in str(error.value) and "--sample_seconds" not in str(error.value)
    with pytest.raises(ConfigError, match=r"use --sample_seconds 20, or leave --sample_every out"):
        plan_of("small", 1, 8, sample_every=50, sample_seconds=200)
    plan_of("small", 1, 8, sample_every=50, sample_seconds=20)


def test_a_run_that_does_not_fit_at_all_is_refused_as_without_sounds() -> None:
    with pytest.raises(MemoryShortError, match="does not fit 1 GPU"):
        plan_of("large", 1, 12, sample_every=50)


def test_longer_sounds_guidance_and_a_beginning_take_more() -> None:
    def needed(**flags: Any) -> int:
        return plan_of("large", 1, None, **flags).sampling_bytes

    plain = needed(sample_seconds=30)
    assert needed(sample_seconds=60) > plain > needed(sample_seconds=30, sample_guidance=1)
    assert needed(sample_seconds=30, sample_continue=5) > plain
