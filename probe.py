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
Numbers whose definition is ours and not the paper's say so.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from model import GPT, Config, ModelError, compose, make_tap

TOP = 5  # how many neurons of a layer count as "a few"
EPS = 0.3  # a head whose score is above this has a sink (Gu et al. 2025, arXiv 2410.10781)


class ProbeError(ValueError):
    """A run, position, layer or text that cannot be probed. The message is one line for the user."""


def others(x, k, dim):
    """x without index k along dim."""
    return torch.cat((x.narrow(dim, 0, k), x.narrow(dim, k + 1, x.shape[dim] - k - 1)), dim)


# ---------------------------------------------------------------- 1 variance

def variance_by_position(x, weights=None):
    """(N, T, ...) -> (T,): variance over the N windows, averaged over all other dimensions (paper, claim 1).

    With weights (S, N), rows that sum to 1, -> (S, T): the same for S weightings of the windows.
    Exactly 0 at position 0 when every window begins with the same token, such as <bos>, because
    nothing else can be seen from there: use windows with ordinary first tokens.
    """
    N, T = x.shape[:2]
    w = torch.full((1, N), 1 / N) if weights is None else weights
    y = x.float().flatten(1)
    y = y - y.mean(0)
    var = (w.to(y) @ y.square() - (w.to(y) @ y).square()) * N / (N - 1)
    var = var.view(len(w), T, -1).mean(2)
    return var[0] if weights is None else var


def spread_by_position(x):
    """(N, T, ..., D) -> (N, T): variance over the last dimension, averaged over those between. Sees a fixed first token too."""
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
    ratio = var(v.float().mean(1)) / var(v.float())
    return (T * ratio - 1) / (T - 1)


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
    return kendall_tau((x - x.mean(0)).square().mean(0), weight.float().norm(dim=0))  # ranks: variance does as well as std


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
        v = w.T @ (w @ v)
        v = v / v.norm().clamp_min(1e-30)
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


def z_scores(x):
    """(n,) -> (x - mean) / std: how far each stands out. The largest of n Gaussians is near `sqrt(2 ln n)`."""
    return (x - x.mean()) / x.std()


def neuron_energy(post, down):
    """post (..., F), W_down (C, F) -> (..., F): squared length of what each neuron writes."""
    return post.float().square() * down.float().square().sum(0)


def neuron_share(energy, top=TOP):
    """(..., F) -> (...) in [0, 1]: share of the energy that the `top` strongest neurons carry. All equal: top / F."""
    return energy.topk(top, -1).values.sum(-1) / energy.sum(-1).clamp_min(1e-30)


def neuron_overlap(a, b, top=TOP):
    """(..., F), (F,) -> (...) in [0, 1]: how many of the `top` of one list are in that of the other. Chance: top / F."""
    best = torch.zeros_like(b, dtype=torch.float).index_fill(0, b.topk(top).indices, 1.0)
    return best[a.topk(top, -1).indices].mean(-1)


# ---------------------------------------------------------------- 4 dimension disparity

def dominance(x):
    """(..., C) -> (...) in [1, C]: DomRatio, `max |x_j| / mean |x_j|` (the paper takes it after RMSNorm)."""
    a = x.float().abs()
    return a.amax(-1) / a.mean(-1).clamp_min(1e-30)


def gaussian_dominance(width):
    """What `dominance` is for Gaussian noise: `sqrt(2 ln C) / sqrt(2 / pi)`, 3.9 at C = 128."""
    return math.sqrt(2 * math.log(width)) / math.sqrt(2 / math.pi)


def max_over_median(x):
    """(..., C) -> (...): `max |x| / median |x|` (Sun et al. 2024, arXiv 2402.17762: "massive" above 1,000)."""
    a = x.float().abs()
    return a.amax(-1) / a.median(-1).values.clamp_min(1e-30)


def kurtosis(x):
    """(..., C) -> (...): fourth moment over squared second, about 0. Gaussian 3, one dimension alone C."""
    x = x.float()
    return x.pow(4).mean(-1) / x.square().mean(-1).square().clamp_min(1e-30)


def energy_dimensions(x, share=0.9):
    """(..., C) -> (...): the least number of dimensions that together hold `share` of the squared length."""
    e = x.float().square().sort(-1, descending=True).values.cumsum(-1)
    return (e < share * e[..., -1:]).sum(-1).float() + 1


