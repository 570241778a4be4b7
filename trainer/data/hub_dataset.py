"""Data sets of the Hugging Face hub: which of their files a run needs, and having these in the hub's own cache.

What is fetched is a folder like any other: of tables, of sound files with captions beside them, or a prepared one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainer.atomic import write_whole
from trainer.data.folder_walk import is_metadata
from trainer.data.prepared import are_prepared, read_about
from trainer.data.prepared_about import MARKER, About
from trainer.data.sound_kind import SOUND_SUFFIXES
from trainer.data.split_files import Configuration, configurations_of, files_of_split, missing_shards
from trainer.data.table_file import SUFFIXES
from trainer.data.table_scan import README
from trainer.errors import ConfigError, DataError, StorageError
from trainer.spec.dataset_path import not_here
from trainer.spec.model_folder import BRANCH, REFS

BESIDE_SOUNDS = (".txt", ".json", ".jsonl", ".csv")  # captions and tables of them
COMMIT = re.compile(r"[0-9a-f]{40}")
THREADS = 4
SHOWN = 10

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """The files of a data set of the hub that a run uses.

    repo        its id, user/name
    revision    the commit
    asked       the branch, tag or commit that led to it
    files       their names in it, sorted
    sizes       of each of them, in bytes
    size_bytes  of all of them together
    in_parts    whether it is larger than the disk, and therefore read in parts (trainer/data/hub_parts.py)
    """

    repo: str
    revision: str
    asked: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    size_bytes: int
    in_parts: bool = False

    @property
    def is_prepared(self) -> bool:
        """Whether they are a prepared folder."""
        return are_prepared(self.files)

    def describe(self) -> str:
        """For the console."""
        return (
            f"data set {self.repo} of the hub, commit {self.revision}: {len(self.files):,} file(s),"
            f" {self.size_bytes / 1e9:,.2f} GB"
        )


def find_dataset(repo: str, *, revision: str | None, config: str | None, split: str, flag: str) -> HubDataset:
    """Ask the hub what the data set holds, and choose the files of the configuration and the split.

    revision  a branch, a tag or a commit; None is main
    flag      which one named the data set, for messages

    Of a prepared folder all is chosen that its prepared.json lists. Under HF_HUB_OFFLINE=1 it is looked for in the
    hub's cache. Raises DataError where it cannot be found or asked for, or is prepared and cannot be read; ConfigError
    where it has no such configuration or split.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        commit, sizes = _cached(repo, revision, flag)
    else:
        commit, sizes = _asking(repo, revision, flag, lambda: _listing(repo, revision))
    if are_prepared(sizes):
        if MARKER in sizes:
            _asking(repo, revision, flag, lambda: _file(repo, commit, MARKER))
        try:
            chosen = _of_prepared(read_about(_snapshot(repo, commit)), repo, sizes)
        except DataError as error:
            raise DataError(f"{flag} {repo}: {error}") from None
        return _found(repo, revision, commit, sizes, chosen)
    readme = ""
    if README in sizes:
        path = _asking(repo, revision, flag, lambda: _file(repo, commit, README))
        readme = Path(path).read_text(encoding="utf-8", errors="replace")
    try:
        chosen = _chosen(sizes, split, config, configurations_of(readme))
    except ConfigError as error:
        raise ConfigError(f"{flag} {repo}: {error}") from None
    if not any(_suffix(name) in (*SUFFIXES, *SOUND_SUFFIXES) for name in chosen):
        kinds = ", ".join(sorted({_suffix(name) for name in sizes if _suffix(name)})) or "none"
        raise DataError(
            f"{flag} {repo}: the data set holds neither .parquet files nor sound files for the split {split}, and"
            f" others are not read (its files: {kinds}). Download it and bring it into such a form"
        )
    if constants.HF_HUB_OFFLINE and (lacking := missing_shards(chosen)):
        raise DataError(
            f"{flag} {repo}: HF_HUB_OFFLINE is set, and the hub's cache lacks {_some(lacking)} of it. {_how(repo)}"
        )
    return _found(repo, revision, commit, sizes, chosen)


