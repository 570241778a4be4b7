"""--init_from: every format gives the weights that were exported, and what does not fit is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.runs import assert_bit_equal, final_state, launch_here, metrics
from tests.synthetic import HEADER
from trainer.errors import ModelError
from trainer.exports.export import ExportSettings, export_all
from trainer.exports.init_from import find_starting_point, start_from
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import CODEC, TEXT_ENCODER, Source, open_model
from trainer.model.weights import weights_in_memory
from trainer.run.checkpoint import FlatSlice, Saver
from trainer.wiring.finished_run import base_of_run, config_of_run

STARTS = {
    "a run": "run",
    "its newest step": "run/checkpoints/step-00000007",
    "lm_final.pt": "exported/lm_final.pt",
    "a run without checkpoints": "exported",
    "a huggingface folder": "exported/huggingface",
    "an audiocraft folder": "exported/audiocraft",
    "its state_dict.bin": "exported/audiocraft/state_dict.bin",
}


@pytest.fixture(scope="module")
def source() -> Source:
    return open_model("debug")


@pytest.fixture(scope="module")
def trained(source: Source) -> LanguageModel:
    """Weights that differ from the source's in every tensor, as after training."""
    torch.manual_seed(5)
    model = load_language_model(source).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def starts(source: Source, trained: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in every format; the run holds an older step too, with other weights."""
    folder = tmp_path_factory.mktemp("starts")
    settings = ExportSettings(card="", segment_seconds=30.0, cfg_dropout=0.0)
    export_all(source, trained.state_dict(), folder / "exported", settings)
    identity = {"codec": source.codec_identity(), "text encoder": source.text_identity()}
    saver = Saver(folder / "run/checkpoints")
    for step, factor in ((3, 0.5), (7, 1.0)):
        state = {name: factor * value for name, value in trained.state_dict().items()}
        saver.save(step, slices_of(state), replace(HEADER, identity=identity))
        saver.wait()
    return folder


def slices_of(state: dict[str, Tensor]) -> dict[str, FlatSlice]:
    return {
        f"weight/{name}": FlatSlice(shape=tuple(value.shape), start=0, values=value.reshape(-1))
        for name, value in state.items()
    }


def logits(model: LanguageModel) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    inputs_BKT = torch.randint(0, 2049, (2, 4, 12), generator=draw)
    text_BSD = torch.randn(2, 5, model.enc_to_dec_proj.in_features, generator=draw)
    with torch.inference_mode():
        return model.eval()(inputs_BKT, text_BSD, torch.ones(2, 5))


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_each_format_gives_the_logits_of_the_model_that_was_exported(
    source: Source, trained: LanguageModel, starts: Path, start: str
) -> None:
    started = start_from(source, find_starting_point(str(starts / start)))
    assert torch.equal(logits(load_language_model(started)), logits(trained))
    assert not torch.equal(logits(load_language_model(source)), logits(trained))


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_ranges_are_those_of_the_whole_tensors_and_the_frozen_models_stay(
    source: Source, trained: LanguageModel, starts: Path, start: str
) -> None:
    started = start_from(source, find_starting_point(str(starts / start)))
    for name, value in trained.state_dict().items():
        assert started.weights.shape(name) == tuple(value.shape)
        for first, stop in ((0, 3), (5, value.numel() - 1)):
            assert torch.equal(started.weights.read(name, first, stop), value.reshape(-1)[first:stop]), name
    assert set(started.weights) == set(source.weights)
    assert started.codec_identity() == source.codec_identity()
    assert started.text_identity() == source.text_identity()


def test_t5_and_encodec_of_a_huggingface_folder_are_not_taken(
    source: Source, trained: LanguageModel, starts: Path, tmp_path: Path
) -> None:
    """docs/starting_points.md: T5, EnCodec and tokenizer are the base's."""
    shutil.copytree(starts / "exported/huggingface", tmp_path / "other")
    file = tmp_path / "other/model.safetensors"
    stored = load_file(file)
    parts = [name for name in stored if name.startswith((CODEC, TEXT_ENCODER)) and stored[name].is_floating_point()]
    save_file({name: value + 1 if name in parts else value for name, value in stored.items()}, file, {"format": "pt"})
    started = start_from(source, find_starting_point(str(tmp_path / "other")))
    assert parts and torch.equal(logits(load_language_model(started)), logits(trained))
    assert started.codec_identity() == source.codec_identity()
    assert started.text_identity() == source.text_identity()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
@pytest.mark.parametrize("start", ["exported/lm_final.pt", "exported/audiocraft/state_dict.bin"])
def test_a_pickled_files_tensors_are_looks_into_the_mapped_file(source: Source, starts: Path, start: str) -> None:
    weights = start_from(source, find_starting_point(str(starts / start))).weights
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps if line[-1] == str(starts / start)]
    for name in weights:
        if name.startswith(("decoder.", "enc_to_dec_proj.")):
            address = weights.read(name, 0, 1).data_ptr()
            assert any(first <= address < stop for first, stop in ranges), name


