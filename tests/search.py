"""The search for a task in which a cure can be seen: one line of settings a run, from a file.

    python -m tests.search FILE      # lines such as: phase-16-25 attn=gated steps=3000 seed=1

A record of how tests/results/cures.json ("search") came about, with the tasks that were tried; written
for commit bb483eb, and removed again, because none of these tasks is used by anything else.
"""
import string
import torch
class Flag:
    """content symbols K in two cases; after upper case the next content is determined."""
    def __init__(self, K=16, p=0.25, kind="back"):
        self.K, self.p, self.kind = K, p, kind
        self.symbols = string.ascii_lowercase[:K] + string.ascii_uppercase[:K]
    def windows(self, n, length, g):
        K = self.K
        c = torch.randint(K, (n, length), generator=g)
        f = torch.rand(n, length, generator=g) < self.p
        rows = torch.arange(n)
        if self.kind == "back":
            for t in range(2, length):
                c[:, t] = torch.where(f[:, t-1], c[:, t-2], c[:, t])
        if self.kind == "back3":
            for t in range(4, length):
                c[:, t] = torch.where(f[:, t-1], c[:, t-4], c[:, t])
        if self.kind == "ind":
            nxt = torch.full((n, K), -1)
            for t in range(1, length):
                prev = c[:, t-1]
                known = nxt[rows, prev]
                c[:, t] = torch.where(f[:, t-1] & (known >= 0), known, c[:, t])
                nxt[rows, prev] = c[:, t]
        if self.kind == "first":   # after upper: successor of the first occurrence
            nxt = torch.full((n, K), -1)
            for t in range(1, length):
                prev = c[:, t-1]
                known = nxt[rows, prev]
                c[:, t] = torch.where(f[:, t-1] & (known >= 0), known, c[:, t])
                nxt[rows, prev] = torch.where(known >= 0, known, c[:, t])
        return c + K * f.long()
    def position_loss(self, length):
        import numpy as np
        return np.zeros(length)
    def encode(self, t): return [self.symbols.index(s) for s in t]
    def decode(self, ids): return "".join([*self.symbols, "|"][i] for i in ids)
