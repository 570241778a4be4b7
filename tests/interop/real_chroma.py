"""The notes that audiocraft's own ChromaExtractor finds, with the real torchaudio and librosa.

Of audiocraft it needs one file alone, so that it runs where audiocraft's pins cannot be installed:

    pip install torch torchaudio librosa einops
    python real_chroma.py AUDIOCRAFT/modules/chroma.py sounds.npz notes.json

sounds.npz holds mono sounds (n,) float32 at 32 kHz by name (tests/chroma_sounds.py); notes.json gets a digit for each
note, what they are from and by which versions. It made tests/data/recorded_chroma.json.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch


def main(module: str, sounds: str, output: str) -> None:
    spec = importlib.util.spec_from_file_location("chroma", module)
    chroma = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chroma)
    extractor = chroma.ChromaExtractor(sample_rate=32_000, n_chroma=12, radix2_exp=14, argmax=True)
    found = {}
    with np.load(sounds) as loaded:
        for name in loaded.files:
            one_hot_BTC = extractor(torch.from_numpy(loaded[name])[None, None])
            found[name] = "".join("0123456789ab"[note] for note in one_hot_BTC[0].argmax(-1))
    said = {
        "origin": "ChromaExtractor of audiocraft 1.3.0 (audiocraft/modules/chroma.py), by tests/interop/real_chroma.py",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchaudio", "librosa", "numpy")},
        "machine": platform.machine(),
        "notes": found,
    }
    Path(output).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
