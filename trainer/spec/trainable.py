"""Which parameters a run trains: all, all but frozen parts, adapters beside the model, or new words of T5.

Names and numbers only, without tensors: the plan, the model and the model card all ask here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from trainer.errors import ConfigError
from trainer.spec.shapes import Shape

EMBEDDINGS, HEADS, PROJECTION = "embeddings", "heads", "projection"
PARTS = (EMBEDDINGS, HEADS, PROJECTION)
FREEZABLE = "embeddings, layers.0-11 (or layers.3), heads, projection"
# How the names of each part's tensors begin in LanguageModel; the final norm is frozen and trained with the heads.
PREFIXES = {
    "decoder.model.decoder.embed_tokens.": EMBEDDINGS,
    "decoder.model.decoder.layer_norm.": HEADS,
    "decoder.lm_heads.": HEADS,
    "enc_to_dec_proj.": PROJECTION,
    "audio_enc_to_dec_proj.": PROJECTION,  # of a melody model
}
TEXT_ROWS = "text_rows"  # the parameter of TextTunedModel that holds the new rows of T5's input embedding
LAYER = re.compile(r"decoder\.model\.decoder\.layers\.(\d+)\.")


ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
SELF, CROSS = "self_attn", "encoder_attn"  # the two attentions of a decoder layer, as transformers calls them
ATTENTIONS = (SELF, CROSS)
TEXT_PROJECTION, MELODY_PROJECTION = "enc_to_dec_proj", "audio_enc_to_dec_proj"
TARGETS = (*ATTENTION, "fc1", "fc2", TEXT_PROJECTION, MELODY_PROJECTION)
TARGETS_IN_WORDS = (
    f"{', '.join(TARGETS)} (of melody models), and of one kind of attention, as self_attn.q_proj or encoder_attn.v_proj"
    " (of text models)"
)
ALL_LAYERS = ",".join((*ATTENTION, "fc1", "fc2"))  # every linear layer of the decoder's layers


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters: the product of two matrices of `rank`, times alpha / rank, is added to each target's weight.

    dropout  of a target's input on its way into the adapter
    targets  linear layers by the ends of their names, as TARGETS_IN_WORDS lists them

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the linear layer of this name (fc1, self_attn.q_proj) in a decoder layer has an adapter."""
        return not {name, name.split(".")[-1]}.isdisjoint(self.targets)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is trained: new rows of T5's input embedding alone, adapters alone, or all of the model but what is frozen.

    frozen_parts   names among PARTS
    frozen_layers  decoder layers; layer 0 is the one next to the embeddings
    new_rows       how many rows of T5's input embedding are learned; where there are any, nothing else is trained
    lora           the adapters; where there are any, nothing else is trained
    """

    frozen_parts: tuple[str, ...] = ()
    frozen_layers: tuple[int, ...] = ()
    new_rows: int = 0
    lora: Lora | None = None

    @property
    def everything(self) -> bool:
        return self.lora is None and not self.frozen_parts and not self.frozen_layers and not self.new_rows

    @property
    def tells_channels_apart(self) -> bool:
        """Whether embeddings and heads are trained: all that a model made stereo has for each channel by itself."""
        return not (self.lora or self.new_rows or {EMBEDDINGS, HEADS} & set(self.frozen_parts))

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name in LanguageModel is trained; adapters are not among its parameters."""
        if self.new_rows:
            return name == TEXT_ROWS
        if self.lora:
            return False
        layer = LAYER.match(name)
        if layer:
            return int(layer[1]) not in self.frozen_layers
        return next(part for prefix, part in PREFIXES.items() if name.startswith(prefix)) not in self.frozen_parts

    def describe(self) -> str:
        """In words, for the plan, for checkpoints and for the model card: "all but layers.0-11"."""
        if self.new_rows:
            return f"{self.new_rows} new row(s) of T5's embedding"
        if self.lora:
            return f"LoRA of rank {self.lora.rank}, alpha {self.lora.alpha:g}, on {', '.join(self.lora.targets)}"
        parts = [*self.frozen_parts, *_ranges(self.frozen_layers)]
        return f"all but {', '.join(parts)}" if parts else "everything"


