"""A MusicGen by name, folder or `debug`, and its parts, each loaded on its own and only when needed.

The trained part is `LanguageModel`: decoder and text projection under the key names that
`MusicgenForConditionalGeneration` gives them. T5 and EnCodec are needed to fill the cache and to export,
never while training.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    EncodecFeatureExtractor,
    EncodecModel,
    GenerationConfig,
    MusicgenConfig,
    MusicgenForCausalLM,
    MusicgenForConditionalGeneration,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from trainer.debug_model import build_debug_model, debug_feature_extractor, debug_tokenizer
from trainer.errors import ModelError
from trainer.loss import codebook_cross_entropy
from trainer.shapes import Shape, shape_of_config
from trainer.weights import MemoryWeights, WeightFiles, Weights, current_name, fingerprint, under

MONO_NAMES = ("small", "medium", "large", "melody", "melody-large")
SHORT_NAMES = (*MONO_NAMES, *(f"stereo-{name}" for name in MONO_NAMES))
DECODER, PROJECTION, CODEC, TEXT_ENCODER = "decoder.", "enc_to_dec_proj.", "audio_encoder.", "text_encoder."
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
# What shapes the codes and no tensor's name or shape tells.
CODEC_SETTINGS = (
    *("sampling_rate", "upsampling_ratios", "num_quantizers", "use_causal_conv", "use_conv_shortcut"),
    *("normalize", "pad_mode", "dilation_growth_rate", "trim_right_ratio"),
)
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the parts of one model come from; opening it has read its configuration and no tensor."""

    name: str
    config: MusicgenConfig
    generation_config: GenerationConfig
    weights: Weights
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    load_feature_extractor: Callable[[], EncodecFeatureExtractor]

    @property
    def codebooks(self) -> int:
        return self.config.decoder.num_codebooks

    @property
    def shape(self) -> Shape:
        return shape_of_config(self.name, self.config.to_dict())

    @property
    def special_token(self) -> int:
        """The code that fills cells of the delay pattern without a frame: 2048, an input only."""
        return self.config.decoder.pad_token_id

    @property
    def frame_samples(self) -> int:
        """Audio samples of one frame: 640 at 32 kHz and 50 Hz."""
        return self.config.audio_encoder.hop_length

    @property
    def sample_rate_hz(self) -> int:
        return self.config.audio_encoder.sampling_rate

    @property
    def frame_rate_hz(self) -> float:
        return self.sample_rate_hz / self.frame_samples

    def decoder_shape(self) -> str:
        """The decoder's size in words, for messages and for the checkpoint."""
        decoder = self.config.decoder
        return f"{decoder.num_hidden_layers} layers of width {decoder.hidden_size}, {decoder.num_codebooks} codebooks"

    def probe(self) -> str:
        """A digest of shape, first and last values of each trained tensor: cheap, and different for other weights."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(name for name in self.weights if name.startswith((DECODER, PROJECTION))):
            size = math.prod(self.weights.shape(name))
            ends = [self.weights.read(name, 0, min(8, size)), self.weights.read(name, max(0, size - 8), size)]
            digest.update(f"{name} {self.weights.shape(name)} {torch.cat(ends).tolist()}".encode())
        return digest.hexdigest()

    def codec_identity(self) -> str:
        """Digest of everything that a clip's codes depend on besides its samples."""
        return self._codec_identity

    def text_identity(self) -> str:
        """Digest of everything that a caption's states depend on besides its words."""
        return self._text_identity

    # Computed once: for T5 it takes a pass over hundreds of megabytes.
    @cached_property
    def _codec_identity(self) -> str:
        config = self.config.audio_encoder
        return fingerprint(self.weights, CODEC, also=str([getattr(config, name) for name in CODEC_SETTINGS]))

    @cached_property
    def _text_identity(self) -> str:
        probe = self.load_tokenizer()("The quick brown fox plays a naïve 120 bpm track, <pad>").input_ids
        return fingerprint(self.weights, TEXT_ENCODER, also=str(probe))


