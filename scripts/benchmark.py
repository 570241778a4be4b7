"""Measure the trainer on this machine, beside what users would take instead, in one run.

python scripts/benchmark.py --cases step bare seq2seq audiocraft --models small --layers 4 --frames 500 1500
python scripts/benchmark.py --suite gpu

Weights, codes and music are made up; speed and memory do not depend on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import (
    data_sets,
    encoding,
    forecasts,
    generating,
    padding,
    parts,
    reading,
    report,
    scanning,
    steps,
    suites,
    whole_runs,
)
from benchmarks.report import Row
from benchmarks.work import Work

from trainer.flags.paths import expanded
from trainer.plan.request import CHECKPOINTING
from trainer.spec.shapes import KNOWN

# The cases besides those of steps.CONTESTANTS, and what measures each. docs/benchmarks.md says what they are.
CASES = {
    "run": whole_runs.run,
    "encode": parts.encode,
    "encode_files": encoding.encode_files,
    "scan": scanning.scan,
    "epochs": whole_runs.epochs,
    "save": parts.save,
    "read": reading.read,
    "scale": whole_runs.scale,
    "start": whole_runs.start,
    "growth": parts.growth,
    "flat": parts.flat,
    "padding": padding.padding,
    "prepared": data_sets.prepared,
    "cached": data_sets.cached,
    "forecast": forecasts.forecast,
}


def main(argv: Sequence[str]) -> int:
    """Run what is asked for; returns 1 where our own step failed."""
    arguments = _parser().parse_args(argv)
    rows: list[Row] = []
    for found in _measured(arguments):
        rows += found
        print(report.table(found), flush=True)
        report.write(Path(arguments.out), rows, {key: str(value) for key, value in vars(arguments).items()})
    print(f"written: {arguments.out}/benchmark.json")
    return 1 if any("failure" in row and row["case"] == "step" for row in rows) else 0


def _measured(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    if arguments.suite == "gpu":
        yield from suites.gpu(arguments.models or suites.SIZES, arguments.rounds)
        return
    works = [
        Work(
            model=model,
            layers=arguments.layers,
            frames=frames,
            micro_batch=arguments.micro_batch,
            accumulation=arguments.accumulation,
            precision=arguments.precision,
            strategy=arguments.strategy,
            gradient_checkpointing=CHECKPOINTING[arguments.gradient_checkpointing],
            compiled=arguments.compile,
        )
        for model in arguments.models or ["small"]
        for frames in arguments.frames
    ]
    if arguments.suite == "generating":
        yield from generating.measure(works, arguments.clips, arguments.rounds)
        return
    stepping = [name for name in arguments.cases if name in steps.CONTESTANTS]
    if stepping:
        for work in works:
            yield steps.measure(stepping, work, arguments.rounds)
    settings = parts.Settings(
        works=works,
        rounds=arguments.rounds,
        clips=arguments.clips,
        seconds=arguments.clip_seconds,
        processes=arguments.processes,
        files=arguments.files,
    )
    for name in arguments.cases:
        if name in CASES:
            yield CASES[name](settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("gpu", "generating"), help="all for a GPU, or how codes are made")
    parser.add_argument("--cases", nargs="+", choices=(*steps.CONTESTANTS, *CASES), default=["step", "bare"])
    parser.add_argument("--models", nargs="+", choices=tuple(KNOWN), help="small; of the suite: small, medium, large")
    parser.add_argument("--layers", type=int, help="only so many layers of the model, for a slow machine")
    parser.add_argument("--frames", nargs="+", type=int, default=[1500], help="frames of a clip; 50 are a second")
    parser.add_argument("--micro_batch", type=int, default=1, help="clips of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--strategy", choices=("single", "fsdp", "zero2", "zero3"), default="single")
    parser.add_argument("--gradient_checkpointing", choices=CHECKPOINTING, default="0", help="selective: --compile")
    parser.add_argument("--compile", action="store_true", help="compile the layers (ours alone)")
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions, after one that is not counted")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4], help="for the case scale")
    parser.add_argument("--clips", type=int, default=8, help="clips for encode, encode_files, epochs and generating")
    parser.add_argument("--clip_seconds", type=float, default=10.0, help="their length")
    parser.add_argument("--files", type=int, default=20_000, help="sound files for the case scan")
    parser.add_argument("--out", type=expanded, default="benchmarks", help="folder for benchmark.json and .png")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
