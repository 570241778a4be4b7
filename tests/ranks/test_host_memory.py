"""Loading and sharding hold at most one copy of the model in host memory, however many ranks a machine has."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.plans import plan_for
from tests.ranks.harness import start_ranks


def build(folder: str, strategy: str, meeting: str) -> tuple[float, float]:
    """Build the engine over the model in `folder`, once told to; when its weights were sharded, and when all was."""
    from trainer.config import Config
    from trainer.engine import Engine, Ranks, build_accelerator
    from trainer.engine.torch_backend import TorchBackend
    from trainer.engine.zero_backend import ZeroBackend
    from trainer.models import open_model

    import faulthandler; faulthandler.dump_traceback_later(40, file=open(f"/tmp/w/trace{os.getpid()}","w"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    plan = plan_for(strategy, world_size=world_size)
    config = Config(dataset_path="unused", timeout_minutes=2.0)
    accelerator = build_accelerator(plan, config, Path("."))
    times: list[float] = []
    for backend in (TorchBackend, ZeroBackend):
        _before(backend, "reset_moments", lambda: times.append(time.monotonic()))
    with Ranks(timeout_seconds=60) as ranks:
        source = open_model(folder)
        (Path(meeting) / f"ready-{os.getpid()}").touch()
        while not (Path(meeting) / "go").exists():
            time.sleep(0.01)
        engine = Engine(accelerator, ranks, source, plan, config)
        time.sleep(0.3)
        ranks.wait("end of the measurement")
        assert sum(share.weight.numel() for share in engine.backend.shares())
    return times[0], time.monotonic()
def _before(owner, name, note):
    method = getattr(owner, name)
    def wrapped(*a, **k):
        note()
        return method(*a, **k)
    setattr(owner, name, wrapped)

def pss(pid: int) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return {k: 1024 * int(re.search(rf"^{k}: +(\d+) kB", text, re.M)[1]) for k in ("Pss","Pss_Anon","Pss_File")}
    return {"Pss":0,"Pss_Anon":0,"Pss_File":0}

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from trainer.debug_model import build_debug_model
    f = tmp_path_factory.mktemp("m")
    build_debug_model(width=768, layers=8).save_pretrained(f)
    return f

@pytest.mark.parametrize("strategy", ["fsdp","zero2","zero3"])
def test_x(strategy, folder, tmp_path):
    from multiprocessing import forkserver
    n = 1 if strategy == "single" else 2
    running = start_ranks(n, build, str(folder), strategy, str(tmp_path))
    pids = [p.pid for p in running.processes] + [forkserver._forkserver._forkserver_pid]
    while len(list(tmp_path.glob("ready-*"))) < n: time.sleep(0.05)
    time.sleep(0.5)
    samples=[]
    samples.append((time.monotonic(), [pss(p) for p in pids]))
    (tmp_path/"go").touch()
    while any(not r.poll(0) for r,_ in running._pipes):
        samples.append((time.monotonic(), [pss(p) for p in pids]))
        time.sleep(0.005)
    res = running.results()
    assert all(k=="returned" for k,_ in res), res
    t1 = min(v[0] for _,v in res); t2=max(v[1] for _,v in res)
    M = 4*sum(1 for _ in [])
    from trainer.models import open_model
    w = open_model(str(folder)).weights
    M = sum(4*__import__("math").prod(w.shape(k)) for k in w if k.startswith(("decoder.","enc_to")))
    base = sum(x["Pss"] for x in samples[0][1])
    def tot(s,k="Pss"): return sum(x[k] for x in s[1])
    pre=[s for s in samples if s[0]<=t1]; allp=[s for s in samples if s[0]<=t2]
    print(f"\n{strategy}: M {M/1e6:.0f} MB base {base/1e6:.0f}; n {len(pre)} {len(allp)}; peak pre-moments {(max(map(tot,pre))-base)/M:.2f} M; peak {(max(map(tot,allp))-base)/M:.2f} M; final {(tot(allp[-1])-base)/M:.2f} M; file peak {(max(tot(s,'Pss_File') for s in allp)-tot(samples[0],'Pss_File'))/M:.2f}; max anon {(max(tot(s,'Pss_Anon') for s in allp)-tot(samples[0],'Pss_Anon'))/M:.2f}")
    for s in allp[::max(1,len(allp)//25)]:
        print(f"  {s[0]-samples[0][0]:.2f} anon {(tot(s,'Pss_Anon')-tot(samples[0],'Pss_Anon'))/M:.2f} file {(tot(s,'Pss_File')-tot(samples[0],'Pss_File'))/M:.2f} {'pre' if s[0]<=t1 else ''}")
