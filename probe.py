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
    gram = x.transpose(-1, -2) @ x
    return torch.linalg.eigh(gram)[1].flip(-1)[..., :n]


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
    x = x[:: -(-len(x) // most)].double()
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    p = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-30)
    return torch.special.entr(p).sum(-1).exp().float()


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
        pooled("direction", lambda x: direction_cos(x[:, k]), normed)
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
    at the head (of all layers) with the largest alpha.
    """
    first = {name: discrepancy(found[name][:, 0], k) for name in
             ("variance", "variance_raw", "variance_predicted", "variance_out", "spread", "spread_out")}
    after = {name: found[name][:, 1:] for name in found if name.startswith(("norm", "dom", "max", "kurt", "energy", "erank", "direction"))}
    alpha = found["alpha"]  # (S, L, H)
    S, layers, heads = alpha.shape
    head = alpha[0].flatten().argmax()
    at_head = {name: found[name].flatten(1)[:, head] for name in
               ("lock_cos", "lock_positive", "lock_gap", "drain")}
    if layers > 1 and layers * heads > heads:
        guess = found["predisposition"][0, 1:].flatten()
        rank = torch.stack([kendall_tau(guess, a[1:].flatten()) for a in alpha])
    else:
        rank = torch.zeros(S)
    numbers = {
        "variance_ratio": first["variance"], "variance_ratio_raw": first["variance_raw"],
        "variance_predicted": first["variance_predicted"], "spread_ratio": first["spread"],
        "variance_out_ratio": first["variance_out"], "spread_out_ratio": first["spread_out"],
        "wo_tau": found["wo_tau"].mean(1), "wo_gain": found["wo_gain"].mean(1),
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
        "lock_weights_tau": rank,
        "sink_rate": found["rate"].mean((1, 2)), "sink_alpha_max": alpha.flatten(1).amax(1),
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
        raise ProbeError(f"--tokens {path}: cannot be read ({error.__class__.__name__}); give random, text, or a file of ids or text") from None
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
