# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 02 · What W_O passes on
#
# **Claim.** In SmolLM2 the output projection lets the outlier of chapter 01 through,
# weakened, and does not favour the dimensions that vary most. In two small models it
# favours them. A positive Kendall tau can be found in all three: it depends on which
# side of $W_O$ is read, and one of the two says little.
#
# **You need** chapter 01, and what an eigenvector is. **Run time**: ten seconds,
# once the models exist.

# %%
import math

from lesson import beside, check, english, models, plt, random_tokens, real, show
from lesson import untrained, windows

import torch

import probe
from chapters import figures
from model import record

torch.set_grad_enabled(False)
model, _ = real()
L = model.cfg.num_hidden_layers


# %%
def around(model, x):
    """For every layer z (N, T, H D), what is made of it (N, T, C), and W_O (C, H D)."""
    layers = range(model.cfg.num_hidden_layers)
    names = [f"{i}.{name}" for i in layers for name in ("z", "attn_out")]
    kept = record(model, x, names)[1]
    found = []
    for i, block in enumerate(model.layers):
        z, out = kept[f"{i}.z"].flatten(2), kept[f"{i}.attn_out"]
        found.append((z, out, block.self_attn.o_proj.weight))
    return found


seen = {"random tokens": around(model, random_tokens()[0]),
        "English": around(model, english()[0])}

# %% [markdown]
# ## Does the outlier come through?
#
# The heads' outputs stand side by side in one vector $z_t$ with $HD$ entries, and the
# layer adds $y_t = W_O z_t$ to the stream. Let $\Sigma_t$ be the covariance of $z_t$
# over windows. The variance after $W_O$, averaged over the $C$ dimensions of $y_t$, is
#
# $$V^{out}_t = \frac1C \operatorname{tr}\big(W_O\, \Sigma_t\, W_O^\top\big),
#   \qquad E\big[V^{out}_t\big] = w^2 \operatorname{tr} \Sigma_t$$
#
# The second holds if the entries of $W_O$ are independent with mean 0 and variance
# $w^2$: then $W_O^\top W_O$ is $C w^2$ times the identity, in the mean. So *any* random
# matrix passes an outlier on. It takes a special matrix to weaken it.

# %%
def over_median(x):
    """(N, T, n) -> (T,): variance over windows, over its median from token 1 on."""
    V = x.var(0).mean(1)
    return V / V[1:].median()


W = model.layers[0].self_attn.o_proj.weight
noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
through = {}
for kind, layers in seen.items():
    z, out, _ = layers[0]
    through[kind] = {"before": over_median(z), "after": over_median(out),
                     "after a random one": over_median(z @ noise.T)}
    before, after, random = (V[0].item() for V in through[kind].values())
    assert abs(before / probe.over_median(probe.variance(z), 0) - 1) < 0.01
    print(f"{kind}, token 0 of the first layer: before W_O {before:.1f}, "
          f"after {after:.1f}, after a random matrix {random:.1f}")
    assert after < 0.7 * before and 0.7 < random / before < 1.4
assert through["random tokens"]["after"][0] > 1.8, "nothing comes through"

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.2), sharey=True)
for axis, (kind, curves) in zip(axes, through.items()):
    legend = {"title": "$W_O$"} if axis is axes[0] else None
    figures.by_position(axis, curves, kind, legend)
axes[0].set_ylabel("variance / its median")
figure.suptitle("The first layer's $W_O$ weakens the outlier, a random matrix does not")
show(figure, "02_through", "Variance by position before and after W_O. After it, token "
     "0 stands out less; on English it no longer does.")

# %% [markdown]
# On random tokens token 0 still stands out after $W_O$. On English it does not, in this
# layer: $W_O$ answers more to what varies at *later* tokens. The sink is there on
# English all the same.
#
# ## Does it prefer what varies? The columns
#
# The paper asks more: that $W_O$ *favours* dimensions of high variance. For dimension
# $j$ of $z$ take its standard deviation $d_j$, and the length $\lVert c_j \rVert$ of
# the column of $W_O$ that reads it. Do the two lists rank the dimensions alike?
# Kendall's $\tau$ counts $+1$ for a pair in the same order in both lists, $-1$ for a
# pair in opposite order, and takes the mean:
#
# $$\tau
#   = \frac{2}{n(n-1)} \sum_{i<j} \operatorname{sign}(d_i - d_j)\,
#     \operatorname{sign}\big(\lVert c_i \rVert - \lVert c_j \rVert\big)$$
#
# For two unrelated rankings its mean is 0 and its standard deviation $\sqrt{2(2n+5) /
# (9n(n-1))}$. That is its null.