class LanguageModel(nn.Module):
    """MusicGen's trained part: codes and text states in, logits of the next codes out."""

    def __init__(self, decoder: MusicgenForCausalLM, enc_to_dec_proj: nn.Linear):
        super().__init__()
        self.decoder = decoder
        self.enc_to_dec_proj = enc_to_dec_proj

    def forward(
        self,
        inputs_BKT: Tensor,
        text_BSD: Tensor,
        text_mask_BS: Tensor,
        attention_BS: Tensor | None = None,
        labels_BKT: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, K, T, V) of each step's codes; given labels, the summed cross entropy (K,) instead.

        inputs_BKT    int64 in [0, V]: the delayed codes, one step late; V is the special token
        text_BSD      float32: T5's last hidden states, any value where the mask is 0
        text_mask_BS  float32, 1 for a text token; a row of zeros is a null condition, whose keys and
                      values become exactly 0, and with them its cross-attention
        attention_BS  bool, the tokens that may be attended to; None where rows need no mask. Every row
                      must allow one token: softmax over none is NaN
        labels_BKT    int64 in [0, V), or IGNORED. The loss is computed in here so that no wrapper around
                      this module sees, copies or casts the logits

        Source: audiocraft 1.3.0, T5Conditioner.forward masks after the projection, because of its bias.
        """
        text_BSD = self.enc_to_dec_proj(text_BSD) * text_mask_BS[..., None]
        steps = inputs_BKT.shape[-1]
        # Four axes: transformers then uses the mask as it is, without reading it on the host.
        mask = None if attention_BS is None else attention_BS[:, None, None, :].expand(-1, 1, steps, -1)
        hidden_BTD = self.decoder.model(
            input_ids=inputs_BKT.flatten(0, 1),
            encoder_hidden_states=text_BSD,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        heads = self.decoder.lm_heads
        if labels_BKT is None:
            return torch.stack([head(hidden_BTD) for head in heads], dim=1)
        # Head by head: stacked logits would be copied once more here, and filled with zeros in the backward pass.
        return torch.stack([codebook_cross_entropy(head(hidden_BTD), labels_BKT[:, k]) for k, head in enumerate(heads)])


def open_model(model_id: str) -> Source:
    """The model that `--model_id` names: debug, a short name, a hub id, or a local folder.

    Raises ModelError where there is none, where it is no MusicGen, and for melody and stereo models.
    """
    if model_id == "debug":
        return source_of(build_debug_model(), name="debug")
    folder = _folder_of(model_id)
    config = _config_of(folder, model_id)
    _require_processor(folder, model_id)
    return Source(
        name=model_id,
        config=config,
        generation_config=_generation_config(folder, config),
        weights=WeightFiles(folder),
        load_tokenizer=lambda: _tokenizer_of(folder, model_id),
        load_feature_extractor=lambda: AutoFeatureExtractor.from_pretrained(folder),
    )


def source_of(model: MusicgenForConditionalGeneration, *, name: str) -> Source:
    """A Source over a model in memory, with the debug tokenizer."""
    return Source(
        name=name,
        config=model.config,
        generation_config=model.generation_config,
        weights=MemoryWeights(
            {key: value.detach() for key, value in model.state_dict().items() if current_name(key)}
        ),
        load_tokenizer=debug_tokenizer,
        load_feature_extractor=debug_feature_extractor,
    )


def quiet() -> None:
    """Keep libraries from printing what is no news here: transformers token 2048 outside the vocabulary and saving
    bars, bitsandbytes, when peft imports it, that it lacks a fast product for CPUs, which nothing here asks for."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def empty_language_model(source: Source, *, dropout: float = 0.0) -> LanguageModel:
    """The trained part on the meta device, in training mode: shapes, no memory.

    dropout  probability in [0, 1) after embeddings and residual blocks; the published configs say 0.1,
             audiocraft trains with 0. Other dropouts and layer drop are 0.
    """
    config = copy.deepcopy(source.config.decoder)
    config.dropout = dropout
    config.attention_dropout = config.activation_dropout = config.layerdrop = 0.0
    with torch.device("meta"):
        model = LanguageModel(
            MusicgenForCausalLM._from_config(config),
            nn.Linear(source.config.text_encoder.hidden_size, config.hidden_size),
        )
    for name, parameter in model.named_parameters():
        if name not in source.weights or source.weights.shape(name) != tuple(parameter.shape):
            raise ModelError(f"{source.name}: its weights do not fit its configuration at {name}")
    return model.train()


def materialize(model: LanguageModel, device: torch.device) -> None:
    """Give a model from the meta device memory of any content, and its table of positions."""
    model.to_empty(device=device)
    positions = model.decoder.model.decoder.embed_positions
    with torch.device("cpu"):
        table = positions.get_embedding(positions.num_positions, positions.embedding_dim)
    del positions.weights
    positions.register_buffer("weights", table.to(device), persistent=False)


def load_language_model(source: Source, *, dropout: float = 0.0) -> LanguageModel:
    """The trained part in float32 on the CPU, in training mode; see `empty_language_model`."""
    model = empty_language_model(source, dropout=dropout)
    materialize(model, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.weights[name])
    return model


