"""The model that a run starts with: that of --model_id, with the weights of --init_from, made stereo by --stereo 1."""

from __future__ import annotations

from dataclasses import replace

from trainer.errors import ConfigError, ModelError
from trainer.exports.init_from import StartingPoint, start_from
from trainer.model.source import MELODY_PROJECTION, Source
from trainer.model.stereo import EMBEDDINGS, HEADS, Embeddings, in_stereo
from trainer.spec.trainable import EVERYTHING, Selection, refuse_equal_channels


def first_model(
    source: Source, start: StartingPoint | None, stereo: Embeddings | None, trained: Selection = EVERYTHING
) -> Source:
    """`source` with the weights of `start`, as a stereo model where `stereo` says what its embeddings start as.

    A start that is mono is put into the mono model, which is then made stereo; one that is stereo already goes into
    the model made stereo, as it is.

    start    None for the source's own weights
    stereo   None for a model that stays what it is
    trained  what of it will be trained

    Raises ModelError where the source is stereo already, and where the start does not fit; ConfigError where the
    channels would be equal and stay so.
    """
    if stereo is None:
        if start is None:
            return source
        _refuse_other_channels(source, start)
        return start_from(source, start)
    made = in_stereo(source, stereo)
    if start is not None and _is_stereo(start, source, made):
        return replace(start_from(made, start), copied=False)
    refuse_equal_channels(trained)
    return made if start is None else in_stereo(start_from(source, start), stereo)


def refuse_stereo_init(start: StartingPoint | None, made: Source, embeddings: str) -> None:
    """Raise ConfigError where --stereo_init was typed and has no effect: the start is a whole stereo model.

    made        what `first_model` made of the start with --stereo 1
    embeddings  the value of --stereo_init

    A stereo start that is a part of a model is not refused: the rest of it has to be made stereo as it was then.
    """
    if start is not None and start.trained.everything and not made.copied:
        raise ConfigError(
            f"--stereo_init {embeddings} has no effect with --init_from {start.path}, which is a stereo model already:"
            " remove --stereo_init"
        )


def _is_stereo(start: StartingPoint, mono: Source, stereo: Source) -> bool:
    """Whether the language model of `start`, or the one that it is a trained part of, is a stereo model.

    Raises ModelError where it is neither a mono nor a stereo model of this kind.
    """
    codebooks = _codebooks(start)
    if codebooks is None:
        # Adapters, or layers alone, are alike in both; but checkpoints are tied to the model that holds the rest.
        return start.frozen is not None and start.frozen == stereo.probe()
    if codebooks not in (mono.codebooks, stereo.codebooks):
        raise ModelError(
            f"--init_from {start.path} has {codebooks} codebooks: with --stereo 1 and --model_id {mono.name} it takes a"
            f" mono model of {mono.codebooks} or a stereo one of {stereo.codebooks}"
        )
    return codebooks == stereo.codebooks


def _refuse_other_channels(source: Source, start: StartingPoint) -> None:
    """Raise ModelError for a stereo start of a mono model, and the other way round, which differ in codebooks alone.

    A start that has a melody where the source has none, or none where it has one, does not fit in any case.
    """
    codebooks, channels = _codebooks(start), source.channels
    if start.trained.everything and (MELODY_PROJECTION + "weight" in start.weights) != source.melody:
        return
    if channels == 1 and codebooks == 2 * source.codebooks:
        raise ModelError(
            f"--init_from {start.path} is a stereo model, and --model_id {source.name} a mono one: add --stereo 1, or"
            " give --model_id the stereo model that it was trained from"
        )
    if channels == 2 and codebooks == source.codebooks // 2:
        raise ModelError(
            f"--init_from {start.path} is a mono model, and --model_id {source.name} a stereo one: give --model_id the"
            " model that it was trained from, with --stereo 1 to make it stereo"
        )


def _codebooks(start: StartingPoint) -> int | None:
    """How many codebooks a language model has by its heads, or else its embeddings; None where it holds neither."""
    for prefix in (HEADS, EMBEDDINGS):
        if found := {name.removeprefix(prefix).split(".")[0] for name in start.weights if name.startswith(prefix)}:
            return len(found)
    return None