def effective_rank(x, most=1024):
    """(M, C) -> `exp(-sum p ln p)`, p the singular values over their sum, in [1, min(M, C)] (Roy and Vetterli 2007).

    M tokens of several windows together; of more than `most`, every second, third, ... is used.
    """
    x = x[:: -(-len(x) // most)].cpu().double()  # not every GPU has fp64
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    p = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-30)
    return torch.special.entr(p).sum(-1).exp().float()


# ---------------------------------------------------------------- 5 direction

def direction_cos(x, weights=None):
    """(N, ..., C) -> (...): mean cosine between two different windows. 1: one direction for every input.

    By `|sum of unit vectors|^2 = N + N (N - 1) mean`, so no pair is formed. With weights (S, N), rows
    that sum to 1, -> (S, ...), as in `variance_by_position`.
    """
    n = len(x)
    unit = F.normalize(x.float(), dim=-1).flatten(1)
    w = torch.full((1, n), 1 / n) if weights is None else weights
    total = (n * w.to(unit) @ unit).view(len(w), *x.shape[1:]).square().sum(-1)
    cos = (total - n) / (n * (n - 1))
    return cos[0] if weights is None else cos


# ---------------------------------------------------------------- 6 lock

def leading_query(q):
    """(N, T, H, D) -> (H, D): unit direction of the queries of each head, before rotation: the leading
    singular vector, not centred, turned so that the mean query lies on its positive side (paper, claim 7)."""
    q = q.float().flatten(0, 1).transpose(0, 1)  # (H, M, D)
    u = principal(q)[..., 0]
    return u * torch.where((q.mean(1) * u).sum(-1, keepdim=True) < 0, -1.0, 1.0)


def lock_cos(u, key):
    """Leading query direction (H, D), keys of one position (N, H, D) -> (N, H): their cosine, before rotation."""
    return F.cosine_similarity(u, key.float(), dim=-1)


def lock_positive(scores, k=0):
    """scores (N, H, T, T), after rotation -> (N, H): share of queries t > k with q_t . k_k > 0. Chance: 1/2."""
    return (scores[:, :, k + 1:, k] > 0).float().mean(-1)


def lock_gap(scores, k=0):
    """scores (N, H, T, T), after rotation -> (N, H), in nats: logit of key k above the mean of the other
    keys that query t can see, averaged over t > k. Chance: 0."""
    s = scores[:, :, k + 1:].float()
    seen = torch.arange(k + 2, scores.shape[-1] + 1, device=s.device)  # keys that each of these queries sees
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
    return pattern.float() / pattern.float().sum(-1, keepdim=True).clamp_min(1e-30)


def sink_scores(pattern, k=0):
    """(N, H, T, T) -> (N, H): `alpha_k = mean_{t >= k} A_tk` (Gu et al. 2025). Uniform attention at
    k = 0: mean of 1 / (t + 1), 0.07 at T = 64. The sink rate is the share of these above EPS."""
    return pattern[:, :, k:, k].float().mean(-1)


def value_drain(v, k=0):
    """(N, T, K, D) -> (N, K): `||v_k|| / mean_t ||v_t||`. Below 0.2 attending to k is nearly a no-op."""
    n = v.float().norm(dim=-1)
    return n[:, k] / n.mean(1).clamp_min(1e-30)


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
    if N < 2 or T < 3:
        raise ProbeError(f"the chain needs at least 2 windows of 3 tokens; this is {N} of {T}")
    check_position(k, T)
    rows = torch.arange(N)[None] if rows is None else rows
    weights = torch.stack([torch.bincount(r, minlength=N) for r in rows]) / N  # (S, N): the same choice as weights
    group = model.cfg.num_attention_heads // model.cfg.num_key_value_heads
    out, now = defaultdict(list), {}

    def mean(name, x):  # x (N, ...): one number, or one row of them, for each window
        out[name].append(x[rows].float().mean(1))

    def pooled(name, f, x):  # a number of all windows together
        out[name].append(torch.stack([f(x[r]) for r in rows]))

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
        pooled("erank_with", lambda x: effective_rank(x.flatten(0, 1)), raw)
        pooled("erank_without", lambda x: effective_rank(x.flatten(0, 1)), others(raw, k, 1))
        cos = direction_cos(normed, weights)  # (S, T)
        out["direction"].append(cos[:, k])
        out["direction_rest"].append(others(cos, k, 1).mean(1))
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
            now["u"] = [leading_query(x[r, k + 1:]) for r in rows]
        elif what == "k":
            key = x[:, k].repeat_interleave(group, 1)  # (N, H, D)
            out["lock_cos"].append(torch.stack([lock_cos(u, key[r]).mean(0) for u, r in zip(now["u"], rows)]))
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
            predicted = variance_by_position(v).mean() * predicted_variance(x, value_correlation(v))
            out["variance_predicted"].append(predicted.expand(len(rows), T))
        elif what == "z_raw":
            out["variance_raw"].append(variance_by_position(x, weights))
        elif what == "z":
            out["variance"].append(variance_by_position(x, weights))
            if model.cfg.attn != "headnorm":
                out["variance_raw"].append(out["variance"][-1])
            mean("spread", spread_by_position(x))
            weight = block.self_attn.o_proj.weight
            pooled("wo_tau", lambda z: wo_tau(z, weight), x)
            pooled("wo_gain", lambda z: wo_gain(z, weight), x)
            out["wo_top"].append(top_singular(weight).expand(len(rows)))
        elif what == "attn_out":
            out["variance_out"].append(variance_by_position(x, weights))
            mean("spread_out", spread_by_position(x))
        elif what == "mlp_post":
            down = block.mlp.down_proj.weight
            energy = neuron_energy(x, down)
            first, rest = energy[:, k], others(energy, k, 1)
            mean("neuron_share", neuron_share(first))
            mean("neuron_share_rest", neuron_share(rest).mean(1))
            score = neuron_scores(block.mlp.gate_proj.weight, block.mlp.up_proj.weight, down,
                                  block.post_attention_layernorm.weight)[0]
            out["neuron_overlap"].append(neuron_overlap(first[rows].mean(1), score))
            few = score.topk(TOP).indices  # the strongest by weight: do they answer to token k more than to others?
            ratio = first[:, few].sum(-1)[rows].mean(1) / rest[..., few].sum(-1).mean(1)[rows].mean(1).clamp_min(1e-30)
            out["neuron_first_ratio"].append(ratio)
            out["neuron_z"].append(z_scores(score).max().expand(len(rows)))
        return x

    logits, _ = model(idx, tap=compose(tap, look), mask=mask)
    result = {name: torch.stack(values, 1).float().cpu() for name, values in out.items()}
    if targets is not None:
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
        keep = (targets != -100).float()
        result["loss"] = ((loss.view_as(keep) * keep).sum(1) / keep.sum(1).clamp_min(1))[rows].mean(1).cpu()
    result["predisposition"] = predisposition(model).expand(len(rows), -1, -1)
    return result


@torch.no_grad()
def predisposition(model: GPT):
    """(L, H): `lock_predisposition` of every head, c being the dimension into which the strongest
    neuron (by weight) of all earlier layers writes. Weights alone. Layer 0 has no earlier neuron: nan."""
    best, dim = -1.0, None
    result = []
    for block in model.layers:
        a, heads = block.self_attn, model.cfg.num_attention_heads
        if dim is None:
            result.append(torch.full((heads,), math.nan))
        else:
            result.append(lock_predisposition(a.q_proj.weight, a.k_proj.weight, block.input_layernorm.weight, dim, heads).cpu())
        score, dims = neuron_scores(block.mlp.gate_proj.weight, block.mlp.up_proj.weight,
                                    block.mlp.down_proj.weight, block.post_attention_layernorm.weight)
        if score.max() > best:
            best, dim = score.max().item(), dims[score.argmax()].item()
    return torch.stack(result)


def summary(found, k=0):
    """`links` -> {name: (S,)}: one number a link.

    Variance is that of the first layer, where no sink can have shaped it; W_O is the mean over layers;
    neurons, norm and the largest dominance are those of the layer where they are largest; the other
    numbers of states are means over all states after the first layer. Lock and value drain are read
    at the head with the largest alpha after the first layer: what rests on the first token in the
    first layer knows it by its embedding, and needs no chain.
    """
    first = {name: discrepancy(found[name][:, 0], k) for name in
             ("variance", "variance_raw", "variance_predicted", "variance_out", "spread", "spread_out")}
    after = {name: found[name][:, 1:] for name in found if name.startswith(("norm", "dom", "max", "kurt", "energy", "erank", "direction"))}
    alpha = found["alpha"]  # (S, L, H)
    deep = min(1, alpha.shape[1] - 1)  # a model of one layer has no later one
    later = alpha[:, deep:].flatten(1)
    head = later[0].argmax()
    at_head = {name: found[name][:, deep:].flatten(1)[:, head] for name in ("lock_cos", "lock_positive", "lock_gap", "drain")}
    guess = found["predisposition"][0, deep:].flatten().nan_to_num()
    numbers = {
        "variance_ratio": first["variance"], "variance_ratio_raw": first["variance_raw"],
        "variance_predicted": first["variance_predicted"], "spread_ratio": first["spread"],
        "variance_out_ratio": first["variance_out"], "spread_out_ratio": first["spread_out"],
        "wo_tau": found["wo_tau"].mean(1), "wo_gain": found["wo_gain"].mean(1),
        "wo_top": found["wo_top"].amax(1),
        "neuron_z": found["neuron_z"].amax(1), "neuron_share_top5": found["neuron_share"].amax(1),
        "neuron_share_rest": found["neuron_share_rest"].amax(1), "neuron_overlap": found["neuron_overlap"].amax(1),
        "neuron_first_ratio": found["neuron_first_ratio"].amax(1),
        "norm_ratio": after["norm_ratio"].amax(1),
        "dom_ratio_first": after["dom_first"].mean(1), "dom_ratio_rest": after["dom_rest"].mean(1),
        "dom_ratio_max": after["dom_first"].amax(1), "max_over_median_first": after["max_median_first"].amax(1),
        "kurtosis_first": after["kurtosis_first"].mean(1), "energy_dims_first": after["energy_dims_first"].mean(1),
        "erank_with": after["erank_with"].mean(1), "erank_without": after["erank_without"].mean(1),
        "norm_direction_cos": after["direction"].mean(1), "norm_direction_cos_rest": after["direction_rest"].mean(1),
        "norm_layer_cos": found["layer_cos"].mean(1),
        "lock_cos": at_head["lock_cos"], "lock_positive": at_head["lock_positive"], "lock_gap": at_head["lock_gap"],
        "lock_weights_tau": torch.stack([kendall_tau(guess, a) for a in later]),
        "sink_rate": found["rate"].mean((1, 2)), "sink_alpha_max": alpha.flatten(1).amax(1), "sink_alpha_later": later.amax(1),
        "sink_alpha_mean": alpha.mean((1, 2)), "sink_best_layer_rate": (alpha > EPS).float().mean(2).amax(1),
        "sink_alpha_raw": found["alpha_raw"].mean((1, 2)), "value_drain": at_head["drain"],
    }
    return numbers | ({"loss": found["loss"]} if "loss" in found else {})


def chain(model: GPT, idx, tap=None, mask=None, k=0) -> dict[str, float]:
    """One number a link (`summary`) for the windows idx (N, T), by name, in causal order."""
    return {name: v[0].item() for name, v in summary(links(model, idx, tap, mask, k), k).items()}


# ---------------------------------------------------------------- interventions
# Each returns a tap for model.forward, or a mask. Layers are a number or several; `k` is a position.

def check_position(k, T):
    if not 0 <= k < T - 1:
        raise ProbeError(f"position {k} is out of range: windows have {T} tokens, so use 0 to {T - 2}")


def edit(cfg: Config, layers, name, change):
    """A tap that applies `change` to `name` of the given layers (a number or several). ProbeError for a layer that is not there."""
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
    """`z_k <- mu + factor (z_k - mu)`, mu the mean of z_k over the windows at hand (paper, claim 9; our reading of mu)."""
    return edit(cfg, layers, "z", at(k, lambda x: _amplified(x, k, factor)))


def scale_norm(cfg, layers, k, factor):
    """`z_k <- factor z_k`: the paper's control for `amplify_variance`."""
    return edit(cfg, layers, "z", at(k, lambda x: factor * x[:, k]))


def scale_norm_matched(cfg, layers, k, factor):
    """z_k scaled, window by window and head by head, to the length that `amplify_variance` would give it (our control)."""
    def change(x):
        want = _amplified(x, k, factor).norm(dim=-1, keepdim=True)
        return x[:, k] * want / x[:, k].norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return edit(cfg, layers, "z", at(k, change))


def shift_norm(cfg, layers, k, factor):
    """z_k plus one vector for all windows, along their mean: as long, in root mean square, as `amplify_variance`
    makes it, with its variance untouched. `scale_norm` multiplies both, so it separates nothing (our control)."""
    def change(x):
        mu = x[:, k].mean(0)
        m = mu.norm(dim=-1, keepdim=True)
        var = (x[:, k] - mu).square().sum(-1, keepdim=True).mean(0)
        grow = (m.square() + (factor**2 - 1) * var).clamp_min(0).sqrt()  # |mu + shift|
        return x[:, k] + F.normalize(mu, dim=-1) * (grow - m)
    return edit(cfg, layers, "z", at(k, change))


def normalise_position(cfg, layers, k=0):
    """z_k of each head scaled to the mean RMS that the other positions have: parity at one position only."""
    def change(x):
        rms = x.square().mean(-1, keepdim=True).sqrt()  # (N, T, H, 1)
        return x[:, k] * others(rms, k, 1).mean(1) / rms[:, k].clamp_min(1e-30)
    return edit(cfg, layers, "z", at(k, change))


def ablate_neurons(cfg, layer, ids, to=0.0, k=None):
    """Neurons `ids` of one layer answer `to` (a number or one for each, such as their means), at k or everywhere."""
    def change(x):
        if k is not None:
            check_position(k, x.shape[1])
        x = x.clone()
        where = slice(None) if k is None else slice(k, k + 1)
        x[:, where, ids] = torch.as_tensor(to, dtype=x.dtype, device=x.device)
        return x
    return edit(cfg, layer, "mlp_post", change)


def copy_neurons(cfg, layer, ids, k, source=0):
    """Neurons `ids` answer to token k as they answered to token `source`: forges link 3."""
    def change(x):
        check_position(k, x.shape[1])
        x = x.clone()
        x[:, k, ids] = x[:, source, ids]
        return x
    return edit(cfg, layer, "mlp_post", change)


def clip_dimensions(cfg, layers, dims, limit, k=0):
    """|x_j| of the state that a layer reads is kept below `limit` (a number or one for each) for dimensions j in `dims`."""
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
        mirror = -torch.ones(C, dtype=x.dtype, device=x.device) / math.sqrt(C)
        mirror[dim] += 1
        mirror = mirror / mirror.norm()
        return x[:, k] - 2 * (x[:, k] @ mirror)[:, None] * mirror
    return edit(cfg, layers, "resid_pre", at(k, change))


def replace_direction(cfg, layers, direction, k=0):
    """The state of token k takes the direction (C,) and keeps its length. Its normed state is then that direction."""
    unit = F.normalize(direction.float(), dim=-1)
    return edit(cfg, layers, "resid_pre", at(k, lambda x: x[:, k].norm(dim=-1, keepdim=True) * unit.to(x)))


def random_direction(cfg, layers, k=0, seed=0):
    """`replace_direction` by a random one, the same for all windows: the control that keeps length and fixedness."""
    return replace_direction(cfg, layers, torch.randn(cfg.hidden_size, generator=torch.Generator().manual_seed(seed)), k)


def replace_state(cfg, layers, state, k):
    """Token k takes a whole state (C,), length included: forges links 4 and 5 when it is that of a first token."""
    return edit(cfg, layers, "resid_pre", at(k, lambda x: state.to(x).expand_as(x[:, k])))


def remove_key_direction(cfg, layer, direction, k=0):
    """The key of token k loses its part along direction (K, D), before rotation: what a locked head looks for."""
    unit = F.normalize(direction.float(), dim=-1)

    def change(x):
        u = unit.to(x)
        return x[:, k] - (x[:, k] * u).sum(-1, keepdim=True) * u
    return edit(cfg, layer, "k", at(k, change))


# ---------------------------------------------------------------- runs and windows

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
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ProbeError(f"{folder}/config.json is not that of a run of train.py ({type(error).__name__}: {error})") from None
    if corpus.vocab_size != cfg.vocab_size:
        raise ProbeError(f"{folder} was trained on {cfg.vocab_size} tokens, but {settings['data']} has {corpus.vocab_size} "
                         "here: the text is not the same any more")
    model = GPT(cfg, seed=settings["seed"])
    if not untrained:
        if not (folder / "model.pt").is_file():
            raise ProbeError(f"{folder} has no model.pt: its training never saved; start it anew, or add --untrained")
        try:
            model.load_state_dict(load_checkpoint(folder / "model.pt")["model"])
        except RuntimeError:
            raise ProbeError(f"{folder}/model.pt does not fit the shape in its config.json") from None
    return model.eval(), corpus, settings


def read_tokens(path, encode=None):
    """A file of token ids (whole numbers between blanks or commas), or of text, which `encode` turns into ids -> (M,)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"--tokens {path}: cannot be read ({type(error).__name__}); "
                         "give random, text, or a file of ids or text") from None
    words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    if not words:
        raise ProbeError(f"--tokens {path}: the file is empty")
    if all(word.isdigit() for word in words):
        return torch.tensor([int(word) for word in words])
    if encode is None:
        raise ProbeError(f"--tokens {path} is text, and this model came without a tokenizer; give a file of token ids")
    return torch.tensor(encode(text))


def draw_windows(N, T, vocab_size, bos, with_bos, seed=0, stream=None):
    """x, y (N, T): windows of uniformly random ordinary tokens, or evenly spaced ones of `stream` (M,).

    with_bos: each begins with the id `bos`, and the tokens follow it. y is the next token.
    """
    if stream is None:
        tokens = torch.randint(vocab_size - (bos is not None), (N, T + 1), generator=torch.Generator().manual_seed(seed))
        if bos is not None:
            tokens += tokens >= bos  # every id but bos
    else:
        if len(stream) < T + 2:
            raise ProbeError(f"the text has {len(stream)} tokens, too few for windows of {T}")
        if not 0 <= int(stream.min()) <= int(stream.max()) < vocab_size:
            raise ProbeError(f"token ids go from {int(stream.min())} to {int(stream.max())}, but this model has 0 to {vocab_size - 1}")
        starts = torch.linspace(0, len(stream) - T - 1, N).long()
        tokens = stream[starts[:, None] + torch.arange(T + 1)]
    if not with_bos:
        return tokens[:, :-1], tokens[:, 1:]
    if bos is None:
        raise ProbeError("this model names no beginning-of-text token; leave --bos out")
    lead = torch.full((N, 1), bos)
    return torch.cat((lead, tokens[:, : T - 1]), 1), tokens[:, :T]


# ---------------------------------------------------------------- the chain table

def _alpha(cfg, T, k):
    return sum(1 / (t + 1) for t in range(k, T)) / (T - k)


# link, key, what it is, and what it would be by chance: Gaussian vectors, unrelated rankings, uniform attention
TABLE = (
    ("1 variance", "variance_ratio_raw", "V_k / median V_t of z, first layer", None),
    ("", "variance_predicted", "  averaging alone would give", None),
    ("", "variance_ratio", "  what W_O is given", None),
    ("", "spread_ratio", "  the same for spread over dimensions", None),
    ("2 W_O", "variance_out_ratio", "V_k / median V_t after W_O", None),
    ("", "wo_tau", "Kendall tau: std of z, column of W_O", lambda c, T, k: 0.0),
    ("", "wo_gain", "gain on the widest directions / random", lambda c, T, k: 1.0),
    ("", "wo_top", "largest singular value / rms, any layer", lambda c, T, k: 2.0),
    ("3 neurons", "neuron_z", "largest weight norm, z-score", lambda c, T, k: math.sqrt(2 * math.log(c.intermediate_size))),
    ("", "neuron_share_top5", "share of the MLP's write by top 5, token k", None),
    ("", "neuron_share_rest", "  the other tokens", None),
    ("", "neuron_overlap", "overlap: largest weights, most active at k", lambda c, T, k: TOP / c.intermediate_size),
    ("", "neuron_first_ratio", "top weights: energy at k / others", lambda c, T, k: 1.0),
    ("4 disparity", "norm_ratio", "norm of token k / median", lambda c, T, k: 1.0),
    ("", "dom_ratio_first", "DomRatio of token k, layer mean", lambda c, T, k: gaussian_dominance(c.hidden_size)),
    ("", "dom_ratio_rest", "  the other tokens", lambda c, T, k: gaussian_dominance(c.hidden_size)),
    ("", "dom_ratio_max", "  token k, largest of all layers", None),
    ("", "energy_dims_first", "dimensions that hold 90 % of token k", None),
    ("", "erank_with", "effective rank, layer mean", lambda c, T, k: float(c.hidden_size)),
    ("", "erank_without", "  without token k", lambda c, T, k: float(c.hidden_size)),
    ("5 direction", "norm_direction_cos", "cos of normed token k between windows", lambda c, T, k: 0.0),
    ("", "norm_direction_cos_rest", "  the other tokens", lambda c, T, k: 0.0),
    ("", "norm_layer_cos", "cos of normed token k, layer to layer", lambda c, T, k: 0.0),
    ("6 lock", "lock_cos", "cos of key k and leading query, later head", lambda c, T, k: 0.0),
    ("", "lock_positive", "share of queries with q.k > 0", lambda c, T, k: 0.5),
    ("", "lock_gap", "logit of key k above the others, nats", lambda c, T, k: 0.0),
    ("", "lock_weights_tau", "Kendall tau: lock by weights alone, alpha", lambda c, T, k: 0.0),
    ("7 sink", "sink_alpha_max", "alpha_k of the strongest head", _alpha),
    ("", "sink_alpha_later", "  not counting the first layer", _alpha),
    ("", "sink_alpha_mean", "  mean of all heads", _alpha),
    ("", "sink_rate", "sink rate (alpha_k > 0.3)", lambda c, T, k: 0.0),
    ("", "sink_alpha_raw", "raw mass on k, mean of all heads", None),
    ("", "value_drain", "||v_k|| / mean ||v_t||, later head", lambda c, T, k: 1.0),
    ("", "loss", "loss, nats per token", None),
)
FIXED_BY_BOS = ("variance_ratio", "variance_ratio_raw", "variance_out_ratio", "norm_direction_cos")


def interval(values):
    """(S,), the first measured, the others bootstrap -> {value, half}: half the width of a 95 % interval, None without draws."""
    value, half = values[0].item(), None
    if len(values) > 2:
        half = 1.96 * values[1:].std().item()
        half = half if half > 1e-5 * max(1.0, abs(value)) else 0.0  # rounding is no spread
    return {"value": value, "half": half}


def number(x):
    """Three digits; one for what is below 0.001."""
    if x is None or not math.isfinite(x):
        return "-"
    size = abs(x)
    return "0" if size < 5e-6 else f"{x:.1g}" if size < 1e-3 else f"{x:.3g}" if size < 1000 else f"{x:.0f}"


def with_interval(value, half):
    return number(value) + ("" if half is None else f" ±{number(half if half > 99 else float(f'{half:.1g}'))}")


def chain_of(model, x, y, k, draws, null=None):
    """`links` of a model with intervals, and of its null (an untrained model) without -> JSON-able dict."""
    found = links(model, x, k=k, targets=y, rows=resamples(len(x), draws))
    result = {"numbers": {name: interval(v) for name, v in summary(found, k).items()},
              "layers": {name: v[0].tolist() for name, v in found.items() if name != "loss" and not v[0].isnan().any()}}
    if null is not None:
        result["untrained"] = {name: v[0].item() for name, v in summary(links(null, x, k=k, targets=y), k).items()}
    return result


def print_chain(kind, results, models, T, k, bos):
    """One table: rows in causal order, a column for each run, value, interval and `| untrained`, and chance."""
    width = max(26, *(len(name) + 2 for name in results))
    print(f"\n{kind}; token k = {k}. value ±95 % interval | the same model untrained")
    print(f"{'link':12}{'number':44}" + "".join(f"{name:>{width}}" for name in results) + f"{'chance':>10}")
    cfg = next(iter(models.values())).cfg
    for link, key, label, chance in TABLE:
        if bos and k == 0 and key in FIXED_BY_BOS:
            cells, label = ["" for _ in results], label + " (fixed token: none)"
        else:
            cells = []
            for r in results.values():
                v = r["numbers"][key]
                cells.append(with_interval(v["value"], v["half"])
                             + (f" | {number(r['untrained'][key])}" if "untrained" in r else ""))
        print(f"{link:12}{label:44}" + "".join(f"{c:>{width}}" for c in cells)
              + (f"{number(chance(cfg, T, k)):>10}" if chance else ""))


# ---------------------------------------------------------------- the cut matrix

@torch.no_grad()
def observe(model, idx, k=0, top=TOP):
    """What the cuts need to know of the untouched model, one entry a layer, from one forward pass:

        neurons  (top,) the most energetic at k      scores (F,) by weight      means (F,) mean activations
        dims     (3,) largest |x_k| of what it reads limits (3,) mean |x| of the other tokens there
        state    (C,) mean state of token k          other  (N, C) state of the token in the middle
        query    (K, D) leading direction of the queries that use each key head
    """
    seen, K = defaultdict(list), model.cfg.num_key_value_heads

    def look(name, x):
        layer, _, what = name.rpartition(".")
        if what == "resid_pre":
            size = x.float().abs()
            dims = size[:, k].mean(0).topk(min(3, x.shape[-1])).indices
            seen["dims"].append(dims)
            seen["limits"].append(others(size, k, 1)[..., dims].mean((0, 1)))
            seen["state"].append(x[:, k].mean(0))
            seen["other"].append(x[:, x.shape[1] // 2].clone())
        elif what == "q":
            N, T, H, D = x.shape
            q = x[:, k + 1:].reshape(N, T - k - 1, K, H // K, D).transpose(2, 3).flatten(1, 2)
            seen["query"].append(leading_query(q))
        elif what == "mlp_post":
            mlp, norm = model.layers[int(layer)].mlp, model.layers[int(layer)].post_attention_layernorm
            seen["neurons"].append(neuron_energy(x[:, k], mlp.down_proj.weight).mean(0).topk(top).indices)
            seen["means"].append(x.mean((0, 1)))
            seen["scores"].append(neuron_scores(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, norm.weight)[0])
        return x

    model(idx, tap=look)
    return seen


def similar_neurons(score, ids):
    """As many other neurons, each the nearest to one of `ids` in weight score (F,): the control for an ablation."""
    wanted, score, taken = score[ids].tolist(), score.clone(), []
    score[ids] = math.inf
    for w in wanted:
        taken.append((score - w).abs().argmin().item())
        score[taken[-1]] = math.inf
    return torch.tensor(taken)


def interventions(model, idx, k, factor, layer=0, seed=0):
    """Every cut at the first token and every forgery at token k -> list of (link, kind, label, position, tap, mask).

    kind: cut, forge, or control of the cuts or forgeries of its link above it.
    """
    cfg, T, seen = model.cfg, idx.shape[1], observe(model, idx)
    L, mid, g = cfg.num_hidden_layers, T // 2, torch.Generator().manual_seed(seed)
    neurons, dims, limits = seen["neurons"], seen["dims"], seen["limits"]
    every, deep = range(L), range(min(1, L - 1), L)  # deep: layers that read what an earlier layer wrote

    def each(layers, build, *args, **more):
        return compose(*(build(cfg, i, *(a[i] if isinstance(a, list) else a for a in args), **more) for i in layers))

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
        ("direction", "cut", "  to one random direction, norm kept", each(deep, random_direction, seed=seed)),
        ("direction", "control", f"  x_{mid} turned at random", each(deep, random_direction, k=mid, seed=seed)),
        ("lock", "cut", "k_0 without the leading query", unlocked),
        ("lock", "control", "  without a random direction", each(every, remove_key_direction, other_query)),
        ("all", "cut", "z_0 parity + neurons + lock together", compose(parity, quiet, unlocked)),
    ]
    block, state = block_aggregation(T, k), seen["state"]
    forgeries = [
        ("variance", "forge", f"token {k} sees only itself", None, block),
        ("variance", "forge", f"variance of z_{k} x {factor:g}, layer {layer}", amplify_variance(cfg, layer, k, factor)),
        ("variance", "control", f"  norm x {factor:g} (as the paper)", scale_norm(cfg, layer, k, factor)),
        ("variance", "control", "  norm as the amplified one's", scale_norm_matched(cfg, layer, k, factor)),
        ("variance", "control", "  that norm by a constant shift", shift_norm(cfg, layer, k, factor)),
        ("neurons", "forge", f"top {TOP} at token {k} answer as at 0", each(every, copy_neurons, neurons, k)),
        ("direction", "forge", f"x_{k} turned to the mean x_0, norm kept", each(deep, replace_direction, state, k=k)),
        ("direction", "control", "  to one random direction, norm kept", each(deep, random_direction, k=k, seed=seed)),
        ("disparity", "forge", f"x_{k} becomes the mean x_0, layer {deep[0]}", replace_state(cfg, deep[0], state[deep[0]], k)),
        ("all", "forge", "sees only itself, z parity in all layers", normalise_position(cfg, every, k), block),
    ]
    return [(*row[:3], position, row[3], row[4] if len(row) > 4 else None)
            for position, rows in ((0, cuts), (k, forgeries)) for row in rows]


COLUMNS = {"variance_ratio_raw": "V_k / V", "neuron_share_top5": "top-5 share", "norm_ratio": "norm", "dom_ratio_max": "DomRatio",
           "norm_direction_cos": "cos x_k", "lock_gap": "lock gap", "sink_alpha_max": "alpha", "sink_alpha_later": "alpha later",
           "value_drain": "drain", "loss": "loss"}
SIGN = {"cut": "-", "forge": "+", "control": "o"}


def cut_matrix(model, x, y, k, factor, layer=0, draws=20, seed=0):
    """Every intervention against every link -> list of rows (dicts) with, for each number, before, after, the
    change and half its 95 % interval (the same bootstrap windows before and after)."""
    rows = resamples(len(x), draws)
    numbers = lambda at, tap=None, mask=None: summary(links(model, x, tap, mask, at, y, rows), at)
    before = {at: numbers(at) for at in (0, k)}
    table = []
    for link, kind, label, at, tap, mask in interventions(model, x, k, factor, layer, seed):
        after = numbers(at, tap, mask)
        cells = {}
        for name in before[at]:
            change = interval(after[name] - before[at][name])
            cells[name] = {"before": before[at][name][0].item(), "after": after[name][0].item(),
                           "change": change["value"], "half": change["half"]}
        table.append({"link": link, "kind": kind, "label": label, "position": at, "numbers": cells})
    return table


def average(tables):
    """Cut matrices of several runs -> one of means, `half` being the standard deviation of the change between runs."""
    if len(tables) == 1:
        return tables[0]
    result = []
    for same in zip(*tables):
        cells = {}
        for name in same[0]["numbers"]:
            all_ = {key: torch.tensor([row["numbers"][name][key] for row in same]) for key in ("before", "after", "change")}
            cells[name] = {key: v.mean().item() for key, v in all_.items()} | {"half": all_["change"].std().item()}
        result.append(same[0] | {"numbers": cells})
    return result


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
        print(f"  {SIGN[row['kind']]} {row['label']:38}" + "".join(f"{with_interval(n[key]['after'], n[key]['half']):>15}" for key in COLUMNS))
    print(f"\n- cut   + forged   o control;   ± {spread} of the change")


# statement, link, kind, and the number that answers
CLAIMS = (
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
CRITERION = """A link holds when its cut takes at least half of what the number has above chance at token 0, the interval of
that change excludes 0, and no control of the same kind does half as much as the cut; partly, from a quarter on.
A forgery holds when it gives token k at least half of what token 0 has, on the same terms. Of several cuts the
strongest counts. Where token 0 itself has no sink after the first layer (alpha <= 0.3), a lock gap below 0.5 nats or a DomRatio below
twice the Gaussian's, there is nothing to explain: absent."""


def verdict(share, half, control):
    """share: effect over what there is to explain; half: half its interval in the same unit; control: the largest share of a control."""
    if share < 0.25 or (half is not None and share - half <= 0) or control >= share / 2:
        return "no"
    return "holds" if share >= 0.5 else "partly"


def verdicts(table, cfg, T):
    """[(statement, verdict, share of the excess, the control's share, label of the strongest intervention)], by CRITERION."""
    first = table[0]["numbers"]
    chance = {"sink_alpha_later": _alpha(cfg, T, 0), "lock_gap": 0.0, "dom_ratio_max": gaussian_dominance(cfg.hidden_size)}
    least = {"sink_alpha_later": EPS, "lock_gap": 0.5, "dom_ratio_max": 2 * chance["dom_ratio_max"]}
    result = []
    for statement, link, kind, key in CLAIMS:
        excess = first[key]["before"] - chance[key]
        if first[key]["before"] <= least[key]:
            result.append((statement, "absent", None, None, f"{key} {number(first[key]['before'])}"))
            continue
        here = [row for row in table if row["link"] == link and (row["position"] == 0) == (kind == "cut")]
        sign = -1 if kind == "cut" else 1
        shares = [(sign * row["numbers"][key]["change"] / excess, (row["numbers"][key]["half"] or 0) / excess, row) for row in here]
        share, half, row = max((s for s in shares if s[2]["kind"] == kind), key=lambda s: s[0])
        control = max((s[0] for s in shares if s[2]["kind"] == "control"), default=0.0)
        result.append((statement, verdict(share, half, control), share, control, row["label"].strip()))
    return result


def print_answers(table, blocks, k, trained_with_bos):
    """Open questions 2 (ablation), 3 (a fair norm control) and 6 (mask intervention without <bos>), in numbers."""
    def change(row, *keys):
        return ", ".join(f"{COLUMNS[key]} {number(row['numbers'][key]['before'])} -> {number(row['numbers'][key]['after'])}" for key in keys)
    named = lambda text: next(row for row in table if text in row["label"])
    keys = ("dom_ratio_max", "lock_gap", "sink_alpha_later", "loss")
    print("\nWhat do the super neurons carry?")
    for label in (f"top {TOP} at token 0, each layer", "their mean", "others of like weight"):
        print(f"  {named(label)['label'].strip():40}{change(named(label), *keys)}")
    print("Is it variance or norm?")
    for label in ("variance of z", "as the paper", "as the amplified", "constant shift"):
        print(f"  {named(label)['label'].strip():40}{change(named(label), 'variance_ratio_raw', 'norm_ratio', 'sink_alpha_max')}")
    print(f"Does blocking token {k} make a sink there, with <bos> in the window and without? "
          f"(trained with <bos> in {trained_with_bos} of the windows)")
    for kind, (before, after) in blocks.items():
        print(f"  {kind:40}alpha max {number(before)} -> {number(after)}")


# ---------------------------------------------------------------- figures
# Each draws numbers into a matplotlib axes. Shades, dashes and markers differ, so grey print is enough.

STYLES = (dict(color="black", ls="-", marker="o"), dict(color="0.45", ls="--", marker="s"), dict(color="0.65", ls="-.", marker="^"),
          dict(color="black", ls=":", marker="D"), dict(color="0.3", ls="-", marker="v"), dict(color="0.55", ls="--", marker="x"))


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plain_ticks(axis, least, greatest):
    """A log axis of less than 1.5 decades: a few plain numbers instead of crowded powers of ten."""
    if greatest / max(least, 1e-30) > 30:
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    axis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def draw_attention(ax, pattern, title):
    """pattern (T, T), mean over windows of one head; dark: much attention. Shades go with the square root."""
    from matplotlib.colors import PowerNorm
    image = ax.imshow(torch.as_tensor(pattern).numpy(), cmap="Greys", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    ax.set(xlabel="key position s", ylabel="query position t")
    ax.set_title(title, fontsize=10)
    return image


def draw_variance(ax, curves, title="Variance by position"):
    """curves: name -> (T,). Each is divided by its median, so that the shape can be compared."""
    for style, (name, y) in zip(STYLES, curves.items()):
        y = torch.as_tensor(y)
        ax.plot(range(1, len(y) + 1), (y / y.median()).tolist(), label=name, markevery=[0, 1, 3, 7], ms=4, lw=1.2,
                **(style | (dict(marker="") if name.startswith("predict") else {})))
    ax.set(xscale="log", yscale="log", xlabel="position t + 1 (log)", ylabel="variance / median over positions (log)")
    plain_ticks(ax.yaxis, *ax.get_ylim())
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=7, frameon=False)


def draw_neurons(ax, score, activation, rest, title="Neurons of one MLP", k=0):
    """Weight score (F,) against mean |activation| at token k (F,) and at the others (F,)."""
    score, activation, rest = (torch.as_tensor(y).tolist() for y in (score, activation, rest))
    ax.scatter(score, rest, s=9, c="0.75", marker="o", label="other tokens")
    ax.scatter(score, activation, s=12, c="black", marker="x", lw=0.8, label=f"token {k}")
    ax.set(xscale="log", yscale="log", xlabel="weight score |W_down| ||W_gate|| ||W_up|| (log)", ylabel="mean |activation| (log)")
    plain_ticks(ax.xaxis, min(score), max(score))
    plain_ticks(ax.yaxis, *ax.get_ylim())
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=7, frameon=False, loc="upper left")


