"""--stereo 1 beside --init_from: a mono start is made stereo, a stereo one is taken as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.synthetic import HEADER
from trainer.errors import ConfigError, ModelError
from trainer.exports.export import ExportSettings, export_all
from trainer.exports.first_model import first_model, refuse_stereo_init
from trainer.exports.init_from import StartingPoint, find_starting_point, start_from
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.lora import ADAPTER_CONFIG, DOWN, UP, save_adapter
from trainer.model.source import LANGUAGE_MODEL, Source, open_model
from trainer.model.stereo import in_stereo
from trainer.model.trained_model import ModelSettings, build_trained_model
from trainer.model.weights import weights_in_memory
from trainer.run.checkpoint import FlatSlice, Saver
from trainer.spec.trainable import EMBEDDINGS, EVERYTHING, HEADS, Lora, Selection

LORA = Lora(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj", "fc1"))
STARTS = (
    *("run", "run/checkpoints/step-00000007", "exported/lm_final.pt", "exported/huggingface", "exported/audiocraft"),
    "exported/audiocraft/state_dict.bin",
)


@pytest.fixture(scope="module")
def mono() -> Source:
    return open_model("debug")


@pytest.fixture(scope="module")
def starts(mono: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mono and a stereo model in every format; their weights differ from the base's in every tensor."""
    folder, settings = tmp_path_factory.mktemp("starts"), ExportSettings(card="", segment_seconds=30, cfg_dropout=0)
    for name, source in (("mono", mono), ("stereo", in_stereo(mono))):
        state = trained(load_language_model(source))
        export_all(source, state, folder / name / "exported", settings)
        save(folder / name / "run", state, source)
    return folder


def trained(model: LanguageModel) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return {name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in model.state_dict().items()}


def save(run: Path, state: Mapping[str, Tensor], source: Source, **flags: object) -> None:
    """A checkpoint of a run of `source` that holds these parameters; `flags` are those of a run that froze others."""
    identity = {"codec": source.codec_identity(), "text encoder": source.text_identity()}
    if flags:
        identity["frozen weights"] = source.probe()
    saver = Saver(run / "checkpoints")
    saver.save(
        7,
        {
            f"weight/{name}": FlatSlice(shape=tuple(value.shape), start=0, values=value.reshape(-1).clone())
            for name, value in state.items()
        },
        replace(HEADER, identity=identity, flags=flags),
    )
    saver.wait()


def language_model(source: Source) -> dict[str, Tensor]:
    return {name: source.weights[name] for name in source.weights if name.startswith(LANGUAGE_MODEL)}


