"""The rooms of trainer/ and what each may import, held by reading the source: nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

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
    "run": ("model.weights",),
    "engine": ("run", "data.batches", "model", "plan", "spec"),
    "exports": ("run.checkpoint", "model", "spec"),
    "evaluation": ("data", "exports", "model", "run", "plan", "spec"),
    "training": ("engine", "data", "run", "plan", "model"),
    "wiring": ("training", "evaluation", "exports", "engine", "run", "data", "model", "plan", "flags", "spec"),
}
# What a command line needs before it is known whether anything heavy will run, and what a thread of it needs.
WITHOUT_TORCH = (
    *("errors", "atomic", "spec.shapes", "spec.trainable", "spec.flops"),
    *("flags.config", "flags.flag", "flags.command_line", "flags.contradictions"),
    *("plan.launcher", "plan.request", "plan.layout", "plan.strategies", "plan.allowed_layouts", "plan.activations"),
    *("plan.memory", "plan.refusal", "plan.plan", "plan.dry_run"),
    *("data.audio", "data.wav_header", "data.audio_facts", "data.captions", "data.manifest", "data.order"),
    *("data.fates", "data.folder_walk", "data.caption_files", "data.clip_table", "data.shared_scan", "data.peers"),
    *("run.signals", "run.lock", "run.exit_code"),
    "training.schedule",
)
WITH_RANKS = ("trainer.engine", "launch")
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
    roads = [[start], ["trainer"]]  # importing a module runs its package first
    seen = {start, "trainer"}
    for road in roads:
        if road[-1] not in trees:
            continue
        for name in _imports(trees[road[-1]], at_run_time=True):
            if _is_any_of(name, ("torch",)):
                return [*road, "torch"]
            module = name if name in trees else name.rpartition(".")[0]
            if module.startswith("trainer") and module not in seen:
                seen.add(module)
                roads.append([*road, module])
    return []


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


def test_the_project_keeps_its_layers() -> None:
    sources = project_sources()
    assert {"trainer", "trainer.flags.config", "trainer.errors"} <= set(sources)
    assert breaches(sources) == []


def test_a_clean_project_has_no_breach() -> None:
    sources = {
        "trainer": "",
        "trainer.errors": "class ConfigError(Exception): ...",
        "trainer.plan": "from typing import TYPE_CHECKING\nfrom trainer.errors import ConfigError\n"
        "if TYPE_CHECKING:\n    import torch\n",
        "trainer.loss": "import torch\nLIMIT: int = 3\nif torch:\n    OTHER, MORE = 1, 2\n",
        "trainer.engine": "import accelerate\nimport torch.distributed as dist\nfrom trainer import loss\n",
        "launch": "from trainer.loss import LIMIT, MORE\nfrom accelerate import Accelerator\n",
    }
    assert breaches(sources) == []


def test_each_kind_of_breach_is_found() -> None:
    cases: list[tuple[str, str, str]] = [
        ("trainer.plan", "import torch", "trainer.plan -> torch"),
        ("trainer.plan", "from torch.nn import Module", "trainer.plan -> torch"),
        ("trainer", "import torch", "trainer -> torch"),
        ("trainer.order", "def f():\n    import torch.nn", "trainer.order -> torch"),
        ("trainer.audio", "from trainer import loss", "trainer.audio -> trainer.loss -> torch"),
        (
            "trainer.audio",
            "from trainer.middle import loss",
            "trainer.audio -> trainer.middle -> trainer.loss -> torch",
        ),
        ("trainer.loop", "import accelerate", "trainer.loop: uses accelerate"),
        ("trainer.loop", "from torch import distributed", "trainer.loop: uses torch.distributed"),
        ("trainer.loop", "import torch\ntorch.distributed.barrier()", "trainer.loop: uses torch.distributed"),
        (
            "trainer.loop",
            "def f():\n    from deepspeed.ops import adam",
            "trainer.loop: uses deepspeed.ops.adam",
        ),
        ("trainer.loop", "from tests.world import ranks", "trainer.loop: uses tests.world.ranks"),
        ("trainer.loop", "import scripts.generate", "trainer.loop: uses scripts.generate"),
        ("trainer.loop", "from trainer.absent import f", "trainer.loop: trainer.absent.f does not exist"),
        (
            "trainer.loop",
            "from trainer.loss import absent",
            "trainer.loop: trainer.loss.absent does not exist",
        ),
        ("trainer.loop", "from trainer import absent", "trainer.loop: trainer.absent does not exist"),
        ("scripts.demo", "import trainer.absent", "scripts.demo: trainer.absent does not exist"),
        ("trainer.loop", "x = 1\n" * 401, "trainer.loop: 401 lines"),
    ]
    for name, text, expected in cases:
        around = {"trainer": "", "trainer.loss": "import torch", "trainer.middle": "from trainer import loss"}
        found = breaches({**around, name: text})
        assert expected in found or any(breach.startswith(f"{expected}.") for breach in found), (text, found)
