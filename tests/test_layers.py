"""The rooms of trainer/ and what each may import, held by reading the source: nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each room may import of trainer, besides the ground and itself. docs/architecture.md shows the same table.
GROUND = ("errors", "atomic")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "atomic": (),
    "spec": (),
    "flags": ("spec",),
    "plan": ("flags", "spec"),
    "model": ("spec",),
    "data": ("model", "spec"),
    "report": ("data", "run.metrics", "run.checkpoint_folders"),
    "run": ("model.weights", "model.safetensors_file"),
    "engine": ("run", "data.batches", "model", "plan", "spec"),
    "exports": ("run.checkpoint", "model", "spec"),
    "evaluation": ("data", "exports", "model", "run", "plan", "spec"),
    "training": ("engine", "data", "run", "plan", "model"),
    "preflight": ("data", "plan", "flags", "spec"),
    "outlook": ("data", "plan", "flags", "spec"),
    "wiring": (
        *("preflight", "outlook", "training", "evaluation", "exports", "engine", "run", "report", "data", "model"),
        *("plan", "flags", "spec"),
    ),
}
# What a command line needs before it is known whether anything heavy will run, and what a thread of it needs.
WITHOUT_TORCH = (
    *("errors", "atomic", "spec.shapes", "spec.trainable", "spec.flops", "spec.model_folder", "spec.trigger"),
    *("spec.melody_generation", "spec.recipes", "data.heard", "model.hub_client"),
    *("flags.config", "flags.flag", "flags.command_line", "flags.contradictions", "flags.paths", "flags.data_flags"),
    *("flags.sample_flags", "flags.best_flags", "flags.sharing_flags", "flags.run_config"),
    *("plan.launcher", "plan.request", "plan.layout", "plan.strategies", "plan.allowed_layouts", "plan.activations"),
    *("plan.exchange", "plan.communication", "plan.reasons"),
    *("plan.memory", "plan.refusal", "plan.plan", "plan.dry_run", "plan.host_memory"),
    *("plan.unused_gpu", "plan.sampling", "plan.rates", "plan.network", "plan.time", "plan.forecast", "plan.disk"),
    *("plan.wanted_layouts", "preflight", "outlook"),
    *("data.audio", "data.wav_header", "data.audio_facts", "data.captions", "data.manifest", "data.order", "data.cut"),
    *("data.melody_files", "data.demucs_files"),
    *("data.fates", "data.folder_walk", "data.caption_files", "data.text_content", "data.clip_table"),
    *("data.sample_prompts", "data.places", "data.table_file", "data.table_scan", "data.split_files"),
    *("data.hub_dataset", "data.hub_parts", "data.stand_ins", "spec.dataset_path"),
    *("data.fingerprint", "data.inventory", "data.garbage_collection", "data.outline"),
    *("report.report", "report.settings", "report.rows", "report.figures", "report.mending", "report.page"),
    *("report.plots", "report.excerpts", "report.template", "report.curves", "report.players", "report.reporter"),
    *("report.run_facts", "report.run_metrics", "report.run_samples", "report.run_sounds", "report.run_words"),
    *("report.comparison_page", "report.memorisation", "report.held_out_score", "report.overfitting"),
    *("report.run_page", "report.blind", "report.blind_sides", "report.blind_score"),
    *("data.audio_fault", "data.decoder", "data.raw_file", "data.sndfile_decoder", "data.sound_file"),
    *("data.ffmpeg_decoder", "data.sound_kind", "data.container_length", "data.ogg_pages"),
    *("data.levels", "data.loudness", "data.excerpt", "data.treatment", "data.crops"),
    *("data.shared_scan", "data.peers", "data.prepared", "data.prepared_upload"),
    *("data.caption_settings", "data.caption_sources", "data.caption_dialects"),
    *("data.caption_metadata", "data.metadata_files", "data.json_captions", "data.music_fields", "data.tags"),
    *("data.caption_template", "spec.caption_sources"),
    *("run.signals", "run.lock", "run.exit_code", "run.checkpoint_folders", "run.metrics", "run.console"),
    *("run.log_file", "run.standing", "run.best"),
    *("training.schedule", "training.judge"),
)
WITH_RANKS = ("trainer.engine", "launch")
# Below launch.py and the scripts, the only modules that know the flags as a whole: they make each room's settings.
KNOW_THE_FLAGS = (
    *("trainer.flags", "trainer.plan.request", "trainer.plan.dry_run"),
    *("trainer.preflight", "trainer.outlook", "trainer.wiring"),
)
RANK_LIBRARIES = ("accelerate", "deepspeed", "torch.distributed")
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60

Sources = Mapping[str, str]  # source text by dotted module name


def project_sources() -> dict[str, str]:
    """The modules of trainer/, launch.py and scripts/."""
    files = [*ROOT.glob("trainer/**/*.py"), *ROOT.glob("launch.py"), *ROOT.glob("scripts/**/*.py")]
    sources = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = file.read_text(encoding="utf-8")
    return sources


def breaches(sources: Sources) -> list[str]:
    """Every breach of the rules in words, sorted; empty if there is none."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    found = [f"{name}: {len(text.splitlines())} lines" for name, text in sources.items() if _too_long(text)]
    for name, tree in trees.items():
        found += [f"{name}: {function}() has {lines} lines" for function, lines in _long_functions(tree)]
        used = set(_uses(tree))
        if not _is_any_of(name, WITH_RANKS):
            found += [f"{name}: uses {use}" for use in used if _is_any_of(use, RANK_LIBRARIES)]
        outside = ("tests",) if name.split(".")[0] in ("scripts", "launch") else ("scripts", "tests", "launch")
        found += [f"{name}: uses {use}" for use in _imports(tree) if _is_any_of(use, outside)]
        found += [f"{name}: {use} does not exist" for use in _imports(tree) if _is_missing(use, trees)]
        found += [f"{name}: may not import {use}" for use in _forbidden(name, tree)]
        if name.startswith("trainer.") and not _is_any_of(name, KNOW_THE_FLAGS):
            configs = [use for use in _imports(tree) if _is_any_of(use, ("trainer.flags.config",))]
            found += [f"{name}: may not know the flags as a whole" for _ in configs]
    for short in WITHOUT_TORCH:
        road = _road_to_torch(f"trainer.{short}", trees)
        if road:
            found.append(" -> ".join(road))
    return sorted(set(found))


