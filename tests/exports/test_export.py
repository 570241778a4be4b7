"""Exported files: names, completeness, reading back, and what stays when the disk is full."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    EncodecModel,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
    T5Tokenizer,
    pipeline,
)

from tests.exports.comparison import assert_equal
from trainer.errors import ModelError, StorageError
from trainer.exports import export
from trainer.exports.audiocraft_config import AudiocraftConfig
from trainer.exports.audiocraft_files import read_audiocraft
from trainer.exports.export import ExportSettings, export_all, write_audiocraft, write_huggingface, write_lm
from trainer.model.debug_model import codec_config
from trainer.model.language_model import load_language_model
from trainer.model.new_word import extended_tokenizer
from trainer.model.source import Source, load_text_encoder, open_model
from trainer.model.weights import weights_in_memory
from trainer.spec.trainable import Placeholder

CARD = "# a card\n"
Writer = Callable[[Source, dict[str, Tensor], Path], None]
WRITERS: dict[str, Writer] = {
    "lm_final.pt": lambda source, state, path: write_lm(state, path),
    "huggingface": lambda source, state, path: write_huggingface(source, state, path, CARD),
    "audiocraft": lambda source, state, path: write_audiocraft(
        source, state, path, segment_seconds=30.0, cfg_dropout=0.1
    ),
}


@pytest.fixture(scope="module")
def exported(source: Source, state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    export_all(source, state, folder, ExportSettings(card=CARD, segment_seconds=30.0, cfg_dropout=0.1))
    return folder


@pytest.mark.parametrize("name", ["lm_final.pt", "audiocraft", "audiocraft/state_dict.bin"])
def test_what_was_exported_reads_back_bit_for_bit(exported: Path, state: dict[str, Tensor], name: str) -> None:
    read = read_audiocraft(exported / name)
    assert_equal(read.state, state)
    if name == "lm_final.pt":
        assert read.config is None
    else:
        assert read.config == AudiocraftConfig(
            width=128,
            layers=2,
            heads=4,
            activation="gelu",
            delays=(0, 1, 2, 3),
            text_encoder="t5-small",
            segment_seconds=30.0,
        )


def test_half_precision_weights_are_exported_in_float32(state: dict[str, Tensor], tmp_path: Path) -> None:
    half = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    write_lm(half, tmp_path / "lm_7.pt")
    read = read_audiocraft(tmp_path / "lm_7.pt").state
    assert_equal(read, {name: tensor.float() for name, tensor in half.items()})


def test_truncated_foreign_and_absent_files_are_refused(exported: Path, tmp_path: Path) -> None:
    whole = (exported / "lm_final.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a model")
    (tmp_path / "empty.pt").touch()
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"best_state": {"model": {}}, "xp.cfg": ""}, tmp_path / "solver.pt")
    shutil.copy(exported / "audiocraft" / "compression_state_dict.bin", tmp_path / "codec.pt")
    for name in ("truncated", "text", "empty", "list", "solver", "codec", "absent"):
        with pytest.raises(ModelError, match=f"{name}.pt"):
            read_audiocraft(tmp_path / f"{name}.pt")


class _Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_reading_runs_no_code_of_the_file(tmp_path: Path) -> None:
    torch.save({"best_state": _Touch(tmp_path / "ran")}, tmp_path / "evil.bin")
    with pytest.raises(ModelError, match=r"evil\.bin"):
        read_audiocraft(tmp_path / "evil.bin")
    assert not (tmp_path / "ran").exists()


def test_transformers_gives_our_logits_bit_for_bit(source: Source, state: dict[str, Tensor], exported: Path) -> None:
    theirs = MusicgenForConditionalGeneration.from_pretrained(exported / "huggingface")
    ours = load_language_model(source)
    ours.load_state_dict(state)
    processor = MusicgenProcessor.from_pretrained(exported / "huggingface")
    text = processor(text=["energetic rock with electric guitar"], return_tensors="pt")
    inputs_BKT = torch.randint(0, 2049, (1, 4, 20), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        text_BSD = load_text_encoder(source)(**text).last_hidden_state
        expected = ours.eval()(inputs_BKT, text_BSD, text.attention_mask.float(), None)
        logits = theirs(**text, decoder_input_ids=inputs_BKT.flatten(0, 1), use_cache=False).logits
    assert torch.equal(logits.unflatten(0, (1, 4)), expected)


def test_the_huggingface_folder_is_a_source_like_the_one_it_came_from(source: Source, exported: Path) -> None:
    again = open_model(str(exported / "huggingface"))
    assert again.codec_identity() == source.codec_identity()
    assert again.text_identity() == source.text_identity()
    assert again.generation_config.guidance_scale == source.generation_config.guidance_scale
    for part in ("decoder", "text_encoder", "audio_encoder"):
        was, now = (getattr(config, part).to_dict() for config in (source.config, again.config))
        changed = {key for key in was | now if was.get(key) != now.get(key)}
        assert changed <= {"dtype", "architectures", "transformers_version"}, part


def test_the_huggingface_folder_has_no_pickle_and_is_readable_by_others(exported: Path) -> None:
    files = list((exported / "huggingface").iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json", ".md"}
    assert {file.stat().st_mode for file in files} == {(exported / "huggingface/README.md").stat().st_mode}
    assert (exported / "huggingface/README.md").read_text() == CARD


def test_what_is_written_is_known_as_ours_so_that_a_later_export_leaves_none_of_it(exported: Path) -> None:
    written = {path.name for folder in ("huggingface", "audiocraft") for path in (exported / folder).iterdir()}
    assert {name for name in written if not export._is_ours(name)} == set()
    shards = ("model-00001-of-00003.safetensors", "model.safetensors.index.json", "spiece.model")
    assert all(map(export._is_ours, (*shards, "adapter_model.safetensors", "adapter_config.json")))
    assert not any(map(export._is_ours, ("model.safetensors.bak", "my_config.json", "sample.wav", "README.md~")))


def test_a_users_files_outlive_an_export_where_no_mode_can_be_set(
    source: Source, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "audiocraft").mkdir()
    (tmp_path / "audiocraft" / "sample.wav").write_bytes(b"sound")
    (tmp_path / "audiocraft" / "state_dict.bin").write_bytes(b"of a former export")

    def refuse(*arguments: object, **more: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    WRITERS["audiocraft"](source, state, tmp_path / "audiocraft")
    assert (tmp_path / "audiocraft" / "sample.wav").read_bytes() == b"sound"
    assert_equal(read_audiocraft(tmp_path / "audiocraft").state, state)


def test_the_text_to_audio_pipeline_makes_sound(exported: Path) -> None:
    music = pipeline("text-to-audio", model=str(exported / "huggingface"))
    made = music("gentle piano", generate_kwargs={"max_new_tokens": 13, "do_sample": False})
    # Ten frames of 640 samples: three of thirteen steps go into the delays.
    assert made["sampling_rate"] == 32_000 and made["audio"].size == 6400 and made["audio"].std() > 0


@pytest.fixture(scope="module")
def published(source: Source) -> Source:
    """The debug model with what tells a published one: a tokenizer of T5's size, and EnCodec with its sizes."""
    known = json.loads(source.load_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    others = [(f"▁word{number}", -9.0) for number in range(32_000 - len(known))]
    gaps = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    tokenizer = T5Tokenizer(vocab=[*map(tuple, known), *others, *gaps], extra_ids=100)
    config = copy.deepcopy(source.config)
    config.audio_encoder = codec_config(filters=64, width=128)
    with torch.device("meta"):  # drawing 59 million numbers takes seconds
        names = EncodecModel(config.audio_encoder).state_dict()
    codec = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in names.items()}
    weights = weights_in_memory({f"audio_encoder.{name}": tensor for name, tensor in codec.items()})
    return replace(
        source, name="small", config=config, weights=source.weights.replaced(weights), load_tokenizer=lambda: tokenizer
    )


