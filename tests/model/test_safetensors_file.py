"""Ranges of safetensors files: the bytes that the library gives, from files that are opened once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.opens import counted_opens, open_now
from trainer.errors import StorageError
from trainer.model import safetensors_file
from trainer.model.safetensors_file import DTYPES, files_kept_open, fill, read_header
from trainer.model.weights import Weights, weights_in_folder

FILES = ("model-1-of-3.safetensors", "model-2-of-3.safetensors", "model-3-of-3.safetensors")


def shards(folder: Path) -> Weights:
    """Twelve tensors in three files."""
    names = {f"tensor{number}": FILES[number % 3] for number in range(12)}
    for file in FILES:
        values = {name: torch.full((3, 4), float(name[6:])) for name, of in names.items() if of == file}
        save_file(values, folder / file)
    index = ", ".join(f'"{name}": "{file}"' for name, file in names.items())
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    return weights_in_folder(folder)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_kind_of_value_is_read_as_the_library_reads_it(dtype, tmp_path):
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (24 * dtype.itemsize,), dtype=torch.uint8)
    path = tmp_path / "file.safetensors"
    save_file({"before": torch.zeros(3), "values": bits.view(dtype).reshape(2, 3, 4)}, path, metadata={"a": "b"})
    places, metadata = read_header(path)
    with safe_open(path, framework="pt") as file:
        expected = file.get_tensor("values")
        assert metadata == file.metadata()
    place = places["values"]
    assert (place.shape, place.dtype) == (tuple(expected.shape), expected.dtype)
    found = torch.empty(place.shape, dtype=place.dtype)
    fill(found, path, place.offset)
    assert found.view(torch.uint8).tolist() == expected.view(torch.uint8).tolist()


def test_a_pass_opens_each_file_once_and_leaves_none_open(tmp_path):
    weights = shards(tmp_path)
    with counted_opens(tmp_path) as opens, files_kept_open():
        values = [weights[name] for name in sorted(weights)]
        with files_kept_open():  # an inner pass uses the outer one's files
            again = [weights.read(name, 2, 9) for name in sorted(weights)]
        assert open_now(tmp_path) == sorted(FILES)
    assert opens == dict.fromkeys(FILES, 1)
    assert open_now(tmp_path) == []
    for value, part, name in zip(values, again, sorted(weights), strict=True):
        assert value.tolist() == [[float(name[6:])] * 4] * 3 and part.tolist() == [float(name[6:])] * 7


def test_outside_of_a_pass_no_file_stays_open(tmp_path):
    weights = shards(tmp_path)
    assert weights["tensor0"].shape == (3, 4) and open_now(tmp_path) == []


def test_more_files_than_a_process_may_open_are_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "MOST_KEPT_OPEN", 2)
    weights = shards(tmp_path)
    with files_kept_open():
        assert [weights[f"tensor{number}"][0, 0].item() for number in range(12)] == list(range(12))
        assert len(open_now(tmp_path)) == 2


@pytest.mark.parametrize("change", ["gone", "cut"])
def test_a_file_that_changes_under_a_run_is_named(change, tmp_path):
    weights = shards(tmp_path)
    path = tmp_path / FILES[0]
    path.unlink() if change == "gone" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=rf"{FILES[0]} could not be read .*Run the same command again"):
        [weights[name] for name in weights]
