"""report.html: how far a run is, its curves, its sounds in a grid, what to do next; or several runs side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.report import held_out_score, memorisation
from trainer.report.curves import MOST_POINTS, chart, series, smoothed, spans_decades
from trainer.report.overfitting import fit_of
from trainer.report.players import CLIPS, Column, columns_of, grid_of
from trainer.report.run_facts import FINISHED, Facts, RunReader
from trainer.report.run_metrics import Columns
from trainer.report.run_sounds import Sounds
from trainer.report.run_words import commands_of, differences, end_in_words, limits_of, settings_of
from trainer.report.template import link_to, rendered

PAGE = "report.html"
STYLES, PROGRAMS = ("base.css", "run_page.css"), ("page_data.js", "charts.js", "players.js")
MOST_POINTS_OF_ALL_RUNS = 16_000  # of one chart
SMOOTHED_MARK = ", smoothed"


def page_of_run(
    reader: RunReader, page_folder: Path, defaults: Mapping[str, object], *, exit_code: int | None = None,
    alive: bool = False,
) -> str:  # fmt: skip
    """The page of one run, as text, for a file in `page_folder`. exit_code, alive: see RunReader.read."""
    facts = reader.read(exit_code=exit_code, alive=alive)
    columns, left_out = columns_of(facts.steps_of_sounds, facts.best_kept or (facts.best[0] if facts.best else None))
    grid = grid_of(columns, reader.sounds, page_folder)
    return rendered(
        "run_page.html",
        styles=STYLES,
        programs=PROGRAMS,
        data=_data(charts_of(facts), grid, facts),
        facts=facts,
        name=name_of(facts),
        page=PAGE,
        grid=grid,
        left_out=left_out,
        dataset=_dataset(facts, page_folder),
        plan=_plan(facts),
        settings=settings_of(facts.config, defaults),
        commands=commands_of(facts, defaults),
        limits=limits_of(facts),
        end=end_in_words(facts),
        fit=fit_of(facts.metrics),
        exported=facts.finished.get("exported_step") if facts.state == FINISHED else None,
        score=held_out_score.score_of(facts.score),
        **_memorisation(facts),
        **_formats(facts),
    )


def page_of_runs(readers: Sequence[RunReader], page_folder: Path) -> str:
    """The page of several runs, as text: their curves in one chart each, and their sounds side by side."""
    runs = [reader.read() for reader in readers]
    names = _different_names(runs)
    grid = grid_of(_columns_of_runs(runs, names), Sounds(), page_folder)
    kept = [sound for facts in runs for sound in limits_of(facts)]
    return rendered(
        "run_comparison.html",
        styles=STYLES,
        programs=PROGRAMS,
        data=_data(_charts_of_runs(runs, names), grid, runs[0]),
        runs=runs,
        names=names,
        grid=grid,
        left_out=0,
        judged=_judged_in_brief(runs),
        differences=differences([facts.config for facts in runs]),
        limits=list(dict.fromkeys(kept)),
        **_formats(runs[0]),
    )


def _memorisation(facts: Facts) -> dict[str, Any]:
    found = memorisation.memorisation_of(facts.recall)
    if found is None:
        return {"memorisation": None}
    verdict, drawn = memorisation.verdict_of(found), memorisation.chart_of(found)
    return {"memorisation": found, "verdict": verdict, "recall_chart": drawn}


def _judged_in_brief(runs: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """Rows of a table: a title, and a text for each run, "" where it was not measured."""
    known = [memorisation.in_brief(memorisation.memorisation_of(facts.recall)) for facts in runs]
    scores = [held_out_score.in_brief(held_out_score.score_of(facts.score)) for facts in runs]
    return [("training clips played by heart", known), ("distance from held-out music", scores)]


def _data(charts: Sequence[Mapping[str, Any]], grid: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """What the page's programs read."""
    return {"charts": charts, "sounds": grid["played"], "written": facts.written, "newest_last": True}