def draw_dimensions(ax, profiles, title="Dimension profile"):
    """profiles: name -> (C,) |x_j| from largest to smallest, sorted token by token, then averaged; drawn over its mean."""
    for style, (name, y) in zip(STYLES, profiles.items()):
        ax.plot(range(1, len(y) + 1), (y / y.mean()).tolist(), label=name, markevery=[0], ms=4, lw=1.2, **style)
    ax.set(xscale="log", xlabel="rank of the dimension (log)", ylabel="|x_j| / mean |x|")
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=7, frameon=False)


def draw_lock(ax, gap, alpha, title="Key lock by head", k=0):
    """gap, alpha (L, H): a bar for each head, dark where the head has a sink (alpha > EPS)."""
    gap, alpha = torch.as_tensor(gap), torch.as_tensor(alpha)
    L, H = gap.shape
    place = torch.arange(L)[:, None] * (H + 1) + torch.arange(H)
    dark = [("0.2" if a > EPS else "0.8") for a in alpha.flatten().tolist()]
    ax.bar(place.flatten().tolist(), gap.flatten().tolist(), color=dark, edgecolor="black", lw=0.5)
    ax.axhline(0, color="black", lw=0.8)
    step = -(-L // 12)
    ax.set_xticks([i * (H + 1) + (H - 1) / 2 for i in range(0, L, step)], [str(i) for i in range(0, L, step)])
    ax.set(xlabel=f"layer ({H} heads each; dark: sink)", ylabel=f"logit of key {k} above the others (nats)")
    ax.set_title(title, fontsize=10)


def draw_cut(ax, table):
    """Heat map: rows interventions, columns links. The number is that after the intervention, the shade
    the size of the change relative to the untouched number (loss: ten times that); <, > its direction."""
    keys, labels, rules = list(COLUMNS), [], []
    for i, row in enumerate(table):
        if i == 0 or row["position"] != table[i - 1]["position"]:
            rules.append(len(labels) - 0.5)
            labels.append((f"untouched, token {row['position']}", row, "before"))
        labels.append((f"{SIGN[row['kind']]} {row['label'].strip()}", row, "after"))
    shade = torch.zeros(len(labels), len(keys))
    for i, (_, row, when) in enumerate(labels):
        for j, key in enumerate(keys):
            n = row["numbers"][key]
            if when == "after":
                size = max(abs(n["before"]), 0.5 if key == "lock_gap" else 0.02) / (10 if key == "loss" else 1)
                shade[i, j] = min(1.0, abs(n["change"]) / size)
            mark = "" if shade[i, j] < 0.1 else " >" if n["change"] > 0 else " <"
            ax.text(j, i, number(n[when]) + mark, ha="center", va="center", fontsize=8,
                    color="white" if shade[i, j] > 0.75 else "black")
    ax.imshow(shade.numpy(), cmap="Greys", vmin=0, vmax=1.25, aspect="auto")
    ax.set_xticks(range(len(keys)), [COLUMNS[key] for key in keys], fontsize=9)
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(labels)), [label for label, *_ in labels], fontsize=8)
    for y in rules:
        ax.axhline(y, color="black", lw=1.5)
    ax.set_xlabel("after the intervention; dark: changed by as much as it was, > up, < down;   - cut   + forged   o control")


