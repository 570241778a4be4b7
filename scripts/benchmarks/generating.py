"""How fast codes are made: ours one by one and together, transformers' own `generate`, and audiocraft's."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

from benchmarks.contestants import AUTOCAST, TEXT
from benchmarks.random_models import random_source
from benchmarks.report import Row
from benchmarks.work import CODES, Work
from trainer.evaluation.decoding import Decoding
from trainer.evaluation.generation import Request, Sampling, generate_all
from trainer.exports.audiocraft_names import lm_to_audiocraft
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import quiet_libraries

Way = Callable[[], Tensor]  # makes all sounds and returns their codes (B, K, T)
THEIRS = "transformers' generate"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """B sounds that every contestant makes.

    model      a text model in eval mode, frozen, float32, on its device
    text_BSD   (B, S, D) float32, on the CPU
    precision  of the contestants: "no" is float32
    """

    model: LanguageModel
    text_BSD: Tensor
    frames: int
    sampling: Sampling
    precision: str = "no"

    @property
    def device(self) -> torch.device:
        return self.model.enc_to_dec_proj.weight.device


def measure(works: Sequence[Work], sounds: int, rounds: int) -> Iterator[list[Row]]:
    """For each work, one row for each contestant, which take turns; `sounds` at once, guided, drawn from 250 codes."""
    quiet_libraries()
    for work in works:
        if work.shape.melody:
            raise SystemExit(f"--suite generating is for text models, and {work.model} reads melodies: use small")
        yield _measured(work, sounds, rounds)


def _measured(work: Work, sounds: int, rounds: int) -> list[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = load_language_model(random_source(work.model, work.layers)).to(device).eval().requires_grad_(False)
    asked = Asked(
        model=model,
        text_BSD=torch.randn(sounds, work.text_tokens, work.shape.text_width),
        frames=work.frames,
        sampling=Sampling(),
        precision=work.precision,
    )
    contestants = ways(asked)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, make in contestants.items():
            since = time.perf_counter()
            codes_BKT = make()  # on the CPU, so that a GPU is waited for
            seconds[name].append(time.perf_counter() - since)
            assert codes_BKT.shape == (sounds, work.shape.codebooks, work.frames)
    made = sounds * work.shape.codebooks * work.frames
    return [
        {
            "case": "generate",
            "what": name,
            "model": work.model,
            "layers": work.shape.layers,
            "clips": sounds,
            "frames": work.frames,
            "precision": work.precision,
            "codes_per_second": made / statistics.median(own[1:]),
            "codes_of_transformers": statistics.median(
                theirs / one for theirs, one in zip(seconds[THEIRS][1:], own[1:], strict=True)
            ),
            "first_seconds": own[0],
        }
        for name, own in seconds.items()
    ]


def ways(asked: Asked) -> dict[str, Way]:
    """The contestants by name; audiocraft where it is installed, the compiled step on a GPU."""
    model = _in_precision(asked)
    found = {
        "one by one": lambda: torch.cat([_ours(asked, model, [n], Decoding()) for n in range(len(asked.text_BSD))]),
        "together": lambda: _ours(asked, model, range(len(asked.text_BSD)), Decoding()),
        "static cache": lambda: _ours(asked, model, range(len(asked.text_BSD)), Decoding(static_cache=True)),
    }
    if asked.device.type == "cuda":
        compiled = Decoding(static_cache=True, compiled=True)
        found["compiled"] = lambda: _ours(asked, model, range(len(asked.text_BSD)), compiled)
    found[THEIRS] = _theirs(asked)
    if importlib.util.find_spec("audiocraft") is not None:
        found["audiocraft's generate"] = _audiocrafts(asked)
    return found


def _in_precision(asked: Asked) -> LanguageModel:
    """Ours: linear layers in the precision, as load_for_generation has them."""
    if asked.precision == "no":
        return asked.model
    model = copy.deepcopy(asked.model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(AUTOCAST[asked.precision])
    return model


def _ours(asked: Asked, model: LanguageModel, numbers: Sequence[int], decoding: Decoding) -> Tensor:
    requests = [
        Request(text_SD=asked.text_BSD[number], generator=torch.Generator().manual_seed(number)) for number in numbers
    ]
    made = generate_all(model, requests, frames=asked.frames, sampling=asked.sampling, decoding=decoding)
    assert made is not None, "nothing stops it"
    return torch.stack(made)


def _conditions(asked: Asked) -> Tensor:
    """The projected texts, and behind them null conditions where it is guided: (B or 2 B, S, D) in float32."""
    text_BSD = asked.model.enc_to_dec_proj(asked.text_BSD.to(asked.device))
    return torch.cat([text_BSD, torch.zeros_like(text_BSD)]) if asked.sampling.guidance > 1 else text_BSD


def _theirs(asked: Asked) -> Way:
    """transformers' `generate` of its decoder: what MusicgenForConditionalGeneration does between T5 and EnCodec."""
    decoder, text_RSD, sounds = asked.model.decoder, _conditions(asked), len(asked.text_BSD)
    if asked.precision != "no":
        decoder, text_RSD = (one.to(AUTOCAST[asked.precision]) for one in (copy.deepcopy(decoder), text_RSD))
    delays = (decoder.num_codebooks - 1) // decoder.config.audio_channels
    drawn: dict[str, Any] = {"temperature": asked.sampling.temperature, "top_k": asked.sampling.top_k}
    config = GenerationConfig(
        **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), CODES),
        guidance_scale=asked.sampling.guidance,
        max_new_tokens=asked.frames + delays,
        do_sample=not asked.sampling.greedy,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        **({} if asked.sampling.greedy else drawn),
    )
    start = torch.full((sounds * decoder.num_codebooks, 1), CODES, device=asked.device)

    def make() -> Tensor:
        return decoder.generate(
            inputs=start,
            generation_config=config,
            attention_mask=torch.ones(sounds, 1, dtype=torch.int64, device=asked.device),
            encoder_hidden_states=text_RSD,
            encoder_attention_mask=torch.ones(text_RSD.shape[:2], dtype=torch.int64, device=asked.device),
            past_key_values=EncoderDecoderCache(
                DynamicCache(config=decoder.config), DynamicCache(config=decoder.config)
            ),
        ).cpu()

    return make