def name_of(facts: Facts) -> str:
    """The name of the run's folder."""
    return facts.root.resolve().name.encode("utf-8", "replace").decode() or str(facts.root)


def duration(seconds: float) -> str:
    """3 d 4 h, 2 h 05 min, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def charts_of(facts: Facts) -> list[dict[str, Any]]:
    """The curves of a run, as the program draws them."""
    training, validation = facts.metrics.training, facts.metrics.validation
    marks: list[tuple[int, str]] = [(step, "resumed") for step in facts.resumes]
    with_best = [*marks, (facts.best[0], "best")] if facts.best else marks
    loss, held_out = training["loss"], validation["validation_loss"]
    norm, codebooks = training["grad_norm"], training.per_codebook
    steps = training["step"]

    def of(name: str, values: np.ndarray, kind: str, colour: int) -> dict[str, Any]:
        return series(name, steps, values, kind, colour, MOST_POINTS)

    made = [
        chart(
            "Loss",
            [
                of("training", loss, "raw", 0), of("training" + SMOOTHED_MARK, smoothed(loss), "line", 0),
                series("validation", validation["step"], held_out, "dots", 1, MOST_POINTS),
            ],
            marks=with_best, log=spans_decades(loss, held_out), unit="",
        ),
        chart(
            "Loss of each codebook" + SMOOTHED_MARK,
            [of(name, smoothed(values), kind, colour) for (name, kind, colour), values in zip(
                lines_of_codebooks(len(codebooks), facts.start.get("channels")), codebooks, strict=True
            )],
            marks=marks, log=spans_decades(*codebooks) if codebooks else False, unit="",
        ),
        chart("Learning rate", [of("learning rate", training["lr"], "line", 0)], marks=marks, log=False, unit=""),
        chart(
            "Gradient norm, before it is clipped",
            [of("gradient norm", norm, "raw", 0), of("gradient norm" + SMOOTHED_MARK, smoothed(norm), "line", 0)],
            marks=marks, log=spans_decades(norm), unit="",
        ),
        chart("Frames per second", [
            of("frames per second", training["frames_per_second"], "raw", 0),
            of("frames per second" + SMOOTHED_MARK, smoothed(training["frames_per_second"]), "line", 0),
        ], marks=marks, log=False, zero=True, unit=""),
        # A CPU's speed is measured once, and others use it too: a share of it says little, and may exceed 100 %.
        chart("Model FLOPs utilisation (MFU)", [
            of("MFU", 100 * training["mfu"], "raw", 0),
            of("MFU" + SMOOTHED_MARK, smoothed(100 * training["mfu"]), "line", 0),
        ], marks=marks, log=False, zero=True, unit=" %") if facts.plan.get("on_gpu", True) else None,
    ]  # fmt: skip
    return [one for one in made if one is not None]


def lines_of_codebooks(count: int, channels: object) -> list[tuple[str, str, int]]:
    """Name, kind and colour of each codebook's curve. In stereo those of left and right stand in turn, and a pair has
    one colour: 1L is a line, 1R a dashed one."""
    if channels != 2:
        return [(f"codebook {n + 1}", "line", n) for n in range(count)]
    kinds = ("line", "dashed")
    return [(f"codebook {n // 2 + 1}{'LR'[n % 2]}", kinds[n % 2], n // 2) for n in range(count)]


def _charts_of_runs(runs: Sequence[Facts], names: Sequence[str]) -> list[dict[str, Any]]:
    most = max(100, min(MOST_POINTS, MOST_POINTS_OF_ALL_RUNS // len(runs)))

    def overlaid(title: str, part: str, column: str, kind: str, *, smooth: bool, **options: object) -> Any:
        tables: list[Columns] = [getattr(facts.metrics, part) for facts in runs]
        values = [smoothed(table[column]) if smooth else table[column] for table in tables]
        drawn = [
            series(name, table["step"], one, kind, number, most)
            for number, (name, table, one) in enumerate(zip(names, tables, values, strict=True))
        ]
        return chart(title, drawn, marks=[], log=spans_decades(*values) if "zero" not in options else False,
                     unit="", **options)  # fmt: skip

    made = [
        overlaid("Training loss" + SMOOTHED_MARK, "training", "loss", "line", smooth=True),
        overlaid("Validation loss", "validation", "validation_loss", "dots", smooth=False),
        overlaid("Learning rate", "training", "lr", "line", smooth=False, zero=True),
        overlaid("Gradient norm" + SMOOTHED_MARK, "training", "grad_norm", "line", smooth=True),
        overlaid("Frames per second" + SMOOTHED_MARK, "training", "frames_per_second", "line", smooth=True, zero=True),
    ]
    return [one for one in made if one is not None]


def _columns_of_runs(runs: Sequence[Facts], names: Sequence[str]) -> list[Column]:
    """The base model, then of each run the newest sounds, and those of its best step where it is another one."""
    base: list[Column] = []
    clips: list[Column] = []
    made: list[Column] = []
    for facts, name in zip(runs, names, strict=True):
        best = facts.best_kept or (facts.best[0] if facts.best else None)
        columns, _ = columns_of(facts.steps_of_sounds, best)
        base = base or [one for one in columns if one.fixed]
        clips = clips or [one for one in columns if one.title == CLIPS]
        made += [
            Column(title=name, remarks=[one.title, *one.remarks], sounds=one.sounds, embedded=True)
            for one in columns if one.embedded and not one.fixed and one.title != CLIPS
        ]  # fmt: skip
    return [*base, *clips, *made]


def _different_names(runs: Sequence[Facts]) -> list[str]:
    """The name of each run's folder, with as many of the folders above it as tell it from the others."""
    parts = [facts.root.resolve().parts for facts in runs]
    most = max(map(len, parts))
    for count in range(1, most + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names) or count == most:
            break
    return [name.encode("utf-8", "replace").decode() for name in names]


