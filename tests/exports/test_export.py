"""Exported files: names, completeness, reading back, and what stays when the disk is full."""

from __future__ import annotations

import hashlib
import os
import re
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
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
    T5Config,
    pipeline,
)

from trainer.errors import ModelError, StorageError
from trainer.exports import audiocraft as layout
from trainer.exports.export import ExportSettings, export_all, write_audiocraft, write_huggingface, write_lm
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import Source, load_codec, load_text_encoder, open_model

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
def source() -> Source:
    return open_model("debug")


@pytest.fixture(scope="module")
def state(source: Source) -> dict[str, Tensor]:
    """Weights that differ from the source's in every tensor, as after training."""
    torch.manual_seed(1)
    language_model = load_language_model(source).state_dict()
    return {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in language_model.items()}


@pytest.fixture(scope="module")
def exported(source: Source, state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    export_all(source, state, folder, ExportSettings(card=CARD, segment_seconds=30.0, cfg_dropout=0.1))
    return folder


# Keys and millions of parameters of Meta's models: audiocraft 1.3.0's LMModel built at these sizes.
@pytest.mark.parametrize(
    ("width", "heads", "layers", "codebooks", "keys", "millions"),
    [
        pytest.param(1024, 16, 24, 4, 300, 420.4, id="small"),
        pytest.param(1536, 24, 48, 4, 588, 1838.7, id="medium"),
        pytest.param(2048, 32, 48, 4, 588, 3257.0, id="large"),
        pytest.param(1024, 16, 24, 8, 308, 437.2, id="stereo-small"),
        pytest.param(1536, 24, 48, 8, 596, 1863.9, id="stereo-medium"),
        pytest.param(2048, 32, 48, 8, 596, 3290.5, id="stereo-large"),
    ],
)
def test_published_sizes_have_audiocrafts_keys_and_parameters(
    width: int, heads: int, layers: int, codebooks: int, keys: int, millions: float
) -> None:
    config = MusicgenDecoderConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        ffn_dim=4 * width,
        num_codebooks=codebooks,
    )
    with torch.device("meta"):
        model = LanguageModel(MusicgenForCausalLM._from_config(config), torch.nn.Linear(768, width))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with FakeTensorMode():
        ours = {name: torch.empty(shape) for name, shape in shapes.items()}
        theirs = layout.lm_to_audiocraft(ours)
        back = layout.lm_from_audiocraft(theirs)
    assert len(theirs) == keys
    assert sum(tensor.numel() for tensor in theirs.values()) / 1e6 == pytest.approx(millions, abs=0.051)
    assert {name: tensor.shape for name, tensor in back.items()} == shapes


def test_language_model_survives_the_way_there_and_back_bit_for_bit(state: dict[str, Tensor]) -> None:
    theirs = layout.lm_to_audiocraft(state)
    _assert_equal(layout.lm_from_audiocraft(theirs), state)
    for tensor in theirs.values():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def test_codec_survives_the_way_there_and_back_bit_for_bit(source: Source) -> None:
    ours = load_codec(source).state_dict()
    theirs = layout.codec_to_audiocraft(ours)
    assert len(theirs) == len(ours) == 116
    _assert_equal(layout.codec_from_audiocraft(theirs), ours)


def test_prefixes_of_wrappers_are_taken_off(state: dict[str, Tensor]) -> None:
    wrapped = {
        f"module.{name}".replace("layers.0.", "layers.0._orig_mod._fsdp_wrapped_module."): tensor
        for name, tensor in state.items()
    }
    _assert_equal(layout.lm_to_audiocraft(wrapped), layout.lm_to_audiocraft(state))


def test_names_of_audiocrafts_plain_attention_are_read(state: dict[str, Tensor]) -> None:
    theirs = layout.lm_to_audiocraft(state)
    plain = {name.replace("_attn.", "_attn.mha.").replace("cross_attention.", "cross_attention.mha."): tensor
             for name, tensor in theirs.items()}  # fmt: skip
    assert any(".mha." in name for name in plain)
    _assert_equal(layout.lm_from_audiocraft(plain), state)


