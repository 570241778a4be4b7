"""Fine-tuning of MusicGen's language model, on one device or on many."""

import sys

if sys.platform == "win32":
    # The one thing that happens at import: what the rooms import next (fcntl, signals of POSIX) is not there on
    # Windows, and its traceback would be all that is seen.
    sys.exit(
        "error: this program does not run on Windows itself. It runs in WSL2, with the GPU: `wsl --install` in a"
        " PowerShell, then clone and install it inside Ubuntu as README.md says"
    )
