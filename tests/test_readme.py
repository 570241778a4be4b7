"""README.md and docs/ say what is there: flags and defaults, exit codes, fates, files."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from trainer import errors
from trainer.data.fates import FATE_KINDS
from trainer.flags.config import Config
from trainer.flags.flag import Setting, settings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG_ROW = re.compile(r"^\| `--(\w+)` \| (.+?) \| .+ \|$", re.MULTILINE)
# A path of this repository: one of its folders and something in it, or a file of these kinds at the top.
REPOSITORY_PATH = re.compile(
    r"(?<![\w./-])((?:trainer|scripts|tests|docs|examples|accelerate_configs)/[\w./-]*[\w/]|[\w-]+\.(?:py|sh|cfg|toml))"
)

FORMER = {"run.py"}  # the first system's command, which README.md says what replaces


def section(title: str) -> str:
    """What stands under a heading of README.md, up to the next of its level."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def missing_paths(page: Path) -> list[str]:
    """What a page names as a file or folder of the repository and, as its link's target, is not there."""
    text = page.read_text(encoding="utf-8")
    tree = section("The repository")
    paths = set(REPOSITORY_PATH.findall(text.replace(tree, ""))) - FORMER
    named = {path for path in paths if not (ROOT / path).exists()}
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    return sorted(named | {link for link in links if not (page.parent / link).exists()})


def files_of_tree() -> set[str]:
    """The files that the annotated tree names, as paths from the repository's root."""
    files, folder = set(), ""
    for line in section("The repository").split("```")[1].strip("\n").splitlines():
        words = line.split()
        if not line.startswith(" "):
            folder = words.pop(0) if words[0].endswith("/") else ""
        files |= {folder + word for word in words if re.fullmatch(r"[\w-]+\.(py|sh|sbatch|md|cfg|toml|txt|yaml)", word)}
    return files


def shown_default(setting: Setting, cell: str) -> object:
    """The value of a cell of the flags' table, read as the command line reads it."""
    return None if setting.required and cell == "required" else setting.read(cell.strip("`"))


def test_the_table_of_flags_has_every_flag_its_default_and_its_section() -> None:
    declared = settings(Config)
    table = section("Flags")
    assert [name for name, _ in FLAG_ROW.findall(table)] == list(declared)
    for name, cell in FLAG_ROW.findall(table):
        assert shown_default(declared[name], cell) == declared[name].default, name
        assert (cell == "required") == declared[name].required, name
    groups = re.findall(r"^\| (?:\*\*(\w+)\*\*|`--(\w+)`)", table, re.MULTILINE)
    group = ""
    for heading, name in groups:
        group = heading or group
        assert not name or declared[name].flag.group == group, name


def test_every_flag_that_is_named_anywhere_exists() -> None:
    declared = settings(Config).values()
    of_ours = {"config", *settings(Config), *(alias for one in declared for alias in one.flag.aliases)}
    of_others = {"help", "model", "prompt", "seconds", "text_embedding"}  # scripts/generate.py
    of_others |= {"config_file", "num_processes", "num_machines", "machine_rank", "multi_gpu", "cpu"}  # accelerate
    of_others |= {"main_process_ip", "main_process_port"}
    of_others |= {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}  # torchrun
    of_others |= {"nodes", "test", "signal", "batch", "gpus", "job", "jobid", "overlap", "start"}  # sbatch
    of_others |= {"container", "ntasks"}
    of_others |= {"suite", "cases", "models", "layers", "frames", "rounds", "clips", "clip_seconds"}  # benchmark.py
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--(\w+)", page.read_text(encoding="utf-8")))
        assert named <= of_ours | of_others, page.name


def test_the_table_of_exit_codes_has_every_code() -> None:
    shown = {int(code) for code in re.findall(r"^\| `(\d+)` \|", README, re.MULTILINE)}
    assert shown == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


@pytest.mark.parametrize("word", FATE_KINDS)
def test_every_fate_of_a_file_is_explained(word: str) -> None:
    assert f"*{word}*" in re.sub(r"\s+", " ", section("Bad files"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    assert missing_paths(page) == []


def test_the_tree_names_every_module_script_and_page_and_nothing_else() -> None:
    files = files_of_tree()
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    patterns = ("trainer/**/*.py", "accelerate_configs/*.yaml", "scripts/*.py", "scripts/**/*.sh", "docs/*.md")
    patterns += ("scripts/slurm/*.sbatch",)
    there = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert {str(path.relative_to(ROOT)) for path in there if path.name != "__init__.py"} <= files


def test_the_architecture_has_a_line_for_every_module() -> None:
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    modules = re.findall(r"^\| `(trainer/[\w/]+\.py)` \| [012] \|", table, re.MULTILINE)
    files = [path for path in ROOT.glob("trainer/**/*.py") if path.name != "__init__.py"]
    there = {str(path.relative_to(ROOT)) for path in files}
    assert len(modules) == len(set(modules)) and set(modules) == there


def test_a_path_that_is_not_there_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`trainer/absent.py`, `trainer/loss.py`, absent.sh, [x](gone.md), `models/hf`, a/tests/x")
    assert missing_paths(page) == ["absent.sh", "gone.md", "trainer/absent.py"]


def test_the_licence_is_that_of_the_package() -> None:
    package = configparser.ConfigParser()
    package.read(ROOT / "setup.cfg")
    assert package["metadata"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert "Ankita Govardhan Bondre" in package["metadata"]["author"] and "Ankita Govardhan Bondre" in README
