"""A run that torchrun starts again (--max_restarts): its processes must not read what the attempt before them wrote.

With a static rendezvous, which is torchrun's default, the launcher's key-value store outlives an attempt. Its keys then
name addresses that are gone, failures that are over and waits that were done.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

ATTEMPT, LAUNCHER_HAS_STORE = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"
_stores: list[dist.TCPStore] = []  # open until this process ends: the other processes' connections lead to it


def use_new_store() -> None:
    """From the second attempt on, have the processes meet at a store of their own, which rank 0 opens.

    MASTER_ADDR and MASTER_PORT then name it; rank 0 tells the others its port through the launcher's store. Does
    nothing at the first attempt, and without torchrun.
    """
    attempt = int(os.environ.get(ATTEMPT, "0"))
    if attempt == 0 or os.environ.get(LAUNCHER_HAS_STORE) != "True":  # else rank 0 opens one at each attempt anyway
        return
    host = os.environ["MASTER_ADDR"]
    launchers = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(minutes=5))
    key = f"trainer/port of attempt {attempt}"
    if os.environ["RANK"] == "0":
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        _stores.append(own)
        launchers.set(key, str(own.port))
    os.environ["MASTER_PORT"] = launchers.get(key).decode()
