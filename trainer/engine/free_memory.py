"""Whether each GPU has free what the plan needs of it, and what holds its memory where it has not."""

from __future__ import annotations

import os
import socket
import subprocess

import torch

from trainer.engine.hardware import card_of
from trainer.engine.ranks import Ranks
from trainer.errors import MemoryShortError
from trainer.plan.memory import GIB, bytes_to_be_free
from trainer.plan.plan import Plan

QUERY = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"]
MOST_SHOWN = 4  # ranks that a message names, and processes of each


def check_free_memory(plan: Plan, device: torch.device, ranks: Ranks) -> None:
    """Raise MemoryShortError, on every rank, where a GPU has less free memory than its process will need.

    To be called once, after the first collective and before anything is allocated. A collective. What is free does not
    choose the plan, because it differs from start to start; it can only refuse it.
    """
    short = [text for text in ranks.gather(_shortage(plan, device)) if text]
    if short:
        more = f"; and {len(short) - MOST_SHOWN} more" if len(short) > MOST_SHOWN else ""
        raise MemoryShortError(
            f"{'; '.join(short[:MOST_SHOWN])}{more}. End those processes, or need less: a smaller --batch_size with"
            " --global_batch as it is, --gradient_checkpointing 1, or shorter --segment_seconds"
        )


def _shortage(plan: Plan, device: torch.device) -> str:
    """What this process's GPU lacks, in words; empty where it has enough, and where that is not known."""
    # Where GPU and host share one memory, CUDA does not count as free what the system keeps of files and gives back.
    if device.type == "cpu" or torch.cuda.get_device_properties(device).is_integrated:
        return ""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)  # PyTorch's own
    needed = bytes_to_be_free(plan.memory, plan.layout)
    if free >= needed:
        return ""
    libraries = "CUDA and NCCL hold" if plan.layout.communicators else "CUDA holds"
    return (
        f"cuda:{device.index} on {socket.gethostname()} has {free / GIB:.1f} of its {total / GIB:.1f} GiB free, and"
        f" this run needs {needed / GIB:.1f} besides what {libraries}: {_holders(card_of(device))}"
    )


def _holders(card: str) -> str:
    """The other processes on this GPU as nvidia-smi tells them, in words."""
    try:
        done = subprocess.run([*QUERY, f"--id={card}"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"what holds the rest is unknown, because nvidia-smi cannot be asked ({error})"
    if done.returncode:
        reason = done.stdout.strip() or done.stderr.strip()
        return f"what holds the rest is unknown, because nvidia-smi failed ({reason})"
    return holders_in_words(done.stdout, os.getpid())


def holders_in_words(listing: str, own: int) -> str:
    """The processes in nvidia-smi's lines of id, name and MiB ("4711, /usr/bin/python, 20480"), without process `own`.

    A process of another container or user is often not listed, and the name or memory may be "[N/A]".
    """
    rows = [[part.strip() for part in line.rsplit(",", 1)] for line in listing.splitlines() if "," in line]
    others = [(*head.split(",", 1), mib) for head, mib in rows if head.split(",", 1)[0].strip() != str(own)]
    if not others:
        return "held by what nvidia-smi does not list here: the screen, a process of another user or container"
    shown = [f"process {pid} ({name.strip()}) holds {_gib(mib)}" for pid, name, mib in others[:MOST_SHOWN]]
    return ", ".join(shown) + (f", and {len(others) - MOST_SHOWN} more" if len(others) > MOST_SHOWN else "")


def _gib(mib: str) -> str:
    return f"{int(mib) / 1024:.1f} GiB" if mib.isdecimal() else "an unknown part"
