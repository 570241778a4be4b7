"""Write docs/flags.md: every flag of launch.py, from its declaration in trainer/flags/config.py.

python scripts/flags_page.py
"""

from __future__ import annotations

import re
from pathlib import Path

from trainer.flags.config import Config
from trainer.flags.flag import Setting, settings

FILE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"

INTRODUCTION = """# Flags

Every flag of `launch.py`. `python scripts/flags_page.py` writes this page from the declarations in
`trainer/flags/config.py`, and a test holds it to them. `python launch.py --help` prints the same texts.

A flag and its value are two arguments, or joined by `=`; switches are 0 or 1 (or false, true), and a bare one is 1; of
a flag that is given twice the last one counts. `--config FILE` (.yaml or .json) holds flags by name, and the command
line wins over it. A flag that was typed either acts or is refused with the reason: none is ignored.

Where a path can stand, `~`, `~user`, `$NAME` and `${NAME}` mean what they mean in a shell, in a file of flags too. A
variable that is not set is refused, unless something of that name is there (a folder A$AP); `$$` is a dollar sign (in
single quotes), and `./~` a folder named ~.
"""

# The page of docs/ that says more about a flag.
MORE: dict[str, tuple[str, ...]] = {
    "best_checkpoint.md": ("keep_best", "early_stop", "export"),
    "stopping.md": ("max_minutes", "resume", "checkpoint_minutes"),
    "sharing.md": ("push_to_hub", "public"),
    "samples.md": ("sample_every", "sample_prompts"),
    "cache.md": ("cache_dir", "code_views", "word_dropout", "rehash"),
    "drafting_captions.md#a-trigger": ("trigger",),
    "captions.md": ("captions", "caption_column", "caption_template", "default_caption", "caption", "merge_metadata"),
    "hub_datasets.md": (
        *("dataset_path", "dataset_config", "dataset_split", "dataset_revision"),
        *("audio_column", "validation_split"),
    ),
    "memory.md": ("optimizer", "gradient_checkpointing", "offload_optimizer", "batch_size"),
    "train_a_part.md": ("freeze", "lora_rank", "lora_targets", "base_bits"),
    "new_word.md": ("tune_text", "placeholder"),
    "averaged_weights.md": ("ema_decay",),
    "starting_points.md": ("init_from",),
    "stereo_melody.md": ("stereo", "stereo_init", "melody_rate", "stems"),
    "large.md": ("strategy", "timeout_minutes"),
    "plans.md": ("dry_run",),
    "time.md": ("gpu_name", "link_gbps"),
    "benchmarks.md": ("compile",),
    "memory.md#on-a-cpu": ("device",),
}


def page() -> str:
    """The whole page, in Markdown."""
    by_group: dict[str, list[Setting]] = {}
    for setting in settings(Config).values():
        by_group.setdefault(setting.flag.group, []).append(setting)
    return "\n".join([INTRODUCTION, *(_section(group, rows) for group, rows in by_group.items())])


def default(setting: Setting) -> str:
    """A flag's default as it would be typed: 0, 1e-5, none; "required" where there is none."""
    value = setting.default
    if setting.required:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, (bool, int)):
        return str(int(value))
    return value if isinstance(value, str) else f"{value:g}".replace("e-0", "e-")


def _section(group: str, rows: list[Setting]) -> str:
    lines = [f"## {group}", "", "| flag | default | takes | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *map(_row, rows), ""])


def _row(setting: Setting) -> str:
    names = ", ".join(f"`--{name}`" for name in (setting.name, *setting.flag.aliases))
    shown = default(setting) if setting.required else f"`{default(setting)}`"
    links = [f"[{name.partition('.md')[0].replace('_', ' ')}]({name})" for name in MORE if setting.name in MORE[name]]
    meaning = " ".join([_markdown(setting.flag.help), *(f"More: {link}." for link in links)])
    return f"| {names} | {shown} | {_takes(setting)} | {meaning} |"


def _takes(setting: Setting) -> str:
    """`Setting.allowed`, shortened where the page's introduction, or the meaning, says the rest."""
    if setting.kind is bool:
        return "0 or 1"
    return setting.allowed.replace("a text that is not empty", "a text")


def _markdown(text: str) -> str:
    """A help text with flags as code, and without characters that Markdown would take for its own."""
    return re.sub(r"--\w+(?: \d| ddp)?", r"`\g<0>`", re.sub(r"[<>*|]", r"\\\g<0>", text))


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    print(f"wrote {FILE}")
