"""A run's loss as one line of characters, from its metrics.jsonl.

python scripts/loss_curve.py models
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.run.metrics import reports

WIDTH = 60
LEVELS = " ▁▂▃▄▅▆▇█"


def main(argv: Sequence[str]) -> int:
    """Print the curve of the run in folder argv[0]; returns the exit code."""
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    path = Path(argv[0]) / "metrics.jsonl"
    try:
        losses = [float(report["loss"]) for report in reports(path) if "loss" in report]
    except OSError as error:
        print(f"error: {path} cannot be read ({error}): give the output_dir of a run", file=sys.stderr)
        return 1
    if not losses:
        print(f"error: {path} reports no loss yet", file=sys.stderr)
        return 1
    print(f"loss {losses[0]:.2f} {curve(losses)} {losses[-1]:.3f} after {len(losses)} steps")
    return 0


def curve(values: Sequence[float], width: int = WIDTH) -> str:
    """At most `width` characters whose heights are the means of equal parts of `values`, from 0 to the largest."""
    width = min(width, len(values))
    parts = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    top = max(*means, 1e-9)
    return "".join(LEVELS[max(0, min(len(LEVELS) - 1, round(mean / top * (len(LEVELS) - 1))))] for mean in means)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # the blocks of a curve, in ASCII
    sys.exit(main(sys.argv[1:]))
