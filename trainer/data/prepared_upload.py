"""Uploading a prepared folder to the hub, as a data set that `--dataset` and `datasets.load_dataset` open."""

from __future__ import annotations

from typing import cast

from trainer.data.prepared import Prepared
from trainer.data.prepared_about import CARD, CODES, MARKER, MELODY, TABLE, TEXT
from trainer.errors import ConfigError, StorageError, in_words
from trainer.model.hub_client import limit_silence

PARTS = [f"{kind}/*" for kind in (CODES, TEXT, MELODY)]
PATTERNS = [MARKER, TABLE, CARD, *PARTS]


def push(prepared: Prepared, repository: str, *, private: bool, endpoint: str | None = None) -> str:
    """Make the hub's data set `repository` (user/name) hold the folder; returns its address.

    private   whether the data set is made private, where there is none of that name yet
    endpoint  address of the hub; None for the one that huggingface_hub is set up for

    It is one commit: who downloads meanwhile gets the former folder or this one. Parts of a former one that are not
    in this one are removed, and other files of the data set stay. Raises ConfigError for a name that cannot be one,
    StorageError where the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    limit_silence()
    api = HfApi(endpoint=endpoint)
    # The base of the hub's error is that of the library by which it speaks, from which errors of a connection come.
    failures = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError))
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=prepared.folder,
            allow_patterns=PATTERNS,
            delete_patterns=PARTS,
            commit_message=f"{prepared.about.clips} clips, {prepared.about.hours:.2f} hours",
        )
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub {repository} is no name of a data set: it takes user/name") from error
    except failures as error:
        raise _not_uploaded(prepared, repository, error) from error
    return str(done.repo_url)


def _not_uploaded(prepared: Prepared, repository: str, error: Exception) -> StorageError:
    return StorageError(
        f"--push_to_hub {repository}: it could not be uploaded ({in_words(error)}). {prepared.folder} is complete:"
        " log in with `hf auth login`, with a token that may write, and run the same command again"
    )
