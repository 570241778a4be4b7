"""Which parameters a run trains: all, all but frozen parts, or adapters beside the model; names and numbers only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.errors import ConfigError
from trainer.shapes import Shape

EMBEDDINGS, HEADS, PROJECTION = "embeddings", "heads", "projection"
PARTS = (EMBEDDINGS, HEADS, PROJECTION)
FREEZABLE = "embeddings, layers.0-11 (or layers.3), heads, projection"
# How the parts' tensors are called in LanguageModel; the final norm goes with the heads.
PREFIXES = {
    "decoder.model.decoder.embed_tokens.": EMBEDDINGS,
    "decoder.model.decoder.layer_norm.": HEADS,
    "decoder.lm_heads.": HEADS,
    "enc_to_dec_proj.": PROJECTION,
}
TEXT_ROWS = "text_rows"  # the new rows, in TextTunedModel
LAYER = re.compile(r"decoder\.model\.decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of the model is trained.

    frozen_parts   of embeddings, heads, projection
    frozen_layers  decoder layers, counted from 0, the one next to the embeddings
    new_rows       of T5's input embedding; where there are any, nothing else is trained
    """

    frozen_parts: tuple[str, ...] = ()
    frozen_layers: tuple[int, ...] = ()
    new_rows: int = 0

    @property
    def everything(self) -> bool:
        return not self.frozen_parts and not self.frozen_layers and not self.new_rows

    @property
    def little(self) -> bool:
        """Whether so few parameters are trained that sharding their optimizer state saves nothing."""
        return self.new_rows > 0

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name in LanguageModel is trained."""
        if self.new_rows:
            return name == TEXT_ROWS
        layer = LAYER.match(name)
        if layer:
            return int(layer[1]) not in self.frozen_layers
        return next(part for prefix, part in PREFIXES.items() if name.startswith(prefix)) not in self.frozen_parts

    def describe(self) -> str:
        """In words, for the plan, for checkpoints and for the model card: "all but layers.0-11"."""
        if self.new_rows:
            return f"{self.new_rows} new row(s) of T5's embedding"
        parts = [*self.frozen_parts, *_ranges(self.frozen_layers)]
        return f"all but {', '.join(parts)}" if parts else "everything"


EVERYTHING = Selection()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of parameters in memory while training.

    trained        gradients and optimizer state are held for these
    added          beside the model's own, whether trained or not
    frozen_linear  frozen ones of linear layers, which torch's strategies hold in the compute precision
    text_encoder   of a T5 in the loop, which every process holds whole and in float32
    """

    trained: int
    added: int = 0
    frozen_linear: int = 0
    text_encoder: int = 0


def selection_of(freeze: str | None, *, new_rows: int = 0) -> Selection:
    """The Selection that `--freeze`, or `--tune_text` with so many rows, asks for; ConfigError for unknown parts."""
    parts, layers = set(), set()
    for item in () if freeze is None else freeze.replace(" ", "").split(","):
        numbers = re.fullmatch(r"layers\.(\d+)(?:-(\d+))?", item)
        if numbers and int(numbers[1]) <= int(numbers[2] or numbers[1]):
            layers |= set(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
        elif item in PARTS:
            parts.add(item)
        else:
            raise ConfigError(f"--freeze {freeze}: '{item}' is no part of the model; it takes a list of {FREEZABLE}.")
    return Selection(frozen_parts=tuple(sorted(parts)), frozen_layers=tuple(sorted(layers)), new_rows=new_rows)


def count(shape: Shape, selection: Selection) -> Counts:
    """How many parameters of a model of this shape are trained.

    Raises ConfigError where a frozen layer does not exist, and where nothing is left to train.
    """
    if selection.new_rows:
        rows = selection.new_rows * shape.text_width
        linear = shape.layers * part_sizes(shape)["layer"][1] + sum(part_sizes(shape)[part][1] for part in PARTS)
        return Counts(trained=rows, added=rows, frozen_linear=linear, text_encoder=shape.text_encoder)
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


def part_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Parameters of each part, one layer standing for all, and how many of them are in linear layers."""
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
