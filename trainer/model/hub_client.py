"""How long the Hugging Face hub's library waits for an answer while something is uploaded."""

from __future__ import annotations

from typing import Any

# A commit of many files may take the hub a minute. The library sends most requests up to six times.
SILENT_SECONDS = 120.0


def limit_silence(seconds: float = SILENT_SECONDS) -> None:
    """From here on, in this process, a connection on which nothing moves for so long fails as one that is lost.

    By itself the library (huggingface_hub 2.4) waits without an end: a run whose network stalls while its model is
    uploaded would hold its machine for ever. Requests that have a limit of their own keep it, such as downloads. xet
    has its own limits.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory  # it has no public name, and gives the token's hooks

    def client() -> Any:
        made = default_client_factory()
        made.timeout = seconds
        return made

    set_client_factory(client)
