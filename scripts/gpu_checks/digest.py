"""Which files of the project a test depends on, and a digest of their content: whether a result is of this code."""

from __future__ import annotations

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

# Where the project's modules are found, as in setup.cfg's `pythonpath`.
SEARCHED = ("", "scripts")
# What every test depends on without importing it.
ALWAYS = ("setup.cfg", "tests/conftest.py")


def digest(root: Path, file: Path) -> str:
    """A digest of the content of all files that `file` depends on; the same wherever the project lies.

    root  of the project; file: relative to it
    """
    summed = hashlib.sha256()
    for path in depends_on(root, file):
        content = (root / path).read_bytes()
        summed.update(f"{path.as_posix()} {len(content)}\n".encode() + content)
    return summed.hexdigest()[:16]


def depends_on(root: Path, file: Path) -> list[Path]:
    """`file`, what it imports of the project, what that imports, and so on, as paths relative to `root`, sorted.

    Imports inside functions count. A whole package that is imported by name counts with its __init__.py.
    """
    found: set[Path] = set()
    waiting = [file, *(Path(name) for name in ALWAYS if (root / name).exists())]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".py":
            names = _imported((root / path).read_text(encoding="utf-8"))
            waiting += [module for name in names for module in _files_of(root, name)]
    return sorted(found)


@lru_cache(maxsize=1024)  # most tests import the same files, and parsing them is all the work
def _imported(source: str) -> frozenset[str]:
    """Dotted names that a source imports: `from a import b` gives a and a.b, since b may be a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return frozenset(names)


@lru_cache(maxsize=16384)  # each is asked for by many files, and no file comes while checks are listed
def _files_of(root: Path, name: str) -> tuple[Path, ...]:
    """The project's files that importing `name` runs: its own, and the __init__.py of each package on the way."""
    parts, found = name.split("."), list[Path]()
    for folder in SEARCHED:
        for end in range(1, len(parts) + 1):
            module = Path(folder, *parts[:end])
            for path in (module / "__init__.py", module.with_suffix(".py")):
                if (root / path).is_file():
                    found.append(path)
    return tuple(found)
