"""The count of model FLOPs is torch's own, whatever is trained, and the published sizes cost what their shapes say."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.flags.config import Config
from trainer.model.debug_model import build_debug_model
from trainer.model.language_model import LanguageModel, load_language_model, materialize
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import source_of
from trainer.model.trained_model import build_trained_model
from trainer.spec.flops import clip_flops
from trainer.spec.shapes import KNOWN, Shape, shape_of_config
from trainer.spec.trainable import selection_of
from trainer.wiring import model_settings


@pytest.mark.parametrize("frames,text_tokens", [(7, 1), (50, 12), (64, 1)])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_count_is_that_of_torchs_flop_counter(frames: int, text_tokens: int, layers: int) -> None:
    source = source_of(build_debug_model(width=128, layers=layers, heads=2), name="counted")
    shape = shape_of_config("counted", source.config.to_dict())
    model, rows = load_language_model(source), 2
    codes = torch.randint(0, 2048, (rows, 4, frames))
    text = torch.randn(rows, text_tokens, shape.text_width)
    # As plain products: the fused kernels' own counts differ by what they compute twice.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(codes, text, torch.ones(rows, text_tokens), labels_BKT=codes).sum().backward()
    assert counter.get_total_flops() == rows * clip_flops(shape, frames, text_tokens, causal=False)


FRAMES, TOKENS = 11, 5


def trained_model(**flags: object) -> tuple[LanguageModel, Shape]:
    source = source_of(build_debug_model(width=128, layers=3, heads=2), name="counted")
    trainee = build_trained_model(source, model_settings(Config(dataset_path="x", **flags)))  # type: ignore[arg-type]
    materialize(trainee.model, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in trainee.model.named_parameters():
            parameter.copy_(trainee.start[name])
    return trainee.model, shape_of_config("counted", source.config.to_dict())


def counted(model: LanguageModel, text: torch.Tensor, rows: int = 2) -> int:
    """What torch counts of forward and backward."""
    codes = torch.randint(0, 2048, (rows, 4, FRAMES))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(codes, text, torch.ones(rows, TOKENS), labels_BKT=codes).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "flags",
    [
        {"freeze": "embeddings"},
        {"freeze": "layers.0-1,embeddings"},
        {"freeze": "layers.0,embeddings,projection"},
        {"freeze": "layers.0-2,embeddings,projection"},
        {"freeze": "layers.0-2,embeddings,heads"},
        {"freeze": "layers.1,heads"},
        {"lora_rank": 3},
        {"lora_rank": 3, "lora_targets": "fc2"},
        {"lora_rank": 3, "lora_targets": "encoder_attn.k_proj,self_attn.out_proj"},
        {"lora_rank": 3, "lora_targets": "self_attn.v_proj"},
        {"lora_rank": 3, "lora_targets": "enc_to_dec_proj"},
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_gradients_that_nothing_needs_are_not_counted(flags: dict) -> None:
    model, shape = trained_model(**flags)
    expected = counted(model, torch.randn(2, TOKENS, shape.text_width))
    config = Config(dataset_path="x", **flags)
    assert 2 * clip_flops(shape, FRAMES, TOKENS, config.selection, causal=False) == expected


def test_a_learned_word_costs_the_gradient_through_the_whole_model_and_t5_is_not_counted() -> None:
    model, shape = trained_model(tune_text=True)
    assert isinstance(model, TextTunedModel)
    tokens = torch.tensor([[*range(199, 203), 1]] * 2)  # the four new ones, and </s>
    with FlopCounterMode(display=False) as of_t5, sdpa_kernel(SDPBackend.MATH):
        model.text_states(tokens, None).sum().backward()
    expected = counted(model, tokens) - of_t5.get_total_flops()
    assert 2 * clip_flops(shape, FRAMES, TOKENS, selection_of(new_rows=4), causal=False) == expected


def test_frozen_weights_leave_two_thirds_of_a_long_clips_flops() -> None:
    lora = selection_of(lora_rank=16)
    share = clip_flops(KNOWN["large"], 1500, 20, lora) / clip_flops(KNOWN["large"], 1500, 20)
    assert 0.66 < share < 0.70  # attention's scores have no weights, and adapters are a hundredth


@pytest.mark.parametrize("name,gigaflops", [("small", 2.39), ("medium", 10.25), ("large", 17.9)])
def test_a_frame_of_30_seconds_costs_what_the_shapes_say(name: str, gigaflops: float) -> None:
    # By hand, for small: 6 x (24 x 14 x 1024^2 + 4 x 2048 x 1024) + 6 x 24 x 1024 x 1500 = 2.386e9.
    assert clip_flops(KNOWN[name], 1500) / 1500 / 1e9 == pytest.approx(gigaflops, rel=3e-3)


def test_causal_attention_costs_half_the_square() -> None:
    square = clip_flops(KNOWN["small"], 1500, causal=False) - clip_flops(KNOWN["small"], 1500)
    assert square == 3 * 2 * 24 * 1024 * 1500**2
