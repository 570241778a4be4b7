"""What was measured, as a table, as JSON with the hardware and versions, and as a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
CHECKPOINTING_LABELS = {False: None, True: "recomputing", "selective": "recomputing little"}
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "audiocraft")


def environment() -> dict[str, Any]:
    """Date, hardware and versions, which every figure needs."""
    versions = {}
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **versions,
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; a column that no row fills is left out."""
    columns = list(dict.fromkeys(name for row in rows for name, value in row.items() if value not in ("", None)))
    lines = [columns, ["---"] * len(columns), *([_text(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(folder: Path, rows: Sequence[Row], settings: dict[str, Any]) -> None:
    """Write benchmark.json and, where matplotlib is installed, benchmark.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "settings": settings, "rows": list(rows)}
    (folder / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n")
    timed = [row for row in rows if "frames_per_second" in row]
    if not timed:
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    _plot(folder / "benchmark.png", timed)


def _plot(path: Path, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [_label(row) for row in rows]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.35 * len(rows)), layout="constrained")
    bars = axes.barh(names, [row["frames_per_second"] for row in rows])
    axes.bar_label(bars, [f"{row['mfu']:.0%}" if "mfu" in row else "" for row in rows], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("frames per second; labels: share of the device's matrix product (MFU)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _label(row: Row) -> str:
    parts = [row["case"], row.get("model"), row.get("what"), row.get("precision")]
    parts += [f"{row['layers']} layers" if "layers" in row else None]
    parts += [f"{row['clips']} x {row['frames']}" if "frames" in row and "clips" in row else None]
    parts += [CHECKPOINTING_LABELS[row.get("checkpointing", False)], "compiled" if row.get("compiled") else None]
    return " ".join(str(part) for part in parts if part not in ("", "no", None))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
