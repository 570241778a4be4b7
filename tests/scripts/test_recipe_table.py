"""docs/recipes.md has the tables of the code, its commands run as they stand, and its data agree with their sources."""

from __future__ import annotations

import math
import re
import shlex

import pytest
import recipe_table

from launch import main
from trainer.data.order import Order
from trainer.flags.config import parse
from trainer.outlook import heard_in_words
from trainer.spec.recipes import META_BATCH, META_RATE, RATES, RECIPES, WHOLE, WORD, WORD_STEPS, recipe_for
from trainer.spec.shapes import KNOWN

PAGE = recipe_table.FILE.read_text(encoding="utf-8")
COMMANDS = [line for line in re.findall(r"^ *(python launch\.py .+)$", PAGE, re.MULTILINE)]


def dry_run(command: str, *words: str) -> int:
    return main([*shlex.split(command)[2:], *words, "--dry_run", "1", "--gpus", "1"])


def test_the_tables_of_the_page_are_what_the_plan_and_the_recipes_say() -> None:
    assert recipe_table.written(PAGE) == PAGE, "python scripts/recipe_table.py writes them anew"


def test_every_recipe_has_its_command_on_the_page() -> None:
    assert {recipe_table.command(recipe) for recipe in RECIPES} <= set(COMMANDS)
    assert len(COMMANDS) == len(RECIPES) + 2  # two dry runs besides


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_accepted_on_an_imagined_gpu(command, capsys) -> None:
    words = [] if "--gpu_memory_gib" in command else ["--gpu_name", "H100"]
    assert dry_run(command, *words) == 0
    told = capsys.readouterr().out
    # A recipe is never far outside of the page, which it is from; the two dry runs have the default rate.
    assert "is heard " in told and "note:" not in told


@pytest.mark.full
@pytest.mark.parametrize("model", ["medium", "large"])
@pytest.mark.parametrize("gpu", ["RTX 4090", "H100"])
def test_so_are_those_of_larger_models(model: str, gpu: str, capsys) -> None:
    for recipe in RECIPES:
        assert dry_run(recipe_table.command(recipe, model), "--gpu_name", gpu) == 0
        assert f"{model}: " in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.mode}, {recipe.music.name}")
def test_a_recipe_is_inside_of_its_own_ranges_and_is_found_by_its_music(recipe) -> None:
    config, _ = parse(["--dataset", "a", *recipe.flags("small")])
    clips = round(recipe.music.clips * (1 - config.validation_share))
    steps = math.ceil(recipe.epochs * clips / recipe.global_batch)
    if recipe.mode == WORD:
        assert WORD_STEPS[0] <= min(steps, recipe.max_steps or steps) <= WORD_STEPS[1]
    else:
        assert recipe.heard[0] <= recipe.epochs <= recipe.heard[1]
        assert RATES[recipe.mode][0] <= config.lr <= RATES[recipe.mode][1]
    assert recipe.music.warmup_steps < steps / 8
    assert recipe.music.validation_steps is None or steps > 3 * recipe.music.validation_steps
    # What is held out, and a tenth more or less of music, finds no other recipe.
    for share in (1 - recipe.music.validation, 0.9, 1.1):
        assert recipe_for(recipe.mode, recipe.music.hours * share) == recipe


def test_whole_models_rates_are_half_of_metas_by_the_square_root_rule() -> None:
    """1e-4 at 192 clips a step; Adam's rate goes with the root of the batch (arXiv 2205.10287)."""
    for recipe in RECIPES:
        if recipe.mode == WHOLE:
            rule = META_RATE / 2 * math.sqrt(recipe.global_batch / META_BATCH)
            assert float(recipe.learning_rate) == pytest.approx(rule, rel=0.05)


def test_meta_heard_each_second_as_often_as_the_page_says() -> None:
    hours = 1_000_000 * META_BATCH * 30 / 3600
    assert hours == pytest.approx(1.6e6) and hours / 20_000 == pytest.approx(80)
    assert "1.6 million hours heard of 20,000: each second 80 times" in PAGE


def test_the_lines_that_the_page_quotes_are_those_of_a_run() -> None:
    """Two hours with the defaults."""
    import numpy as np

    config, _ = parse(["--dataset", "my_music"])
    order = Order(
        seed=0, epochs=config.epochs, global_batch=config.batch_size * config.grad_acc, segment_frames=1500,
        codebooks=4, caption_drop_rate=0.0, frames=np.full((240, 4), 1500),
    )  # fmt: skip
    for line in heard_in_words(config, order, KNOWN["small"], 50):
        assert f"    {line}\n" in PAGE


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="lacks"):
        recipe_table.written("# Recipes\n")