def _audiocrafts(asked: Asked) -> Way:
    """audiocraft's LMModel.generate, with the same weights; its text conditioner is given states, as ours is."""
    from benchmarks.audiocraft_stub import import_audiocraft  # it pins a torch that is not this one

    import_audiocraft()
    from audiocraft.modules.conditioners import ConditioningAttributes, ConditioningProvider

    text_RSD = _conditions(asked)
    dtype = torch.float32 if asked.precision == "no" else AUTOCAST[asked.precision]

    class Given(ConditioningProvider):
        def __init__(self) -> None:
            super().__init__({})

        def tokenize(self, inputs: Any) -> Any:
            return inputs

        def forward(self, tokenized: Any) -> Any:
            return {TEXT: (text_RSD.to(dtype), torch.ones(text_RSD.shape[:2], device=text_RSD.device))}

    model = _audiocrafts_model(asked, Given()).to(asked.device, dtype).eval()
    prompts = [ConditioningAttributes(text={TEXT: "given"})] * len(asked.text_BSD)

    @torch.no_grad()
    def make() -> Tensor:
        return model.generate(
            None,
            prompts,
            max_gen_len=asked.frames,
            use_sampling=not asked.sampling.greedy,
            temp=asked.sampling.temperature,
            top_k=asked.sampling.top_k,
            cfg_coef=asked.sampling.guidance,
        ).cpu()

    return make


def _audiocrafts_model(asked: Asked, provider: Any) -> Any:
    """audiocraft's LMModel with the weights of ours, and this in place of its conditioners."""
    from audiocraft.models.lm import LMModel
    from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
    from audiocraft.modules.conditioners import ConditionFuser

    config = asked.model.decoder.config
    delays = [k // config.audio_channels for k in range(config.num_codebooks)]
    model = LMModel(
        DelayedPatternProvider(config.num_codebooks, delays),
        provider,
        ConditionFuser({"cross": [TEXT], "sum": [], "prepend": [], "input_interpolate": []}),
        n_q=config.num_codebooks,
        card=CODES,
        dim=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        hidden_scale=config.ffn_dim // config.hidden_size,
        norm_first=True,
        bias_proj=False,
        bias_ff=False,
        bias_attn=False,
        causal=True,
        memory_efficient=True,
        cross_attention=True,
        activation="gelu",
    )
    state = lm_to_audiocraft(asked.model.state_dict())
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("condition_provider")})
    return model