def test_another_size_is_refused_with_both_sizes(source: Source, trained: LanguageModel, tmp_path: Path) -> None:
    state = {name: value for name, value in trained.state_dict().items() if ".layers.1." not in name}
    saver = Saver(tmp_path / "checkpoints")
    saver.save(1, slices_of(state), HEADER)
    saver.wait()
    layers = source.config.decoder.num_hidden_layers
    with pytest.raises(ModelError, match=rf"it has {layers - 1} layers .* the base has {layers} layers .*absent there"):
        start_from(source, find_starting_point(str(tmp_path)))


def test_another_shape_or_number_of_heads_is_refused_with_both(source: Source, starts: Path) -> None:
    point = find_starting_point(str(starts / "exported/huggingface"))
    name = "enc_to_dec_proj.weight"
    wide = weights_in_memory({key: point.weights[key] for key in point.weights} | {name: torch.zeros(7, 9)})
    with pytest.raises(ModelError, match=rf"{name}: \(7, 9\) there, \(\d+, 512\) in the base"):
        start_from(source, replace(point, weights=wide))
    with pytest.raises(ModelError, match=r"attention heads 3 there, \d+ in the base"):
        start_from(source, replace(point, settings={**point.settings, "attention heads": 3}))


def test_a_run_beside_another_codec_is_refused(source: Source, starts: Path) -> None:
    point = find_starting_point(str(starts / "run"))
    with pytest.raises(ModelError, match=r"another codec \(abc then, "):
        start_from(source, replace(point, parts={**point.parts, "codec": "abc"}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no such file or folder"),
        ("facebook/musicgen-small", "a hub id goes to --model_id"),
        ("empty", "holds no model to start from"),
        ("text.pt", "cannot be read as a file of tensors"),
        ("broken", "is empty or damaged"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/checkpoint.json").write_text("{")
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(ModelError, match=f"--init_from .*{message}"):
        find_starting_point(str(tmp_path / name) if "/" not in name else name)


def test_a_run_starts_from_a_finished_one_and_resumes_without_it(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "first")
    flags = ("--init_from", "first", "--lr", "1e-3", "--warmup_steps", "1", "--batch_size", "2", "--grad_acc", "1")
    said = launch_here(tmp_path, *flags, "--max_steps", "2")
    assert "starting from the weights in first/checkpoints/step-00000003" in said
    assert 'language model of "first"' in (tmp_path / "models/huggingface/README.md").read_text()
    # The first step's loss is that of the weights at the start, whatever their format; nothing else was taken over.
    started = metrics(tmp_path)
    launch_here(tmp_path, "--init_from", "first/lm_final.pt", *flags[2:], "--max_steps", "2", "--output_dir", "other")
    lines = [json.loads(line) for line in (tmp_path / "other/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == list(started.values())
    first = open_model(str(tmp_path / "first/huggingface")).weights
    with contextlib.chdir(tmp_path):  # --init_from is relative to the folder that the run was started in
        before = base_of_run(config_of_run(Path("models"))).weights
        assert all(torch.equal(before[name], first[name]) for name in before if name.startswith("decoder."))

    shutil.rmtree(tmp_path / "first")
    former = final_state(tmp_path)
    said = launch_here(tmp_path, *flags, "--max_steps", "2")
    assert "already complete: 2 steps" in said and "a larger --max_steps adds to them" in said
    assert_bit_equal(final_state(tmp_path), former)
    said = launch_here(tmp_path, *flags, "--max_steps", "3")
    assert "resuming from" in said and "starting from" not in said and list(metrics(tmp_path)) == [1, 2, 3]
    said = launch_here(tmp_path, *flags[2:], "--max_steps", "4", expect=1)
    assert "--init_from: first then, None now" in said
