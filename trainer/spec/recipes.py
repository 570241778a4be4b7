"""What docs/recipes.md recommends, as data: for each amount of music and each mode of training, the flags and the range
in which a run should let its music be heard. The page gives the sources, and scripts/recipe_table.py writes its tables.

Nothing here was measured with the published weights. The ranges say only where a run is far away from all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.spec.shapes import KNOWN, PUBLISHED_NAMES, Shape
from trainer.spec.trainable import Selection

PAGE = "docs/recipes.md"
CLIP_SECONDS = 30.0  # of a clip in the recipes, the segment that Meta trained on (arXiv 2306.05284, section 3.1)
LORA, WORD, WHOLE = "LoRA", "a new word", "the whole model"
FAR = 2.0  # a run is far outside of a range from so many times its upper end on, or below its lower end over this

# Meta's clips a step from nothing (arXiv 2306.05284, section 3.1), and its rate for medium and large (audiocraft 1.3.0,
# audiocraft/grids/musicgen/musicgen_base_32khz.py).
META_RATE, META_BATCH = 1e-4, 192

# The rates at which somebody has trained, or that follow from it (docs/recipes.md). A new word's depends on the
# embeddings of its T5, by which the run judges it (trainer/model/new_word.py).
RATES = {LORA: (3e-5, 4e-4), WHOLE: (3e-6, 1e-4)}
# Steps of a new word; textual inversion took 5,000 for three to five pictures (arXiv 2208.01618).
WORD_STEPS = (200, 5000)
WORD_VALIDATION_STEPS, WORD_SAMPLE_STEPS = 50, 100


@dataclass(frozen=True, kw_only=True)
class Music:
    """An amount of music, as clips of CLIP_SECONDS, and what depends on it alone.

    validation        share of the files that is held out
    code_views        offsets inside a codec frame at which each clip is encoded
    cfg_rate          share of captions that is dropped
    validation_steps  between validations; None: once per epoch
    early_stop        validations without improvement
    sample_every      steps between sounds
    warmup_steps      some per cent of all steps
    """

    name: str
    clips: int
    validation: float
    code_views: int
    cfg_rate: float
    validation_steps: int | None
    early_stop: int
    sample_every: int
    warmup_steps: int

    @property
    def hours(self) -> float:
        return self.clips * CLIP_SECONDS / 3600


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train one mode on one amount of music.

    heard      (least, most) times that each second of the music should be heard; None where steps count instead
    max_steps  where they end the run before its epochs do
    """

    mode: str
    music: Music
    learning_rate: str
    epochs: int
    global_batch: int
    heard: tuple[float, float] | None
    rank: int | None = None
    max_steps: int | None = None

    def flags(self, model: str) -> list[str]:
        """What follows `python launch.py --dataset my_music`, as words of a command."""
        music = self.music
        of_mode = {
            LORA: ["--lora_rank", f"{self.rank}"],
            WORD: ["--tune_text", "1", "--placeholder", "<my-style>"],
            WHOLE: [],
        }[self.mode]
        words = ["--model_id", model, *of_mode, "--lr", self.learning_rate, "--warmup_steps", f"{music.warmup_steps}"]
        words += ["--epochs", f"{self.epochs}", "--global_batch", f"{self.global_batch}", "--sample_by", "duration"]
        words += ["--max_steps", f"{self.max_steps}"] if self.max_steps else []
        words += ["--code_views", f"{music.code_views}"]
        # A row without its caption has no word in it, from which the word could learn.
        words += ["--use_cfg", "1", "--cfg_rate", f"{music.cfg_rate:g}"] if self.mode != WORD else []
        words += ["--validation", f"{music.validation:g}"]
        steps, sounds = music.validation_steps, music.sample_every
        if self.mode == WORD:  # whose steps do not depend on the amount of music
            steps, sounds = WORD_VALIDATION_STEPS, WORD_SAMPLE_STEPS
        words += ["--validation_steps", f"{steps}"] if steps else []
        return [*words, "--keep_best", "1", "--early_stop", f"{music.early_stop}", "--sample_every", f"{sounds}"]


CLIPS_20 = Music(
    name="20 clips", clips=20, validation=0.2, code_views=16, cfg_rate=0.1, validation_steps=10, early_stop=3,
    sample_every=20, warmup_steps=5,
)  # fmt: skip
HOURS_2 = Music(
    name="2 hours", clips=240, validation=0.1, code_views=8, cfg_rate=0.1, validation_steps=None, early_stop=3,
    sample_every=50, warmup_steps=16,
)  # fmt: skip
HOURS_20 = Music(
    name="20 hours", clips=2400, validation=0.05, code_views=4, cfg_rate=0.2, validation_steps=50, early_stop=4,
    sample_every=100, warmup_steps=50,
)  # fmt: skip
HOURS_200 = Music(
    name="200 hours", clips=24_000, validation=0.01, code_views=2, cfg_rate=0.2, validation_steps=150, early_stop=4,
    sample_every=300, warmup_steps=100,
)  # fmt: skip
AMOUNTS = (CLIPS_20, HOURS_2, HOURS_20, HOURS_200)


