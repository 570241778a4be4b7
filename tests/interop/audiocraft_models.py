"""audiocraft's own models with our weights. Import only after `require_audiocraft()`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from audiocraft.models import MusicGen, builders
from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import ConditioningAttributes
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from trainer.exports.audiocraft_config import lm_config, text_encoder_name
from trainer.exports.audiocraft_names import lm_to_audiocraft
from trainer.model.source import Source, load_text_encoder


def build_lm(
    source: Source, state: Mapping[str, Tensor], folder: Path, *, cfg_dropout: float = 0.0
) -> LMModel:
    """audiocraft's LMModel in eval mode, float32, with the tensors of `LanguageModel.state_dict()`.

    folder  where the source's T5 is written, for audiocraft's conditioner to find it
    """
    name = text_encoder_name(source.config)
    if not (folder / name).exists():
        source.load_tokenizer().save_pretrained(folder / name)
        load_text_encoder(source).save_pretrained(folder / name)
    config = OmegaConf.create(
        lm_config(source.config, text_encoder_name=name, segment_seconds=30.0, cfg_dropout=cfg_dropout)
    )
    assert isinstance(config, DictConfig)
    model = build_from(config, folder)
    model.load_state_dict(lm_to_audiocraft(state), strict=True)
    return model.eval()


def build_from(config: DictConfig, folder: Path) -> LMModel:
    """audiocraft's LMModel of an xp.cfg, freshly initialised; `folder` holds its T5."""
    with _working_directory(folder):
        return builders.get_lm_model(config)


def load_exported(folder: Path) -> MusicGen:
    """`MusicGen.get_pretrained` of an exported folder that holds its own T5."""
    with _working_directory(folder):
        return MusicGen.get_pretrained(".", device="cpu")


def conditions(captions: list[str | None]) -> list[ConditioningAttributes]:
    """What LMModel takes for captions; None is the null condition."""
    return [ConditioningAttributes(text={"description": caption}) for caption in captions]


def lm_without_text(codebooks: int, width: int, layers: int, heads: int) -> dict[str, torch.Size]:
    """Shapes by name of audiocraft's language model, without its text conditioner; no memory is used."""
    from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
    from audiocraft.modules.conditioners import ConditionFuser, ConditioningProvider

    with torch.device("meta"):
        model = LMModel(
            DelayedPatternProvider(codebooks),
            ConditioningProvider({}),
            ConditionFuser({"cross": ["description"], "sum": [], "prepend": [], "input_interpolate": []}),
            n_q=codebooks,
            card=2048,
            dim=width,
            num_heads=heads,
            num_layers=layers,
            norm_first=True,
            bias_proj=False,
            bias_ff=False,
            bias_attn=False,
            causal=True,
            memory_efficient=True,
            cross_attention=True,
            activation="gelu",
        )
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@contextmanager
def _working_directory(folder: Path) -> Iterator[None]:
    former = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(former)