EVERYTHING = Selection()


def refuse_equal_channels(trained: Selection) -> None:
    """Raise ConfigError where training so would leave the channels of a mono model made stereo equal."""
    if not trained.tells_channels_apart:
        raise ConfigError(
            f"--stereo 1 cannot be used with what is trained here ({trained.describe()}): both channels start as copies"
            " of the mono model's one, and are told apart by embeddings and heads alone, which would stay copies. Train"
            " all of the model with --stereo 1 first, then this, from that model: --model_id models/huggingface"
        )


@dataclass(frozen=True, kw_only=True)
class Placeholder:
    """The word that stands in captions and prompts for `vectors` new tokens, as in <my-style>."""

    word: str
    vectors: int

    @property
    def tokens(self) -> tuple[str, ...]:
        """<my-style> of two vectors is <my-style:0> <my-style:1>."""
        return tuple(f"{self.word[:-1]}:{index}>" for index in range(self.vectors))


@dataclass(frozen=True, kw_only=True)
class NewWord:
    """A word to learn: what stands for it, and the known word whose embedding it starts from."""

    placeholder: Placeholder
    init_word: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of parameters that are in memory while training.

    trained        those for which gradients and optimizer state are held
    added          those beside the model's own: of adapters, or new rows of T5's embedding
    frozen_linear  frozen weights of linear layers, which torch's strategies hold in the precision of the computation
    in_layers      those among frozen_linear that --base_bits rounds if it is given: in the decoder's layers, where
                   adapters or new rows alone are trained; else 0
    text_encoder   those of a T5 in the loop, which every process holds whole and in float32
    """

    trained: int
    added: int = 0
    frozen_linear: int = 0
    in_layers: int = 0
    text_encoder: int = 0


def selection_of(
    freeze: str | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    lora_targets: str = ALL_LAYERS,
    *,
    new_rows: int = 0,
) -> Selection:
    """The Selection that flags of these names, or `--tune_text` with so many rows, ask for.

    Raises ConfigError for what they do not know.
    """
    lora = None
    if lora_rank is not None:
        if freeze is not None:
            raise ConfigError("--freeze has no effect with --lora_rank, which freezes the whole model: remove one.")
        alpha = 2.0 * lora_rank if lora_alpha is None else lora_alpha
        lora = Lora(rank=lora_rank, alpha=alpha, dropout=lora_dropout, targets=_targets(lora_targets))
    parts, layers = _frozen(freeze)
    return Selection(frozen_parts=parts, frozen_layers=layers, lora=lora, new_rows=new_rows)


def selection_of_flags(flags: Mapping[str, Any]) -> Selection:
    """The Selection that a run's flags ask for, given by name: those of a Config, or of a checkpoint's header.

    A flag that is absent, as in checkpoints from before it existed, is off.
    """
    lora = {name: flags[name] for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets") if name in flags}
    new_rows = flags["placeholder_vectors"] if flags.get("tune_text") else 0
    return selection_of(flags.get("freeze"), **lora, new_rows=new_rows)


def _targets(text: str) -> tuple[str, ...]:
    known = {*TARGETS, *(f"{kind}.{name}" for kind in ATTENTIONS for name in ATTENTION)}
    items = text.replace(" ", "").split(",")
    for item in items:
        if item not in known:
            raise ConfigError(f"--lora_targets {text}: '{item}' is no linear layer that takes one: {TARGETS_IN_WORDS}.")
    return tuple(sorted(set(items)))


def _frozen(freeze: str | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The parts and the layers that --freeze names, sorted."""
    parts, layers = set(), set()
    for item in () if freeze is None else freeze.replace(" ", "").split(","):
        numbers = re.fullmatch(r"layers\.(\d+)(?:-(\d+))?", item)
        if numbers and int(numbers[1]) <= int(numbers[2] or numbers[1]):
            layers |= set(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
        elif item in PARTS:
            parts.add(item)
        else:
            raise ConfigError(f"--freeze {freeze}: '{item}' is no part of the model; it takes a list of {FREEZABLE}.")
    return tuple(sorted(parts)), tuple(sorted(layers))


@lru_cache(maxsize=8)
def count(shape: Shape, selection: Selection) -> Counts:
    """How many parameters of a model of this shape are trained.

    Raises ConfigError where a frozen layer, or a layer that is to get an adapter, does not exist, and where nothing is
    left to train.
    """
    if selection.lora:
        _refuse_absent_targets(shape, selection.lora)
    if selection.new_rows or selection.lora:
        rows, t5 = selection.new_rows * shape.text_width, shape.text_encoder if selection.new_rows else 0
        added = adapter_parameters(shape, selection.lora) if selection.lora else rows
        in_layers = shape.layers * part_sizes(shape)["layer"][1]
        return Counts(
            trained=added, added=added, frozen_linear=shape.cast_parameters, in_layers=in_layers, text_encoder=t5
        )
    beyond = [layer for layer in selection.frozen_layers if layer >= shape.layers]
    if beyond:
        raise ConfigError(f"--freeze layers.{beyond[0]}: {shape.name} has layers.0-{shape.layers - 1}")
    frozen, linear = 0, 0
    for part, (parameters, of_linear) in part_sizes(shape).items():
        times = len(selection.frozen_layers) if part == "layer" else int(part in selection.frozen_parts)
        frozen, linear = frozen + times * parameters, linear + times * of_linear
    if frozen == shape.parameters:
        raise ConfigError(f"--freeze {selection.describe().removeprefix('all but ')} leaves nothing to train")
    return Counts(trained=shape.parameters - frozen, frozen_linear=linear)


def adapter_parameters(shape: Shape, lora: Lora) -> int:
    """How many parameters the adapters have: a matrix of rank x inputs and one of outputs x rank per target."""
    wide, ffn = 2 * shape.width, shape.width + shape.ffn
    in_layer = {"fc1": ffn, "fc2": ffn}
    for kind in ATTENTIONS if shape.cross_attention else ATTENTIONS[:1]:
        in_layer |= {f"{kind}.{name}": wide for name in ATTENTION}
    of_layers = sum(size for name, size in in_layer.items() if lora.adapts(name))
    inputs = {TEXT_PROJECTION: shape.text_width, MELODY_PROJECTION: shape.chroma_bins}
    projections = sum(size + shape.width for name, size in inputs.items() if lora.adapts(name))
    return lora.rank * (shape.layers * of_layers + projections)


def _refuse_absent_targets(shape: Shape, lora: Lora) -> None:
    """Raise ConfigError for a target that this kind of model has not: peft would leave it out and say nothing."""
    for target in lora.targets:
        reason = ""
        if target == MELODY_PROJECTION and not shape.melody:
            reason = "is the projection of the melody, which only melody models read"
        if target.startswith(f"{CROSS}.") and not shape.cross_attention:
            reason = "belongs to the attention to the text, and melody models read the text in front of the codes"
        if reason:
            raise ConfigError(f"--lora_targets {target}: {shape.name} has no such layer. It {reason}: leave it out")


def part_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """How many parameters each part has, and how many of these are in linear layers. "layer" is one decoder layer."""
    norms = (3 if shape.cross_attention else 2) * 2 * shape.width
    embeddings = shape.codebooks * (shape.codes + 1) * shape.width
    heads = shape.codebooks * shape.codes * shape.width
    projection = shape.rest_parameters - embeddings - heads - 2 * shape.width
    return {
        "layer": (shape.layer_parameters, shape.layer_parameters - norms),
        EMBEDDINGS: (embeddings, 0),
        HEADS: (heads + 2 * shape.width, heads),
        PROJECTION: (projection, projection),
    }


def _ranges(numbers: tuple[int, ...]) -> Iterator[str]:
    """(0, 1, 2, 5) as layers.0-2, layers.5."""
    start = 0
    for index, number in enumerate(numbers):
        if index + 1 == len(numbers) or numbers[index + 1] != number + 1:
            first = numbers[start]
            yield f"layers.{first}-{number}" if number > first else f"layers.{number}"
            start = index + 1
