"""Where a run is told that it is far outside of the recipes, and where it is not."""

from __future__ import annotations

import pytest

from trainer.flags.config import parse
from trainer.spec.recipes import PAGE, rate_in_words, remarks, times_in_words
from trainer.spec.shapes import KNOWN

LORA, WORD, WHOLE = ["--lora_rank", "16", "--lr", "1e-4"], ["--tune_text", "1", "--lr", "0.1"], []


def told(words: list[str], *, times: float, hours: float | None, steps: int = 1000, model: str = "small") -> list[str]:
    config, _ = parse(["--dataset", "a", *words])
    shape = KNOWN[model]
    return remarks(config.selection, shape, learning_rate=config.lr, times=times, steps=steps, hours=hours)


@pytest.mark.parametrize(
    "words,times,hours",
    [
        (WHOLE, 100, 20 * 30 / 3600),  # the first system's defaults, on few clips
        (WHOLE, 15, 2),
        (WHOLE, 80, 2),  # twice the most is not yet far
        (LORA, 30, 0.17),
        (LORA, 1.5, 2),
        (WORD, 5000, 0.1),  # its steps count, and not how often it hears
        (["--freeze", "embeddings"], 15, 2),
    ],
)
def test_what_is_near_to_a_recipe_is_told_nothing(words, times, hours) -> None:
    assert told(words, times=times, hours=hours) == []


@pytest.mark.parametrize(
    "words,times,hours,steps,what",
    [
        (WHOLE, 100, 2, 3000, "note: to hear the music 100 times is far above the 5 to 40 times"),
        (WHOLE, 1, 0.2, 3, "once is far below the 10 to 100 times"),
        (WHOLE, 100, 200, 9, "above the 1 to 15 times that docs/recipes.md has for the whole model on 200 hours"),
        (LORA, 100, 20, 9, "above the 2 to 15 times that docs/recipes.md has for LoRA on 20 hours"),
        (WORD, 0.1, 200, 90, "note: 90 steps are far below the 200 to 5,000 that docs/recipes.md has for a new word"),
    ],
)
def test_what_is_far_from_all_recipes_names_the_page(words, times, hours, steps, what) -> None:
    [line] = told(words, times=times, hours=hours, steps=steps)
    assert what in line and PAGE in line


def test_the_first_systems_rate_is_far_too_low_for_adapters() -> None:
    [line] = told(["--lora_rank", "16"], times=10, hours=2)
    assert line == "note: --lr 1e-5 is far below the 3e-5 to 4e-4 that docs/recipes.md has for LoRA"
    [line] = told(["--lr", "1e-3"], times=10, hours=2)
    assert "far above the 3e-6 to 1e-4" in line


def test_of_unknown_music_the_rate_alone_is_judged() -> None:
    assert told(WHOLE, times=10_000, hours=None) == [] == told(WORD, times=1, hours=None, steps=1)
    assert len(told(["--lr", "0.01"], times=10_000, hours=None)) == 1


@pytest.mark.parametrize("model", ["debug", "debug-melody"])
def test_models_of_other_sizes_start_from_nothing_and_are_told_nothing(model) -> None:
    assert told(["--lr", "0.01"], times=10_000, hours=2, model=model) == []


def test_numbers_in_words() -> None:
    assert [rate_in_words(rate) for rate in (1e-5, 1.5e-5, 0.0004, 0.1)] == ["1e-5", "1.5e-5", "4e-4", "1e-1"]
    words = [times_in_words(times) for times in (1, 100, 1200.4, 3.21, 0.25, 2)]
    assert words == ["once", "100 times", "1,200 times", "3.2 times", "0.25 times", "2 times"]