class Cased:
    """copy: first showing lower case, later showings upper case; share `rest` of windows never repeats"""
    def __init__(self, K=16, rest=0.0, lo=8, hi=3/8):
        self.K, self.rest_share, self.lo, self.hi = K, rest, lo, hi
        self.symbols = string.ascii_lowercase[:K] + string.ascii_uppercase[:K]
    def windows(self, n, length, g):
        K = self.K
        spans = torch.arange(length // self.lo, int(length * self.hi) + 1)
        span = spans[torch.randint(len(spans), (n,), generator=g)][:, None]
        none = torch.rand(n, 1, generator=g) < self.rest_share
        span = torch.where(none, length, span)
        passage = torch.randint(K, (n, length), generator=g)
        at = torch.arange(length)
        return passage.gather(1, at % span) + K * (at >= span).long()
    def rest(self, n, length, g):
        return torch.randint(self.K, (n, length), generator=g)
    def position_loss(self, length):
        import numpy as np
        return np.zeros(length)
    def encode(self, t): return [self.symbols.index(s) for s in t]
    def decode(self, ids): return "".join([*self.symbols, "|"][i] for i in ids)

class Gates:
    """alternating runs: upper-case runs copy what followed the latest occurrence of the content;
    lower-case runs are random. a Markov case with mean run length m."""
    def __init__(self, K=16, m=6):
        self.K, self.m = K, m
        self.symbols = string.ascii_lowercase[:K] + string.ascii_uppercase[:K]
    def windows(self, n, length, g):
        K = self.K
        c = torch.randint(K, (n, length), generator=g)
        flip = torch.rand(n, length, generator=g) < 1/self.m
        flip[:, 0] = False
        f = flip.long().cumsum(1) % 2 == 1
        rows = torch.arange(n); nxt = torch.full((n, K), -1)
        for t in range(1, length):
            prev = c[:, t-1]; known = nxt[rows, prev]
            c[:, t] = torch.where(f[:, t-1] & (known >= 0), known, c[:, t])
            nxt[rows, prev] = c[:, t]
        return c + K * f.long()
    def rest(self, n, length, g):
        return torch.randint(self.K, (n, length), generator=g)
    position_loss = Cased.position_loss; encode = Cased.encode; decode = Cased.decode
Flag.rest = lambda self, n, length, g: torch.randint(self.K, (n, length), generator=g)
class Phase(Cased):
    """as Cased, but the repeats begin anywhere in the passage, so that token 0 is no prediction."""
    def __init__(self, K=16, rest=0.0, lo=8, hi=3/8, case=True):
        super().__init__(K, rest, lo, hi); self.case = case
        if not case: self.symbols = self.symbols[:K]
    def windows(self, n, length, g):
        K = self.K
        spans = torch.arange(length // self.lo, int(length * self.hi) + 1)
        span = spans[torch.randint(len(spans), (n,), generator=g)][:, None]
        none = torch.rand(n, 1, generator=g) < self.rest_share
        span = torch.where(none, length, span)
        passage = torch.randint(K, (n, length), generator=g)
        start = (torch.rand(n, 1, generator=g) * span).long()
        at = torch.arange(length)
        idx = torch.where(at < span, at, (at + start) % span)
        return passage.gather(1, idx) + K * (at >= span).long() * self.case
class Alt(Cased):
    """fresh spans (lower case) and repeats of the last fresh span from a random start (upper), in turn."""
    def __init__(self, K=16, lo=4, hi=16):
        super().__init__(K); self.lo, self.hi = lo, hi
    def windows(self, n, length, g):
        K = self.K
        c = torch.randint(K, (n, length), generator=g)
        up = torch.zeros(n, length, dtype=torch.bool)
        lens = torch.randint(self.lo, self.hi + 1, (n, length // self.lo + 2), generator=g).tolist()
        us = torch.rand(n, length // self.lo + 2, generator=g).tolist()
        c = c.numpy(); u = up.numpy()
        for r in range(n):
            at, i, fresh, begin, L = 0, 0, True, 0, 0
            while at < length:
                m = lens[r][i]
                if fresh:
                    begin, L = at, min(m, length - at)
                    at += L
                else:
                    s = int(us[r][i] * L)
                    m = min(m, length - at)
                    for j in range(m):
                        c[r, at + j] = c[r, begin + (s + j) % L]
                    u[r, at:at+m] = True
                    at += m
                fresh = not fresh; i += 1
        return torch.from_numpy(c) + K * torch.from_numpy(u).long()
import sys, json, time, torch
torch.set_num_threads(1)
import data, train
from functools import partial
for kind in ("back","back3","ind","first"):
    for p in (10, 25, 50):
        for K in (8, 16):
            data.TASKS[f"{kind}-{K}-{p}"] = partial(Flag, K, p/100, kind)
for K in (8, 12, 16, 24):
    for r in (0, 25, 50, 75):
        data.TASKS[f"cased-{K}-{r}"] = partial(Cased, K, r/100)
    for r in (0, 25, 50, 75):
        data.TASKS[f"phase-{K}-{r}"] = partial(Phase, K, r/100)
        data.TASKS[f"plain-{K}-{r}"] = partial(Phase, K, r/100, case=False)
    for hi in (8, 16, 24):
        data.TASKS[f"alt-{K}-{hi}"] = partial(Alt, K, 4, hi)
        data.TASKS[f"fix-{K}-{hi}"] = partial(Alt, K, hi, hi)
    for hi in (50, 75):
        data.TASKS[f"long-{K}-{hi}"] = partial(Phase, K, 0, 8, hi/100)
    for m in (4, 8, 16):
        data.TASKS[f"gates-{K}-{m}"] = partial(Gates, K, m)
data.NAMES.extend(data.TASKS)
init = train.Evaluation.__init__
def patched(self, corpus, seq_len, bos, device):
    init(self, corpus, seq_len, bos, device)
    if hasattr(corpus.task, "rest"):
        self.windows["links_rest"] = corpus.task.rest(64, seq_len, torch.Generator().manual_seed(7))
train.Evaluation.__init__ = patched
_t = train.train
train.train = lambda run, **k: _t(run, say=lambda t: None, live=lambda t: None, **k)

def go(task, **kw):
    base = dict(size="micro", data=task, steps=2000, evals=8, vocab_size=33)
    base.update(kw)
    name = "-".join([task] + [f"{k}{v}" for k, v in kw.items()])
    run = train.Run(**base, out=f"out/search/{name}")
    t = time.time()
    try:
        r = train.train(run, overwrite=True)
        row = r.log[-1]; L = row.get("links_rest", row["links"])
        curve = " ".join(f"{x.get('links_rest', x['links'])['sink']:.2f}/{x['val_loss']:.2f}" for x in r.log[1:])
        print(f"{name}: val {row['val_loss']:.3f} all {row['links']['sink']:.2f} sink {L['sink']:.2f} rate {L['sink_rate']:.2f} norm {L['norm_ratio']:.1f} dom {L['dominance']:.1f} drain {L['drain']:.2f} gap {L['lock_gap']:.1f} [{time.time()-t:.0f}s] {curve}", flush=True)
    except Exception as e:
        print(name, "ERR", repr(e)[:200], flush=True)
if __name__ == "__main__":
    for line in open(sys.argv[1]):
        if not line.strip() or line[0] == "#": continue
        task, *kv = line.split()
        kw = {}
        for x in kv:
            k, v = x.split("=")
            try: v = int(v)
            except ValueError:
                try: v = float(v)
                except ValueError: pass
            kw[k] = v
        go(task, **kw)


# "memoryless" is data/tasks.py with these two methods in place of its own (START = 1/32, or 1/16 at T = 32):
#
#     def windows(self, n, length, generator):
#         start = torch.rand(n, length, generator=generator) < self.START
#         start[:, 0] = False
#         span = start.long().argmax(1)
#         return self._show(torch.where(span > 0, span, length)[:, None], length, generator)
