"""recall.json and score.json as scripts/recall.py and scripts/score.py write them after a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LENGTHS = (0, 1, 5, 10)
# Share of equal codes in the first codebook by the seconds that the model was given.
EQUAL = {
    ("training", "before"): (0.01, 0.012, 0.011, 0.02),
    ("training", "after"): (0.71, 0.9, 1.0, 1.0),
    ("held out", "before"): (0.01, 0.01, 0.013, 0.02),
    ("held out", "after"): (0.02, 0.024, 0.03, 0.04),
}


def shares(equal: float) -> dict[str, float]:
    return {"exact": float(equal == 1), "partial": float(equal >= 0.8), "equal": equal, "chance": 0.015}


def recall() -> dict[str, Any]:
    """Training clips that are known by heart after the training, and held-out ones near chance."""
    rows = [
        {"group": group, "model": model, "prompt_seconds": length, "clips": 10 if group == "training" else 3,
         "first_codebook": shares(equal), "all_codebooks": shares(equal / 2)}
        for (group, model), all_equal in EQUAL.items() for length, equal in zip(LENGTHS, all_equal, strict=True)
    ]  # fmt: skip
    played = [
        {"clip": f"song {n}.wav", "caption": "slow rock", "codes": 800, "before": 9, "after": 800 - 100 * (n == 3),
         "snr_before_db": -2.9, "snr_after_db": None if n != 3 else 4.0}
        for n in range(4)
    ]  # fmt: skip
    nearest = [
        {"prompt": prompt, "clip": "rock/slow.wav", "output_seconds": 1.5, "clip_seconds": 12.0, "seconds": 5.0,
         "equal": equal, "first_codebook": equal + 0.125, "first_codebook_chance": 0.03, "chance": 0.02, "model": model}
        for model, equal in (("before", 0.05), ("after", 0.625)) for prompt in ("slow rock", "fast metal")
    ]  # fmt: skip
    return {
        "format": "musicgen-trainer recall", "version": 2, "played_back": played,
        "memorisation": {
            "continued_seconds": 5.0, "rows": rows, "nearest": nearest, "searched_clips": 10, "training_clips": 40,
        },
        "remarks": [],
    }  # fmt: skip


def score(clips: int = 60) -> dict[str, Any]:
    """The tuned model is nearer by one measure, farther by another, and nothing can be said by the third."""
    kad = {"base": [4.2, 3.6, 5.0], "tuned": [1.9, 1.4, 2.5], "difference": [-2.3, -3.1, -1.4], "verdict": "better"}
    frechet = {"base": [80.0, 70.0, 95.0], "tuned": [85.5, 71.0, 99.0], "difference": [5.5, -9.0, 21.0],
               "verdict": None}  # fmt: skip
    text = {"base": [0.31, 0.28, 0.34], "tuned": [0.22, 0.2, 0.25], "difference": [-0.09, -0.12, -0.05],
            "verdict": "worse"}  # fmt: skip
    return {
        "format": "musicgen-trainer score", "version": 1, "clips": clips, "generated": 120, "few": clips < 50,
        "seconds": 10.0,
        "embeddings": {
            "encodec": {"distances": {"kad": kad, "frechet": frechet}},
            "clap": {"distances": {"kad": kad}, "text": text},
        },
        "not_run": ["fadtk: <b>it</b> is not installed"],
    }  # fmt: skip


def add_judgement(run: Path, **files: Any) -> Path:
    """Write recall.json and score.json into a run, or what is given in their place. Returns the run."""
    values: Mapping[str, Any] = {"recall": recall(), "score": score()} | files
    for name, value in values.items():
        (run / f"{name}.json").write_text(json.dumps(value))
    return run