def test_missing_and_unknown_tensors_are_named(state: dict[str, Tensor]) -> None:
    lost = "decoder.model.decoder.layers.1.fc1.weight"
    with pytest.raises(ModelError, match=rf"lacks {re.escape(lost)}"):
        layout.lm_to_audiocraft({name: tensor for name, tensor in state.items() if name != lost})
    with pytest.raises(ModelError, match=r"unknown audio_enc_to_dec_proj\.weight"):
        layout.lm_to_audiocraft(state | {"audio_enc_to_dec_proj.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"unknown .*self_wav"):
        theirs = layout.lm_to_audiocraft(state)
        layout.lm_from_audiocraft(
            theirs | {"condition_provider.conditioners.self_wav.output_proj.bias": torch.zeros(1)}
        )
    with pytest.raises(ModelError, match=r"encoder\.fc"):
        layout.codec_to_audiocraft({"encoder.fc.weight": torch.zeros(1)})


def test_stereo_codebooks_come_in_pairs_of_one_delay() -> None:
    decoder = MusicgenDecoderConfig(num_codebooks=8, audio_channels=2)
    config = MusicgenConfig(text_encoder={"model_type": "t5"}, audio_encoder={"model_type": "encodec"},
                            decoder=decoder.to_dict())  # fmt: skip
    text = layout.lm_config(config, text_encoder_name="t5-base", segment_seconds=30.0, cfg_dropout=0.1)
    tree = yaml.safe_load(text)
    assert tree["codebooks_pattern"]["delay"]["delays"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert tree["interleave_stereo_codebooks"]["use"] and tree["channels"] == 2


@pytest.mark.parametrize(
    ("saved_as", "width", "name"),
    [
        ("t5-base", 768, "t5-base"),
        ("google/flan-t5-large", 1024, "google/flan-t5-large"),
        ("t5-base", 512, "t5-small"),
        ("", 1024, "t5-large"),
        ("google/t5-v1_1-xl", 2048, None),
    ],
)
def test_audiocraft_gets_a_text_encoder_that_it_knows(saved_as: str, width: int, name: str | None) -> None:
    text = T5Config(d_model=width, _name_or_path=saved_as)  # type: ignore[call-arg]
    config = MusicgenConfig(
        text_encoder=text.to_dict(),
        audio_encoder={"model_type": "encodec"},
        decoder=MusicgenDecoderConfig().to_dict(),
    )
    if name is None:
        with pytest.raises(ModelError, match="2048"):
            layout.text_encoder_name(config)
    else:
        assert layout.text_encoder_name(config) == name


@pytest.mark.parametrize("name", ["lm_final.pt", "audiocraft", "audiocraft/state_dict.bin"])
def test_what_was_exported_reads_back_bit_for_bit(exported: Path, state: dict[str, Tensor], name: str) -> None:
    read = layout.read_audiocraft(exported / name)
    _assert_equal(read.state, state)
    if name == "lm_final.pt":
        assert read.config is None
    else:
        assert read.config == layout.AudiocraftConfig(
            width=128, layers=2, heads=4, activation="gelu", delays=(0, 1, 2, 3), text_encoder="t5-small",
            segment_seconds=30.0,
        )


def test_half_precision_weights_are_exported_in_float32(state: dict[str, Tensor], tmp_path: Path) -> None:
    half = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    write_lm(half, tmp_path / "lm_7.pt")
    read = layout.read_audiocraft(tmp_path / "lm_7.pt").state
    _assert_equal(read, {name: tensor.float() for name, tensor in half.items()})


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
            layout.read_audiocraft(tmp_path / f"{name}.pt")


class _Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_reading_runs_no_code_of_the_file(tmp_path: Path) -> None:
    torch.save({"best_state": _Touch(tmp_path / "ran")}, tmp_path / "evil.bin")
    with pytest.raises(ModelError, match=r"evil\.bin"):
        layout.read_audiocraft(tmp_path / "evil.bin")
    assert not (tmp_path / "ran").exists()


def test_transformers_gives_our_logits_bit_for_bit(
    source: Source, state: dict[str, Tensor], exported: Path
) -> None:
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


def test_the_text_to_audio_pipeline_makes_sound(exported: Path) -> None:
    music = pipeline("text-to-audio", model=str(exported / "huggingface"))
    made = music("gentle piano", generate_kwargs={"max_new_tokens": 13, "do_sample": False})
    # Ten frames of 640 samples: three of thirteen steps go into the delays.
    assert made["sampling_rate"] == 32_000 and made["audio"].size == 6400 and made["audio"].std() > 0


def test_a_t5_of_the_hub_is_not_written_again(state: dict[str, Tensor], source: Source, tmp_path: Path) -> None:
    published = replace(source, name="small")
    write_audiocraft(published, state, tmp_path / "audiocraft", segment_seconds=30.0, cfg_dropout=0.1)
    names = {path.name for path in (tmp_path / "audiocraft").iterdir()}
    assert names == {"state_dict.bin", "compression_state_dict.bin", "README.md"}


def test_weights_of_another_size_are_refused(
    source: Source, state: dict[str, Tensor], tmp_path: Path
) -> None:
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
        _assert_equal(layout.read_audiocraft(disk / "lm_final.pt").state, new)
        _assert_equal(layout.read_audiocraft(disk / "audiocraft").state, state)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="Read-only"):
            write_lm(new, disk / "lm_final.pt")


def test_what_a_killed_export_left_is_cleared(
    source: Source, state: dict[str, Tensor], tmp_path: Path
) -> None:
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
        read = open_model(str(path)).weights if name == "huggingface" else layout.read_audiocraft(path).state
        shifts = {float(read[f"enc_to_dec_proj.{part}"].double().mean().round()) for part in ("weight", "bias")}
        assert len(shifts) == 1 and shifts.pop() >= 1


def _assert_equal(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in given.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


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
