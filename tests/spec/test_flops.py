"""The count of model FLOPs is torch's own, whatever is trained, and the published sizes cost what their shapes say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.synthetic import random_examples
from trainer.data.order import Row
from trainer.flags.config import Config
from trainer.model.debug_model import build_debug_model
from trainer.model.language_model import LanguageModel, load_language_model, materialize
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import Source, source_of
from trainer.model.trained_model import build_trained_model
from trainer.spec.flops import clip_flops
from trainer.spec.shapes import KNOWN, MELODY_PLACES, Shape
from trainer.spec.trainable import selection_of
from trainer.wiring import model_settings

KINDS = {
    "text": {},
    "stereo": {"stereo": True},
    "melody": {"melody": True},
    "stereo melody": {"stereo": True, "melody": True},
}
LAYERS, FRAMES, TOKENS = 3, 11, 5
SIZES = [(50, 12), (7, 1), (64, 1)]  # frames, tokens of text


def source_of_kind(kind: str, layers: int = LAYERS) -> Source:
    return source_of(build_debug_model(width=128, layers=layers, heads=2, **KINDS[kind]), name="counted")


def counted(model: LanguageModel, shape: Shape, text: torch.Tensor, frames: int, rows: int = 2) -> int:
    """What torch counts of forward and backward, as plain products: the fused kernels' own counts differ by what they
    compute twice."""
    codes = torch.randint(0, 2048, (rows, shape.codebooks, frames))
    melody = torch.randint(0, 12, (rows, MELODY_PLACES)) if shape.melody else None
    mask = torch.ones(rows, text.shape[1])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(codes, text, mask, labels_BKT=codes, melody_BC=melody).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "frames,text_tokens,kind,layers",
    [
        *((frames, tokens, "text", layers) for frames, tokens in SIZES for layers in (1, 3)),
        *((*SIZES[0], kind, 3) for kind in KINDS if kind != "text"),
        *(
            pytest.param(*size, kind, 3, marks=pytest.mark.full)
            for size in SIZES[1:]
            for kind in KINDS
            if kind != "text"
        ),
    ],
)
def test_the_count_is_that_of_torchs_flop_counter(frames: int, text_tokens: int, kind: str, layers: int) -> None:
    source = source_of_kind(kind, layers)
    shape, rows = source.shape, 2
    expected = counted(load_language_model(source), shape, torch.randn(rows, text_tokens, shape.text_width), frames)
    assert rows * clip_flops(shape, frames, text_tokens, causal=False) == expected


@pytest.mark.parametrize("kind", ["melody", "stereo melody"])
def test_the_count_of_a_melody_models_micro_batch_is_that_of_its_rows_places(kind: str) -> None:
    """As the trainer makes it: a clip without a caption has one place of text, one of zeros, before its codes."""
    source = source_of_kind(kind)
    name = "debug-stereo-melody" if source.shape.audio_channels == 2 else "debug-melody"
    examples = replace(random_examples([40, 40], [None, None], model=name), shape=source.shape)
    batch = examples.batch([Row(clip=n, epoch=0, view=0, start=0, frames=40, drop_caption=False) for n in range(2)])
    model = load_language_model(source)
    inputs = (batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS, batch.labels_BKT)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs, batch.melody_BC).sum().backward()
    assert batch.inputs_BKT.shape[-1] == 40  # crops of the longest length have no steps more than frames
    assert counter.get_total_flops() == 2 * clip_flops(source.shape, 40, 0, causal=False)
    assert batch.flops == 2 * clip_flops(source.shape, 40)


def trained_model(kind: str, **flags: object) -> tuple[LanguageModel, Shape]:
    source = source_of_kind(kind)
    trainee = build_trained_model(source, model_settings(Config(dataset_path="x", **flags)))  # type: ignore[arg-type]
    materialize(trainee.model, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in trainee.model.named_parameters():
            parameter.copy_(trainee.start[name])
    return trainee.model, source.shape


OF_EVERY_KIND = [
    {"freeze": "embeddings"},
    {"freeze": "layers.0-1,embeddings"},
    {"freeze": "layers.0,embeddings,projection"},
    {"freeze": "layers.0-2,embeddings,projection"},
    {"freeze": "layers.0-2,embeddings,heads"},
    {"freeze": "layers.1,heads"},
    {"lora_rank": 3},
    {"lora_rank": 3, "lora_targets": "fc2"},
    {"lora_rank": 3, "lora_targets": "self_attn.v_proj"},
    {"lora_rank": 3, "lora_targets": "enc_to_dec_proj"},
]
MELODY_QUICK = OF_EVERY_KIND[2:4] + OF_EVERY_KIND[-1:]


@pytest.mark.parametrize(
    "kind,flags",
    [
        *(("text", flags) for flags in OF_EVERY_KIND),
        *(
            ("melody", flags) if flags in MELODY_QUICK else pytest.param("melody", flags, marks=pytest.mark.full)
            for flags in OF_EVERY_KIND
        ),
        ("text", {"lora_rank": 3, "lora_targets": "encoder_attn.k_proj,self_attn.out_proj"}),
        ("stereo", {"lora_rank": 3}),
        ("stereo melody", {"lora_rank": 3}),
        ("stereo melody", {"freeze": "layers.0-1,embeddings"}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_gradients_that_nothing_needs_are_not_counted(kind: str, flags: dict) -> None:
    model, shape = trained_model(kind, **flags)
    expected = counted(model, shape, torch.randn(2, TOKENS, shape.text_width), FRAMES)
    config = Config(dataset_path="x", **flags)
    assert 2 * clip_flops(shape, FRAMES, TOKENS, config.selection, causal=False) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_word_costs_the_gradient_through_the_whole_model_and_t5_is_not_counted(kind: str) -> None:
    model, shape = trained_model(kind, tune_text=True)
    assert isinstance(model, TextTunedModel)
    tokens = torch.tensor([[*range(199, 203), 1]] * 2)  # the four new ones, and </s>
    with FlopCounterMode(display=False) as of_t5, sdpa_kernel(SDPBackend.MATH):
        model.text_states(tokens, None).sum().backward()
    expected = counted(model, shape, tokens, FRAMES) - of_t5.get_total_flops()
    assert 2 * clip_flops(shape, FRAMES, TOKENS, selection_of(new_rows=4), causal=False) == expected


def test_frozen_weights_leave_two_thirds_of_a_long_clips_flops() -> None:
    lora = selection_of(lora_rank=16)
    share = clip_flops(KNOWN["large"], 1500, 20, lora) / clip_flops(KNOWN["large"], 1500, 20)
    assert 0.66 < share < 0.70  # attention's scores have no weights, and adapters are a hundredth


@pytest.mark.parametrize(
    "name,gigaflops",
    [
        ("small", 2.39), ("medium", 10.25), ("large", 17.9), ("melody", 10.40), ("melody-large", 18.06),
        ("stereo-small", 2.436), ("stereo-medium", 10.33), ("stereo-large", 18.0),
        ("stereo-melody", 10.48), ("stereo-melody-large", 18.16),
    ],
)  # fmt: skip
def test_a_frame_of_30_seconds_costs_what_the_shapes_say(name: str, gigaflops: float) -> None:
    # By hand, for small: 6 x (24 x 14 x 1024^2 + 4 x 2048 x 1024) + 6 x 24 x 1024 x 1500 = 2.386e9.
    # For melody, of 235 + 1 + 1500 = 1736 places: 6 x (1736 x 48 x 12 x 1536^2 + 1500 x 4 x 2048 x 1536) + 6 x 48
    # x 1536 x 1736^2 + 4 x 1536 x (768 + 12 x 235) = 1.5601e13, a 1500th of which is 10.40e9.
    assert clip_flops(KNOWN[name], 1500) / 1500 / 1e9 == pytest.approx(gigaflops, rel=3e-3)


def test_causal_attention_costs_half_the_square() -> None:
    square = clip_flops(KNOWN["small"], 1500, causal=False) - clip_flops(KNOWN["small"], 1500)
    assert square == 3 * 2 * 24 * 1024 * 1500**2
