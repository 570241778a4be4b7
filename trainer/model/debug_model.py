"""`--model_id debug`: a small MusicGen with random weights, built in memory in a second from transformers' own classes.

It stands in for the published models wherever none can be downloaded: same codec rate (32 kHz, 50 Hz, 4 codebooks of
2048 codes), same text conditioning, same names of tensors. It cannot make music, but it can learn to reproduce codes,
which is what the tests and the demo need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    GenerationConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    MusicgenMelodyConfig,
    MusicgenMelodyDecoderConfig,
    MusicgenMelodyForConditionalGeneration,
    T5Config,
    T5Tokenizer,
)

SEED = 20231122
# T5-small's width: audiocraft loads a text encoder only under a name whose width it knows.
TEXT_WIDTH = 512
TEXT_ENCODER_NAME = "t5-small"
# The words of our example captions, each a token of its own as in T5's vocabulary, so that a caption has about as many
# tokens as it has for the published models. Other words are spelled in single characters.
WORDS = [
    "a", "and", "or", "with", "without", "the", "of", "no", "in", "on", "over", "by", "for", "to", "from", "very",
    "music", "song", "tune", "theme", "title", "track", "loop", "instrumental", "solo", "melody", "hook", "chords",
    "riffing", "beat", "rhythm", "bass", "arcade", "game", "video", "boss", "battle", "shooter", "chiptune",
    "techno", "rock", "metal", "ballad", "power", "symphonic", "heavy", "electronic", "drum", "drums", "machine",
    "guitar", "guitars", "synth", "strings", "piano", "lead", "arpeggios", "electric", "clean", "distorted",
    "double", "energetic", "upbeat", "playful", "gentle", "happy", "cheerful", "optimistic", "tense", "epic",
    "heroic", "slow", "fast", "emotional", "simple", "aggressive", "melancholic", "driving", "restless", "bouncy",
    "bright", "light", "catchy", "steady", "galloping", "pounding", "like", "toy", "ending", "ambient", "jazz",
    "house", "hip", "hop", "lofi", "orchestral", "choir", "vocal", "bpm", "minor", "major",
]  # fmt: skip


def build_debug_model(
    *,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    dropout: float = 0.1,
    stereo: bool = False,
    melody: bool = False,
) -> MusicgenForConditionalGeneration | MusicgenMelodyForConditionalGeneration:
    """A MusicgenForConditionalGeneration in eval mode, float32, the same weights at every call.

    width, layers, heads  of the decoder
    stereo, melody        whether it has 8 codebooks, of two channels; whether it is one that reads a melody, a
                          MusicgenMelodyForConditionalGeneration
    dropout               what the decoder's configuration says. The published ones say 0.1, and a run must replace it
                          by its own setting, so the debug model says the same
    """
    kind = MusicgenMelodyConfig if melody else MusicgenConfig
    config = kind(
        text_encoder=_text_config().to_dict(),
        audio_encoder=codec_config().to_dict(),
        decoder=_decoder_config(width, layers, heads, dropout, stereo=stereo, melody=melody).to_dict(),
    )
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(SEED)
        model = (MusicgenMelodyForConditionalGeneration if melody else MusicgenForConditionalGeneration)(config)
        set_codebooks(model.audio_encoder)
    model.config.decoder.decoder_start_token_id = model.config.decoder.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=2048,
        pad_token_id=2048,
        decoder_start_token_id=2048,
        do_sample=True,
        guidance_scale=3.0,
        max_length=1500,
    )
    return model.eval()


def debug_tokenizer() -> T5Tokenizer:
    """A tokenizer of T5's kind (Unigram) and with its special tokens, over printable ASCII characters and WORDS."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = ["▁", *characters, *(f"▁{word}" for word in dict.fromkeys(WORDS))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    # Log probabilities: a word must score better than its characters do together, or it would be spelled.
    vocabulary += [(piece, -4.0 if len(piece) > 1 else -8.0) for piece in pieces]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def debug_feature_extractor(channels: int = 1) -> EncodecFeatureExtractor:
    """The feature extractor that belongs to the debug codec, of a model of so many channels."""
    return EncodecFeatureExtractor(feature_size=channels, sampling_rate=32_000, padding_value=0.0, padding_side="left")


def codec_config(*, filters: int = 8, width: int = 32) -> EncodecConfig:
    """MusicGen's EnCodec: 32 kHz, 50 Hz, 4 codebooks of 2048 codes. The published one has 64 filters and width 128."""
    return EncodecConfig(
        sampling_rate=32_000,
        audio_channels=1,
        normalize=False,
        chunk_length_s=None,
        overlap=None,
        upsampling_ratios=[8, 5, 4, 4],
        num_filters=filters,
        hidden_size=width,
        codebook_size=2048,
        target_bandwidths=[2.2],
        use_causal_conv=False,
        use_conv_shortcut=False,
        norm_type="weight_norm",
        pad_mode="reflect",
    )


def _text_config() -> T5Config:
    return T5Config(
        vocab_size=len(debug_tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        _name_or_path=TEXT_ENCODER_NAME,
    )


def _decoder_config(
    width: int, layers: int, heads: int, dropout: float, *, stereo: bool, melody: bool
) -> MusicgenDecoderConfig | MusicgenMelodyDecoderConfig:
    return (MusicgenMelodyDecoderConfig if melody else MusicgenDecoderConfig)(
        vocab_size=2048,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        num_codebooks=8 if stereo else 4,
        audio_channels=2 if stereo else 1,
        dropout=dropout,
        pad_token_id=2048,
        bos_token_id=2048,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, so that sums have one order.

    With several threads the codebooks would differ in their last bits from machine to machine, and with them the
    codec's identity, by which cached codes are found again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def set_codebooks(codec: EncodecModel) -> None:
    """Draw each stage's codebook from a Gaussian with the mean and deviation of the residuals that the stage gets.

    EncodecModel starts with codebooks of zeros, which map every sound to code 0. The residuals are those of ten seconds
    of a noisy, gliding tone, drawn from torch's global generator.
    """
    residual_DT = codec.encoder(_test_sound(codec.config.sampling_rate))[0]
    for layer in codec.quantizer.layers:
        mean, deviation = residual_DT.mean(dim=1), residual_DT.std(dim=1)
        table = layer.codebook.embed
        table.copy_(mean + deviation * torch.randn(table.shape))
        residual_DT = residual_DT - layer.decode(layer.encode(residual_DT[None]))[0]


def _test_sound(sample_rate_hz: int, seconds: float = 10.0) -> Tensor:
    """Samples (1, 1, seconds x rate) float32, about -1 to 1."""
    time = torch.arange(int(seconds * sample_rate_hz)) / sample_rate_hz
    glide = torch.sin(2 * torch.pi * (110 + 80 * time) * time) * (0.5 + 0.5 * torch.sin(3 * time))
    return (0.4 * glide + 0.2 * torch.randn(time.shape))[None, None]