BIRTH = {"variance_ratio_raw": "1 variance", "neuron_share_top5": "3 neurons", "dom_ratio_max": "4 disparity", "norm_ratio": "4 norm",
         "lock_gap": "6 lock", "sink_alpha_max": "7 sink"}


def read_log(folder):
    """The evaluations in log.jsonl that have numbers of the chain, [] without such a file."""
    try:
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict) and "links" in row and "step" in row]


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
    ax.set(xscale="log", xlabel="training step (log; step 0 drawn at 1)", ylim=(-0.03, 1.03),
           ylabel="share of the way from least to greatest")
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="link (least to greatest)")


@torch.no_grad()
def portrait(model, x, layers, k=0):
    """What the figure of one model needs on windows x (N, T); `layers` is that part of `chain_of`."""
    alpha = torch.tensor(layers["alpha"])
    layer, head = divmod(alpha.flatten().argmax().item(), alpha.shape[1])
    writer = torch.tensor(layers["neuron_share"]).argmax().item()
    state = torch.tensor(layers["dom_first"])[1:].argmax().item() + 1
    last = state == model.cfg.num_hidden_layers
    seen = {"head": (layer, head), "writer": writer, "state": state}

    def look(name, a):
        if name == f"{layer}.pattern":
            seen["pattern"] = normalise_rows(a[:, head]).mean(0).cpu()
        elif name == f"{writer}.mlp_post":
            size = a.float().abs()
            seen["first"], seen["rest"] = size[:, k].mean(0).cpu(), others(size, k, 1).mean((0, 1)).cpu()
        elif name == ("final" if last else f"{state}.resid_pre"):
            size = (a if last else model.layers[state].input_layernorm(a)).float().abs()
            sort = lambda y: y.sort(-1, descending=True).values.flatten(0, -2).mean(0).cpu()
            seen["profile"], seen["profile_rest"] = sort(size[:, k]), sort(others(size, k, 1))
        return a

    model(x, tap=look)
    mlp, norm = model.layers[writer].mlp, model.layers[writer].post_attention_layernorm
    score = neuron_scores(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, norm.weight)[0]
    return seen | {"score": score.cpu()}