def fetch(found: HubDataset, flag: str) -> None:
    """Have all files of the data set in the hub's cache; what is there already is not fetched again.

    Raises DataError where one cannot be fetched, StorageError where the disk has no room for them.
    """
    from huggingface_hub import constants

    missing = missing_files(found, found.files)
    if missing and not constants.HF_HUB_OFFLINE:
        _refuse_full_disk(found, missing, Path(constants.HF_HUB_CACHE), flag)
    fetch_files(found, missing, flag)
    if not constants.HF_HUB_OFFLINE:
        _remember_branch(found)


def missing_files(found: HubDataset, names: Sequence[str]) -> list[str]:
    """Those of these files of it that the hub's cache on this machine lacks."""
    return [name for name in names if not _is_cached(found, name)]


def fetch_files(found: HubDataset, names: Sequence[str], flag: str, folder: Path | None = None) -> None:
    """Fetch these files by a few threads: into the hub's cache, or into a folder of their own.

    Raises DataError where one cannot be fetched.
    """
    from huggingface_hub import constants
    from tqdm import tqdm

    if names and constants.HF_HUB_OFFLINE:
        raise DataError(
            f"{flag} {found.repo}: HF_HUB_OFFLINE is set, and the hub's cache lacks {_some(list(names))} of commit"
            f" {found.revision}. {_how(found.repo)}"
        )
    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(names), desc=found.repo, unit="file", delay=2) as bar:

        def one(name: str) -> None:
            _asking(found.repo, found.revision, flag, lambda: _file(found.repo, found.revision, name, folder))
            bar.update()

        try:
            for _ in pool.map(one, names):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _remember_branch(found: HubDataset) -> None:
    """Let the hub's cache know to which commit the branch led, so that a start without a network finds it.

    The library does this for a file that is asked for by its branch; here all are asked for by the commit, so that they
    belong together.
    """
    ref = folder_of(found).parent.parent / REFS / found.asked
    if not COMMIT.fullmatch(found.asked) and folder_of(found).is_dir():
        with suppress(OSError):  # of another user, or on a read-only disk
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_whole(ref, found.revision.encode())


def folder_of(found: HubDataset) -> Path:
    """The folder in the hub's cache in which the files lie, after `fetch` on this machine."""
    return _snapshot(found.repo, found.revision)


def _snapshot(repo: str, commit: str) -> Path:
    from huggingface_hub import constants, file_download

    repo_folder = file_download.repo_folder_name(repo_id=repo, repo_type="dataset")
    return Path(constants.HF_HUB_CACHE).absolute() / repo_folder / "snapshots" / commit


def _found(
    repo: str, revision: str | None, commit: str, sizes: Mapping[str, int], chosen: tuple[str, ...]
) -> HubDataset:
    bytes_of = tuple(sizes[name] for name in chosen)
    return HubDataset(
        repo=repo, revision=commit, asked=revision or BRANCH, files=chosen, sizes=bytes_of, size_bytes=sum(bytes_of)
    )