# %%
def tau(a, b):
    pairs = (a[:, None] - a).sign() * (b[:, None] - b).sign()
    return pairs.sum() / (len(a) * (len(a) - 1))


def spread(x):
    return x.flatten(0, 1).std(0)  # (N, T, n) -> (n,): over all tokens


z, _, W = seen["English"][0]
own = tau(spread(z), W.norm(dim=0))
assert torch.isclose(own, probe.wo_alignment(z[:, :, None], W), atol=1e-3)
n = W.shape[1]
null = math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))
print(f"n = {n}: two unrelated rankings have tau 0 +- {null:.3f}")

# %% [markdown]
# ## The rows, and why they mislead
#
# One can also look at the other side. Row $i$ of $W_O$ writes dimension $i$ of the
# output. Do long rows write dimensions that vary much? They do, and they must: a long
# row makes a large output *whatever comes in*. The control deals out the entries of
# each row anew. Lengths stay, and every relation to the input is gone.

# %%
def shuffled(W, seed=0):
    """Each row keeps its length and loses its direction."""
    draw = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed))
    return W.gather(1, draw.argsort(1))


taus = {}
for kind, layers in seen.items():
    for z, out, W in layers:
        row = W.norm(dim=1)
        found = {"columns that read z": tau(spread(z), W.norm(dim=0)),
                 "rows that write": tau(spread(out), row),
                 "rows, shuffled": tau(spread(z @ shuffled(W).T), row)}
        for side, value in found.items():
            taus.setdefault((kind, side), []).append(value.item())
mean = {key: sum(values) / L for key, values in taus.items()}
for (kind, side), value in mean.items():
    print(f"{kind:14} {side:20} mean over layers {value:5.2f}")
for kind in seen:
    assert abs(mean[kind, "columns that read z"]) < 0.16 < mean[kind, "rows that write"]
    assert mean[kind, "rows, shuffled"] > 0.7 * mean[kind, "rows that write"]

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.6), sharey=True)
for axis, kind in zip(axes, seen):
    curves = {side: values for (k, side), values in taus.items() if k == kind}
    figures.lines(axis, curves)
    axis.axhspan(-2 * null, 2 * null, color="0.9")
    axis.axhline(0.32, color="black", lw=0.9, ls=":")
    figures.dress(axis, kind, xlabel="layer")
axes[0].set_ylabel("Kendall tau (dotted: the paper's mean)")
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=3)
figure.suptitle("Rows give a large tau, and shuffled rows give it too (grey: chance)")
show(figure, "02_tau", "Kendall tau by layer. Columns lie around 0, rows near 0.5, "
     "shuffled rows almost as high.")

# %% [markdown]
# The paper reports 0.32, for the spread of what $W_O$ *reads*: the columns, as we take
# it. By these SmolLM2 has none of it. By the rows it has more than that, and so has a
# matrix that knows nothing of its input.
#
# ## A direction is not a dimension
#
# Tau sees single dimensions, but variance may lie slantwise to all of them. A matrix
# stretches a unit vector $u$ to squared length $\lVert W_O u \rVert^2$. Over all
# directions the mean of this is $\lVert W_O \rVert_F^2 / n$. So for the $m$ widest
# directions $u_i$ of $z$, its leading eigenvectors, the *gain*
#
# $$g = \frac{\frac1m \sum_i \lVert W_O u_i \rVert^2}{\lVert W_O \rVert_F^2 / n}$$
#
# is 1 for a matrix without preference. We take an eighth of the directions, in every
# other layer.

