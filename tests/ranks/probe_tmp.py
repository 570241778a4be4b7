import os, gc, time, re
from pathlib import Path
def anon():
    t=Path("/proc/self/smaps_rollup").read_text()
    return 1024*int(re.search(r"^Pss_Anon:\s+(\d+)",t,re.M)[1])
def build(folder, strategy, trace=False):
    import ctypes
    assert ctypes.CDLL(None).mallopt(-3, 1<<20)
    import torch
    from tests.plans import plan_for
    from trainer.config import Config
    from trainer.models import open_model
    from trainer.engine import Engine, Ranks, build_accelerator
    plan = plan_for(strategy, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    accelerator = build_accelerator(plan, Config(dataset_path="unused", timeout_minutes=2.0), Path("."))
    out=[]
    with Ranks(timeout_seconds=60) as ranks:
        source = open_model(folder)
        b=anon()
        from trainer.engine.torch_backend import TorchBackend
        from trainer.engine.zero_backend import ZeroBackend
        def live():
            s={}
            for o in gc.get_objects():
                try:
                    if isinstance(o, torch.Tensor) and o.device.type=="cpu":
                        st=o.untyped_storage(); s[st.data_ptr()]=(st.nbytes(), tuple(o.shape))
                except Exception: pass
            return s
        for B in (TorchBackend, ZeroBackend):
            m=B.reset_moments
            def f(self, n, m=m):
                s=live(); out.append(("before moments", anon()-b, sum(v[0] for v in s.values()), sorted(s.values())[-4:]))
                m(self,n)
                s=live(); out.append(("after moments", anon()-b, sum(v[0] for v in s.values()), sorted(s.values())[-4:]))
            B.reset_moments=f
        e=Engine(accelerator, ranks, source, plan, Config(dataset_path="unused"))
        s=live(); out.append(("end", anon()-b, sum(v[0] for v in s.values()), sorted(s.values())[-6:]))
        gc.collect()
        s=live(); out.append(("end gc", anon()-b, sum(v[0] for v in s.values()), sorted(s.values())[-6:]))
        ctypes.CDLL(None).malloc_trim(0)
        out.append(("trim", anon()-b,0,0))
    return out
def steps_(): pass
if __name__=="__main__":
    import sys
    from tests.ranks.harness import run_ranks
    from trainer.debug_model import build_debug_model, debug_feature_extractor, debug_tokenizer
    from transformers import MusicgenProcessor
    f="/tmp/w/model"
    if not os.path.exists(f):
        build_debug_model(width=640, layers=8).save_pretrained(f); MusicgenProcessor(debug_feature_extractor(), debug_tokenizer()).save_pretrained(f)
    from tests.ranks.probe_tmp import build as B
    for st in sys.argv[1:]:
        for r,o in enumerate(run_ranks(2, B, f, st)):
            for name,a,l,big in o: print(st, r, name, f"anon {a/253109760:.2f} live {l/253109760:.2f}", big)