def _of_prepared(about: About, repo: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The files of a prepared folder. Raises DataError where one is not there, or has another size."""
    from huggingface_hub import constants

    lacking = sorted(set(about.files) - sizes.keys())
    if lacking and constants.HF_HUB_OFFLINE:
        raise DataError(f"HF_HUB_OFFLINE is set, and the hub's cache lacks {_some(lacking)} of it. {_how(repo)}")
    wrong = [f"{name} has {sizes[name]:,} bytes and not {size:,}" for name, size in about.files.items()
             if name in sizes and sizes[name] != size]  # fmt: skip
    if lacking or wrong:
        raise DataError(
            f"the prepared data set is incomplete: {'it lacks ' * bool(lacking)}{_some(lacking or wrong)}. Push it"
            " again with scripts/prepare_dataset.py --push_to_hub"
        )
    return tuple(sorted((MARKER, *about.files)))


def _chosen(
    sizes: Mapping[str, int], split: str, config: str | None, configurations: tuple[Configuration, ...]
) -> tuple[str, ...]:
    """The tables of the split; where there are none, its sound files and what may hold their captions."""
    names = [name for name in sizes if not any(part.startswith(".") for part in name.split("/"))]
    tables = [name for name in names if _suffix(name) in SUFFIXES and not is_metadata(_base(name))]
    if tables:
        return files_of_split(tables, split, config=config, configurations=configurations)
    sounds = [name for name in names if _suffix(name) in SOUND_SUFFIXES]
    if not sounds:
        return ()
    chosen = files_of_split(sounds, split, config=config, configurations=configurations, by_folder=not configurations)
    folders = {""} | {"/".join(name.split("/")[:end]) for name in chosen for end in range(1, name.count("/") + 1)}
    beside = [name for name in names if _suffix(name) in BESIDE_SOUNDS or is_metadata(_base(name))]
    return tuple(sorted((*chosen, *(name for name in beside if name.rpartition("/")[0] in folders))))


def _listing(repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """The commit, and the size in bytes of each file."""
    from huggingface_hub import HfApi, constants

    info = HfApi(endpoint=constants.ENDPOINT).dataset_info(repo, revision=revision, files_metadata=True)
    return str(info.sha), {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}


def _cached(repo: str, revision: str | None, flag: str) -> tuple[str, dict[str, int]]:
    """The same of what the hub's cache holds."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{flag} {repo}: {not_here(repo)}; and HF_HUB_OFFLINE is set, and no such data set is in the hub's cache."
            f" {_how(repo)}"
        ) from error
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return folder.name, {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _file(repo: str, commit: str, name: str, folder: Path | None = None) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repo, name, repo_type="dataset", revision=commit, local_dir=folder)


def _is_cached(found: HubDataset, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(
        try_to_load_from_cache(found.repo, name, repo_type="dataset", revision=found.revision), str
    )


def _asking(repo: str, revision: str | None, flag: str, ask: Callable[[], T]) -> T:
    """What `ask` returns; DataError in words for what the hub answers instead, or where it cannot be reached."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,  # of whichever version of httpx the library uses; it has no name of its own for a lost connection
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    start = f"{flag} {repo}: {not_here(repo)}; "
    login = "log in with `hf auth login`, or set HF_TOKEN"
    page = f"{constants.ENDPOINT}/datasets/{repo}"
    try:
        return ask()
    except GatedRepoError as error:
        reason = f"the data set of this name on the hub asks for consent: agree at {page}, then {login}"
        raise DataError(start + reason) from error
    except RepositoryNotFoundError as error:
        reason = f"and the hub has no data set of this name, or it is private: check the name, or {login}"
        raise DataError(start + reason) from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"{flag} {repo}: the data set has no revision {revision}: --dataset_revision takes a branch, tag or commit"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise DataError(f"{start}the hub refuses to hand it out (HTTP {status}): {login}") from error
        raise DataError(f"{start}the hub failed: {_line(error)}. Try again later") from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise DataError(
            f"{start}and the hub at {constants.ENDPOINT} cannot be reached ({_line(cause)}). {_how(repo)}"
        ) from error


def _refuse_full_disk(found: HubDataset, missing: list[str], cache: Path, flag: str) -> None:
    """Raise StorageError where what is missing is larger than the free disk of the hub's cache."""
    from huggingface_hub import HfApi, constants

    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if found.size_bytes <= free:
        return
    paths = HfApi(endpoint=constants.ENDPOINT).get_paths_info(
        found.repo, missing, revision=found.revision, repo_type="dataset"
    )
    needed = sum(getattr(path, "size", 0) for path in paths)
    if needed > free:
        raise StorageError(
            f"{flag} {found.repo}: {needed / 1e9:,.1f} GB of it are to be fetched, and the hub's cache {cache} has"
            f" {free / 1e9:,.1f} GB left: make room, set HF_HOME to a folder on a larger disk, or take another"
            " --dataset_split or --dataset_config"
        )


def _how(repo: str) -> str:
    return (
        f"Where there is a network: `hf download {repo} --repo-type dataset`, and HF_HUB_OFFLINE=1 where there is none"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