def _lora(music: Music, rate: str, epochs: int, batch: int, heard: tuple[float, float], rank: int = 16) -> Recipe:
    return Recipe(
        mode=LORA, music=music, learning_rate=rate, epochs=epochs, global_batch=batch, heard=heard, rank=rank
    )


def _word(music: Music, epochs: int, max_steps: int | None = None) -> Recipe:
    return Recipe(
        mode=WORD, music=music, learning_rate="0.1", epochs=epochs, global_batch=8, heard=None, max_steps=max_steps
    )


def _whole(music: Music, rate: str, epochs: int, batch: int, heard: tuple[float, float]) -> Recipe:
    return Recipe(mode=WHOLE, music=music, learning_rate=rate, epochs=epochs, global_batch=batch, heard=heard)


RECIPES = (
    _lora(CLIPS_20, "1e-4", 30, 8, (4, 60)),
    _lora(HOURS_2, "1e-4", 10, 8, (3, 30)),
    _lora(HOURS_20, "1e-4", 5, 16, (2, 15)),
    _lora(HOURS_200, "1e-4", 2, 32, (1, 6), rank=64),
    _word(CLIPS_20, 200),
    _word(HOURS_2, 20),
    _word(HOURS_20, 4, 1000),
    _word(HOURS_200, 1, 1000),
    _whole(CLIPS_20, "1e-5", 40, 8, (10, 100)),
    _whole(HOURS_2, "1.5e-5", 15, 16, (5, 40)),
    _whole(HOURS_20, "2e-5", 10, 32, (3, 25)),
    _whole(HOURS_200, "3e-5", 5, 64, (1, 15)),
)


def mode_of(selection: Selection) -> str:
    """The mode of the recipes that trains so; a model of which parts are frozen counts as a whole one."""
    if selection.new_rows:
        return WORD
    return LORA if selection.lora else WHOLE


def recipe_for(mode: str, hours: float) -> Recipe:
    """The recipe of the nearest amount of music, by the logarithm of the hours."""
    of_mode = [recipe for recipe in RECIPES if recipe.mode == mode]
    return min(of_mode, key=lambda recipe: abs(math.log(recipe.music.hours / max(hours, 1e-6))))


def is_fine_tuned(shape: Shape) -> bool:
    """Whether a model has the size of a published one: the recipes are for weights that know music already."""
    sizes = {(KNOWN[name].layers, KNOWN[name].width, KNOWN[name].codebooks) for name in PUBLISHED_NAMES}
    return (shape.layers, shape.width, shape.codebooks) in sizes


def remarks(
    selection: Selection, shape: Shape, *, learning_rate: float, times: float, steps: int, hours: float | None
) -> list[str]:
    """Lines that name the page of recipes, for what is far outside of it; none of a model of another size.

    times  each second of the music is heard, on average
    steps  of the whole run
    hours  of music; None where it is not known, and only the rate is judged
    """
    if not is_fine_tuned(shape):
        return []
    mode, found = mode_of(selection), []
    if mode in RATES and (where := _far(learning_rate, RATES[mode])):
        given, least, most = (rate_in_words(rate) for rate in (learning_rate, *RATES[mode]))
        found.append(f"note: --lr {given} is far {where} the {least} to {most} that {PAGE} has for {mode}")
    if hours is None:
        return found
    if mode == WORD and (where := _far(steps, WORD_STEPS)):
        least, most = (f"{count:,}" for count in WORD_STEPS)
        found.append(f"note: {steps:,} steps are far {where} the {least} to {most} that {PAGE} has for {mode}")
    recipe = recipe_for(mode, hours)
    if recipe.heard is not None and (where := _far(times, recipe.heard)):
        least, most = (f"{count:g}" for count in recipe.heard)
        found.append(
            f"note: to hear the music {times_in_words(times)} is far {where} the {least} to {most} times that {PAGE}"
            f" has for {mode} on {recipe.music.name}"
        )
    return found


def rate_in_words(rate: float) -> str:
    """1e-4, 1.5e-5."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def times_in_words(times: float) -> str:
    """once, 100 times, 3.2 times, 0.25 times."""
    if times == 1:
        return "once"
    return f"{times:,.0f} times" if times >= 10 or times == round(times) else f"{times:.2g} times"


def _far(value: float, usual: tuple[float, float]) -> str:
    """"above" or "below" where a value is far outside of a range, else empty."""
    least, most = usual
    return "above" if value > FAR * most else "below" if value < least / FAR else ""