def load_codec(source: Source) -> EncodecModel:
    """EnCodec in float32, frozen and in eval mode, on the CPU."""
    codec = EncodecModel._from_config(source.config.audio_encoder)
    _assign(codec, _float32(under(source.weights, CODEC)), source.name)
    return codec.eval().requires_grad_(False)


def load_text_encoder(source: Source) -> T5EncoderModel:
    """T5's encoder in float32, frozen and in eval mode, on the CPU."""
    encoder = T5EncoderModel._from_config(source.config.text_encoder)
    tensors = _float32(under(source.weights, TEXT_ENCODER))
    tensors["encoder.embed_tokens.weight"] = tensors.get("shared.weight", torch.zeros(0))
    _assign(encoder, tensors, source.name)
    return encoder.eval().requires_grad_(False)


def _float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in tensors.items()
    }


def _assign(module: nn.Module, tensors: Mapping[str, Tensor], model_name: str) -> None:
    """Put `tensors` in place of the module's own, which may be on the meta device."""
    try:
        module.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{model_name}: its weights do not fit its configuration: {error}") from error
    for parameter in module.parameters():
        parameter.requires_grad_(True)


def _folder_of(model_id: str) -> Path:
    path = Path(model_id).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model_id.startswith((".", "~")):
        raise ModelError(f"--model_id {model_id}: there is no such folder")
    hub_id = f"facebook/musicgen-{model_id}" if model_id in SHORT_NAMES else model_id
    for kind in ("melody", "stereo"):  # known by their names, before gigabytes are fetched
        if hub_id.startswith("facebook/musicgen-") and kind in hub_id:
            raise ModelError(f"--model_id {model_id}: {kind} models cannot be trained yet; use small, medium or large")
    return _download(hub_id, model_id)


def _download(hub_id: str, model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*HUB_FILES, "pytorch_model*.bin"]))
        return folder
    except HFValidationError as error:
        raise ModelError(
            f"--model_id {model_id}: neither a folder nor a hub id; short names are {', '.join(SHORT_NAMES)}, debug"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set and it is not in the local cache" if offline else str(error).splitlines()[0]
        raise ModelError(
            f"--model_id {model_id}: {hub_id} could not be fetched ({reason}). Give a local folder, or download it"
            f" where there is a network: `hf download {hub_id}`"
        ) from error


def _config_of(folder: Path, model_id: str) -> MusicgenConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"--model_id {model_id}: {folder} holds no readable config.json ({error})") from error
    if config.model_type == "musicgen_melody":
        raise ModelError(f"--model_id {model_id}: melody models cannot be trained yet; use small, medium or large")
    if not isinstance(config, MusicgenConfig):
        raise ModelError(f"--model_id {model_id} is a {config.model_type} model, not a MusicGen")
    if config.decoder.audio_channels != 1:
        raise ModelError(f"--model_id {model_id}: stereo models cannot be trained yet; use the mono model")
    codec = config.audio_encoder
    if codec.model_type != "encodec" or codec.normalize or codec.chunk_length_s is not None or codec.use_causal_conv:
        raise ModelError(f"--model_id {model_id}: only EnCodec as MusicGen has it (facebook/encodec_32khz) is known")
    if config.text_encoder.model_type != "t5":
        raise ModelError(f"--model_id {model_id}: only T5 as text encoder is known")
    if config.text_encoder.hidden_size == config.decoder.hidden_size:
        raise ModelError(f"--model_id {model_id}: it has no enc_to_dec_proj, which audiocraft's layout needs")
    return config


def _tokenizer_of(folder: Path, model_id: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"--model_id {model_id}: the tokenizer in {folder} cannot be read ({error!r}): download the model again"
        ) from error


def _require_processor(folder: Path, model_id: str) -> None:
    """The tokenizer is looked for by file: without one transformers makes T5's with no words in it."""
    lacking = [] if any((folder / name).is_file() for name in TOKENIZER_FILES) else [TOKENIZER_FILES[0]]
    try:
        AutoFeatureExtractor.from_pretrained(folder)
    except (OSError, ValueError):
        lacking.append("preprocessor_config.json")
    if lacking:
        raise ModelError(
            f"--model_id {model_id}: {folder} lacks {' and '.join(lacking)}: save the base model's processor there"
            " too, with MusicgenProcessor.from_pretrained(...).save_pretrained(...)"
        )


def _generation_config(folder: Path, config: MusicgenConfig) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    special = config.decoder.pad_token_id
    return GenerationConfig(
        bos_token_id=special,
        pad_token_id=special,
        decoder_start_token_id=special,
        do_sample=True,
        guidance_scale=3.0,
        max_length=1500,
    )
