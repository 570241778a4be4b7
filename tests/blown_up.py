"""Models of random weights so large that what is generated depends on all that is read: texts, melodies, codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.data.text_states import text_states
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import Source, load_text_encoder

CHORD = (261.63, 392.0)  # c and g, in Hz


def blown_up(source: Source, *, seed: int = 0) -> LanguageModel:
    """The language model of `source` in eval mode, frozen, with weights at which attention is peaked."""
    draw = torch.Generator().manual_seed(seed)
    model = load_language_model(source).eval().requires_grad_(False)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
        start = torch.zeros_like(parameter) if parameter.ndim == 2 else parameter
        parameter.copy_(start + scale * torch.randn(parameter.shape, generator=draw))
    for projection in filter(None, (model.enc_to_dec_proj, model.audio_enc_to_dec_proj)):
        assert isinstance(projection, nn.Linear)
        projection.weight.mul_(8)
        projection.bias.copy_(torch.randn(projection.bias.shape, generator=draw))
    # Of 2048 logits the two best then rarely lie so close together that rounding decides between them.
    for head in model.decoder.lm_heads:
        head.weight.mul_(4)
    return model


def states_of(source: Source, prompt: str | None) -> Tensor | None:
    """T5's states (S, D) of a prompt; None for none."""
    return text_states(load_text_encoder(source), source.load_tokenizer(), prompt or "")


def tones(seconds: float, notes_hz: tuple[float, float] = CHORD) -> Tensor:
    """Two notes in turn, a second each: (samples,) float32 at 32 kHz."""
    time = torch.arange(round(seconds * 32_000)) / 32_000
    first, second = (0.3 * torch.sin(2 * torch.pi * note * time) for note in notes_hz)
    return torch.where(time % 2 < 1, first, second)
