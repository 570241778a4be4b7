"""Write the commands and times of docs/recipes.md: from trainer/spec/recipes.py and the plan.

python scripts/recipe_table.py
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

from trainer.flags.config import Config, parse
from trainer.outlook import imagined_order
from trainer.plan.dry_run import cluster_of, plan_of
from trainer.plan.forecast import seconds_in_words, step_seconds
from trainer.spec.recipes import (
    AMOUNTS,
    CLIP_SECONDS,
    LORA,
    RATES,
    RECIPES,
    WHOLE,
    WORD,
    WORD_STEPS,
    Recipe,
    rate_in_words,
)
from trainer.spec.shapes import KNOWN

FILE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
MODELS = ("small", "medium", "large")
CARDS = ("RTX 4090", "H100")  # of 24 and 80 GiB: rates assumed, and measured
TITLES = {LORA: "LoRA", WORD: "A new word", WHOLE: "The whole model"}
BEGIN, END = "<!-- {name}: python scripts/recipe_table.py writes this -->\n", "<!-- end of {name} -->"


def command(recipe: Recipe, model: str = "small") -> str:
    """The command of a recipe as it is typed."""
    return shlex.join(["python", "launch.py", "--dataset", "my_music", *recipe.flags(model)])


def section(mode: str) -> str:
    """The commands of one mode, and what they take on CARDS."""
    recipes = [recipe for recipe in RECIPES if recipe.mode == mode]
    commands = [f"{recipe.music.name}:\n\n```\n{command(recipe)}\n```\n" for recipe in recipes]
    head = "| music | steps | heard | range | " + " | ".join(f"{model}, {card}" for model in MODELS for card in CARDS)
    cells = [
        f"| {recipe.music.name} | {steps_of(recipe):,} | {_times(recipe)} | {_range(recipe)} | "
        + " | ".join(cell(recipe, model, card) for model in MODELS for card in CARDS)
        + " |"
        for recipe in recipes
    ]
    return "\n".join([*commands, head + " |", "|---" * (4 + len(MODELS) * len(CARDS)) + "|", *cells, ""])


def rates() -> str:
    """The ranges outside of which, by far, a run names the page."""
    rows = [
        f"| {TITLES[mode]} | {rate_in_words(least)} to {rate_in_words(most)} |" for mode, (least, most) in RATES.items()
    ]
    rows.append(f"| {TITLES[WORD]} | by its T5, as the run says; {WORD_STEPS[0]} to {WORD_STEPS[1]:,} steps |")
    return "\n".join(["| | `--lr` |", "|---|---|", *rows, ""])


def amounts() -> str:
    """What depends on the amount of music alone."""
    head = "| | " + " | ".join(music.name for music in AMOUNTS) + " |"
    rows = {
        "`--warmup_steps`": [f"{music.warmup_steps}" for music in AMOUNTS],
        "`--validation`": [f"{music.validation:g}" for music in AMOUNTS],
        "held out": [seconds_in_words(music.validation * music.hours * 3600) for music in AMOUNTS],
        "`--validation_steps`": [str(music.validation_steps or "once per epoch") for music in AMOUNTS],
        "`--early_stop`": [f"{music.early_stop}" for music in AMOUNTS],
        "`--cfg_rate`": [f"{music.cfg_rate:g}" for music in AMOUNTS],
        "`--code_views`": [f"{music.code_views}" for music in AMOUNTS],
    }
    table = [f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()]
    return "\n".join([head, "|---" * (1 + len(AMOUNTS)) + "|", *table, ""])


@cache
def read(recipe: Recipe) -> tuple[Config, frozenset[str]]:
    """The flags of a recipe's command, and which of them are typed."""
    words = ["--dataset", "my_music", *recipe.flags(MODELS[0]), "--dry_run", "1", "--gpus", "1", "--gpu_name", CARDS[0]]
    return parse(words)


@cache
def planned(recipe: Recipe, model: str, card: str) -> tuple[int, float, bool, float]:
    """Steps, seconds of all of them, whether the optimizer is in host memory, and epochs: what a dry run says."""
    config, typed = read(recipe)
    config = replace(config, model_id=model, gpu_name=card)
    shape = KNOWN[model]
    plan = plan_of(config, typed, cluster_of(config, None)[0], shape)
    clips = round(recipe.music.clips * (1 - config.validation_share))
    order = imagined_order(config, plan, shape, [CLIP_SECONDS], clips)
    if plan.time is None:
        raise SystemExit(f"no rates of {card}: trainer/plan/rates.py lists the cards")
    seconds = order.steps * step_seconds(plan.time, 1.0)
    return order.steps, seconds, plan.offload_optimizer, order.epoch_of(order.steps)


def steps_of(recipe: Recipe) -> int:
    """Optimizer steps of a recipe's command; the same on every card."""
    return planned(recipe, MODELS[0], CARDS[-1])[0]


def cell(recipe: Recipe, model: str, card: str) -> str:
    """The time of all steps of a recipe."""
    _, seconds, offloaded, _ = planned(recipe, model, card)
    return seconds_in_words(seconds) + " **o**" * offloaded


def _times(recipe: Recipe) -> str:
    return f"{planned(recipe, MODELS[0], CARDS[-1])[3]:.3g} x"


def _range(recipe: Recipe) -> str:
    return "-" if recipe.heard is None else "{:g} to {:g} x".format(*recipe.heard)


def tables() -> dict[str, str]:
    """What stands between the marks of the page, by their names."""
    return {"rates": rates(), "amounts": amounts()} | {mode: section(mode) for mode in TITLES}


def written(page: str) -> str:
    """The page with its tables made anew."""
    for name, table in tables().items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        before, _, rest = page.partition(begin)
        if end not in rest:
            raise SystemExit(f"{FILE} lacks '{begin.strip()}' or, behind it, '{end}'")
        page = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    FILE.write_text(written(FILE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {FILE}")
