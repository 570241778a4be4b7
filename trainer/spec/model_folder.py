"""Where a local model lies: the folder that was named, or the snapshot in a folder of the Hugging Face cache."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import ModelError

REFS, SNAPSHOTS, BRANCH = "refs", "snapshots", "main"


def model_folder(path: str) -> Path | None:
    """The folder of the model that `path` names; None where there is no such folder.

    Of a folder as the Hugging Face cache has it (models--facebook--musicgen-small, with refs/ and snapshots/, or that
    snapshots/ itself) it is the snapshot of the branch main, or the only one there is.

    Raises ModelError where the snapshot is missing, or where there are several and nothing says which.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    if (folder / SNAPSHOTS).is_dir() and not (folder / "config.json").is_file():
        return _snapshot(folder)
    if folder.name == SNAPSHOTS and (folder.parent / REFS).is_dir():
        return _snapshot(folder.parent)
    return folder


def is_only_a_path(model_id: str) -> bool:
    """Whether this can be nothing but a folder: no name and no hub id begins with a slash, a dot or `~`."""
    return Path(model_id).is_absolute() or model_id.startswith((".", "~"))


def _snapshot(cached: Path) -> Path:
    snapshots = sorted(path for path in (cached / SNAPSHOTS).iterdir() if path.is_dir())
    branch = cached / REFS / BRANCH
    if branch.is_file():
        named = cached / SNAPSHOTS / branch.read_text(encoding="utf-8").strip()
        if named in snapshots:
            return named
    if len(snapshots) == 1:
        return snapshots[0]
    hub_id = "/".join(cached.name.split("--")[1:])
    fetch = f"`hf download {hub_id}`" if hub_id else "`hf download` with its hub id"
    if not snapshots:
        raise ModelError(f"{cached} is a folder of the Hugging Face cache without a snapshot: fetch it by {fetch}")
    raise ModelError(
        f"{cached} is a folder of the Hugging Face cache, and nothing says which of its {len(snapshots)} snapshots"
        f" to take: give one, such as {snapshots[0]}"
    )