def room_of(module: str) -> str:
    """The room of a module of trainer: trainer.data.audio is in data, trainer.wiring is a room of its own."""
    return module.split(".")[1] if "." in module else ""


def _forbidden(name: str, tree: ast.AST) -> Iterator[str]:
    """What a module of trainer imports of trainer and may not, imports for a type checker included."""
    room = room_of(name)
    if not name.startswith("trainer.") or room not in MAY_IMPORT:
        return
    allowed = tuple(f"trainer.{place}" for place in (*GROUND, room, *MAY_IMPORT[room]))
    if room in GROUND:
        allowed = ()
    yield from (use for use in _imports(tree) if use.startswith("trainer.") and not _is_any_of(use, allowed))


def _long_functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                yield node.name, lines


def _too_long(text: str) -> bool:
    return len(text.splitlines()) > MOST_LINES


def _imports(tree: ast.AST, *, at_run_time: bool = False) -> Iterator[str]:
    """Dotted names that `tree` imports, inside functions too: `from a import b` gives a.b.

    With `at_run_time`, imports that only a type checker sees are left out.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(ast.Module(body=node.orelse, type_ignores=[]), at_run_time=True)
        else:
            yield from _imports(node, at_run_time=at_run_time)


def _uses(tree: ast.AST) -> Iterator[str]:
    """What `tree` imports, and attributes written out in full, as in torch.distributed.get_rank()."""
    yield from _imports(tree)
    yield from (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def _is_any_of(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _road_to_torch(start: str, trees: Mapping[str, ast.Module]) -> list[str]:
    """The shortest chain of imports from `start` to torch through modules of the project; [] without one."""
    roads = [[start], *([package] for package in _packages_of(start))]  # importing a module runs its packages first
    seen = {road[0] for road in roads}
    for road in roads:
        if road[-1] not in trees:
            continue
        for name in _imports(trees[road[-1]], at_run_time=True):
            if _is_any_of(name, ("torch",)):
                return [*road, "torch"]
            module = name if name in trees else name.rpartition(".")[0]
            for ran in (module, *_packages_of(module)):
                if ran.startswith("trainer") and ran not in seen:
                    seen.add(ran)
                    roads.append([*road, ran])
    return []


def _packages_of(module: str) -> list[str]:
    """trainer.data.audio is in trainer and trainer.data."""
    parts = module.split(".")[:-1]
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _is_missing(name: str, trees: Mapping[str, ast.Module]) -> bool:
    """Whether `name` starts with trainer. and is neither a module nor bound at the top of one."""
    if not name.startswith("trainer.") or name in trees:
        return False
    module, _, attribute = name.rpartition(".")
    return module not in trees or attribute not in set(_bound(trees[module]))


def _bound(tree: ast.AST) -> Iterator[str]:
    """Names that a module binds, without entering its functions and classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        else:
            yield from _bound(node)


def test_every_room_keeps_its_rules() -> None:
    sources = project_sources()
    assert {"trainer", "trainer.flags.config", "trainer.errors", "launch", "scripts.generate"} <= set(sources)
    assert breaches(sources) == []


def test_every_room_has_its_rule_and_every_rule_its_room() -> None:
    assert {room_of(name) for name in project_sources() if name.startswith("trainer.")} == set(MAY_IMPORT)


def test_no_circle_leads_from_a_room_back_to_it() -> None:
    above: list[str] = []  # rooms whose imports are all in the list already
    while len(above) < len(MAY_IMPORT):
        below = {room: {place.split(".")[0] for place in places} for room, places in MAY_IMPORT.items()}
        ready = [room for room in MAY_IMPORT if room not in above and below[room] <= set(above)]
        assert ready, f"a circle among {sorted(set(MAY_IMPORT) - set(above))}"
        above += ready


