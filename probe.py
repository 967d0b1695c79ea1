"""Look at every link between the first token and the attention sink, cut it, forge it.

    python probe.py out/softmax out/headnorm out/sigmoid      the chain table and its figure
    python probe.py out/softmax --cut                         every intervention against every link
    python probe.py --llama FOLDER                            the same for a Llama checkpoint

The chain, as told by Li et al. (ICML 2026, arXiv 2605.06611), "the paper" below:

    1 variance   the first token has nobody to average with, so its aggregated value varies most
    2 W_O        the output projection passes that on
    3 neurons    a few neurons of the next MLP answer to it and write into a few dimensions
    4 disparity  so the first token's state is large, and large in few dimensions
    5 direction  RMSNorm turns such a state into one fixed direction, whatever the token was
    6 lock       the first key is fixed with it, and later heads turn their queries towards it
    7 sink       attention rests on the first token, whose value is nearly nothing

Letters in shapes: N windows, T position, H head, K key/value head, D head width, C model width,
F neuron, L layer, S resample. `k` is the position looked at: 0, the first token, unless told.
Numbers whose definition is ours and not the paper's say so. The file goes from the metrics, link by
link, through the interventions to runs, tables, figures and the command line.
"""

import argparse
import json
import math
import os
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from model import GPT, Config, ModelError, Tap, compose, make_tap, record

TOP = 5  # how many neurons of a layer count as "a few"
EPS = 0.3  # a head whose score is above this has a sink (Gu et al. 2025, arXiv 2410.10781)
TINY = 1e-30  # keeps quotients finite


class ProbeError(ValueError):
    """A run, position, layer or text that cannot be probed. The message is one line for the user."""


def check_position(k, T):
    if not 0 <= k < T - 1:
        raise ProbeError(f"position {k} is out of range: windows have {T} tokens, so use 0 to {T - 2}")


def check_windows(N, T, k):
    if N < 2 or T < 3:
        raise ProbeError(f"the chain needs at least 2 windows of 3 tokens; this is {N} of {T}")
    check_position(k, T)


def others(x, k, dim):
    """x without index k along dim."""
    return torch.cat((x.narrow(dim, 0, k), x.narrow(dim, k + 1, x.shape[dim] - k - 1)), dim)


# ---------------------------------------------------------------- 1 variance

def variance_by_position(x):
    """(N, T, ...) -> (T,): variance over the N windows, averaged over all other dimensions (paper, claim 1).

    Exactly 0 at position 0 when every window begins with the same token, such as <|bos|>, because
    nothing else can be seen from there: use windows with ordinary first tokens.
    """
    x = x.float()
    return (x - x.mean(0)).square().sum(0).flatten(1).mean(1) / (len(x) - 1)


def spread_by_position(x):
    """(N, T, ..., D) -> (N, T): variance over the last dimension, averaged over those between.
    Sees a fixed first token too."""
    x, D = x.float(), x.shape[-1]
    var = (x.square().mean(-1) - x.mean(-1).square()) * D / (D - 1)
    return var.flatten(2).mean(2) if var.dim() > 2 else var


def discrepancy(curve, k=0):
    """(..., T) -> (...): the value at k over the median of the others. 1: position k is like any other."""
    return curve[..., k] / others(curve, k, -1).median(-1).values


def predicted_variance(pattern, rho=0.0):
    """(..., T, T) -> (T,): the variance of `sum_s a_ts v_s` in units of one value's variance,

        rho (sum_s a_ts)^2 + (1 - rho) sum_s a_ts^2,

    for identically distributed values with pairwise correlation rho, averaged over leading dimensions.
    Uniform attention on independent values: 1 / (t + 1). A law of averaging, not of training: it
    holds at initialisation (Chi et al. 2023, arXiv 2305.13571).
    """
    a = pattern.float()
    v = rho * a.sum(-1).square() + (1 - rho) * a.square().sum(-1)
    return v.flatten(0, -2).mean(0) if v.dim() > 1 else v


def value_correlation(v):
    """(N, T, ...) -> rho: mean correlation, over windows, of the values at two positions.

    From the variance of the mean over positions: `Var(mean) = Var(v) (1 + (T - 1) rho) / T`.
    """
    T = v.shape[1]
    var = lambda x: (x - x.mean(0)).square().mean()
    return (T * var(v.float().mean(1)) / var(v.float()) - 1) / (T - 1)


# ---------------------------------------------------------------- 2 W_O

def kendall_tau(a, b):
    """(n,), (n,) -> tau-b in [-1, 1]: agreement of two rankings over all pairs, ties discounted.

    Null: mean 0, standard deviation `sqrt(2 (2n + 5) / (9 n (n - 1)))` for unrelated rankings.
    """
    x, y = ((t[:, None] - t[None, :]).sign().float() for t in (a.float(), b.float()))
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt().clamp_min(1e-12)


def wo_tau(z, weight):
    """z (N, T, H, D), W_O (C, H D) -> Kendall tau between the std of each input dimension and the
    norm of W_O's column for it (paper, claim 3: 0.32 on average in Llama-2-7B)."""
    x = z.float().flatten(2).flatten(0, 1)
    return kendall_tau((x - x.mean(0)).square().mean(0), weight.float().norm(dim=0))


def principal(x, n=1):
    """(..., M, D) -> (..., D, n): the n leading right singular vectors of x, largest first."""
    gram = (x.transpose(-1, -2) @ x).cpu()  # small, and not every GPU has eigh
    return torch.linalg.eigh(gram)[1].flip(-1)[..., :n].to(x.device)


