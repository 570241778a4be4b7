"""Processes that play the ranks of a run on one machine, over gloo, started fast.

A forkserver has torch, accelerate, deepspeed and transformers loaded already, so that a case takes seconds; each
rank is a fresh process with the environment that torchrun would give it.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# The last is what each rank of ZeRO would import of DeepSpeed and, with it, of torch's compiler: a second and more.
PRELOADED = ["torch", "accelerate", "transformers", "datasets", "tests.ranks.preload"]
PRELOADED += ["peft", "deepspeed.runtime.zero.muon.original_muon"]
TIME_LIMIT_SECONDS = 180.0


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
    """What `function(*arguments, **named)` returned on each rank; a rank that raised fails the test with its trace."""
    results = start_ranks(world_size, function, *arguments, **named).results()
    for rank, (kind, value) in enumerate(results):
        assert kind == "returned", f"rank {rank} of {world_size}:\n{value}"
    return [value for _, value in results]


def start_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> RankProcesses:
    """The ranks, running."""
    return RankProcesses(world_size, function, arguments, named)


class RankProcesses:
    """Owns one process per rank.

    environments  variables of each rank besides; with them each rank imports everything itself, since CUDA cannot be
                  used in a process that was forked from one which has looked for it
    """

    def __init__(
        self,
        world_size: int,
        function: Callable[..., Any],
        arguments: tuple,
        named: dict[str, Any],
        environments: Sequence[Mapping[str, str]] = (),
    ):
        context = mp.get_context("spawn" if environments else "forkserver")
        if not environments:
            context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self._pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        self.processes = [
            context.Process(
                target=_rank_main,
                args=(
                    (rank, world_size, port),
                    environments[rank] if environments else {},
                    self._pipes[rank][1],
                    (function, arguments, named),
                ),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()
        for _, sender in self._pipes:
            sender.close()

    def results(self, seconds: float = TIME_LIMIT_SECONDS) -> list[tuple[str, Any]]:
        """For each rank ("returned", value), ("raised", trace) or ("died", exit code); all are ended after that."""
        deadline = time.monotonic() + seconds
        found: list[tuple[str, Any]] = []
        try:
            for process, (receiver, _) in zip(self.processes, self._pipes, strict=True):
                if not receiver.poll(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"a rank hung for {seconds:.0f} s; so far: {found}")
                try:
                    found.append(receiver.recv())
                except EOFError:
                    process.join(5)
                    found.append(("died", process.exitcode))
        finally:
            for process in self.processes:
                process.join(0.5)
                process.kill()
                process.join()
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_rank(folder: str, *flags: str) -> tuple[int, str]:
    """launch.py's main in this rank, in `folder`: its exit code and output."""
    from launch import main

    output = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(flags)
        except Exception:
            traceback.print_exc()
            code = 1
    return code, output.getvalue()


def _rank_main(
    place: tuple[int, int, int],
    environment: Mapping[str, str],
    pipe: Any,
    call: tuple[Callable[..., Any], tuple, dict[str, Any]],
) -> None:
    rank, world_size, port = place
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    if world_size == 1:  # as `python launch.py` starts it
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    import torch

    torch.set_num_threads(1)
    function, arguments, named = call
    try:
        pipe.send(("returned", function(*arguments, **named)))
    except Exception:
        pipe.send(("raised", traceback.format_exc()))
    finally:
        pipe.close()