@pytest.fixture(scope="module")
def beside_a_config(published: Source, state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "audiocraft"
    write_audiocraft(published, state, folder, segment_seconds=30.0, cfg_dropout=0.1)
    return folder


def test_a_t5_of_the_hub_is_not_written_again(beside_a_config: Path) -> None:
    names = {path.name for path in beside_a_config.iterdir()}
    assert names == {"state_dict.bin", "compression_state_dict.bin", "config.json", "README.md"}
    assert "takes T5 and EnCodec from the hub: t5-small and " in (beside_a_config / "README.md").read_text()


@pytest.mark.parametrize("kind", ["debug as a folder", "learned word"])
def test_a_t5_with_the_name_of_another_is_written(
    kind: str, source: Source, published: Source, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Its name alone would have audiocraft take the published one, whose states mean nothing to the model."""
    own = replace(source, name="models/huggingface")
    if kind == "learned word":
        tokenizer = extended_tokenizer(published.load_tokenizer(), Placeholder(word="<my-style>", vectors=2))
        own = replace(published, load_tokenizer=lambda: tokenizer)
    write_audiocraft(own, state, tmp_path / "audiocraft", segment_seconds=30.0, cfg_dropout=0.1)
    told = (tmp_path / "audiocraft/README.md").read_text()
    assert (tmp_path / "audiocraft/t5-small/model.safetensors").is_file()
    assert (tmp_path / "audiocraft/t5-small/spiece.model").is_file() is (kind == "debug as a folder")
    assert ("needs transformers 5" in told) is (kind == "learned word")
    assert not (tmp_path / "audiocraft/config.json").exists() and "mlx-examples cannot use it" in told


def test_mlx_examples_finds_every_size_and_every_tensor(beside_a_config: Path) -> None:
    """What it reads and the tensors that it then expects. Source: mlx-examples, musicgen/musicgen.py."""
    config = json.loads((beside_a_config / "config.json").read_text())
    decoder, codec, text = config["decoder"], config["audio_encoder"], config["text_encoder"]
    assert text["_name_or_path"] == "t5-small" and config["_name_or_path"] == ""  # no folder of the user's machine
    # Of which it makes mlx-community/encodec-32khz-float32
    assert codec["_name_or_path"] == "facebook/encodec_32khz" and codec["sampling_rate"] == 32_000
    assert decoder["bos_token_id"] == codec["codebook_size"] == 2048 and decoder["num_attention_heads"] == 4
    width, inner, codes = decoder["hidden_size"], decoder["ffn_dim"], codec["codebook_size"]
    expected = {
        "out_norm.weight": (width,),
        "out_norm.bias": (width,),
        "text_conditioner.output_proj.weight": (width, text["d_model"]),
        "text_conditioner.output_proj.bias": (width,),
    }
    for book in range(decoder["num_codebooks"]):
        expected |= {f"emb.{book}.weight": (codes + 1, width), f"linears.{book}.weight": (codes, width)}
    for layer in range(decoder["num_hidden_layers"]):
        for attention in ("self_attn", "cross_attn"):
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                expected[f"layers.{layer}.{attention}.{part}.weight"] = (width, width)
        expected |= {f"layers.{layer}.linear1.weight": (inner, width), f"layers.{layer}.linear2.weight": (width, inner)}
        for norm in ("norm1", "norm_cross", "norm2"):
            expected |= {f"layers.{layer}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in torch.load(beside_a_config / "state_dict.bin", weights_only=True)["best_state"].items():
        assert tensor.dtype == torch.float32
        name = name.removeprefix("transformer.").replace("cross_attention", "cross_attn")
        name = name.replace("condition_provider.conditioners.description", "text_conditioner")
        if name.endswith("in_proj_weight"):
            stem = name.removesuffix("in_proj_weight")
            found |= {f"{stem}{part}_proj.weight": (len(tensor) // 3, tensor.shape[1]) for part in "qkv"}
        else:
            found[name] = tuple(tensor.shape)
    assert found == expected


def test_audiocrafts_folder_as_a_model_id_is_told_apart(beside_a_config: Path) -> None:
    with pytest.raises(ModelError, match=r"it is a folder for audiocraft: give the huggingface/ beside it"):
        open_model(str(beside_a_config))


def test_weights_of_another_size_are_refused(source: Source, state: dict[str, Tensor], tmp_path: Path) -> None:
    narrow = state | {"enc_to_dec_proj.bias": torch.zeros(64)}
    with pytest.raises(ModelError, match="do not fit debug"):
        write_huggingface(source, narrow, tmp_path / "huggingface", CARD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_full_disk_leaves_the_former_export_whole(
    source: Source, state: dict[str, Tensor], exported: Path, tmp_path: Path, name: str
) -> None:
    size = sum(file.stat().st_size for file in _files(exported / name))
    with _small_disk(tmp_path / "disk", size * 3 // 2) as disk:
        WRITERS[name](source, state, disk / name)
        before = _digests(disk / name)
        with pytest.raises(StorageError, match="GiB free"):
            WRITERS[name](source, {key: tensor + 1 for key, tensor in state.items()}, disk / name)
        assert _digests(disk / name) == before
        assert [path.name for path in disk.iterdir()] == [name]


def test_a_full_disk_is_reported_with_what_is_valid(
    source: Source, state: dict[str, Tensor], exported: Path, tmp_path: Path
) -> None:
    whole = sum(file.stat().st_size for file in _files(exported))
    room = (exported / "lm_final.pt").stat().st_size + 2**20
    with _small_disk(tmp_path / "disk", whole + room) as disk:
        export_all(source, state, disk, ExportSettings(card=CARD, segment_seconds=30.0, cfg_dropout=0.1))
        new = {key: tensor + 1 for key, tensor in state.items()}
        valid = r"Complete from this export: lm_final.pt; still the former export: huggingface, audiocraft"
        with pytest.raises(StorageError, match=rf"{disk}/huggingface could not be written.*{valid}"):
            export_all(source, new, disk, ExportSettings(card=CARD, segment_seconds=30.0, cfg_dropout=0.1))
        assert_equal(read_audiocraft(disk / "lm_final.pt").state, new)
        assert_equal(read_audiocraft(disk / "audiocraft").state, state)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="Read-only"):
            write_lm(new, disk / "lm_final.pt")


def test_what_a_killed_export_left_is_cleared(source: Source, state: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "huggingface"
    WRITERS["huggingface"](source, state, folder)
    folder.rename(tmp_path / "huggingface.former")
    (tmp_path / "huggingface.partial").mkdir()
    (tmp_path / "huggingface.partial" / "model.safetensors").write_bytes(b"half")
    WRITERS["huggingface"](source, {key: tensor + 1 for key, tensor in state.items()}, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["huggingface"]
    assert torch.equal(open_model(str(folder)).weights["enc_to_dec_proj.bias"], state["enc_to_dec_proj.bias"] + 1)


EXPORT_FOR_EVER = """
import sys
from pathlib import Path
from trainer.exports.export import ExportSettings, export_all
from trainer.model.language_model import load_language_model
from trainer.model.source import open_model

source = open_model("debug")
state = load_language_model(source).state_dict()
while True:
    state = {name: tensor + 1 for name, tensor in state.items()}
    export_all(source, state, Path(sys.argv[1]), ExportSettings(card="", segment_seconds=30.0, cfg_dropout=0.1))
    print("once", flush=True)
"""


@pytest.mark.full
@pytest.mark.parametrize("milliseconds", [0, 70, 190, 333])
def test_an_export_killed_at_any_moment_leaves_complete_files(tmp_path: Path, milliseconds: int) -> None:
    command = [sys.executable, "-c", EXPORT_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert b"once\n" in iter(process.stdout.readline, b"")
        time.sleep(milliseconds / 1000)
        os.kill(process.pid, signal.SIGKILL)
    for name in WRITERS:
        path = tmp_path / name
        path = path if path.exists() else tmp_path / f"{name}.former"
        read = open_model(str(path)).weights if name == "huggingface" else read_audiocraft(path).state
        shifts = {float(read[f"enc_to_dec_proj.{part}"].double().mean().round()) for part in ("weight", "bias")}
        assert len(shifts) == 1 and shifts.pop() >= 1


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _digests(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in _files(path)}


@contextmanager
def _small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A real file system of that size; skips, loudly, where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes // 4096 * 4096}", "tmpfs", str(folder)]
    try:
        refused = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        refused = subprocess.CompletedProcess(mount, 1, stderr="there is no mount")
    if refused.returncode:
        message = f"NOT TESTED: an export onto a full disk needs the right to mount ({refused.stderr.strip()})"
        warnings.warn(message, stacklevel=3)
        pytest.skip(message)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