# %%
def gain(z, W, share=8):
    z = z.flatten(0, 1)
    z = z - z.mean(0)
    directions = torch.linalg.eigh(z.T @ z)[1]  # columns, the widest come last
    widest = directions[:, -(W.shape[1] // share):]
    return (W @ widest).square().sum(0).mean() / (W.square().sum() / W.shape[1])


for kind, layers in seen.items():
    g = torch.stack([gain(z, W) for z, _, W in layers[::2]])
    print(f"{kind:14} gain on the widest directions: mean {g.mean():.2f}, "
          f"from {g.min():.2f} to {g.max():.2f}")
    assert 0.75 < g.mean() < 1.3, "SmolLM2's W_O has a preference"

# %% [markdown]
# ## In one that you train
#
# The same numbers, before and after training: the outlier, the gain as a mean over
# layers, and tau of the columns layer by layer.

# %%
small = models("softmax", "tiny-softmax")
reads = {"softmax": windows("rest")[0], "tiny-softmax": windows("text")[0]}
for name, x in reads.items():
    for when, m in (("before", untrained(name)), ("after", small[name])):
        layers = around(m, x)
        into, out = (over_median(a)[0] for a in layers[0][:2])
        t = torch.stack([tau(spread(z), W.norm(dim=0)) for z, _, W in layers])
        g = torch.stack([gain(z, W) for z, _, W in layers]).mean()
        print(f"{name:12} {when:6} training: outlier {into:4.1f} -> {out:4.1f}, "
              f"gain {g:.2f}, tau", *(f"{value:5.2f}" for value in t.tolist()))
        favours = t[0] > 0.3 and g > 1.6
        assert favours if when == "after" else t.mean().abs() < 0.15 and 0.7 < g < 1.4

# %% [markdown]
# Before training $W_O$ passes the outlier on as it is; after it the outlier comes out
# weaker, as in SmolLM2. But training also makes what the paper reports: by directions,
# and by columns in some layers, these $W_O$ favour what varies. Here the real
# model and the small ones disagree, and why is open.
#
# ## Beside the paper

# %%
beside(("model", "Llama-2-7B", "SmolLM2-135M"),
       ("tau, columns", "0.32", mean["English", "columns that read z"]),
       ("tau, rows", "not reported", mean["English", "rows that write"]))

# %% [markdown]
# Nothing here says that the sink *needs* $W_O$. Chapter 06 intervenes: it gives the
# first token's $z$ the size that the others have, and SmolLM2's sink stays.
#
# ## What would falsify this
#
# A tau of the columns well above chance in most layers of SmolLM2 would make us wrong,
# and so would shuffled rows with a tau near 0. A tau of the small models that was there
# before training would make their preference an accident.
#
# ## Exercises
#
# **1.** Write Kendall's tau for two lists without ties, from the pairs themselves, with
# loops if you like. `a` and `b` are (n,).


# %%
def kendall(a, b):
    ...


check("02.kendall", kendall)

# %% [markdown]
# **2.** Predict before you run the next cell. Deal out the entries of each *column* of
# SmolLM2's $W_O$ anew, so that columns keep their lengths and rows do not. Which of the
# two taus keeps its value *exactly*, whatever the draw? Answer "columns", "rows",
# "both" or "none".

# %%
prediction = ...
if prediction is not ...:
    for i in (4, 16, 20):
        z, _, W = seen["English"][i]
        for when, w in (("as it is", W), ("columns dealt out anew", shuffled(W.T).T)):
            by_column = tau(spread(z), w.norm(dim=0)).item()
            by_row = tau(spread(z @ w.T), w.norm(dim=1)).item()
            print(f"layer {i:2} {when:22} columns {by_column:5.2f}, rows {by_row:5.2f}")
check("02.prediction", prediction)

# %% [markdown]
# **3.** An experiment: is tau a property of what the model computes? Attention never
# mixes the dimensions of a head. So the basis of its values is free: turn it by a
# rotation `R` (D, D), and turn it back in $W_O$. For one head, given `v` (D, C) and `o`
# (C, D), return the two new matrices. The check turns every head of a small model.


# %%
def turn_values(v, o, R):
    ...


check("02.turn_values", turn_values)

# %% [markdown]
# Tau depends on a basis that the model does not fix, and the gain does not. That is why
# this chapter shows both.
