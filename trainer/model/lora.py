"""LoRA: adapters in a model and their first values, peft's files of them, and base and adapters merged.

peft puts the adapters in and computes with them. Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.model.weights import Computed, StoredTensor, Weights
from trainer.spec.trainable import Lora

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
# How peft names what it puts into a model: the weight X.weight of a layer with an adapter becomes
# X.base_layer.weight, and X.lora_A.default.weight (rank, inputs) and X.lora_B.default.weight (outputs, rank) stand
# beside it. In peft's files ".default" is left out, and each name begins with PEFT_PREFIX.
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
PEFT_PREFIX = "base_model.model."
# What an adapter_config.json says: the settings of a plain LoRA that old versions of peft know too. Each new version
# adds settings, and writes them all; another one refuses a file with settings that it does not know, or warns. Files
# with these were loaded by 0.6.2, 0.10.0, 0.13.2, 0.17.1 and 0.21.2.
SETTINGS = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "fan_in_fan_out", "init_lora_weights"),
    *("modules_to_save", "layers_to_transform", "layers_pattern"),
)


def adapted(base: Weights, shapes: Mapping[str, tuple[int, ...]], *, seed: int) -> Weights:
    """The first values of a model with adapters: `base` under peft's names, and adapters that change nothing yet.

    shapes  of every parameter of the model with adapters, by peft's names
    seed    of the adapters' first values

    An adapter's first matrix is uniform in +-1 / sqrt(inputs), float32, and a function of seed and name, so that every
    process makes the same one. The second is zero. Source: peft 0.21, LoraLayer.reset_lora_parameters.
    """
    stored: dict[str, StoredTensor] = {}
    for name, shape in shapes.items():
        if name.endswith(DOWN):
            stored[name] = Computed(shape=shape, compute=partial(_first_values, name, shape, seed))
        elif name.endswith(UP):
            stored[name] = Computed(shape=shape, compute=partial(torch.zeros, shape))
        else:
            stored[name] = base.stored[name.replace(BASE, ".")]
    return Weights(stored)


def with_adapters_merged(base: Weights, adapters: Weights, scale: float) -> Weights:
    """`base` with `scale` x second matrix x first matrix added to each weight that has an adapter, in float32.

    adapters  by peft's names; each merged weight is computed when it is asked for
    """
    stored = dict(base.stored)
    for name, tensor in base.stored.items():
        stem = name.removesuffix(".weight")
        if name != stem and stem + UP in adapters:
            down, up = adapters.stored[stem + DOWN], adapters.stored[stem + UP]
            stored[name] = Computed(shape=tensor.shape, compute=partial(_merged_weight, tensor, down, up, scale))
    return Weights(stored)


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Put adapters into a model on the meta device, and make them all that is trained of it."""
    # peft takes a second or more to import, since it imports bitsandbytes where that is installed.
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    inject_adapter_in_model(_config(lora), model, low_cpu_mem_usage=True)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # peft would cast every input to the adapter's dtype and keep that copy for the backward pass. Autocast and
            # the sharded strategies cast already.
            module.cast_input_dtype_enabled = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((DOWN, UP)))


def save_adapter(folder: Path, adapters: Mapping[str, Tensor], lora: Lora, base_model: str | None) -> None:
    """Write what `PeftModel.from_pretrained(model, folder)` loads, for a MusicgenForConditionalGeneration.

    adapters    by their names in the model, see DOWN and UP
    base_model  the hub id that peft's configuration gives as the adapter's base, if that has one
    """
    tensors = {PEFT_PREFIX + name.replace(".default.", "."): adapters[name].contiguous() for name in adapters}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = _config(lora)
    config.base_model_name_or_path, config.inference_mode = base_model, True
    settings = config.to_dict()
    known = {name: settings[name] for name in SETTINGS} | {"target_modules": sorted(lora.targets)}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> tuple[Lora, dict[str, Tensor]]:
    """An adapter's settings, and its tensors by their names in the model: the inverse of `save_adapter`.

    Takes adapters of a whole MusicgenForConditionalGeneration and of its decoder alone. Dropout, which is of no use
    after training, is not read. Raises ModelError where the folder cannot be read, and for an adapter that is more
    than the product of two matrices.
    """
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_FILE)
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder} holds no readable adapter ({error!r})") from error
    special = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if settings.get(name)]
    names = {stored: _name_in_model(stored) for stored in tensors}
    unknown = [stored for stored, name in names.items() if not name.endswith((DOWN, UP))]
    if settings.get("peft_type") != "LORA" or special or unknown:
        reasons = ", ".join([str(settings.get("peft_type")), *special, *unknown[:3]])
        raise ModelError(f"{folder} is no plain LoRA ({reasons}): merge it in peft, and give the merged model's folder")
    adapters = {name: tensors[stored] for stored, name in names.items()}
    targets = sorted({name.removesuffix(UP).rpartition(".")[2] for name in adapters if name.endswith(UP)})
    return Lora(rank=rank, alpha=alpha, dropout=0.0, targets=tuple(targets)), adapters


def base_named_by(folder: Path) -> str | None:
    """The hub id or folder that an adapter's configuration gives as its base; None where it gives none."""
    try:
        named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return named if isinstance(named, str) and named else None


def _first_values(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


def _merged_weight(weight: StoredTensor, down: StoredTensor, up: StoredTensor, scale: float) -> Tensor:
    """Weight (O, I) + scale x up (O, R) x down (R, I), float32."""
    return torch.addmm(weight.whole().float(), up.whole().float(), down.whole().float(), alpha=scale)


def _name_in_model(stored: str) -> str:
    name = re.sub(r"\.(lora_[AB])\.", r".\1.default.", stored.removeprefix(PEFT_PREFIX))
    return f"decoder.{name}" if name.startswith("model.") else name


def _config(lora: Lora) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int, and divides it by the rank
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
    )
