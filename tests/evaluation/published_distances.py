"""Writes published_distances.json: what kadtk, fadtk and frechet-audio-distance say of some embeddings.

    pip install --no-deps --target FOLDER kadtk==1.1.0 fadtk==1.1.0 frechet-audio-distance==0.3.4
    python tests/evaluation/published_distances.py FOLDER

It runs their own functions, taken out of their sources: the packages import what cannot be installed beside this
project's versions. Besides those it takes numpy, scipy and torch.
"""

from __future__ import annotations

import ast
import json
import logging
import sys
from pathlib import Path
from typing import Any, Union

import numpy as np

SIZES = ((24, 31, 5), (60, 45, 8), (200, 150, 16))  # generated, reference, columns
BANDWIDTH = 2.5
FILE = Path(__file__).with_suffix(".json")


def embeddings(rows: int, columns: int, shift: float) -> np.ndarray:
    """By a formula, so that no version of a random generator matters: (rows, columns) float64."""
    i, j = np.arange(rows)[:, None], np.arange(columns)[None]
    return np.sin(1 + i * (j + 1) * 0.37 + (i * i % 7) * 0.61 * shift) * (1 + 0.1 * j) + shift * 0.05 * j


def functions(path: Path, names: tuple[str, ...], scope: dict[str, Any]) -> dict[str, Any]:
    """The functions or methods of these names in a source file, run among the names in `scope`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            exec(compile(ast.Module([node], []), str(path), "exec"), scope)
    return scope


def main(folder: Path) -> None:
    import torch
    from scipy import linalg

    kadtk = functions(
        folder / "kadtk" / "kad.py", ("calc_kernel_audio_distance", "median_pairwise_distance"),
        {"torch": torch, "np": np, "Path": Path, "Union": Union, "SCALE_FACTOR": 100},
    )  # fmt: skip
    fadtk = functions(
        folder / "fadtk" / "fad.py", ("calc_frechet_distance", "calc_embd_statistics"),
        {"np": np, "linalg": linalg, "scisqrt": np.lib.scimath.sqrt, "log": logging.getLogger("fadtk")},
    )  # fmt: skip
    other = functions(
        folder / "frechet_audio_distance" / "fad.py", ("calculate_frechet_distance", "calculate_embd_statistics"),
        {"np": np, "linalg": linalg},
    )  # fmt: skip
    rows = []
    for generated, reference, columns in SIZES:
        x, y = embeddings(generated, columns, 1.0), embeddings(reference, columns, 0.0)
        tensors = torch.from_numpy(x), torch.from_numpy(y)
        kad, exact = kadtk["calc_kernel_audio_distance"], torch.float64
        of_x, of_y = (other["calculate_embd_statistics"](None, values) for values in (x, y))
        rows.append({
            "generated": generated, "reference": reference, "columns": columns,
            "kadtk": kad(*tensors, (None, None), "cpu", precision=exact).item(),
            "kadtk_at_bandwidth": kad(*tensors, (None, None), "cpu", bandwidth=BANDWIDTH, precision=exact).item(),
            "kadtk_median": kadtk["median_pairwise_distance"](tensors[1]),
            "fadtk": float(
                fadtk["calc_frechet_distance"](*fadtk["calc_embd_statistics"](x), *fadtk["calc_embd_statistics"](y))
            ),
            "frechet_audio_distance": float(other["calculate_frechet_distance"](None, *of_x, *of_y)),
        })  # fmt: skip
    FILE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
