"""The MusicGen that `--model_id` names (a short name, a hub id, a folder, `debug`), and its parts.

Each part is loaded on its own and only when it is needed. T5 and EnCodec are needed to fill the cache and to export.
While training, EnCodec is never needed, and T5 only with --tune_text 1.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoFeatureExtractor,
    EncodecFeatureExtractor,
    EncodecModel,
    GenerationConfig,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    MusicgenMelodyConfig,
    MusicgenMelodyForConditionalGeneration,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from trainer.errors import ModelError
from trainer.model.debug_model import build_debug_model, debug_feature_extractor, debug_tokenizer
from trainer.model.model_files import read_config, read_generation_config, read_tokenizer, require_processor
from trainer.model.safetensors_file import files_kept_open
from trainer.model.weights import Weights, current_name, fingerprint, under, weights_in_folder, weights_in_memory
from trainer.spec.model_folder import is_only_a_path, model_folder
from trainer.spec.shapes import DEBUG_NAMES, Shape, hub_id_of, published, shape_of_config, unknown_name

DECODER, PROJECTION, CODEC, TEXT_ENCODER = "decoder.", "enc_to_dec_proj.", "audio_encoder.", "text_encoder."
MELODY_PROJECTION = "audio_enc_to_dec_proj."  # of a melody model
LANGUAGE_MODEL = (DECODER, PROJECTION, MELODY_PROJECTION)  # how the names of its tensors begin
# Settings on which EnCodec's codes depend and which no tensor's name or shape tells. They are part of the identity of a
# cache: another list makes every cache be filled anew.
CODEC_SETTINGS = (
    *("sampling_rate", "upsampling_ratios", "num_quantizers", "use_causal_conv", "use_conv_shortcut"),
    *("normalize", "pad_mode", "dilation_growth_rate", "trim_right_ratio"),
)
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One model: its configuration, and where its tensors and its processor come from. Opening it reads no tensor.

    name     as --model_id gave it
    weights  of all parts, by the names of transformers' `MusicgenForConditionalGeneration`; of a melody model by those
             of `MusicgenMelodyForConditionalGeneration`
    copied   whether its two channels are copies of a mono model's one (trainer/model/stereo.py)

    `load_feature_extractor` gives EnCodec's. A melody model's own one, which hears notes, exists only where torchaudio
    is installed, and has no settings: trainer/exports/processor_files.py writes it.
    """

    name: str
    config: MusicgenConfig | MusicgenMelodyConfig
    generation_config: GenerationConfig
    weights: Weights
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    load_feature_extractor: Callable[[], EncodecFeatureExtractor]
    copied: bool = False

    @property
    def codebooks(self) -> int:
        return self.config.decoder.num_codebooks

    @property
    def channels(self) -> int:
        """Of the sound: 1, or 2 in a stereo model."""
        return self.config.decoder.audio_channels

    @property
    def melody(self) -> bool:
        """Whether the model reads a melody."""
        return isinstance(self.config, MusicgenMelodyConfig)

    @property
    def shape(self) -> Shape:
        return shape_of_config(self.name, self.config.to_dict())

    @property
    def special_token(self) -> int:
        """The code that the decoder reads where the delay pattern has no frame: 2048. It is never predicted."""
        return self.config.decoder.pad_token_id

    @property
    def frame_samples(self) -> int:
        """Audio samples per frame: 640 at 32 kHz and 50 Hz."""
        return self.config.audio_encoder.hop_length

    @property
    def sample_rate_hz(self) -> int:
        return self.config.audio_encoder.sampling_rate

    @property
    def frame_rate_hz(self) -> float:
        return self.sample_rate_hz / self.frame_samples

    def decoder_shape(self) -> str:
        """The decoder's size as text, for messages and for the checkpoint's identity."""
        decoder = self.config.decoder
        return f"{decoder.num_hidden_layers} layers of width {decoder.hidden_size}, {decoder.num_codebooks} codebooks"

    @files_kept_open()
    def probe(self) -> str:
        """A digest of name, shape, first and last eight values of each tensor of the language model.

        It reads little, and training changes those values, so that it tells other weights apart. A checkpoint that
        holds a part of the model is tied to the frozen rest by it: computed otherwise, such runs cannot be resumed.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(name for name in self.weights if name.startswith(LANGUAGE_MODEL)):
            size = math.prod(self.weights.shape(name))
            ends = [self.weights.read(name, 0, min(8, size)), self.weights.read(name, max(0, size - 8), size)]
            digest.update(f"{name} {self.weights.shape(name)} {torch.cat(ends).tolist()}".encode())
        return digest.hexdigest()

    def codec_identity(self) -> str:
        """Digest of everything that a clip's codes depend on besides its audio samples: EnCodec and its settings."""
        return self._codec_identity

    def text_identity(self) -> str:
        """Digest of everything that a caption's states depend on besides its text: T5 and how its tokenizer splits."""
        return self._text_identity

    # Computed once: for T5 it reads hundreds of megabytes.
    @cached_property
    def _codec_identity(self) -> str:
        config = self.config.audio_encoder
        return fingerprint(self.weights, CODEC, also=str([getattr(config, name) for name in CODEC_SETTINGS]))

    @cached_property
    def _text_identity(self) -> str:
        probe = self.load_tokenizer()("The quick brown fox plays a naïve 120 bpm track, <pad>").input_ids
        return fingerprint(self.weights, TEXT_ENCODER, also=str(probe))