CLEAN = {
    "trainer": "",
    "trainer.errors": "class ConfigError(Exception): ...",
    "trainer.atomic": "import os",
    "trainer.spec": "",
    "trainer.spec.shapes": "from trainer.errors import ConfigError",
    "trainer.flags": "",
    "trainer.flags.config": "class Config: ...",
    "trainer.plan": "",
    "trainer.plan.plan": "from typing import TYPE_CHECKING\nfrom trainer.spec import shapes\n"
    "if TYPE_CHECKING:\n    import torch\n",
    "trainer.plan.request": "from trainer.flags.config import Config",
    "trainer.model": "",
    "trainer.model.loss": "import torch\nLIMIT: int = 3\nif torch:\n    OTHER, MORE = 1, 2\n",
    "trainer.model.weights": "import torch",
    "trainer.data": "",
    "trainer.data.order": "import numpy",
    "trainer.run": "",
    "trainer.run.checkpoint": "from trainer.model.weights import torch",
    "trainer.engine": "import accelerate\nimport torch.distributed as dist\nfrom trainer.model import loss\n",
    "launch": "from trainer.model.loss import LIMIT, MORE\nfrom accelerate import Accelerator\n",
}


def test_a_clean_project_has_no_breach() -> None:
    assert breaches(CLEAN) == []


@pytest.mark.parametrize(
    "name,text,expected",
    [
        ("trainer.plan.plan", "import torch", "trainer.plan.plan -> torch"),
        ("trainer.plan.plan", "from torch.nn import Module", "trainer.plan.plan -> torch"),
        ("trainer", "import torch", "trainer -> torch"),
        ("trainer.plan", "import torch", "trainer.plan -> torch"),
        ("trainer.data.order", "def f():\n    import torch.nn", "trainer.data.order -> torch"),
        ("trainer.data.audio", "from trainer.model import loss", "trainer.data.audio -> trainer.model.loss -> torch"),
        ("trainer.data.cache", "import accelerate", "trainer.data.cache: uses accelerate"),
        ("trainer.data.cache", "from torch import distributed", "trainer.data.cache: uses torch.distributed"),
        (
            "trainer.data.cache", "import torch\ntorch.distributed.barrier()",
            "trainer.data.cache: uses torch.distributed",
        ),
        (
            "trainer.data.cache", "def f():\n    from deepspeed.ops import adam",
            "trainer.data.cache: uses deepspeed.ops.adam",
        ),
        ("trainer.data.cache", "from tests.world import ranks", "trainer.data.cache: uses tests.world.ranks"),
        ("trainer.data.cache", "import scripts.generate", "trainer.data.cache: uses scripts.generate"),
        ("scripts.demo", "from tests.runs import launch", "scripts.demo: uses tests.runs.launch"),
        ("trainer.data.cache", "from trainer.absent import f", "trainer.data.cache: trainer.absent.f does not exist"),
        (
            "trainer.data.cache", "from trainer.model.loss import absent",
            "trainer.data.cache: trainer.model.loss.absent does not exist",
        ),
        (
            "trainer.data.cache", "from trainer.data import absent",
            "trainer.data.cache: trainer.data.absent does not exist",
        ),
        ("scripts.demo", "import trainer.absent", "scripts.demo: trainer.absent does not exist"),
        ("trainer.data.cache", "x = 1\n" * 401, "trainer.data.cache: 401 lines"),
        ("scripts.demo", "def f():\n" + "    x = 1\n" * 60, "scripts.demo: f() has 61 lines"),
        (
            "trainer.model.source", "from trainer.flags import config",
            "trainer.model.source: may not import trainer.flags.config",
        ),
        ("trainer.run.lock", "from trainer.data import order", "trainer.run.lock: may not import trainer.data.order"),
        ("trainer.run.lock", "from trainer.model import loss", "trainer.run.lock: may not import trainer.model.loss"),
        ("trainer.data.cache", "import trainer.engine", "trainer.data.cache: may not import trainer.engine"),
        (
            "trainer.engine", "def f():\n    from trainer import exports",
            "trainer.engine: may not import trainer.exports",
        ),
        ("trainer.engine.engine", "import trainer.wiring", "trainer.engine.engine: may not import trainer.wiring"),
        ("trainer.errors", "from trainer.spec import shapes", "trainer.errors: may not import trainer.spec.shapes"),
        (
            "trainer.plan.plan", "from trainer.flags.config import Config",
            "trainer.plan.plan: may not know the flags as a whole",
        ),
    ],
)  # fmt: skip
def test_each_kind_of_breach_is_found(name: str, text: str, expected: str) -> None:
    others = {"trainer.exports": "", "trainer.wiring": ""}
    found = breaches({**CLEAN, **others, name: text})
    assert any(breach == expected or breach.startswith(f"{expected}.") for breach in found), found