def draw_sinks(ax, alphas, title="Sink by layer", k=0):
    """alphas: name -> (L, H): the strongest head of each layer."""
    for style, (name, a) in zip(STYLES, alphas.items()):
        ax.plot(torch.as_tensor(a).amax(1).tolist(), label=name, ms=5, lw=1.2, **style)
    ax.axhline(EPS, color="black", lw=0.8, ls=":")
    ax.set(xlabel=f"layer (dotted: sink above {EPS})", ylabel=f"mean attention to token {k}, strongest head", ylim=(0, 1))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=7, frameon=False)


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
        layer, head = portraits[name]["head"]
        image = draw_attention(axes[0], portraits[name]["pattern"], f"{name}: layer {layer}, head {head}")
        figure.colorbar(image, ax=axes.pop(0), label="attention, rows sum to 1", shrink=0.7)
    draw_sinks(axes.pop(0), {name: results[name]["layers"]["alpha"] for name in names}, k=k)
    curves = {name: spread_of[name]["layers"]["variance_raw"][0] for name in names}
    curves[f"predicted, {first}"] = spread_of[first]["layers"]["variance_predicted"][0]
    draw_variance(axes.pop(0), curves, "Variance of z over windows, layer 0")
    draw_neurons(axes.pop(0), p["score"], p["first"], p["rest"], f"{first}: neurons of layer {p['writer']}", k)
    noise = torch.randn(256, len(p["profile"]), generator=torch.Generator().manual_seed(0)).abs().sort(descending=True).values.mean(0)
    where = "end" if p["state"] == len(layers["alpha"]) else f"layer {p['state']} reads"
    profiles = {f"token {k}": p["profile"], "other tokens": p["profile_rest"], "Gaussian vector": noise}
    draw_dimensions(axes.pop(0), profiles, f"{first}: normed state, {where}")
    draw_lock(axes.pop(0), layers["lock_gap"], layers["alpha"], f"{first}: key lock by head", k)
    for ax in axes:
        ax.axis("off")
    figure.suptitle(f"From token {k} to the sink; {kind}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_figure(path, draw, size, *args):
    """One axes, drawn by `draw(ax, *args)`, as a PNG."""
    plt = pyplot()
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    draw(ax, *args)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- command line

def parser():
    p = argparse.ArgumentParser(description="Measure every link between the first token and the attention sink, cut it, forge it.")
    p.add_argument("runs", nargs="*", help="folders of train.py, such as out/softmax out/headnorm")
    p.add_argument("--llama", metavar="FOLDER", help="a Llama checkpoint in Hugging Face format instead of runs")
    p.add_argument("--cut", action="store_true", help="the cut matrix: every intervention against every link")
    p.add_argument("--untrained", action="store_true", help="the weights that the runs started from")
    p.add_argument("--tokens", default=None,
                   help="text (default for runs), random (default for --llama), or a file of token ids or of text")
    p.add_argument("--bos", action=argparse.BooleanOptionalAction, default=None,
                   help="only windows that begin with <bos>, or only those that do not (default: the table shows both; "
                        "the cut matrix takes what the run was mostly trained with)")
    p.add_argument("--windows", type=int, default=None, help="how many windows (default 32; 8 for --llama)")
    p.add_argument("--seq-len", type=int, default=None, help="tokens a window (default: the run's; 64 for --llama)")
    p.add_argument("--position", type=int, default=None,
                   help="the token looked at (default 0), or with --cut where to forge a sink (default 10)")
    p.add_argument("--layer", type=int, default=0, help="with --cut: the layer whose variance is amplified (default 0)")
    p.add_argument("--factor", type=float, default=5.0, help="with --cut: how much it is amplified (default 5)")
    p.add_argument("--draws", type=int, default=None, help="bootstrap draws for the intervals (default 20; 0, none, for --llama)")
    p.add_argument("--seed", type=int, default=0, help="of windows, draws and random controls")
    p.add_argument("--threads", type=int, default=None,
                   help="CPU threads (default: 1 below 5 million parameters, which more would slow down)")
    p.add_argument("--out", default=None, help="folder for JSON and figures (default: that of the first run)")
    return p


def open_models(args):
    """-> {name: (model, null or None, settings, text stream or None, bos id)} in the order given. Raises ProbeError."""
    opened = {}
    if args.llama:
        model = GPT.from_llama(args.llama).eval()
        folder = Path(args.llama)
        bos = json.loads((folder / "config.json").read_text()).get("bos_token_id")
        bos = bos if isinstance(bos, int) and 0 <= bos < model.cfg.vocab_size else None
        settings = {"seq_len": 64, "bos": None, "seed": 0, "data": folder.name, "vocab_size": model.cfg.vocab_size}
        return {folder.resolve().name: (model, None, settings, llama_stream(args.tokens or "random", folder), bos)}
    for folder in args.runs:
        model, corpus, settings = load_run(folder, args.untrained)
        name = Path(folder).resolve().name
        if name in opened:
            raise ProbeError(f"two runs are called {name}; give each folder its own name")
        first = next(iter(opened.values()), None)
        for key in ("data", "seq_len", "vocab_size"):
            if first and first[2][key] != settings[key]:
                raise ProbeError(f"{folder} has {key} {settings[key]}, but {args.runs[0]} has {first[2][key]}: "
                                 "their windows would differ; probe them one by one")
        null = None if args.untrained else GPT(model.cfg, seed=settings["seed"]).eval()
        tokens = args.tokens or "text"
        stream = corpus if tokens == "text" else None if tokens == "random" else read_tokens(tokens, corpus.encode)
        opened[name] = (model, null, settings, stream, corpus.bos)
    return opened


def llama_stream(tokens, folder):
    """Token ids (M,) of a checkpoint: None for random ones; a file; or `text`, the held-out part of our own corpus."""
    if tokens == "random":
        return None

    def encode(text):
        try:
            from tokenizers import Tokenizer
            return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        except ImportError:
            raise ProbeError("text needs the tokenizers package (pip install tokenizers); random tokens do not") from None
        except Exception as error:
            raise ProbeError(f"{folder / 'tokenizer.json'} cannot be read ({type(error).__name__}); "
                             "use --tokens random or a file of ids") from None
    if tokens != "text":
        return read_tokens(tokens, encode)
    import data
    corpus = data.load("stdlib")
    return torch.tensor(encode(corpus.decode(corpus.val[corpus.val != corpus.bos][:60000])))


def take_windows(stream, model, bos, N, T, with_bos, seed):
    """x, y (N, T) on the model's device, from a corpus, a stream of ids or nothing (random)."""
    if hasattr(stream, "batch"):
        return stream.batch(N, T, torch.Generator().manual_seed(seed), split="val", bos=float(with_bos))
    return draw_windows(N, T, model.cfg.vocab_size, bos, with_bos, seed, stream)


def run_command(args):
    if bool(args.runs) == bool(args.llama):
        raise ProbeError("give the folders of one or more runs, or --llama FOLDER" + (", not both" if args.runs else ""))
    if args.llama and args.untrained:
        raise ProbeError("--untrained is for runs: a checkpoint does not say what it started from")
    opened = open_models(args)
    N = (8 if args.llama else 32) if args.windows is None else args.windows
    draws = (0 if args.llama else 20) if args.draws is None else args.draws
    models = {name: m for name, (m, *_) in opened.items()}
    if args.threads or sum(p.numel() for p in next(iter(models.values())).parameters()) < 5e6:
        torch.set_num_threads(args.threads or 1)
    _, _, settings, stream, bos = next(iter(opened.values()))
    T = settings["seq_len"] if args.seq_len is None else args.seq_len
    k = args.position if args.position is not None else (10 if args.cut else 0)
    if N < 2 or T < 3 or draws < 0:
        raise ProbeError(f"--windows {N} --seq-len {T} --draws {draws}: the chain needs at least 2 windows of 3 tokens, "
                         "and 0 draws or more")
    check_position(k, T)
    tokens = args.tokens or ("random" if args.llama else "text")
    source = "random tokens" if tokens == "random" else settings["data"] if tokens == "text" and args.runs else tokens
    out = Path(args.out or (args.runs[0] if args.runs else "out"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProbeError(f"cannot write to {out} ({error.strerror}); choose another --out") from None
    what = {True: f"{source}, first token <bos>", False: f"{source}, first token ordinary"}
    kinds = [False, True] if args.bos is None and bos is not None else [bool(args.bos)]
    windows = {kind: take_windows(stream, next(iter(models.values())), bos, N, T, kind, args.seed) for kind in kinds}
    print(f"{N} windows of {T} tokens, {draws} bootstrap draws{', untrained' if args.untrained else ''}")
    if args.cut:
        if k == 0:
            raise ProbeError("--position 0 with --cut: the first token is the one to cut; forge at another")
        cut_command(args, opened, windows, what, k, draws, out)
    else:
        table_command(args.runs, opened, models, windows, what, T, k, draws, out)


def table_command(runs, opened, models, windows, what, T, k, draws, out):
    saved = {"windows": len(next(iter(windows.values()))[0]), "tokens": T, "position": k, "draws": draws, "chain": {}}
    ordinary = None
    for kind, (x, y) in windows.items():
        results = {name: chain_of(m, x, y, k, draws, null) for name, (m, null, *_) in opened.items()}
        saved["chain"][what[kind]] = results
        ordinary = ordinary or results
        print_chain(what[kind], results, models, T, k, kind)
    (out / "chain.json").write_text(json.dumps(saved, indent=1) + "\n")
    portraits = {name: portrait(m, x, results[name]["layers"], k) for name, m in list(models.items())[:3]}
    draw_chain(out / "chain.png", portraits, results, ordinary, what[kind], k)
    print(f"\nwrote {out / 'chain.json'}, {out / 'chain.png'}")
    for folder, name in zip(runs, results):
        rows = read_log(folder)
        if len(rows) > 2:
            path = out / f"birth_{name}.png"
            kind = "links_bos" if "links_bos" in rows[0] else "links"
            save_figure(path, draw_birth, (9.5, 4.5), rows, kind, f"{name}: birth of the sink")
            print(f"wrote {path}")


def cut_command(args, opened, windows, what, k, draws, out):
    bos_share = next(iter(opened.values()))[2]["bos"]
    main = next(iter(windows)) if len(windows) == 1 else bos_share is None or bos_share >= 0.5
    x, y = windows[main]
    tables = [cut_matrix(m, x, y, k, args.factor, args.layer, draws, args.seed) for m, *_ in opened.values()]
    table = average(tables)
    print(f"{what[main]}; {'mean of ' + ', '.join(opened) if len(tables) > 1 else next(iter(opened))}\n")
    print_cuts(table, "standard deviation between runs" if len(tables) > 1 else "95 % interval")
    print("\nWhich links hold? " + CRITERION)
    decided = {name: verdicts(t, m.cfg, x.shape[1]) for (name, (m, *_)), t in zip(opened.items(), tables)}
    for lines in zip(*decided.values()):
        said = [v if share is None else f"{v} {share:.0%}" for _, v, share, _, _ in lines]
        _, _, share, control, label = lines[0]
        why = f"({label})" if share is None else f"(control {control:.0%}; {label})"
        print(f"  {lines[0][0]:42}" + (f"{said[0]:12}{why}" if len(lines) == 1 else "".join(f"{v:14}" for v in said)))
    blocks = {}
    for kind, (x2, _) in windows.items():
        alpha = lambda mask: [chain(m, x2, mask=mask, k=k)["sink_alpha_max"] for m, *_ in opened.values()]
        blocks[what[kind]] = [sum(a) / len(a) for a in (alpha(None), alpha(block_aggregation(x2.shape[1], k)))]
    print_answers(table, blocks, k, "an unknown share" if bos_share is None else f"{bos_share:.0%}")
    saved = {"windows": len(x), "tokens": x.shape[1], "kind": what[main], "position": k, "factor": args.factor, "layer": args.layer,
             "criterion": CRITERION, "blocked": blocks, "verdicts": decided, "runs": dict(zip(opened, tables)), "mean": table}
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