def wo_gain(z, weight, share=1 / 8, most=512):
    """z (N, T, H, D), W_O (C, H D) -> mean squared gain of W_O on the subspace where z varies most
    (`share` of its dimensions) over that on a random one, `||W||^2 / (H D)`. 1: no preference.

    At most `most` tokens are used: for a wide model the subspace is found among them.
    """
    x, w = z.float().flatten(2).flatten(0, 1), weight.float()
    x = x[:: -(-len(x) // most)]
    x = x - x.mean(0)
    n = max(1, int(min(x.shape) * share))
    if len(x) < x.shape[1]:  # the smaller Gram matrix has the same spectrum
        basis = torch.linalg.qr(x.T @ principal(x.T, n))[0]
    else:
        basis = principal(x, n)
    return (w @ basis).square().sum() / n / (w.square().sum() / w.shape[1])


def top_singular(weight, iterations=30):
    """(C, I) -> the largest singular value over the root mean square of all: about 2 for a square
    Gaussian matrix. Power iteration from the longest row, so nothing random is drawn."""
    w = weight.float()
    v = w[w.norm(dim=1).argmax()]
    for _ in range(iterations):
        v = F.normalize(w.T @ (w @ v), dim=0, eps=TINY)
    return (w @ v).norm() / (w.norm() / math.sqrt(min(w.shape)))


# ---------------------------------------------------------------- 3 super neurons

def neuron_scores(gate, up, down, gamma):
    """Weights alone: gate, up (F, C), down (C, F), gain of the norm before them (C,) -> (F,), (F,).

    `|W_down| * ||gamma w_gate|| * ||gamma w_up||`, the largest over dimensions, and which dimension
    that is (screen of arXiv 2603.05498). A neuron whose gate and up point the same way answers with
    the square of its input; these two norms say how steeply.
    """
    size = (gate.float() * gamma.float()).norm(dim=1) * (up.float() * gamma.float()).norm(dim=1)
    largest = down.float().abs().max(0)
    return largest.values * size, largest.indices


def weight_scores(block):
    """`neuron_scores` of the MLP of one layer."""
    mlp, gamma = block.mlp, block.post_attention_layernorm.weight
    return neuron_scores(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, gamma)


def z_scores(x):
    """(n,) -> (x - mean) / std. The largest of n Gaussians is near `sqrt(2 ln n)`."""
    return (x - x.mean()) / x.std()


def neuron_energy(post, down):
    """post (..., F), W_down (C, F) -> (..., F): squared length of what each neuron writes."""
    return post.float().square() * down.float().square().sum(0)


def neuron_share(energy, top=TOP):
    """(..., F) -> (...) in [0, 1]: share of the energy that the `top` strongest carry. All equal: top / F."""
    return energy.topk(top, -1).values.sum(-1) / energy.sum(-1).clamp_min(TINY)


def neuron_overlap(a, b, top=TOP):
    """(..., F), (F,) -> (...) in [0, 1]: how many of the `top` of one list are in that of the other.
    Chance: top / F."""
    best = torch.zeros_like(b, dtype=torch.float).index_fill(0, b.topk(top).indices, 1.0)
    return best[a.topk(top, -1).indices].mean(-1)


# ---------------------------------------------------------------- 4 dimension disparity

def dominance(x):
    """(..., C) -> (...) in [1, C]: DomRatio, `max |x_j| / mean |x_j|` (the paper takes it after RMSNorm)."""
    a = x.float().abs()
    return a.amax(-1) / a.mean(-1).clamp_min(TINY)


def gaussian_dominance(width):
    """What `dominance` is for Gaussian noise: `sqrt(2 ln C) / sqrt(2 / pi)`, 3.9 at C = 128."""
    return math.sqrt(2 * math.log(width)) / math.sqrt(2 / math.pi)


def max_over_median(x):
    """(..., C) -> (...): `max |x| / median |x|` (Sun et al. 2024, arXiv 2402.17762: "massive" above 1,000)."""
    a = x.float().abs()
    return a.amax(-1) / a.median(-1).values.clamp_min(TINY)


def kurtosis(x):
    """(..., C) -> (...): fourth moment over squared second, about 0. Gaussian 3, one dimension alone C."""
    x = x.float()
    return x.pow(4).mean(-1) / x.square().mean(-1).square().clamp_min(TINY)


def energy_dimensions(x, share=0.9):
    """(..., C) -> (...): the least number of dimensions that together hold `share` of the squared length."""
    e = x.float().square().sort(-1, descending=True).values.cumsum(-1)
    return (e < share * e[..., -1:]).sum(-1).float() + 1


def effective_rank(x, most=1024):
    """(..., C), M tokens in all -> `exp(-sum p ln p)`, p the singular values over their sum, in
    [1, min(M, C)] (Roy and Vetterli 2007). Of more than `most` tokens every second, third, ... is used."""
    x = x.reshape(-1, x.shape[-1])
    x = x[:: -(-len(x) // most)].cpu().double()  # not every GPU has fp64
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    p = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return torch.special.entr(p / p.sum().clamp_min(TINY)).sum().exp().float()


# ---------------------------------------------------------------- 5 direction

def direction_cos(x):
    """(N, ..., C) -> (...): mean cosine between two different windows. 1: one direction for every input.

    By `|sum of unit vectors|^2 = N + N (N - 1) mean`, so no pair is formed.
    """
    n = len(x)
    return (F.normalize(x.float(), dim=-1).sum(0).square().sum(-1) - n) / (n * (n - 1))


# ---------------------------------------------------------------- 6 lock

def leading_query(q):
    """(N, T, H, D) -> (H, D): unit direction of the queries of each head, before rotation: the leading
    singular vector, not centred, turned so that the mean query lies on its positive side (paper, claim 7)."""
    q = q.float().flatten(0, 1).transpose(0, 1)  # (H, M, D)
    u = principal(q)[..., 0]
    return u * torch.where((q.mean(1) * u).sum(-1, keepdim=True) < 0, -1.0, 1.0)


def lock_cos(u, key):
    """Leading query (H, D), keys of one position (N, H, D) -> (N, H): their cosine, before rotation."""
    return F.cosine_similarity(u, key.float(), dim=-1)


def lock_positive(scores, k=0):
    """scores (N, H, T, T), after rotation -> (N, H): share of queries t > k with q_t . k_k > 0. Chance: 1/2."""
    return (scores[:, :, k + 1:, k] > 0).float().mean(-1)


def lock_gap(scores, k=0):
    """scores (N, H, T, T), after rotation -> (N, H), in nats: logit of key k above the mean of the other
    keys that query t can see, averaged over t > k. Chance: 0."""
    s = scores[:, :, k + 1:].float()
    seen = torch.arange(k + 2, scores.shape[-1] + 1, device=s.device)  # how many keys each query sees
    rest = (s.tril(k + 1).sum(-1) - s[..., k]) / (seen - 1)
    return (s[..., k] - rest).mean(-1)


def lock_predisposition(wq, wk, gamma, dim, heads):
    """Weights alone (our score): W_Q (H D, C), W_K (K D, C), gain (C,), dimension c -> (H,) in [0, 1].

    |cos| between column c of W_K, the key of a token that is large in c alone, and the leading left
    singular vector of W_Q diag(gamma), where the queries of shapeless input point.
    """
    q = (wq.float() * gamma.float()).view(heads, -1, wq.shape[1])  # (H, D, C)
    key = wk.float()[:, dim].view(-1, q.shape[1])  # (K, D)
    key = key.repeat_interleave(heads // len(key), 0)
    return F.cosine_similarity(principal(q.transpose(1, 2))[..., 0], key, dim=-1).abs()


# ---------------------------------------------------------------- 7 sink

def normalise_rows(pattern):
    """(..., T, T) -> rows that sum to 1: how sigmoid attention is compared with softmax (Gu et al. 2025)."""
    return pattern.float() / pattern.float().sum(-1, keepdim=True).clamp_min(TINY)


def sink_scores(pattern, k=0):
    """(N, H, T, T) -> (N, H): `alpha_k = mean_{t >= k} A_tk` (Gu et al. 2025). The sink rate is the share
    of these above EPS. Null: `uniform_alpha`."""
    return pattern[:, :, k:, k].float().mean(-1)


def uniform_alpha(T, k=0):
    """`sink_scores` of uniform attention: mean of 1 / (t + 1) over t >= k. 0.07 at T = 64, k = 0."""
    return sum(1 / (t + 1) for t in range(k, T)) / (T - k)


def value_drain(v, k=0):
    """(N, T, K, D) -> (N, K): `||v_k|| / mean_t ||v_t||`. Below 0.2 attending to k is nearly a no-op."""
    n = v.float().norm(dim=-1)
    return n[:, k] / n.mean(1).clamp_min(TINY)


# ---------------------------------------------------------------- the whole chain

def resamples(windows, count, seed=0):
    """(1 + count, N) rows of window numbers: all of them, then `count` bootstrap draws."""
    draw = torch.randint(windows, (count, windows), generator=torch.Generator().manual_seed(seed))
    return torch.cat((torch.arange(windows)[None], draw))


@torch.no_grad()
def links(model: GPT, idx, tap=None, mask=None, k=0, targets=None, rows=None):
    """Every number of the chain on idx (N, T) -> {name: (S, L, ...) tensor}, in one forward pass.

    rows (S, N) chooses windows (`resamples`); None: all of them, S = 1. Activations are measured as
    they pass and dropped, so a large model needs no more memory than its own forward pass. Numbers
    of states have L + 1 entries: what each layer reads, and the end. `tap` and `mask` are
    interventions; the numbers are what the model does under them. With targets, also `loss` (S,).
    Raises ProbeError for a position outside the window and for fewer than 2 windows.
    """
    N, T = idx.shape
    check_windows(N, T, k)
    rows = torch.arange(N)[None] if rows is None else rows
    weights = torch.zeros(len(rows), N).scatter_add_(1, rows, torch.full(rows.shape, 1 / N))  # of each window in each resample
    group = model.cfg.num_attention_heads // model.cfg.num_key_value_heads
    out, now = defaultdict(list), {}

    def mean(name, x):  # x (N, ...): one number, or one row of them, for each window
        out[name].append(torch.tensordot(weights, x.float().to(weights.device), 1))

    def pooled(name, f, *xs):  # a number of all windows together
        out[name].append(torch.stack([f(*(x[r] for x in xs)) for r in rows]))

    def constant(name, x):  # the same for every choice of windows
        out[name].append(x.expand(len(rows), *x.shape))

    def state(raw, normed):  # (N, T, C) twice
        norm = raw.float().norm(dim=-1)
        mean("norm_ratio", norm[:, k] / others(norm, k, 1).median(1).values)
        mean("top3", raw[:, k].float().abs().topk(3).values)
        mean("median", raw[:, k].float().abs().median(-1).values)
        dom = dominance(normed)
        mean("dom_first", dom[:, k])
        mean("dom_rest", others(dom, k, 1).mean(1))
        mean("max_median_first", max_over_median(normed[:, k]))
        mean("kurtosis_first", kurtosis(normed[:, k]))
        mean("energy_dims_first", energy_dimensions(normed[:, k]))
        pooled("erank_with", effective_rank, raw)
        pooled("erank_without", effective_rank, others(raw, k, 1))
        pooled("direction", direction_cos, normed[:, k])
        pooled("direction_rest", lambda x: direction_cos(x).mean(), others(normed, k, 1))
        if "normed" in now:
            mean("layer_cos", F.cosine_similarity(normed[:, k].float(), now["normed"].float(), dim=-1))
        now["normed"] = normed[:, k]

    def look(name, x):
        layer, _, what = name.rpartition(".")
        block = model.layers[int(layer)] if layer else None
        if what == "resid_pre":
            state(x, block.input_layernorm(x))
        elif what == "resid_post":
            now["end"] = x
        elif what == "final":
            state(now["end"], x)
        elif what == "q":
            now["q"] = x[:, k + 1:]
        elif what == "k":
            key = x[:, k].repeat_interleave(group, 1)  # (N, H, D)
            pooled("lock_cos", lambda q, key: lock_cos(leading_query(q), key).mean(0), now.pop("q"), key)
        elif what == "v":
            now["v"] = x
            mean("drain", value_drain(x, k).repeat_interleave(group, 1))
        elif what == "scores":
            mean("lock_positive", lock_positive(x, k))
            mean("lock_gap", lock_gap(x, k))
        elif what == "pattern":
            mean("alpha_raw", sink_scores(x, k))
            alpha = sink_scores(normalise_rows(x), k)
            mean("alpha", alpha)
            mean("rate", alpha > EPS)
            v = now.pop("v")
            unit = variance_by_position(v).mean()
            constant("variance_predicted", unit * predicted_variance(x, value_correlation(v)))
        elif what == "z_raw":
            pooled("variance_raw", variance_by_position, x)
        elif what == "z":
            pooled("variance", variance_by_position, x)
            if model.cfg.attn != "headnorm":
                out["variance_raw"].append(out["variance"][-1])
            mean("spread", spread_by_position(x))
            weight = block.self_attn.o_proj.weight
            pooled("wo_tau", lambda z: wo_tau(z, weight), x)
            pooled("wo_gain", lambda z: wo_gain(z, weight), x)
            constant("wo_top", top_singular(weight))
        elif what == "attn_out":
            pooled("variance_out", variance_by_position, x)
            mean("spread_out", spread_by_position(x))
        elif what == "mlp_post":
            energy, score = neuron_energy(x, block.mlp.down_proj.weight), weight_scores(block)[0]
            first, rest = energy[:, k], others(energy, k, 1)
            mean("neuron_share", neuron_share(first))
            mean("neuron_share_rest", neuron_share(rest).mean(1))
            pooled("neuron_overlap", lambda e: neuron_overlap(e.mean(0), score), first)
            few = score.topk(TOP).indices  # strongest by weight: do they answer to k more than to others?
            ratio = lambda a, b: a.mean() / b.mean().clamp_min(TINY)
            pooled("neuron_first_ratio", ratio, first[:, few].sum(-1), rest[..., few].sum(-1).mean(1))
            constant("neuron_z", z_scores(score).max())
        return x

    logits, _ = model(idx, tap=compose(tap, look), mask=mask)
    result = {name: torch.stack(values, 1).float().cpu() for name, values in out.items()}
    if targets is not None:
        loss = F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")  # 0 where -100
        result["loss"] = (loss.sum(1) / (targets != -100).sum(1).clamp_min(1))[rows].mean(1).cpu()
    result["predisposition"] = predisposition(model).expand(len(rows), -1, -1)
    return result


@torch.no_grad()
def predisposition(model: GPT):
    """(L, H): `lock_predisposition` of every head, c being the dimension into which the strongest
    neuron (by weight) of all earlier layers writes. Weights alone. Layer 0 has no earlier neuron: nan."""
    best, dim, heads = -1.0, None, model.cfg.num_attention_heads
    result = [torch.full((heads,), math.nan)]
    for block, reader in zip(model.layers, model.layers[1:]):
        score, dims = weight_scores(block)
        if score.max() > best:
            best, dim = score.max().item(), dims[score.argmax()].item()
        a, gamma = reader.self_attn, reader.input_layernorm.weight
        result.append(lock_predisposition(a.q_proj.weight, a.k_proj.weight, gamma, dim, heads).cpu())
    return torch.stack(result)


def summary(found, k=0):
    """`links` -> {name: (S,)}: one number a link.

    Variance is that of the first layer, where no sink can have shaped it; W_O is the mean over layers;
    neurons, norm and the largest dominance are those of the layer where they are largest; the other
    numbers of states are means over all states after the first layer. Lock and value drain are read
    at the head with the largest alpha after the first layer: what rests on the first token in the
    first layer knows it by its embedding, and needs no chain.
    """
    alpha = found["alpha"]  # (S, L, H)
    deep = min(1, alpha.shape[1] - 1)  # a model of one layer has no later one
    heads = lambda name: found[name][:, deep:].flatten(1)
    later, guess = heads("alpha"), heads("predisposition")[0].nan_to_num()
    at_sink = lambda name: heads(name)[:, later[0].argmax()]
    first_layer = lambda name: discrepancy(found[name][:, 0], k)
    largest = lambda name: found[name].amax(1)
    states = lambda name: found[name][:, 1:].mean(1)
    numbers = {
        "variance_ratio": first_layer("variance"), "variance_ratio_raw": first_layer("variance_raw"),
        "variance_predicted": first_layer("variance_predicted"), "spread_ratio": first_layer("spread"),
        "variance_out_ratio": first_layer("variance_out"), "spread_out_ratio": first_layer("spread_out"),
        "wo_tau": found["wo_tau"].mean(1), "wo_gain": found["wo_gain"].mean(1), "wo_top": largest("wo_top"),
        "neuron_z": largest("neuron_z"), "neuron_share_top5": largest("neuron_share"),
        "neuron_share_rest": largest("neuron_share_rest"), "neuron_overlap": largest("neuron_overlap"),
        "neuron_first_ratio": largest("neuron_first_ratio"),
        "norm_ratio": found["norm_ratio"][:, 1:].amax(1),
        "dom_ratio_first": states("dom_first"), "dom_ratio_rest": states("dom_rest"),
        "dom_ratio_max": found["dom_first"][:, 1:].amax(1),
        "max_over_median_first": found["max_median_first"][:, 1:].amax(1),
        "kurtosis_first": states("kurtosis_first"), "energy_dims_first": states("energy_dims_first"),
        "erank_with": states("erank_with"), "erank_without": states("erank_without"),
        "norm_direction_cos": states("direction"), "norm_direction_cos_rest": states("direction_rest"),
        "norm_layer_cos": found["layer_cos"].mean(1),
        "lock_cos": at_sink("lock_cos"), "lock_positive": at_sink("lock_positive"),
        "lock_gap": at_sink("lock_gap"), "lock_weights_tau": torch.stack([kendall_tau(guess, a) for a in later]),
        "sink_rate": found["rate"].mean((1, 2)), "sink_alpha_max": alpha.flatten(1).amax(1),
        "sink_alpha_later": later.amax(1), "sink_alpha_mean": alpha.mean((1, 2)),
        "sink_best_layer_rate": (alpha > EPS).float().mean(2).amax(1),
        "sink_alpha_raw": found["alpha_raw"].mean((1, 2)), "value_drain": at_sink("drain"),
    }
    return numbers | ({"loss": found["loss"]} if "loss" in found else {})


def chain(model: GPT, idx, tap=None, mask=None, k=0) -> dict[str, float]:
    """One number a link (`summary`) for the windows idx (N, T), by name, in causal order."""
    return {name: v[0].item() for name, v in summary(links(model, idx, tap, mask, k), k).items()}


# ---------------------------------------------------------------- interventions
# Each returns a tap for model.forward, or a mask. Layers are a number or several; `k` is a position.

def edit(cfg: Config, layers, name, change):
    """A tap that applies `change` to `name` of the given layers. ProbeError for a layer that is not there."""
    layers = [layers] if isinstance(layers, int) else list(layers)
    for i in layers:
        if not 0 <= i < cfg.num_hidden_layers:
            raise ProbeError(f"layer {i} does not exist: this model has layers 0 to {cfg.num_hidden_layers - 1}")
    return make_tap(cfg, {f"{i}.{name}": change for i in layers})


def at(k, change):
    """Apply `change` ((N, T, ...) -> what position k becomes) to position k and leave the rest alone."""
    def apply(x):
        check_position(k, x.shape[1])
        x = x.clone()
        x[:, k] = change(x)
        return x
    return apply


def block_aggregation(T, k):
    """Mask (T, T): token k sees only itself, as the first token does (paper, claim 8)."""
    check_position(k, T)
    mask = torch.ones(T, T, dtype=torch.bool)
    mask[k] = torch.arange(T) == k
    return mask


def _amplified(x, k, factor):
    if len(x) < 2:
        raise ProbeError("variance over windows needs at least 2 windows")
    mu = x[:, k].mean(0)
    return mu + factor * (x[:, k] - mu)


def amplify_variance(cfg, layers, k, factor):
    """`z_k <- mu + factor (z_k - mu)`, mu the mean of z_k over the windows at hand (paper, claim 9; our
    reading of mu)."""
    return edit(cfg, layers, "z", at(k, lambda x: _amplified(x, k, factor)))


def scale_norm(cfg, layers, k, factor):
    """`z_k <- factor z_k`: the paper's control for `amplify_variance`."""
    return edit(cfg, layers, "z", at(k, lambda x: factor * x[:, k]))


def scale_norm_matched(cfg, layers, k, factor):
    """z_k scaled, window by window and head by head, to the length that `amplify_variance` would give it
    (our control)."""
    def change(x):
        return F.normalize(x[:, k], dim=-1) * _amplified(x, k, factor).norm(dim=-1, keepdim=True)
    return edit(cfg, layers, "z", at(k, change))


def shift_norm(cfg, layers, k, factor):
    """z_k plus one vector for all windows, along their mean: as long, in root mean square, as
    `amplify_variance` makes it, with its variance untouched. `scale_norm` multiplies both, so it
    separates nothing (our control)."""
    def change(x):
        mu = x[:, k].mean(0)
        m = mu.norm(dim=-1, keepdim=True)
        var = (x[:, k] - mu).square().sum(-1, keepdim=True).mean(0)
        grow = (m.square() + (factor**2 - 1) * var).clamp_min(0).sqrt()  # |mu + shift|
        return x[:, k] + F.normalize(mu, dim=-1) * (grow - m)
    return edit(cfg, layers, "z", at(k, change))


@torch.no_grad()
def same_variance(model: GPT, idx, k) -> dict[str, Tap]:
    """Taps for the windows idx (N, T). One leaves the first layer's z_k as it is; four give it one mean and, head by head, one
    variance over windows: `z_k = mean + d`, d being the deviation that `block_aggregation` gives (the token's own value, unmixed),
    that of another window, that with each head's part from a different window, and the usual one made as wide (our control)."""
    masks = None, block_aggregation(idx.shape[1], k)
    free, own = (record(model, idx, ["0.z"], mask=mask)[1]["0.z"][:, k] for mask in masks)
    mean, d, usual = free.mean(0), own - own.mean(0), free - free.mean(0)
    grow = d.square().mean((0, 2)).div(usual.square().mean((0, 2))).sqrt()[:, None]  # (H, 1)
    apart = torch.stack([d[:, h].roll(h + 1, 0) for h in range(d.shape[1])], 1)
    forms = {"as it is": free, "own value": mean + d, "value of another window": mean + d.roll(1, 0),
             "heads from different windows": mean + apart, "amplified mixture": mean + grow * usual}
    return {name: edit(model.cfg, 0, "z", at(k, lambda _, z=z: z)) for name, z in forms.items()}


def normalise_position(cfg, layers, k=0):
    """z_k of each head scaled to the mean RMS that the other positions have: parity at one position only."""
    def change(x):
        rms = x.square().mean(-1, keepdim=True).sqrt()  # (N, T, H, 1)
        return x[:, k] * others(rms, k, 1).mean(1) / rms[:, k].clamp_min(TINY)
    return edit(cfg, layers, "z", at(k, change))


def ablate_neurons(cfg, layer, ids, to=0.0, k=None):
    """Neurons `ids` of one layer answer `to` (a number, or one for each), at k or (None) everywhere."""
    def change(x):  # (..., F)
        x = x.clone()
        x[..., ids] = torch.as_tensor(to, dtype=x.dtype, device=x.device)
        return x
    return edit(cfg, layer, "mlp_post", change if k is None else at(k, lambda x: change(x[:, k])))


def copy_neurons(cfg, layer, ids, k, source=0):
    """Neurons `ids` answer to token k as they answered to token `source`: forges link 3."""
    def change(x):
        y = x[:, k].clone()
        y[:, ids] = x[:, source, ids]
        return y
    return edit(cfg, layer, "mlp_post", at(k, change))


def clip_dimensions(cfg, layers, dims, limit, k=0):
    """|x_j| of the state that a layer reads is kept below `limit` (a number, or one for each j in `dims`)."""
    def change(x):
        y = x[:, k].clone()
        bound = torch.as_tensor(limit, dtype=x.dtype, device=x.device).expand(len(dims))
        y[:, dims] = torch.minimum(torch.maximum(y[:, dims], -bound), bound)
        return y
    return edit(cfg, layers, "resid_pre", at(k, change))


def spread_dimension(cfg, layers, dim, k=0):
    """Rotate the state of token k so that dimension `dim` is spread over all: a reflection that swaps e_dim
    with (1, .., 1) / sqrt(C). The length stays, the dominance goes."""
    def change(x):
        C = x.shape[-1]
        mirror = torch.full((C,), -1 / math.sqrt(C), dtype=x.dtype, device=x.device)
        mirror[dim] += 1
        mirror = mirror / mirror.norm()
        return x[:, k] - 2 * (x[:, k] @ mirror)[:, None] * mirror
    return edit(cfg, layers, "resid_pre", at(k, change))


def replace_direction(cfg, layers, direction, k=0):
    """The state of token k takes the direction (C,) or (N, C) and keeps its length: so does its normed state."""
    unit = F.normalize(direction.float(), dim=-1)
    return edit(cfg, layers, "resid_pre", at(k, lambda x: x[:, k].norm(dim=-1, keepdim=True) * unit.to(x)))


def random_direction(cfg, layers, k=0, seed=0):
    """`replace_direction` by a random one, the same for all windows: keeps length and fixedness (control)."""
    drawn = torch.randn(cfg.hidden_size, generator=torch.Generator().manual_seed(seed))
    return replace_direction(cfg, layers, drawn, k)


def replace_state(cfg, layers, state, k):
    """Token k takes a whole state (C,), length included: forges links 4 and 5 with that of a first token."""
    return edit(cfg, layers, "resid_pre", at(k, lambda x: state.to(x).expand_as(x[:, k])))


def remove_key_direction(cfg, layer, direction, k=0):
    """The key of token k loses its part along direction (K, D), before rotation: what a locked head looks for."""
    unit = F.normalize(direction.float(), dim=-1)

    def change(x):
        u = unit.to(x)
        return x[:, k] - (x[:, k] * u).sum(-1, keepdim=True) * u
    return edit(cfg, layer, "k", at(k, change))


# ---------------------------------------------------------------- the cut matrix

@torch.no_grad()
def observe(model, idx, k=0, top=TOP):
    """What the cuts need to know of the untouched model, one entry a layer, from one forward pass:

        neurons  (top,) the most energetic at k      scores (F,) by weight      means (F,) mean activations
        dims     (3,) largest |x_k| of what it reads limits (3,) mean |x| of the other tokens there
        state    (C,) mean state of token k          other  (N, C) state of the token in the middle
        query    (K, D) leading direction of the queries that use each key head
    """
    L, T, K = model.cfg.num_hidden_layers, idx.shape[1], model.cfg.num_key_value_heads
    _, kept = record(model, idx, [f"{i}.{name}" for i in range(L) for name in ("resid_pre", "q", "mlp_post")])
    seen = defaultdict(list)
    for i, block in enumerate(model.layers):
        x, q, post = (kept[f"{i}.{name}"] for name in ("resid_pre", "q", "mlp_post"))
        size = x.float().abs()
        dims = size[:, k].mean(0).topk(3).indices
        energy = neuron_energy(post[:, k], block.mlp.down_proj.weight).mean(0)
        q = q[:, k + 1:].unflatten(2, (K, -1)).transpose(2, 3).flatten(1, 2)  # (N, queries of a key head, K, D)
        for name, value in dict(
            neurons=energy.topk(top).indices, scores=weight_scores(block)[0], means=post.mean((0, 1)), dims=dims,
            limits=others(size, k, 1)[..., dims].mean((0, 1)), state=x[:, k].mean(0), other=x[:, T // 2],
            query=leading_query(q),
        ).items():
            seen[name].append(value)
    return seen


def similar_neurons(score, ids):
    """As many other neurons, each the nearest to one of `ids` in weight score (F,): control for an ablation."""
    wanted, score, taken = score[ids].tolist(), score.clone(), []
    score[ids] = math.inf
    for w in wanted:
        taken.append((score - w).abs().argmin().item())
        score[taken[-1]] = math.inf
    return torch.tensor(taken)


def interventions(model, idx, k, factor, layer=0, seed=0):
    """Every cut at the first token and every forgery at k -> list of (link, kind, label, position, tap, mask).

    kind: cut, forge, or control of the cuts or forgeries of its link above it.
    """
    cfg, T, seen = model.cfg, idx.shape[1], observe(model, idx)
    L, mid, g = cfg.num_hidden_layers, T // 2, torch.Generator().manual_seed(seed)
    every, deep = range(L), range(min(1, L - 1), L)  # deep: layers that read what an earlier layer wrote

    def each(layers, build, *args, **more):  # an argument that is a list has one entry a layer
        return compose(*(build(cfg, i, *(a[i] if isinstance(a, list) else a for a in args), **more) for i in layers))

    neurons, dims, limits, state = seen["neurons"], seen["dims"], seen["limits"], seen["state"]
    like = [similar_neurons(score, ids) for score, ids in zip(seen["scores"], neurons)]
    means = [mean[ids] for mean, ids in zip(seen["means"], neurons)]
    largest = [d[0].item() for d in dims]
    anywhere = torch.randperm(cfg.hidden_size, generator=g)[:3]
    other_query = torch.randn(seen["query"][0].shape, generator=g)
    parity = normalise_position(cfg, every, 0)
    quiet = each(every, ablate_neurons, neurons)
    unlocked = each(every, remove_key_direction, seen["query"])
    cuts = [
        ("variance", "cut", "z_0 given the RMS of the others", parity),
        ("variance", "control", f"z_{mid} given the RMS of the others", normalise_position(cfg, every, mid)),
        ("neurons", "cut", f"top {TOP} at token 0, each layer: 0", quiet),
        ("neurons", "cut", "  their mean instead of 0", each(every, ablate_neurons, neurons, means)),
        ("neurons", "cut", "  0 at token 0 only", each(every, ablate_neurons, neurons, k=0)),
        ("neurons", "control", "  others of like weight: 0", each(every, ablate_neurons, like)),
        ("disparity", "cut", "3 largest dimensions of x_0 clipped", each(deep, clip_dimensions, dims, limits)),
        ("disparity", "cut", "  largest turned into all, norm kept", each(deep, spread_dimension, largest)),
        ("disparity", "control", "  3 random dimensions clipped", each(deep, clip_dimensions, anywhere, limits)),
        ("direction", "cut", f"x_0 turned to x_{mid}, norm kept", each(deep, replace_direction, seen["other"])),
        ("direction", "cut", "  to one random direction, norm kept", random_direction(cfg, deep, seed=seed)),
        ("direction", "control", f"  x_{mid} turned at random", random_direction(cfg, deep, mid, seed)),
        ("lock", "cut", "k_0 without the leading query", unlocked),
        ("lock", "control", "  without a random direction", each(every, remove_key_direction, other_query)),
        ("all", "cut", "z_0 parity + neurons + lock together", compose(parity, quiet, unlocked)),
    ]
    block = block_aggregation(T, k)
    forgeries = [
        ("variance", "forge", f"token {k} sees only itself", None, block),
        ("variance", "forge", f"variance of z_{k} x {factor:g}, layer {layer}", amplify_variance(cfg, layer, k, factor)),
        ("variance", "control", f"  norm x {factor:g} (as the paper)", scale_norm(cfg, layer, k, factor)),
        ("variance", "control", "  norm as the amplified one's", scale_norm_matched(cfg, layer, k, factor)),
        ("variance", "control", "  that norm by a constant shift", shift_norm(cfg, layer, k, factor)),
        ("neurons", "forge", f"top {TOP} at token {k} answer as at 0", each(every, copy_neurons, neurons, k)),
        ("direction", "forge", f"x_{k} turned to the mean x_0, norm kept", each(deep, replace_direction, state, k=k)),
        ("direction", "control", "  to one random direction, norm kept", random_direction(cfg, deep, k, seed)),
        ("disparity", "forge", f"x_{k} becomes the mean x_0, layer {deep[0]}",
         replace_state(cfg, deep[0], state[deep[0]], k)),
        ("all", "forge", "sees only itself, z parity in all layers", normalise_position(cfg, every, k), block),
    ]
    return [(link, kind, label, position, tap, mask[0] if mask else None)
            for position, rows in ((0, cuts), (k, forgeries)) for link, kind, label, tap, *mask in rows]


def interval(values):
    """(S,), the first measured, the others bootstrap -> {value, half}: half the width of a 95 % interval,
    None without draws."""
    value, half = values[0].item(), None
    if len(values) > 2:
        half = 1.96 * values[1:].std().item()
        half = half if half > 1e-5 * max(1.0, abs(value)) else 0.0  # rounding is no spread
    return {"value": value, "half": half}


def cut_matrix(model, x, y, k, factor, layer=0, draws=20, seed=0):
    """Every intervention against every link -> list of rows (dicts) with, for each number, before, after, the
    change and half its 95 % interval (the same bootstrap windows before and after)."""
    rows = resamples(len(x), draws)
    numbers = lambda at, tap=None, mask=None: summary(links(model, x, tap, mask, at, y, rows), at)
    before = {at: numbers(at) for at in (0, k)}
    table = []
    for link, kind, label, at, tap, mask in interventions(model, x, k, factor, layer, seed):
        cells = {}
        for name, after in numbers(at, tap, mask).items():
            change = interval(after - before[at][name])
            cells[name] = {"before": before[at][name][0].item(), "after": after[0].item(),
                           "change": change["value"], "half": change["half"]}
        table.append({"link": link, "kind": kind, "label": label, "position": at, "numbers": cells})
    return table


def average(tables):
    """Cut matrices of several runs -> one of means, `half` being the standard deviation between runs."""
    if len(tables) == 1:
        return tables[0]
    result = []
    for same in zip(*tables):
        cells = {}
        for name in same[0]["numbers"]:
            runs = {key: torch.tensor([row["numbers"][name][key] for row in same])
                    for key in ("before", "after", "change")}
            cells[name] = {key: v.mean().item() for key, v in runs.items()} | {"half": runs["change"].std().item()}
        result.append(same[0] | {"numbers": cells})
    return result


CLAIMS = (  # statement, link, kind, and the number that answers
    ("variance of z_0 feeds the sink", "variance", "cut", "sink_alpha_later"),
    ("super neurons make the disparity", "neurons", "cut", "dom_ratio_max"),
    ("super neurons make the sink", "neurons", "cut", "sink_alpha_later"),
    ("disparity makes the lock", "disparity", "cut", "lock_gap"),
    ("disparity makes the sink", "disparity", "cut", "sink_alpha_later"),
    ("the direction of x_0 makes the lock", "direction", "cut", "lock_gap"),
    ("the direction of x_0 makes the sink", "direction", "cut", "sink_alpha_later"),
    ("the locked key makes the sink", "lock", "cut", "sink_alpha_later"),
    ("variance forges a sink at k", "variance", "forge", "sink_alpha_later"),
    ("super neurons forge a sink at k", "neurons", "forge", "sink_alpha_later"),
    ("the state of x_0 forges a sink at k", "disparity", "forge", "sink_alpha_later"),
    ("the direction of x_0 forges a sink at k", "direction", "forge", "sink_alpha_later"),
)
CRITERION = """\
A link holds when its cut takes at least half of what the number has above chance at token 0, the
interval of that change excludes 0, and no control of the same kind does half as much as the cut;
partly, from a quarter on. A forgery holds when it gives token k at least half of what token 0 has,
on the same terms. Of several cuts the strongest counts. Where token 0 itself has no sink after the
first layer (alpha <= 0.3), a lock gap below 0.5 nats or a DomRatio below twice the Gaussian's, there
is nothing to explain: absent."""


def verdict(share, half, control):
    """share: effect over what there is to explain; half: half its interval; control: the largest of a control."""
    if share < 0.25 or (half is not None and share - half <= 0) or control >= share / 2:
        return "no"
    return "holds" if share >= 0.5 else "partly"


def verdicts(table, cfg, T):
    """[(statement, verdict, share of the excess, the control's share, strongest intervention)], by CRITERION."""
    first, null = table[0]["numbers"], chance(cfg, T, 0)
    least = {"sink_alpha_later": EPS, "lock_gap": 0.5, "dom_ratio_max": 2 * null["dom_ratio_max"]}
    result = []
    for statement, link, kind, key in CLAIMS:
        before = first[key]["before"]
        if before <= least[key]:
            result.append((statement, "absent", None, None, f"{COLUMNS[key]} {number(before)}"))
            continue
        unit = (before - null[key]) * (-1 if kind == "cut" else 1)
        here = [row for row in table if row["link"] == link and (row["position"] == 0) == (kind == "cut")]
        share = lambda row: row["numbers"][key]["change"] / unit
        best = max((row for row in here if row["kind"] == kind), key=share)
        control = max((share(row) for row in here if row["kind"] == "control"), default=0.0)
        half = (best["numbers"][key]["half"] or 0) / abs(unit)
        result.append((statement, verdict(share(best), half, control), share(best), control, best["label"].strip()))
    return result


# ---------------------------------------------------------------- runs and windows

@dataclass
class Opened:
    """A model and what its windows are drawn from."""
    model: GPT
    null: GPT | None  # the same, untrained
    settings: dict
    stream: object  # a corpus, token ids (M,), or None for random tokens
    bos: int | None


def load_checkpoint(path) -> dict:
    """The dict that train.py saved: tensors, numbers and strings, nothing that runs code. Raises ProbeError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["model"].items()
    except Exception as error:  # torch has a dozen ways to say that this is no checkpoint
        raise ProbeError(f"{path} is no checkpoint of train.py ({type(error).__name__})") from None
    return saved


def load_run(folder, untrained=False):
    """A folder of train.py -> (model, corpus, settings); untrained: the weights it started from. Raises ProbeError."""
    import data  # only here: the numbers themselves need no corpus
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "holds no run (config.json is missing)" if folder.is_dir() else "is not a folder"
        raise ProbeError(f"{folder} {what}; train one with: python train.py --out {folder}")
    try:
        config = json.loads((folder / "config.json").read_text())
        settings, cfg = config["run"], Config(**config["model"])
        corpus = data.load(settings["data"], seq_len=settings["seq_len"], vocab_size=settings["vocab_size"],
                           encoding=settings["encoding"])
    except data.DataError as error:
        raise ProbeError(f"{folder}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ProbeError(f"{folder}/config.json is not that of a run of train.py ({why})") from None
    same = config.get("corpus", corpus.fingerprint()) == corpus.fingerprint() or cfg.vocab_size == 257  # bytes are bytes
    if not same or corpus.vocab_size != cfg.vocab_size:
        raise ProbeError(f"{folder} was trained on another text: its {cfg.vocab_size} tokens are not those that "
                         f"{settings['data']} has here (another Python has another standard library); train it anew")
    model = GPT(cfg, seed=settings["seed"])
    if not untrained:
        if not (folder / "model.pt").is_file():
            raise ProbeError(f"{folder} has no model.pt: its training never saved; start it anew, or add --untrained")
        try:
            model.load_state_dict(load_checkpoint(folder / "model.pt")["model"])
        except RuntimeError:
            raise ProbeError(f"{folder}/model.pt does not fit the shape in its config.json") from None
    return model.eval(), corpus, settings


def read_log(folder):
    """The evaluations in log.jsonl that have numbers of the chain, [] without such a file."""
    try:
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict) and "links" in row and "step" in row]


def half_time(rows, links, key):
    """rows: evaluations of log.jsonl -> the first step at which a number of `links` ("links_bos", ...) has gone half
    of its way from the first evaluation to the last."""
    values = [row[links][key] for row in rows]
    middle = (values[0] + values[-1]) / 2
    return next(row["step"] for row, v in zip(rows, values) if (v - middle) * (values[-1] - middle) >= 0)


def read_tokens(path, encode):
    """A file of token ids (whole numbers between blanks or commas), or of text for `encode` -> (M,)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"--tokens {path}: cannot be read ({type(error).__name__}); "
                         "give random, text, or a file of ids or text") from None
    words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    if not words:
        raise ProbeError(f"--tokens {path}: the file is empty")
    return torch.tensor([int(w) for w in words] if all(w.isdigit() for w in words) else encode(text))


def draw_windows(N, T, vocab_size, bos, with_bos, seed=0, stream=None):
    """x, y (N, T): windows of uniformly random ordinary tokens, or evenly spaced ones of `stream` (M,).

    with_bos: each begins with the id `bos`, and the tokens follow it. y is the next token.
    """
    if stream is None:
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(vocab_size - (bos is not None), (N, T + 1), generator=g)
        if bos is not None:
            tokens += tokens >= bos  # every id but bos
    else:
        if len(stream) < T + 2:
            raise ProbeError(f"the text has {len(stream)} tokens, too few for windows of {T}")
        low, high = int(stream.min()), int(stream.max())
        if low < 0 or high >= vocab_size:
            raise ProbeError(f"token ids go from {low} to {high}, but this model has 0 to {vocab_size - 1}")
        starts = torch.linspace(0, len(stream) - T - 1, N).long()
        tokens = stream[starts[:, None] + torch.arange(T + 1)]
    if not with_bos:
        return tokens[:, :-1], tokens[:, 1:]
    if bos is None:
        raise ProbeError("this model names no beginning-of-text token; leave --bos out")
    return torch.cat((torch.full((N, 1), bos), tokens[:, : T - 1]), 1), tokens[:, :T]


def open_runs(args) -> dict[str, Opened]:
    """The runs by name, in the order given. Raises ProbeError."""
    opened = {}
    for folder in args.runs:
        model, corpus, settings = load_run(folder, args.untrained)
        name = Path(folder).resolve().name
        if name in opened:
            raise ProbeError(f"two runs are called {name}; give each folder its own name")
        for first in list(opened.values())[:1]:
            for key in ("data", "seq_len", "vocab_size"):
                if first.settings[key] != settings[key]:
                    raise ProbeError(f"{folder} has {key} {settings[key]}, but {args.runs[0]} has "
                                     f"{first.settings[key]}: their windows would differ; probe them one by one")
        null = None if args.untrained else GPT(model.cfg, seed=settings["seed"]).eval()
        stream = {"text": corpus, "random": None}.get(args.tokens, args.tokens)
        stream = read_tokens(stream, corpus.encode) if isinstance(stream, str) else stream
        opened[name] = Opened(model, null, settings, stream, corpus.bos)
    return opened


def open_llama(args) -> dict[str, Opened]:
    """The same for a Llama checkpoint. Its text is the held-out part of our own corpus, in its own tokens."""
    model, folder, stream = GPT.from_llama(args.llama).eval(), Path(args.llama), None
    bos = json.loads((folder / "config.json").read_text()).get("bos_token_id")
    bos = bos if isinstance(bos, int) and 0 <= bos < model.cfg.vocab_size else None

    def encode(text):
        try:
            from tokenizers import Tokenizer
            return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        except ImportError:
            raise ProbeError("text needs the tokenizers package (pip install tokenizers); "
                             "random tokens do not") from None
        except Exception as error:
            raise ProbeError(f"{folder / 'tokenizer.json'} cannot be read ({type(error).__name__}); "
                             "use --tokens random or a file of ids") from None
    if args.tokens == "text":
        import data
        corpus = data.load("stdlib")
        stream = torch.tensor(encode(corpus.decode(corpus.val[corpus.val != corpus.bos][:60000])))
    elif args.tokens != "random":
        stream = read_tokens(args.tokens, encode)
    settings = {"seq_len": 64, "bos": None, "data": folder.name}
    return {folder.resolve().name: Opened(model, None, settings, stream, bos)}


def take_windows(run: Opened, N, T, with_bos, seed):
    """x, y (N, T) from the corpus of a run, from token ids or at random."""
    if hasattr(run.stream, "batch"):
        return run.stream.batch(N, T, torch.Generator().manual_seed(seed), split="val", bos=float(with_bos))
    return draw_windows(N, T, run.model.cfg.vocab_size, run.bos, with_bos, seed, run.stream)


# ---------------------------------------------------------------- tables

TABLE = (  # link, key, what it is
    ("1 variance", "variance_ratio_raw", "V_k / median V_t of z, first layer"),
    ("", "variance_predicted", "  averaging alone would give"),
    ("", "variance_ratio", "  what W_O is given"),
    ("", "spread_ratio", "  the same for spread over dimensions"),
    ("2 W_O", "variance_out_ratio", "V_k / median V_t after W_O"),
    ("", "wo_tau", "Kendall tau: std of z, column of W_O"),
    ("", "wo_gain", "gain on the widest directions / random"),
    ("", "wo_top", "largest singular value / rms, any layer"),
    ("3 neurons", "neuron_z", "largest weight norm, z-score"),
    ("", "neuron_share_top5", "share of the MLP's write by top 5, token k"),
    ("", "neuron_share_rest", "  the other tokens"),
    ("", "neuron_overlap", "overlap: largest weights, most active at k"),
    ("", "neuron_first_ratio", "top weights: energy at k / others"),
    ("4 disparity", "norm_ratio", "norm of token k / median"),
    ("", "dom_ratio_first", "DomRatio of token k, layer mean"),
    ("", "dom_ratio_rest", "  the other tokens"),
    ("", "dom_ratio_max", "  token k, largest of all layers"),
    ("", "energy_dims_first", "dimensions that hold 90 % of token k"),
    ("", "erank_with", "effective rank, layer mean"),
    ("", "erank_without", "  without token k"),
    ("5 direction", "norm_direction_cos", "cos of normed token k between windows"),
    ("", "norm_direction_cos_rest", "  the other tokens"),
    ("", "norm_layer_cos", "cos of normed token k, layer to layer"),
    ("6 lock", "lock_cos", "cos of key k and leading query, later head"),
    ("", "lock_positive", "share of queries with q.k > 0"),
    ("", "lock_gap", "logit of key k above the others, nats"),
    ("", "lock_weights_tau", "Kendall tau: lock by weights alone, alpha"),
    ("7 sink", "sink_alpha_max", "alpha_k of the strongest head"),
    ("", "sink_alpha_later", "  not counting the first layer"),
    ("", "sink_alpha_mean", "  mean of all heads"),
    ("", "sink_rate", "sink rate (alpha_k > 0.3)"),
    ("", "sink_alpha_raw", "raw mass on k, mean of all heads"),
    ("", "value_drain", "||v_k|| / mean ||v_t||, later head"),
    ("", "loss", "loss, nats per token"),
)


def glossary():
    """[(name in chain.json and log.jsonl, what it is)]; a line that goes on with the one above says of what."""
    rows, above = [], ""
    for _, key, text in TABLE:
        above = above if text.startswith(" ") else text
        rows.append((key, f"{above}: {text.strip()}" if text.startswith(" ") else text))
    return rows


SAME = ("variance_ratio", "variance_ratio_raw", "variance_predicted", "variance_out_ratio", "norm_direction_cos")
COLUMNS = {"variance_ratio": "V_k / V", "spread_ratio": "spread", "neuron_share_top5": "top-5 share",
           "norm_ratio": "norm", "dom_ratio_max": "DomRatio", "norm_direction_cos": "cos x_k",
           "lock_gap": "lock gap", "sink_alpha_later": "alpha", "value_drain": "drain", "loss": "loss"}
BIRTH = {"variance_ratio_raw": "1 variance", "neuron_share_top5": "3 neurons", "dom_ratio_max": "4 disparity",
         "norm_ratio": "4 norm", "lock_gap": "6 lock", "sink_alpha_max": "7 sink"}
SIGN = {"cut": "-", "forge": "+", "control": "o"}


def chance(cfg, T, k) -> dict[str, float]:
    """The numbers of Gaussian vectors, unrelated rankings and uniform attention."""
    gauss, width = gaussian_dominance(cfg.hidden_size), float(cfg.hidden_size)
    return {"wo_tau": 0, "wo_gain": 1, "wo_top": 2, "neuron_z": math.sqrt(2 * math.log(cfg.intermediate_size)),
            "neuron_overlap": TOP / cfg.intermediate_size, "neuron_first_ratio": 1, "norm_ratio": 1,
            "dom_ratio_first": gauss, "dom_ratio_rest": gauss, "dom_ratio_max": gauss,
            "erank_with": width, "erank_without": width, "norm_direction_cos": 0, "norm_direction_cos_rest": 0,
            "norm_layer_cos": 0, "lock_cos": 0, "lock_positive": 0.5, "lock_gap": 0, "lock_weights_tau": 0,
            **dict.fromkeys(("sink_alpha_max", "sink_alpha_later", "sink_alpha_mean"), uniform_alpha(T, k)),
            "sink_rate": 0, "value_drain": 1}


def number(x):
    """Three digits; one for what is below 0.001."""
    size = abs(x)
    return "0" if size < 5e-6 else f"{x:.1g}" if size < 1e-3 else f"{x:.3g}" if size < 1000 else f"{x:.0f}"


def with_interval(value, half):  # no interval: it does not depend on which windows were drawn
    return number(value) + (f" ±{number(half if half > 99 else float(f'{half:.1g}'))}" if half else "")


def chain_of(run: Opened, x, y, k, draws):
    """`links` of a model with intervals, and of its null (untrained) without -> JSON-able dict."""
    found = links(run.model, x, k=k, targets=y, rows=resamples(len(x), draws))
    layers = {name: v[0].tolist() for name, v in found.items() if name != "loss" and not v[0].isnan().any()}
    result = {"numbers": {name: interval(v) for name, v in summary(found, k).items()}, "layers": layers}
    if run.null is not None:
        null = links(run.null, x, k=k, targets=y)
        result["untrained"] = {name: v[0].item() for name, v in summary(null, k).items()}
        result["untrained_variance"] = null["variance_raw"][0, 0].tolist()
    return result


def print_chain(title, results, opened, T, k, with_bos):
    """One table: rows in causal order, a column for each run: value, interval, `| untrained`; and chance."""
    width = max(26, *(len(name) + 2 for name in results))
    print(f"\n{title}; token k = {k}. value ±95 % interval | the same model untrained")
    print(f"{'link':12}{'number':44}" + "".join(f"{name:>{width}}" for name in results) + f"{'chance':>10}")
    null = chance(next(iter(opened.values())).model.cfg, T, k)
    for link, key, label in TABLE:
        cells = []
        for r in results.values():
            untrained = f" | {number(r['untrained'][key])}" if "untrained" in r else ""
            cells.append("same token" if with_bos and k == 0 and key in SAME
                         else with_interval(*r["numbers"][key].values()) + untrained)
        by_chance = number(null[key]) if key in null else ""
        print(f"{link:12}{label:44}" + "".join(f"{c:>{width}}" for c in cells) + f"{by_chance:>10}")
    if with_bos and k == 0:
        print("same token: with <|bos|> first in every window, nothing there varies between windows")
    shares = {name: run.settings["bos"] for name, run in opened.items()}
    unseen = [name for name, share in shares.items() if share == (0.0 if with_bos else 1.0)]
    if unseen:
        print(f"foreign windows: training always began {'without' if with_bos else 'with'} <|bos|> "
              f"({', '.join(unseen)}); read these as a null")


def print_cuts(table, spread):
    link = position = None
    for row in table:
        n = row["numbers"]
        if row["position"] != position:
            link, position = None, row["position"]
            print(f"\n{f'numbers of token {position}':42}" + "".join(f"{name:>15}" for name in COLUMNS.values()))
            print(f"{'  untouched':42}" + "".join(f"{number(n[key]['before']):>15}" for key in COLUMNS))
        if row["link"] != link:
            link = row["link"]
            print(link)
        cells = (with_interval(n[key]["after"], n[key]["half"]) for key in COLUMNS)
        print(f"  {SIGN[row['kind']]} {row['label']:38}" + "".join(f"{cell:>15}" for cell in cells))
    print(f"\n- cut   + forged   o control;   ± {spread} of the change, left out where it is 0")


def print_verdicts(decided):
    """decided: run -> `verdicts`. One run: with the shares; several: a column each."""
    percent = lambda share: f"{int(100 * share)}%"  # cut off, not rounded: 49.9 % is no half
    print("\nWhich links hold?\n" + CRITERION)
    for lines in zip(*decided.values()):
        said = [v if share is None else f"{v} {percent(share)}" for _, v, share, _, _ in lines]
        _, _, share, control, label = lines[0]
        why = "" if len(lines) > 1 else f"({label}{'' if share is None else f'; control {percent(control)}'})"
        print(f"  {lines[0][0]:42}" + "".join(f"{v:14}" for v in said) + why)


def print_answers(table, blocks, k, T, bos_share):
    """Open questions 2 (ablation), 3 (a fair norm control) and 6 (mask intervention without <|bos|>)."""
    print("\nWhat do the super neurons carry?")
    shown = ("dom_ratio_max", "lock_gap", "sink_alpha_later", "loss")
    for part in (f"top {TOP} at token 0, each", "their mean", "others of like weight", None, "variance of z",
                 "as the paper", "as the amplified", "constant shift"):
        if part is None:
            print("Is it variance or norm?")
            shown = ("variance_ratio", "norm_ratio", "sink_alpha_later")
            continue
        row = next(row for row in table if part in row["label"])
        cells = ((COLUMNS[key], row["numbers"][key]) for key in shown)
        print(f"  {row['label'].strip():40}"
              + ", ".join(f"{name} {number(n['before'])} -> {number(n['after'])}" for name, n in cells))
    share = "an unknown share" if bos_share is None else f"{bos_share:.0%}"
    print(f"Does blocking token {k} make a sink there, with <bos> in the window and without? "
          f"(trained with <bos> in {share} of the windows; uniform attention {number(uniform_alpha(T, k))})")
    for kind, (before, after) in blocks.items():
        print(f"  {kind:40}alpha {number(before)} -> {number(after)}")


# ---------------------------------------------------------------- figures
# Each draws numbers into a matplotlib axes. Shades, dashes and markers differ, so grey print is enough.

STYLES = [dict(zip(("color", "ls", "marker"), s)) for s in (
    ("black", "-", "o"), ("0.45", "--", "s"), ("0.65", "-.", "^"), ("black", ":", "D"), ("0.3", "-", "v"), ("0.55", "--", "x"))]


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def dress(ax, title, legend=None, **labels):
    """Title, axes and legend; a log axis of few decades gets plain numbers instead of crowded powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    ax.set(**labels)
    ax.set_title(title, fontsize=10)
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        if axis.get_scale() == "log" and high / low < 100:
            axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if legend is not None:
        ax.legend(frameon=False, **{"fontsize": 7, **legend})


def draw_attention(ax, pattern, title):
    """pattern (T, T), mean over windows of one head; dark: much attention. Shades go with the square root."""
    from matplotlib.colors import PowerNorm
    image = ax.imshow(torch.as_tensor(pattern).numpy(), cmap="Greys", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    dress(ax, title, xlabel="key position s", ylabel="query position t")
    return image


def draw_sinks(ax, alphas, title="Sink by layer", k=0):
    """alphas: name -> (L, H): the strongest head of each layer."""
    for style, (name, a) in zip(STYLES, alphas.items()):
        ax.plot(torch.as_tensor(a).amax(1).tolist(), label=name, ms=5, lw=1.2, **style)
    ax.axhline(EPS, color="black", lw=0.8, ls=":")
    ax.xaxis.get_major_locator().set_params(integer=True)
    dress(ax, title, {}, xlabel=f"layer (dotted: sink above {EPS})", ylim=(0, 1),
          ylabel=f"mean attention to token {k}, strongest head")


def draw_variance(ax, curves, title="Variance by position"):
    """curves: name -> (T,). Each is divided by its median, so that the shape can be compared."""
    for style, (name, y) in zip(STYLES, curves.items()):
        y = torch.as_tensor(y)
        ax.plot(range(1, len(y) + 1), (y / y.median()).tolist(), label=name, markevery=[0, 1, 3, 7], ms=4, lw=1.2, **style)
    dress(ax, title, {}, xscale="log", yscale="log", xlabel="position t + 1 (log)",
          ylabel="variance / median over positions (log)")


def draw_neurons(ax, score, activation, rest, title="Neurons of one MLP", k=0):
    """Weight score (F,) against mean |activation| at token k (F,) and at the others (F,)."""
    ax.scatter(score.tolist(), rest.tolist(), s=9, c="0.75", marker="o", label="other tokens")
    ax.scatter(score.tolist(), activation.tolist(), s=12, c="black", marker="x", lw=0.8, label=f"token {k}")
    dress(ax, title, {"loc": "upper left"}, xscale="log", yscale="log", ylabel="mean |activation| (log)",
          xlabel="weight score |W_down| ||W_gate|| ||W_up|| (log)")


def draw_dimensions(ax, profiles, title="Dimension profile"):
    """profiles: name -> (C,) |x_j| from largest to smallest, sorted token by token, then averaged."""
    for style, (name, y) in zip(STYLES, profiles.items()):
        ax.plot(range(1, len(y) + 1), (y / y.mean()).tolist(), label=name, markevery=[0], ms=4, lw=1.2, **style)
    dress(ax, title, {}, xscale="log", xlabel="rank of the dimension (log)", ylabel="|x_j| / mean |x|")


def draw_lock(ax, gap, alpha, title="Key lock by head", k=0):
    """gap, alpha (L, H): a bar for each head, dark where the head has a sink (alpha > EPS)."""
    gap, alpha = torch.as_tensor(gap), torch.as_tensor(alpha)
    L, H = gap.shape
    place = torch.arange(L)[:, None] * (H + 1) + torch.arange(H)
    dark = ["0.2" if a > EPS else "0.8" for a in alpha.flatten().tolist()]
    ax.bar(place.flatten().tolist(), gap.flatten().tolist(), color=dark, edgecolor="black", lw=0.5)
    ax.axhline(0, color="black", lw=0.8)
    shown = range(0, L, -(-L // 12))
    ax.set_xticks([i * (H + 1) + (H - 1) / 2 for i in shown], [str(i) for i in shown])
    dress(ax, title, xlabel=f"layer ({H} heads each; dark: sink)", ylabel=f"logit of key {k} above the others (nats)")


def draw_birth(ax, rows, links="links", title="Birth of the sink"):
    """rows: the evaluations of log.jsonl. Each link as its share of the way from its least to its greatest value.
    Variance always comes from windows with ordinary first tokens: a fixed one has none."""
    rows = [row for row in rows if links in row]
    steps = [max(row["step"], 1) for row in rows]
    for style, (key, label) in zip(STYLES, BIRTH.items()):
        y = torch.tensor([row["links" if key.startswith("variance") else links][key] for row in rows])
        low, high = y.min(), y.max()
        label = f"{label} ({number(low.item())} to {number(high.item())})"
        ax.plot(steps, ((y - low) / (high - low).clamp_min(1e-9)).tolist(), label=label, ms=3.5, lw=1.2, **style)
    legend = dict(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="link (least to greatest)")
    dress(ax, title, legend, xscale="log", xlabel="training step (log; step 0 drawn at 1)", ylim=(-0.03, 1.03),
          ylabel="share of the way from least to greatest")


def draw_cut(ax, table):
    """Heat map: rows interventions, columns links. The number is that after the intervention, the shade
    the size of the change relative to the untouched number (loss: ten times that); <, > its direction."""
    rows, rules = [], []
    for i, row in enumerate(table):
        if i == 0 or row["position"] != table[i - 1]["position"]:
            rules.append(len(rows) - 0.5)
            rows.append((f"untouched, token {row['position']}", row["numbers"], "before"))
        rows.append((f"{SIGN[row['kind']]} {row['label'].strip()}", row["numbers"], "after"))
    shade = torch.zeros(len(rows), len(COLUMNS))
    for i, (_, numbers, when) in enumerate(rows):
        for j, key in enumerate(COLUMNS):
            n = numbers[key]
            size = max(abs(n["before"]), 0.5 if key == "lock_gap" else 0.02) / (10 if key == "loss" else 1)
            shade[i, j] = min(1.0, abs(n["change"]) / size) if when == "after" else 0
            mark = "" if shade[i, j] < 0.1 else " >" if n["change"] > 0 else " <"
            ax.text(j, i, number(n[when]) + mark, ha="center", va="center", fontsize=8,
                    color="white" if shade[i, j] > 0.75 else "black")
    ax.imshow(shade.numpy(), cmap="Greys", vmin=0, vmax=1.25, aspect="auto")
    ax.set_xticks(range(len(COLUMNS)), COLUMNS.values(), fontsize=9)
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8)
    for y in rules:
        ax.axhline(y, color="black", lw=1.5)
    ax.set_xlabel("after the intervention; dark: changed by as much as it was, > up, < down;   - cut   + forged   o control")


def portrait(model, x, layers, k=0):
    """What the figure of one model needs on windows x (N, T); `layers` is that part of `chain_of`."""
    best = torch.tensor(layers["alpha"])
    layer, head = divmod(best.argmax().item(), best.shape[1])
    writer = torch.tensor(layers["neuron_share"]).argmax().item()
    state = torch.tensor(layers["dom_first"])[1:].argmax().item() + 1
    end = state == model.cfg.num_hidden_layers
    names = [f"{layer}.pattern", f"{writer}.mlp_post", "final" if end else f"{state}.resid_pre"]
    _, kept = record(model, x, names)
    pattern, post, normed = (kept[name].detach() for name in names)
    if not end:
        normed = model.layers[state].input_layernorm(normed).detach()
    size = normed.float().abs().sort(-1, descending=True).values
    return {"title": f"layer {layer}, head {head}", "pattern": normalise_rows(pattern[:, head]).mean(0).cpu(),
            "writer": writer, "score": weight_scores(model.layers[writer])[0].detach().cpu(),
            "first": post[:, k].float().abs().mean(0).cpu(), "rest": others(post, k, 1).float().abs().mean((0, 1)).cpu(),
            "reads": "end" if end else f"layer {state} reads",
            "profile": size[:, k].mean(0).cpu(), "profile_rest": others(size, k, 1).mean((0, 1)).cpu()}


def draw_chain(path, portraits, results, spread_of, kind, k=0):
    """chain.png: attention maps of up to three runs; sink by layer, variance by position (`spread_of`: results on
    windows whose first token varies); neurons, dimensions and lock of the first run."""
    plt = pyplot()
    names, first = list(portraits), next(iter(portraits))
    p, layers = portraits[first], results[first]["layers"]
    columns = 3 if len(names) == 1 else 4
    figure, axes = plt.subplots(2, columns, figsize=(4.2 * columns, 8))
    figure.subplots_adjust(left=0.19 / columns, right=1 - 0.05 / columns, bottom=0.07, top=0.92, wspace=0.3, hspace=0.25)
    axes = list(axes.flat)
    for name in names:
        image = draw_attention(axes[0], portraits[name]["pattern"], f"{name}: {portraits[name]['title']}")
        figure.colorbar(image, ax=axes.pop(0), label="attention, rows sum to 1", shrink=0.7)
    draw_sinks(axes.pop(0), {name: results[name]["layers"]["alpha"] for name in names}, k=k)
    curves = {name: spread_of[name]["layers"]["variance_raw"][0] for name in names}
    curves[f"predicted, {first}"] = spread_of[first]["layers"]["variance_predicted"][0]
    if "untrained_variance" in spread_of[first]:
        curves[f"untrained, {first}"] = spread_of[first]["untrained_variance"]
    draw_variance(axes.pop(0), curves, "Variance of z over windows, layer 0")
    draw_neurons(axes.pop(0), p["score"], p["first"], p["rest"], f"{first}: neurons of layer {p['writer']}", k)
    noise = torch.randn(256, len(p["profile"]), generator=torch.Generator().manual_seed(0)).abs()
    noise = noise.sort(descending=True).values.mean(0)
    profiles = {f"token {k}": p["profile"], "other tokens": p["profile_rest"], "Gaussian vector": noise}
    draw_dimensions(axes.pop(0), profiles, f"{first}: normed state, {p['reads']}")
    draw_lock(axes.pop(0), layers["lock_gap"], layers["alpha"], f"{first}: key lock by head", k)
    for ax in axes:
        ax.axis("off")
    figure.suptitle(f"From token {k} to the sink; {kind}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_figure(path, draw, size, *args):
    """One axes, drawn by `draw(ax, *args)`, as a PNG."""
    plt = pyplot()
    figure, ax = plt.subplots(figsize=size)
    draw(ax, *args)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


# ---------------------------------------------------------------- command line

def parser():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="numbers, k being the position looked at:\n" + "\n".join(f"  {key:24} {text}" for key, text in glossary()))
    p.add_argument("runs", nargs="*", help="folders of train.py, such as out/softmax out/headnorm")
    p.add_argument("--llama", metavar="FOLDER", help="a Llama checkpoint in Hugging Face format instead of runs")
    p.add_argument("--cut", action="store_true", help="the cut matrix: every intervention against every link")
    p.add_argument("--untrained", action="store_true", help="the weights that the runs started from")
    p.add_argument("--tokens", help="text (default for runs), random (default for --llama), or a file of ids or text")
    p.add_argument("--bos", action=argparse.BooleanOptionalAction, default=None,
                   help="only windows that begin with <bos>, or only those that do not (default: the table shows "
                        "both; the cut matrix takes what the run was mostly trained with)")
    p.add_argument("--windows", type=int, help="how many windows (default 32; 8 for --llama)")
    p.add_argument("--seq-len", type=int, help="tokens a window (default: the run's; 64 for --llama)")
    p.add_argument("--position", type=int,
                   help="the token looked at (default 0), or with --cut where to forge a sink (default 10)")
    p.add_argument("--layer", type=int, default=0, help="with --cut: the layer whose variance is amplified (default 0)")
    p.add_argument("--factor", type=float, default=5.0, help="with --cut: how much it is amplified (default 5)")
    p.add_argument("--draws", type=int, help="bootstrap draws for the intervals (default 20; 0, none, for --llama)")
    p.add_argument("--seed", type=int, default=0, help="of windows, draws and random controls")
    p.add_argument("--threads", type=int, help="CPU threads (default: 1 below 5 million parameters)")
    p.add_argument("--out", help="folder for JSON and figures (default: that of the first run)")
    return p


def run_command(args):
    if bool(args.runs) == bool(args.llama):
        raise ProbeError("give the folders of one or more runs, or --llama FOLDER" + (", not both" if args.runs else ""))
    if args.llama and args.untrained:
        raise ProbeError("--untrained is for runs: a checkpoint does not say what it started from")
    for name, of_run, of_llama in (("tokens", "text", "random"), ("windows", 32, 8), ("draws", 20, 0),
                                   ("position", 10 if args.cut else 0, 10 if args.cut else 0)):
        if getattr(args, name) is None:
            setattr(args, name, of_llama if args.llama else of_run)
    opened = open_llama(args) if args.llama else open_runs(args)
    first, k = next(iter(opened.values())), args.position
    if args.threads or sum(p.numel() for p in first.model.parameters()) < 5e6:
        torch.set_num_threads(args.threads or 1)
    T = first.settings["seq_len"] if args.seq_len is None else args.seq_len
    check_windows(args.windows, T, k)
    if args.draws < 0:
        raise ProbeError(f"--draws {args.draws}: give 0 draws or more")
    if args.cut and k == 0:
        raise ProbeError("--position 0 with --cut: the first token is the one to cut; forge at another")
    out = Path(args.out or (args.runs[0] if args.runs else "out"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProbeError(f"cannot write to {out} ({error.strerror}); choose another --out") from None
    share = first.settings["bos"]  # of the windows in training; the kind it knows better comes first
    kinds = [True, False] if share is None or share >= 0.5 else [False, True]
    kinds = [bool(args.bos)] if args.bos is not None or first.bos is None else kinds
    source = {"random": "random tokens", "text": first.settings["data"]}.get(args.tokens, args.tokens)
    what = {True: f"{source}, first token <bos>", False: f"{source}, first token ordinary"}
    windows = {kind: take_windows(first, args.windows, T, kind, args.seed) for kind in kinds}
    print(f"{args.windows} windows of {T} tokens, {args.draws} bootstrap draws{', untrained' if args.untrained else ''}")
    saved = {"windows": args.windows, "tokens": T, "position": k, "draws": args.draws}
    (cut_command if args.cut else table_command)(args, opened, windows, what, saved, out)


def table_command(args, opened, windows, what, saved, out):
    k, T = args.position, saved["tokens"]
    with ThreadPoolExecutor(1 if args.llama else min(os.cpu_count() or 1, 4)) as pool:  # small models side by side
        jobs = {kind: {name: pool.submit(chain_of, run, x, y, k, args.draws) for name, run in opened.items()}
                for kind, (x, y) in windows.items()}
        results = {kind: {name: job.result() for name, job in named.items()} for kind, named in jobs.items()}
    for kind, found in results.items():
        print_chain(what[kind], found, opened, T, k, kind)
    chains = {what[kind]: r for kind, r in results.items()}
    (out / "chain.json").write_text(json.dumps(saved | {"chain": chains}, indent=1) + "\n")
    kind, found = next(iter(results.items()))
    portraits = {name: portrait(run.model, windows[kind][0], found[name]["layers"], k)
                 for name, run in list(opened.items())[:3]}
    draw_chain(out / "chain.png", portraits, found, results.get(False, found), what[kind], k)
    print(f"\nwrote {out / 'chain.json'}, {out / 'chain.png'}")
    for folder, name in zip(args.runs, opened):
        rows = read_log(folder)
        if len(rows) > 2:
            path = out / f"birth_{name}.png"
            kind = "links_bos" if "links_bos" in rows[0] else "links"
            save_figure(path, draw_birth, (9.5, 4.5), rows, kind, f"{name}: birth of the sink")
            print(f"wrote {path}")


def cut_command(args, opened, windows, what, saved, out):
    main, (x, y) = next(iter(windows.items()))
    k, T = args.position, saved["tokens"]
    tables = {name: cut_matrix(run.model, x, y, k, args.factor, args.layer, args.draws, args.seed)
              for name, run in opened.items()}
    table, several = average(list(tables.values())), len(tables) > 1
    print(f"{what[main]}; {'mean of ' * several}{', '.join(opened)}")
    print_cuts(table, "standard deviation between runs" if several else "95 % interval")
    decided = {name: verdicts(t, opened[name].model.cfg, T) for name, t in tables.items()}
    print_verdicts(decided)
    alpha = lambda x, mask: sum(chain(run.model, x, mask=mask, k=k)["sink_alpha_later"]
                                for run in opened.values()) / len(opened)
    blocks = {what[kind]: [alpha(x, None), alpha(x, block_aggregation(T, k))] for kind, (x, _) in windows.items()}
    print_answers(table, blocks, k, T, next(iter(opened.values())).settings["bos"])
    saved |= {"kind": what[main], "factor": args.factor, "layer": args.layer, "criterion": CRITERION,
              "blocked": blocks, "verdicts": decided, "runs": tables, "mean": table}
    (out / "cut.json").write_text(json.dumps(saved, indent=1) + "\n")
    save_figure(out / "cut.png", draw_cut, (12, 9), table)
    print(f"\nwrote {out / 'cut.json'}, {out / 'cut.png'}")


def main(argv=None):
    args = parser().parse_args(argv)
    from data import DataError
    try:
        run_command(args)
    except (ProbeError, ModelError, DataError) as error:
        print(f"probe.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
