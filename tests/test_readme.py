"""README.md, CONTRIBUTING.md and docs/ say what is there: flags, exit codes, fates, rooms, files, links."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import flags_page
import pytest

from tests.test_layers import GROUND, MAY_IMPORT
from trainer import errors
from trainer.data.fates import FATE_KINDS
from trainer.flags.config import Config
from trainer.flags.flag import settings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples/README.md"]
# A path of this repository: one of its folders and something in it, or a file of these kinds at the top.
REPOSITORY_PATH = re.compile(
    r"(?<![\w./-])((?:trainer|scripts|tests|docs|examples|accelerate_configs)/[\w./-]*[\w/]|[\w-]+\.(?:py|sh|cfg|toml))"
)
# Names of files without a folder that are no files at the top: the first system's command, whose successor
# docs/first_system.md names.
FORMER = {"run.py"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def missing_paths(page: Path) -> list[str]:
    """What a page names as a file or folder of the repository and, as its link's target, is not there."""
    text = page.read_text(encoding="utf-8")
    named = {path for path in set(REPOSITORY_PATH.findall(text)) - FORMER if not (ROOT / path).exists()}
    links = {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}
    anchored = {link for link in re.findall(r"\]\(([^)]*#[^)]+)\)", text) if "://" not in link}
    missing = {link for link in links if not (page.parent / link).exists()}
    return sorted(named | missing | {link for link in anchored if not _has_heading(page, link)})


def _has_heading(page: Path, link: str) -> bool:
    """Whether the page that `link` (page.md#a-heading, or #a-heading of `page` itself) names has that heading."""
    file, _, anchor = link.partition("#")
    target = page.parent / file if file else page
    if not target.exists():
        return False
    headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_page_of_flags_is_what_the_declarations_give() -> None:
    assert text_of("docs/flags.md") == flags_page.page(), "python scripts/flags_page.py writes it anew"


def test_the_page_of_flags_shows_defaults_that_read_back_as_themselves() -> None:
    for setting in settings(Config).values():
        assert setting.required or setting.read(flags_page.default(setting)) == setting.default, setting.name
    assert {name for names in flags_page.MORE.values() for name in names} <= set(settings(Config))


def test_every_flag_that_is_named_anywhere_exists() -> None:
    declared = settings(Config).values()
    of_ours = {"config", *settings(Config), *(alias for one in declared for alias in one.flag.aliases)}
    of_others = {"help", "model", "base", "prompt", "seconds", "text_embedding", "melody"}  # scripts/generate.py
    of_others |= {"continue_from", "continue_seconds", "guidance", "temperature", "top_k", "greedy", "prompts"}
    of_others |= {"window_seconds", "stride_seconds", "repeat", "format", "strength", "compare"}
    of_others |= {"precision", "device", "compile"}
    of_others |= {"step"}  # export.py
    of_others |= {"report", "embed", "strict"}  # scripts/check_dataset.py
    of_others |= {"run", "held_out", "sampled", "searched_clips", "wav"}  # recall.py
    of_others |= {"config_file", "num_processes", "num_machines", "machine_rank", "multi_gpu", "cpu"}  # accelerate
    of_others |= {"main_process_ip", "main_process_port"}
    of_others |= {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}  # torchrun
    of_others |= {"max_restarts", "local_rank"}
    of_others |= {"repo"}  # hf download --repo-type
    of_others |= {"nodes", "test", "signal", "batch", "gpus", "job", "jobid", "overlap", "start"}  # sbatch
    of_others |= {"container", "ntasks"}
    of_others |= {"minutes", "results"}  # gpu_check.py
    of_others |= {"template", "overwrite", "clap", "least_confidence"}  # caption.py
    of_others |= {"suite", "cases", "models", "layers", "frames", "rounds", "clips", "clip_seconds"}
    of_others |= {"files"}  # benchmark.py
    of_others |= {"blind", "steps", "rating", "score"}  # report.py
    of_others |= {"reference", "base_sounds", "tuned_sounds", "count"}  # score.py
    of_others |= {"output", "anonymous", "push_to_hub", "public"}  # prepare_dataset.py
    of_others |= {"part"}  # push_to_hub.py, with repo and public
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--(\w+)", page.read_text(encoding="utf-8")))
        assert named <= of_ours | of_others, page.name


def test_the_table_of_exit_codes_has_every_code() -> None:
    shown = {int(code) for code in re.findall(r"^\| `(\d+)` \|", text_of("docs/stopping.md"), re.MULTILINE)}
    assert shown == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_every_fate_of_a_file_is_explained_once() -> None:
    explained = re.findall(r"^\| \*([\w ]+)\* \| \S", text_of("docs/cache.md"), re.MULTILINE)
    assert sorted(explained) == sorted(FATE_KINDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    assert missing_paths(page) == []


def test_the_readme_is_short_and_names_every_page() -> None:
    assert len(README.splitlines()) < 240
    linked = set(re.findall(r"\]\(([^)#]+)\)", README))
    pages = [path for path in ROOT.glob("docs/*") if path.is_file() and path.suffix != ".json"]
    assert {str(path.relative_to(ROOT)) for path in pages} <= linked


def test_the_picture_is_small_and_has_a_title() -> None:
    picture = ROOT / "docs/road.svg"
    assert picture.stat().st_size < 300_000 and "<title" in picture.read_text(encoding="utf-8")


def rooms_of_the_page(page: str) -> dict[str, set[str]]:
    """What each room may import, from the rows "| `trainer/room/` | `one`, `two` or nothing | ... |"."""
    rows = re.findall(r"^\| ((?:`trainer/\w+(?:/|\.py)`(?:, )?)+) \| (nothing|`.+?`) \| \S", page, re.MULTILINE)
    rooms = {}
    for names, imports in rows:
        for name in re.findall(r"`trainer/(\w+)", names):
            rooms[name] = set(re.findall(r"`([\w.]+)`", imports))
    return rooms


def test_the_architecture_shows_the_rooms_and_what_each_may_import() -> None:
    table = rooms_of_the_page(text_of("docs/architecture.md"))
    assert table == {room: set(imports) for room, imports in MAY_IMPORT.items()}
    assert set(GROUND) <= set(table)


def test_every_folder_of_the_trainer_is_a_room() -> None:
    parts = {path.stem for path in (ROOT / "trainer").iterdir() if path.name not in ("__init__.py", "__pycache__")}
    assert parts == set(MAY_IMPORT)


def test_a_path_that_is_not_there_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n`trainer/absent.py`, `trainer/errors.py`, absent.sh, [x](gone.md), `models/hf`, a/tests/x, "
        "[y](#a-heading), [z](page.md#none)"
    )
    assert missing_paths(page) == ["absent.sh", "gone.md", "page.md#none", "trainer/absent.py"]


def test_the_licence_is_that_of_the_package() -> None:
    package = configparser.ConfigParser()
    package.read(ROOT / "setup.cfg")
    assert package["metadata"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert "Ankita Govardhan Bondre" in package["metadata"]["author"] and "Ankita Govardhan Bondre" in README