def fetch_model(model_id: str) -> None:
    """Have a model of the hub in the local cache, whole. Does nothing for debug and for a local folder.

    Raises ModelError where it cannot be fetched.
    """
    if model_id not in DEBUG_NAMES:
        _folder_of(model_id)


def open_model(model_id: str, *, fetched: bool = False) -> Source:
    """The model that `--model_id` names. A hub id is downloaded unless it is in the local cache.

    model_id  one of DEBUG_NAMES, a short name as `small`, a hub id, or a local folder
    fetched   whether fetch_model was called for it on this machine; then the hub is not asked again, which matters
              where hundreds of processes would

    Raises ModelError where there is none, and where it is no MusicGen.
    """
    if model_id in DEBUG_NAMES:
        stereo, melody = "stereo" in model_id, "melody" in model_id
        return source_of(build_debug_model(stereo=stereo, melody=melody), name=model_id)
    folder = _folder_of(model_id, fetched=fetched)
    config = read_config(folder, model_id)
    melody = isinstance(config, MusicgenMelodyConfig)
    require_processor(folder, model_id, melody=melody)
    return Source(
        name=model_id,
        config=config,
        generation_config=read_generation_config(folder, model_id, config),
        weights=weights_in_folder(folder),
        load_tokenizer=partial(read_tokenizer, folder, model_id),
        load_feature_extractor=(
            partial(codec_feature_extractor, config)
            if melody
            else partial(AutoFeatureExtractor.from_pretrained, folder)
        ),
    )


def source_of(
    model: MusicgenForConditionalGeneration | MusicgenMelodyForConditionalGeneration, *, name: str
) -> Source:
    """A Source over a model in memory, with the debug model's tokenizer and feature extractor."""
    return Source(
        name=name,
        config=model.config,
        generation_config=model.generation_config,
        weights=weights_in_memory(
            {name: value.detach() for name, value in model.state_dict().items() if current_name(name)}
        ),
        load_tokenizer=debug_tokenizer,
        load_feature_extractor=lambda: debug_feature_extractor(model.config.decoder.audio_channels),
    )


def codec_feature_extractor(config: MusicgenConfig | MusicgenMelodyConfig) -> EncodecFeatureExtractor:
    """The feature extractor of a model's EnCodec, as the published models have it, for sound of its channels."""
    return EncodecFeatureExtractor(
        feature_size=config.decoder.audio_channels,
        sampling_rate=config.audio_encoder.sampling_rate,
        padding_value=0.0,
        padding_side="left",
    )


def quiet_libraries() -> None:
    """Keep libraries from printing what is no news here.

    transformers warns that token 2048 is outside the vocabulary, which is how MusicGen is made, and draws progress bars
    of saving. bitsandbytes says, when peft imports it, that it lacks a fast product for CPUs, which nothing here uses.
    DeepSpeed says, when transformers imports it, that there is no GPU, also in programs that use neither.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_news)  # its level it sets itself


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")


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


def free_unused(device: torch.device) -> None:
    """Free what nobody holds any more of models like the above, in host memory and on the device.

    EnCodec's convolutions are in cycles of references, by which their weights, 90 MB of the published codec's, would
    stay until Python next looks for cycles; and torch keeps freed blocks of the sizes that such models need, which no
    training step would reuse.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, in float32 where they are of a float dtype: the tensors may lie in a mapped file or belong to a model."""
    return {
        name: tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in tensors.items()
    }


def _assign(module: nn.Module, tensors: Mapping[str, Tensor], model_name: str) -> None:
    """Put `tensors` in place of the module's own. Raises ModelError where names or shapes differ."""
    try:
        module.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{model_name}: its weights do not fit its configuration: {error}") from error
    for parameter in module.parameters():
        parameter.requires_grad_(True)


def _folder_of(model_id: str, *, fetched: bool = False) -> Path:
    try:
        folder = model_folder(model_id)
    except ModelError as error:
        raise ModelError(f"--model_id {model_id}: {error}") from None
    if folder is not None:
        return folder
    if is_only_a_path(model_id):
        raise ModelError(f"--model_id {model_id}: there is no such folder")
    return _download(hub_id_of(model_id) or model_id, model_id, fetched=fetched)


def _download(hub_id: str, model_id: str, *, fetched: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES), local_files_only=fetched))
        if not fetched and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*HUB_FILES, "pytorch_model*.bin"]))
        return folder
    except HFValidationError as error:
        raise ModelError(f"--model_id {model_id}: {unknown_name(model_id)}, and it can be no hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set and it is not in the local cache" if offline else _first_lines(error)
        if published(model_id) is None:
            raise ModelError(
                f"--model_id {model_id}: {unknown_name(model_id)}. Taken for a hub id, it could not be fetched"
                f" ({reason}). Give one of these names or a local folder; or, if the hub id is right, download it where"
                f" there is a network: `hf download {hub_id}`"
            ) from error
        raise ModelError(
            f"--model_id {model_id}: {hub_id} could not be fetched ({reason}). Give a local folder, or download it"
            f" where there is a network: `hf download {hub_id}`"
        ) from error


def _first_lines(error: Exception) -> str:
    """The first two lines of an error: the hub's say the status, and what it means."""
    return "; ".join([line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()][:2])
