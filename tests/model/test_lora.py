"""An adapter's files: what old versions of peft can read, and what reads back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig

from trainer.model.lora import DOWN, UP, read_adapter, save_adapter
from trainer.spec.trainable import Lora

# The fields of LoraConfig in peft 0.6.2, which fails at any other name, as all versions before 0.14 do.
PEFT_0_6_2 = (
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save"),
    *("peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type"),
)


def test_an_adapters_settings_are_known_to_old_versions_of_peft(tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=12.0, dropout=0.1, targets=("v_proj", "fc1"))
    stem = "decoder.model.decoder.layers.0.self_attn.v_proj"
    adapters = {stem + DOWN: torch.rand(4, 8), stem + UP: torch.rand(8, 4)}
    save_adapter(tmp_path, adapters, lora, "facebook/musicgen-small")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings.keys() <= set(PEFT_0_6_2)
    again = LoraConfig.from_pretrained(str(tmp_path))
    assert (again.r, again.lora_alpha, again.lora_dropout, again.bias) == (4, 12.0, 0.1, "none")
    assert set(again.target_modules) == {"v_proj", "fc1"} and again.inference_mode
    assert again.base_model_name_or_path == "facebook/musicgen-small"
    read, tensors = read_adapter(tmp_path)
    assert (read.rank, read.alpha) == (4, 12.0)
    assert all(torch.equal(tensors[name], adapters[name]) for name in adapters)
