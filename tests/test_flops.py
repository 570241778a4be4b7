"""The count of model FLOPs is torch's own, and the published sizes cost what MusicGen's shapes say."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.debug_model import build_debug_model
from trainer.flops import clip_flops
from trainer.models import load_language_model, source_of
from trainer.shapes import KNOWN, shape_of_config


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


@pytest.mark.parametrize("name,gigaflops", [("small", 2.39), ("medium", 10.25), ("large", 17.9)])
def test_a_frame_of_30_seconds_costs_what_the_shapes_say(name: str, gigaflops: float) -> None:
    # By hand, for small: 6 x (24 x 14 x 1024^2 + 4 x 2048 x 1024) + 6 x 24 x 1024 x 1500 = 2.386e9.
    assert clip_flops(KNOWN[name], 1500) / 1500 / 1e9 == pytest.approx(gigaflops, rel=3e-3)


def test_causal_attention_costs_half_the_square() -> None:
    square = clip_flops(KNOWN["small"], 1500, causal=False) - clip_flops(KNOWN["small"], 1500)
    assert square == 3 * 2 * 24 * 1024 * 1500**2