def assert_same(found: Source, expected: Source) -> None:
    ours, theirs = language_model(found), language_model(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found.channels == expected.channels and found.codebooks == expected.codebooks


@pytest.mark.parametrize("start", STARTS)
def test_a_mono_start_is_made_stereo_and_a_stereo_one_taken_as_it_is(mono: Source, starts: Path, start: str) -> None:
    of_mono = find_starting_point(str(starts / "mono" / start))
    made = first_model(mono, of_mono, "halved")
    assert_same(made, in_stereo(start_from(mono, of_mono)))
    assert_same(first_model(mono, of_mono, "copied"), in_stereo(start_from(mono, of_mono), "copied"))
    of_stereo = find_starting_point(str(starts / "stereo" / start))
    for embeddings in ("halved", "copied"):
        taken = first_model(mono, of_stereo, embeddings)
        assert_same(taken, start_from(in_stereo(mono), of_stereo))
        state = trained(load_language_model(in_stereo(mono)))
        assert all(torch.equal(value, state[name]) for name, value in language_model(taken).items())


def test_a_start_of_other_channels_is_refused_with_what_to_do(mono: Source, starts: Path) -> None:
    of_mono, of_stereo = (find_starting_point(str(starts / kind / "run")) for kind in ("mono", "stereo"))
    with pytest.raises(ModelError, match=r"is a stereo model, and --model_id debug a mono one: add --stereo 1"):
        first_model(mono, of_stereo, None)
    with pytest.raises(ModelError, match=r"is a mono model, and --model_id debug-stereo a stereo one: .* --stereo 1"):
        first_model(open_model("debug-stereo"), of_mono, None)
    with pytest.raises(ModelError, match="debug-stereo is a stereo model already"):
        first_model(open_model("debug-stereo"), of_stereo, "halved")
    melody = replace(of_stereo, weights=open_model("debug-stereo-melody").weights)
    with pytest.raises(ModelError, match="it is a stereo melody model, the base is a mono text model; give --model_id"):
        first_model(mono, melody, None)  # with --stereo 1 it would not fit either
    heads = {f"decoder.lm_heads.{k}.weight": torch.zeros(2048, 128) for k in range(6)}
    with pytest.raises(ModelError, match=r"has 6 codebooks: .* a mono model of 4 or a stereo one of 8"):
        first_model(mono, replace(of_mono, weights=weights_in_memory(heads)), "halved")
    assert_same(first_model(mono, of_mono, None), start_from(mono, of_mono))
    assert first_model(mono, None, None) is mono


def test_stereo_init_is_refused_where_the_start_is_a_whole_stereo_model(mono: Source, starts: Path) -> None:
    of_mono, of_stereo = (find_starting_point(str(starts / kind / "run")) for kind in ("mono", "stereo"))
    heads = weights_in_memory({name: of_stereo.weights[name] for name in of_stereo.weights if ".lm_heads." in name})
    part = replace(of_stereo, weights=heads, trained=Selection(frozen_layers=(0,)))
    for start, made_stereo in ((None, True), (of_mono, True), (of_stereo, False), (part, False)):
        made = first_model(mono, start, "copied")
        assert made.copied is made_stereo and not first_model(mono, None, None).copied
        if start is of_stereo:
            with pytest.raises(ConfigError, match=r"--stereo_init copied has no effect with --init_from .* remove"):
                refuse_stereo_init(start, made, "copied")
        else:  # what a part is beside was made stereo in one way or the other
            refuse_stereo_init(start, made, "copied")


def adapters_of(source: Source) -> dict[str, Tensor]:
    """Trained adapters of a model; what they add is not zero."""
    made = build_trained_model(source, ModelSettings(selection=Selection(lora=LORA), dropout=0, new_word=None, seed=1))
    names = [name for name in made.start if name.endswith((DOWN, UP))]
    draw = torch.Generator().manual_seed(2)
    return {name: 0.1 * torch.randn(made.start.shape(name), generator=draw) for name in names}


LORA_FLAGS = {"lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.0, "lora_targets": "q_proj,fc1"}


@pytest.mark.parametrize("kind", ["mono", "stereo"])
def test_a_loras_checkpoint_is_recognised_by_the_model_that_it_is_tied_to(
    mono: Source, tmp_path: Path, kind: str
) -> None:
    base = mono if kind == "mono" else in_stereo(mono)
    save(tmp_path / "run", adapters_of(base), base, **LORA_FLAGS)
    point = find_starting_point(str(tmp_path / "run"))
    expected = start_from(base, point)
    adapted = "decoder.model.decoder.layers.0.fc1.weight"
    assert not torch.equal(base.weights[adapted], expected.weights[adapted])
    assert_same(first_model(mono, point, "halved"), expected if kind == "stereo" else in_stereo(expected))
    if kind == "stereo":  # whose frozen embeddings are others then
        with pytest.raises(ModelError, match=r"holds what was trained .*, not the frozen rest"):
            first_model(mono, point, "copied")


def test_pefts_folder_gives_the_same_stereo_model_whichever_comes_first(mono: Source, tmp_path: Path) -> None:
    save_adapter(tmp_path, adapters_of(mono), LORA, None)
    assert (tmp_path / ADAPTER_CONFIG).is_file()
    point = find_starting_point(str(tmp_path))
    assert_same(first_model(mono, point, "halved"), start_from(in_stereo(mono), point))


@pytest.mark.parametrize("selection", [Selection(lora=LORA), Selection(frozen_parts=(HEADS,)), Selection(new_rows=1)])
def test_channels_that_would_stay_equal_are_refused_and_those_of_a_stereo_start_are_not(
    mono: Source, starts: Path, selection: Selection
) -> None:
    of_mono, of_stereo = (find_starting_point(str(starts / kind / "run")) for kind in ("mono", "stereo"))
    points: list[StartingPoint | None] = [None, of_mono]
    for point in points:
        with pytest.raises(ConfigError, match=r"--stereo 1 cannot be used with what is trained here \(.*stay copies"):
            first_model(mono, point, "halved", selection)
    assert first_model(mono, of_stereo, "halved", selection).channels == 2
    for other in (EVERYTHING, Selection(frozen_layers=(0,)), Selection(frozen_parts=("projection",))):
        assert first_model(mono, of_mono, "halved", other).channels == 2
    assert not Selection(frozen_parts=(EMBEDDINGS,)).tells_channels_apart
