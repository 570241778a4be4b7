"""The real audiocraft, or a loud skip."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
from benchmarks.audiocraft_stub import import_audiocraft

MISSING = (
    "THE TESTS AGAINST AUDIOCRAFT ARE SKIPPED: nothing shows that audiocraft loads what is exported."
    " Install it: pip install -e '.[audiocraft]' && pip install --no-deps audiocraft==1.3.0"
)


def require_audiocraft() -> None:
    """Import audiocraft with its language model and solver, or skip the calling test module, loudly.

    Call it at the top of a test module, before any `import audiocraft`.
    """
    if importlib.util.find_spec("audiocraft") is None:
        warnings.warn(MISSING, stacklevel=2)
        pytest.skip(MISSING, allow_module_level=True)
    import_audiocraft()
