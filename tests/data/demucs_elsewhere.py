"""Runs trainer/data/stems.py with the real package demucs, for tests/data/test_stems.py: python FILE FOLDER.

htdemucs' class with few channels and weights by chance is saved as demucs saves its own, once as a package of torch hub
and once in the hub's cache, and found there as a user's would be. Prints what came out as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch

FOLDER = Path(sys.argv[1])
os.environ |= {"TORCH_HOME": str(FOLDER / "torch"), "HF_HUB_CACHE": str(FOLDER / "hub"), "HF_HUB_OFFLINE": "1"}

from demucs.apply import apply_model  # noqa: E402
from demucs.htdemucs import HTDemucs  # noqa: E402
from demucs.states import get_state  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from trainer.data import demucs_files  # noqa: E402
from trainer.data.excerpt import Excerpt  # noqa: E402
from trainer.data.stems import Demucs, stems_of  # noqa: E402
from trainer.errors import ConfigError  # noqa: E402

CPU = torch.device("cpu")
RATE = 8_000  # of the model: pieces are as long in seconds as htdemucs' own
OTHER_RATE = 12_000  # of the file
SIGNATURE = "955717e8"


def main() -> dict[str, Any]:
    torch.manual_seed(0)
    settings = {
        "sources": ["drums", "bass", "other", "vocals"], "channels": 8, "nfft": 512, "depth": 3, "t_layers": 1,
        "t_heads": 2, "bottom_channels": 16, "samplerate": RATE, "segment": Fraction(39, 5), "dconv_comp": 4,
    }  # fmt: skip
    model = HTDemucs(**settings).eval()
    results = kept(model, settings)
    stems = stems_of("demucs", CPU)
    assert isinstance(stems, Demucs)
    results |= {"key": stems.key, "key again": stems_of("demucs", CPU).key}
    return results | seams(model, stems) | inputs(model, stems)


def kept(model: HTDemucs, settings: dict[str, Any]) -> dict[str, Any]:
    """Put the weights into both places, and say what was found of each."""
    name = FOLDER / "torch/hub/checkpoints" / f"{SIGNATURE}-8726e21a.th"
    results: dict[str, Any] = {"before": demucs_files.what_is_missing()}
    results["refused"] = refusal()
    name.parent.mkdir(parents=True)
    state = get_state(model, None, half=True)
    # As demucs.states.serialize_model makes it, whose package omegaconf need not be here. Settings may be numpy's.
    package = {
        "klass": HTDemucs, "args": (), "kwargs": settings, "state": state,
        "training_args": {"seed": np.float64(42.0), "lr": 3e-4},
    }  # fmt: skip
    torch.save(package, name)
    model.load_state_dict(state)  # what half precision keeps
    results |= {"hub of torch": str(demucs_files.weights_path()), "key of it": stems_of("demucs", CPU).key}
    content = name.read_bytes()
    for what, damaged in (("cut", content[:5_000]), ("foreign", foreign())):
        name.write_bytes(damaged)
        results[what] = refusal()
    name.write_bytes(content)
    results["called"] = (FOLDER / "called").exists()
    snapshot = FOLDER / "hub/models--adefossez--HTDemucs/snapshots/0123456789abcdef"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
    snapshot.mkdir(parents=True)
    described = {
        name: {"_type": "fraction", "numerator": value.numerator, "denominator": value.denominator}
        if isinstance(value, Fraction) else value
        for name, value in settings.items()
    }  # fmt: skip
    metadata = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(described)}
    path = snapshot / f"{SIGNATURE}.safetensors"
    tensors = {name: value.clone() for name, value in state.items()}
    save_file(tensors, path, metadata | {"klass": "os.system"})
    results["another class"] = refusal()
    save_file(tensors, path, metadata)
    return results | {"hub": str(demucs_files.weights_path())}


def refusal() -> str:
    try:
        stems_of("demucs", CPU)
    except ConfigError as error:
        return str(error)
    return ""


def foreign() -> bytes:
    """A pickle that would call what no weights need."""
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(FOLDER / "called"),)

    torch.save({"klass": Call()}, FOLDER / "foreign.th")
    return (FOLDER / "foreign.th").read_bytes()


def whole(model: HTDemucs, samples: np.ndarray) -> np.ndarray:
    """Voice and other instruments in mono of (n, 2) samples at RATE, by one pass over all of it."""
    stems = apply_model(model, torch.from_numpy(np.ascontiguousarray(samples.T))[None], shifts=0)[0]
    return stems[[2, 3]].sum(dim=0).mean(dim=0).numpy()


def seams(model: HTDemucs, stems: Demucs) -> dict[str, Any]:
    """How far windows are from one pass, at lengths around theirs; each sound is read in blocks of 10 s."""
    draw = np.random.default_rng(0)
    piece = int(7.8 * RATE)
    stride = int(0.75 * piece)
    window = 9 * stride + piece
    furthest = {}
    for frames in (1, 1_000, piece, window - 1, window, window + 1, 2 * window + 12_345):
        samples = (0.1 * draw.standard_normal((frames, 2))).astype(np.float32)
        soundfile.write(FOLDER / "sound.wav", samples, RATE, subtype="FLOAT")
        found = np.concatenate(list(stems.blocks(FOLDER / "sound.wav", RATE, 10.0, None)))
        expected = whole(model, samples)
        assert found.shape == expected.shape and np.abs(expected).max() > 0
        furthest[frames] = float(np.abs(found - expected).max() / np.abs(expected).max())
    return {"furthest": furthest}


def inputs(model: HTDemucs, stems: Demucs) -> dict[str, Any]:
    """Mono and six channels, another rate and an excerpt: what is separated is what should be."""
    draw = np.random.default_rng(1)
    samples = (0.1 * draw.standard_normal((12 * OTHER_RATE, 6))).astype(np.float32)
    excerpt = Excerpt(first_frame=OTHER_RATE, frames=10 * OTHER_RATE + 7, gain=0.5)
    part = samples[excerpt.first_frame : excerpt.first_frame + excerpt.frames] * np.float32(0.5)
    furthest = {}
    for channels, heard in ((1, part[:, [0, 0]]), (2, part[:, :2]), (6, part[:, :2])):
        path = FOLDER / f"{channels}.wav"
        soundfile.write(path, samples[:, :channels], OTHER_RATE, subtype="FLOAT")
        blocks = list(stems.blocks(path, 32_000, 0.5, excerpt))
        assert all(0 < len(block) <= 16_000 and block.dtype == np.float32 for block in blocks)
        mixed = whole(model, soxr.resample(heard, OTHER_RATE, RATE, quality="HQ"))
        expected = soxr.resample(mixed, RATE, 32_000, quality="HQ")
        found = np.concatenate(blocks)
        assert found.shape == expected.shape
        furthest[f"{channels} channels"] = float(np.abs(found - expected).max() / np.abs(expected).max())
    return {"furthest of inputs": furthest, "torchaudio": "torchaudio" in sys.modules}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main()))
