"""Uploading files to a model repository of the Hugging Face hub: once each, in one commit, however often it is stopped.

Who downloads meanwhile gets the former model or the new one. Files that a killed upload had sent whole are not sent
again: the hub keeps them by their digest, and is asked for it before a file is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trainer.errors import ConfigError, StorageError, in_words
from trainer.model.hub_client import limit_silence

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What an upload led to.

    url      address of the repository's page
    changed  whether there was anything to send; False where the repository held all of it already
    private  whether only its owner sees it
    """

    url: str
    changed: bool
    private: bool


def check(repository: str, *, public: bool) -> None:
    """Raise what an upload to the model repository would be refused for, as far as the hub tells without changing it.

    Asked are: the name, whose token it is, whether it may write for that owner, and of a repository that is there,
    whether it may be written and is as private as it should be. Nothing is made. ConfigError says what the user can
    mend, StorageError that the hub does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        owner, _ = repository.split("/")
    except (HFValidationError, ValueError) as error:
        raise ConfigError(f"{repository} is no name of a repository of the hub: it takes user/name") from error
    _refuse_offline(repository)
    limit_silence()
    if get_token() is None:
        raise ConfigError(f"{_given(repository)}: there is no token for the hub: {LOG_IN}")
    api = HfApi()
    with _failures(repository, "the hub does not accept it"):
        who = api.whoami()
        _refuse_owner(repository, owner, who)
        _check_repository(api, repository, public=public)


def upload(
    repository: str, files: Mapping[str, Path | bytes], *, is_ours: Callable[[str], bool], public: bool, message: str
) -> Pushed:
    """Make the model repository hold these files, in one commit. Raises ConfigError and StorageError.

    files    by their path in the repository
    is_ours  whether a file of that path is one that such an upload writes: those that are there and not in `files`
             are removed. All other files stay
    public   whether a new repository is public
    message  of the commit
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _refuse_offline(repository)
    limit_silence()
    api = HfApi()
    with _failures(repository, "it could not be uploaded"):
        url = api.create_repo(repository, private=not public, exist_ok=True)
        _refuse_public(repository, api.model_info(repository), public=public)
        added = [
            CommitOperationAdd(name, str(file) if isinstance(file, Path) else file)
            for name, file in sorted(files.items())
        ]
        # One after another: what is sent whole then stays sent. Several at once the library sends in threads, for which
        # Ctrl-C would wait, for as long as a connection stalls.
        for operation in added:
            api.preupload_lfs_files(repository, [operation], free_memory=False)
        before = api.model_info(repository)
        there = [one.rfilename for one in before.siblings or ()]
        gone = [CommitOperationDelete(name) for name in there if is_ours(name) and name not in files]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*added, *gone]
        # By its parent, the commit is refused where somebody else has changed the repository in between.
        made = api.create_commit(repository, operations, commit_message=message, parent_commit=before.sha)
    return Pushed(url=str(url), changed=made.oid != before.sha, private=bool(before.private))


def _given(repository: str) -> str:
    return f"the hub's repository {repository}"


def _refuse_offline(repository: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{_given(repository)} cannot be asked for, because HF_HUB_OFFLINE=1 forbids it: unset that, or leave"
            " --push_to_hub out and run scripts/push_to_hub.py where there is a network"
        )


def _refuse_owner(repository: str, owner: str, who: Mapping[str, Any]) -> None:
    """Raise ConfigError where the token is of somebody who cannot write there, or may only read."""
    orgs = [org for org in who.get("orgs", ()) if org.get("roleInOrg") != "read"]
    names = [who.get("name", ""), *(org.get("name", "") for org in orgs)]
    if owner.lower() not in [name.lower() for name in names]:
        raise ConfigError(
            f"{_given(repository)}: the token is of {names[0]}, who cannot write for {owner}. It can for"
            f" {', '.join(names)}: use one of these, or {LOG_IN} for {owner}"
        )
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"{_given(repository)}: the token of {names[0]} may only read: {LOG_IN}")


def _check_repository(api: HfApi, repository: str, *, public: bool) -> None:
    """Raise ConfigError for a repository that is there and may not be written, or is public and should not be."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        _refuse_public(repository, api.model_info(repository), public=public)
        api.auth_check(repository, write=True)
    except RepositoryNotFoundError:
        return  # it is made at the end, so that a run that fails leaves none
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 403:
            raise
        why = in_words(error)
        raise ConfigError(f"{_given(repository)}: the token may not write there ({why}): {LOG_IN}") from error


def _refuse_public(repository: str, found: Any, *, public: bool) -> None:
    if not found.private and not public:
        raise ConfigError(
            f"{_given(repository)}: that repository is public, and what is uploaded there is as well. Say --public if"
            " that is meant, or choose another name, or make it private on its page"
        )


@contextmanager
def _failures(repository: str, what: str) -> Iterator[None]:
    """Turn what the library raises into a StorageError.

    Besides errors of HTTP and of a connection it raises ValueError for what the hub has against a file or a card, and
    RuntimeError for one that could not be sent.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The base of the hub's error is that of the library by which it speaks, from which errors of a connection come.
    failures = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError))
    try:
        yield
    except failures as error:
        raise StorageError(f"{_given(repository)}: {what} ({in_words(error)})") from error