def _dataset(facts: Facts, page_folder: Path) -> dict[str, Any]:
    """The figures of the data set, and the link to its page; {} where it was not looked at."""
    figures = facts.dataset.get("figures")
    findings = facts.dataset.get("mend_first")
    page = facts.root / "dataset.html"
    return {
        "figures": figures if isinstance(figures, dict) else {},
        "findings": [one for one in findings if isinstance(one, dict)] if isinstance(findings, list) else [],
        "link": link_to(page, page_folder) if page.is_file() else "",
        "path": str(facts.config.get("dataset_path", "")),
    }


def _plan(facts: Facts) -> list[tuple[str, str]]:
    """What plan.json says, as rows of a table."""
    plan, start = facts.plan, facts.start
    memory = plan.get("memory")
    rows = [
        ("hardware", str(start.get("device") or ("GPU" if plan.get("on_gpu") else "CPU")) if plan else ""),
        ("processes", _counted(plan.get("world_size"))),
        ("machines", _counted(plan.get("nodes"))),
        ("strategy", str(plan.get("strategy", ""))),
        ("precision", "float32" if plan.get("mixed_precision") == "no" else str(plan.get("mixed_precision", ""))),
        ("clips per step", _counted(plan.get("global_batch"))),
        ("micro-batch", _counted(plan.get("micro_batch"))),
        ("accumulation", _counted(plan.get("accumulation"))),
        ("between processes", str(plan.get("exchange", ""))),
        ("parameters", _counted(start.get("parameters"))),
        ("of them trained", _counted(start.get("trained_parameters"))),
    ]
    if isinstance(memory, dict) and plan.get("on_gpu"):
        parts = ("weights", "gradients", "optimizer", "buffers", "activations", "reserve")
        total = sum(value for name in parts if isinstance(value := memory.get(name), int))
        rows.append(("planned memory per GPU", f"{total / 2**30:.1f} GiB"))
    return [(name, value) for name, value in rows if value]


def _counted(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _formats(facts: Facts) -> dict[str, Any]:
    return {"duration": duration, "moment": _moment, "written_text": _moment(facts.written)}


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
