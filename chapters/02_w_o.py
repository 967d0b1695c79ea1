# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 02 · What W_O passes on
#
# **Claim.** In SmolLM2 the output projection $W_O$ of the first layer weakens the
# outlier of chapter 01, and over all layers $W_O$ does not favour the dimensions that
# vary most. In two small models it favours them. The paper's number for this, Kendall's
# tau, is a little below 0 in SmolLM2 for the columns of $W_O$. For its rows it is
# clearly positive, but there it must be, whatever they read.
#
# **You learn** what a matrix passes on, and why one measure has two readings. **You
# need** chapter 01, and what an eigenvector is. **Run time**: ten to forty seconds,
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
    names = []
    for i in range(len(model.layers)):
        names += [f"{i}.z", f"{i}.attn_out"]
    _, kept = record(model, x, names)
    found = []
    for i, block in enumerate(model.layers):
        z = kept[f"{i}.z"].flatten(2)
        out = kept[f"{i}.attn_out"]
        W = block.self_attn.o_proj.weight
        found.append((z, out, W))
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
# $$V^{out}_t = \frac1C \mathrm{tr}\big(W_O\, \Sigma_t\, W_O^\top\big),
#   \qquad E\big[V^{out}_t\big] = w^2 \mathrm{tr} \Sigma_t$$
#
# The second formula holds if the entries of $W_O$ are independent with mean 0 and
# variance $w^2$: then $W_O^\top W_O$ is $C w^2$ times the identity, in the mean. So a
# random matrix passes an outlier on as it is. Only a special matrix weakens it.

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
    curves = {"before": over_median(z), "after": over_median(out),
              "after a random one": over_median(z @ noise.T)}
    through[kind] = curves
    before = curves["before"][0]
    after = curves["after"][0]
    random = curves["after a random one"][0]
    library = probe.over_median(probe.variance(z), 0)
    assert abs(before / library - 1) < 0.01
    print(f"{kind}, token 0 of the first layer: before W_O {before:.1f}, "
          f"after {after:.1f}, after a random matrix {random:.1f}")
    assert after < 0.7 * before, "W_O does not weaken the outlier"
    assert 0.7 < random / before < 1.4, "a random matrix changes it"
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
# layer: $W_O$ passes on more of the variance of *later* tokens. Yet English has a sink
# too.
#
# ## Does it prefer what varies? The columns
#
# The paper claims more: that $W_O$ *favours* dimensions of high variance. For dimension
# $j$ of $z$ take its standard deviation $d_j$, and the length $\lVert c_j \rVert$ of
# the column of $W_O$ that reads it. Do the two lists rank the dimensions alike?
# Kendall's $\tau$ counts $+1$ for a pair in the same order in both lists, $-1$ for a
# pair in opposite order, and takes the mean:
#
# $$\tau
#   = \frac{2}{n(n-1)} \sum_{i<j} \mathrm{sign}(d_i - d_j)\,
#     \mathrm{sign}\big(\lVert c_i \rVert - \lVert c_j \rVert\big)$$
#
# For two unrelated rankings its mean is 0 and its standard deviation $\sqrt{2(2n+5) /
# (9n(n-1))}$. Chance gives no more than about twice this.

# %%
def tau(a, b):
    """(n,), (n,) -> a number"""
    n = len(a)
    order_a = (a[:, None] - a).sign()  # (n, n): every pair twice
    order_b = (b[:, None] - b).sign()
    return (order_a * order_b).sum() / (n * (n - 1))


def spread(x):
    return x.flatten(0, 1).std(0)  # (N, T, n) -> (n,): over all tokens


def tau_columns(z, W):
    """Do long columns of W read the dimensions of z that vary much?"""
    return tau(spread(z), W.norm(dim=0)).item()


z, _, W = seen["English"][0]
library = probe.wo_alignment(z[:, :, None], W).item()
assert math.isclose(tau_columns(z, W), library, abs_tol=1e-3)
n = W.shape[1]
null = math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))
print(f"n = {n}: two unrelated rankings have tau 0 +- {null:.3f}")

# %% [markdown]
# ## The rows, and why they mislead
#
# One can also compare rows. Row $i$ of $W_O$ writes dimension $i$ of the output. Do
# long rows write dimensions that vary much? They do, and they must: a long row makes a
# large output *whatever the input is*. The control shuffles the entries of each row.
# This keeps the length of the row and removes every relation to the input.

# %%
def tau_rows(out, W):
    """Do long rows of W write dimensions that vary much?"""
    return tau(spread(out), W.norm(dim=1)).item()


def shuffled(W, seed=0):
    """Each row keeps its length and loses its direction."""
    draw = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed))
    return W.gather(1, draw.argsort(1))


taus = {}  # of each layer
for kind, layers in seen.items():
    columns, rows, shuffled_rows = [], [], []
    for z, out, W in layers:
        columns.append(tau_columns(z, W))
        rows.append(tau_rows(out, W))
        shuffled_rows.append(tau_rows(z @ shuffled(W).T, W))
    taus[kind] = {"columns that read z": columns, "rows that write": rows,
                  "rows, shuffled": shuffled_rows}

# %%
mean = {}
for kind, sides in taus.items():
    for side, values in sides.items():
        mean[kind, side] = sum(values) / L
        print(f"{kind:14} {side:20} mean over layers {mean[kind, side]:5.2f}")
    assert abs(mean[kind, "columns that read z"]) < 0.16, "W_O has a preference"
    rows = mean[kind, "rows that write"]
    assert rows > 0.16, "long rows do not write what varies more"
    assert mean[kind, "rows, shuffled"] > 0.7 * rows, "it takes more than long rows"
    first = taus[kind]["columns that read z"][0]
    print(f"{kind:14} columns that read z, the first layer alone {first:5.2f}")
    assert first > 2 * null, "not even the first layer agrees"

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.6), sharey=True)
for axis, kind in zip(axes, seen):
    figures.lines(axis, taus[kind])
    axis.axhspan(-2 * null, 2 * null, color="0.9")
    axis.axhline(0.32, color="black", lw=0.9, ls=":")
    figures.dress(axis, kind, xlabel="layer")
axes[0].set_ylabel("Kendall tau (dotted: the paper's mean)")
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=3)
figure.suptitle("Rows give a large tau, and shuffled rows give it too (grey: chance)")
show(figure, "02_tau", "Kendall tau by layer. Columns lie between -0.4 and 0.4, mostly "
     "below 0; rows between 0.15 and 0.7, shuffled rows about as high.")

# %% [markdown]
# The paper reports 0.32, for the spread of what $W_O$ *reads*. We take this to mean the
# columns. By columns SmolLM2 shows rather the opposite: in most layers tau is below 0,
# so $W_O$ reads more of what varies *less*. Only one layer, the first, reaches 0.32,
# and only on English.
#
# ## A direction is not a dimension
#
# Tau compares single dimensions, but variance may lie along no single dimension. A
# matrix stretches a unit vector $u$ to squared length $\lVert W_O u \rVert^2$. Over all
# directions the mean of this is $\lVert W_O \rVert_F^2 / n$. So for the $m$ widest
# directions $u_i$ of $z$, the leading eigenvectors of its covariance, the *gain*
#
# $$g = \frac{\frac1m \sum_i \lVert W_O u_i \rVert^2}{\lVert W_O \rVert_F^2 / n}$$
#
# is 1 for a matrix without preference. We take an eighth of the directions, in every
# other layer.

# %%
def gain(z, W):
    """z (N, T, n), W (C, n) -> g, a number"""
    n = W.shape[1]
    z = z.flatten(0, 1)
    z = z - z.mean(0)
    _, directions = torch.linalg.eigh(z.T @ z)  # columns, the widest come last
    widest = directions[:, -(n // 8):]
    stretched = (W @ widest).square().sum(0)  # the squared length of each
    mean = W.square().sum() / n  # over all directions
    return (stretched.mean() / mean).item()


for kind, layers in seen.items():
    g = torch.tensor([gain(z, W) for z, _, W in layers[::2]])
    print(f"{kind:14} gain on the widest directions: mean {g.mean():.2f}, "
          f"from {g.min():.2f} to {g.max():.2f}")
    assert 0.75 < g.mean() < 1.3, "SmolLM2's W_O has a preference"

# %% [markdown]
# ## In a small model that you train
#
# For `softmax` and `text`, on the windows of chapter 01, the same numbers before and
# after training: the outlier of the first layer, before and after $W_O$; the mean gain
# over layers; and tau of the columns in each layer.

# %%
def preference(layers):
    """tau of the columns of each layer, (L,), and the mean gain."""
    taus = torch.tensor([tau_columns(z, W) for z, _, W in layers])
    gains = torch.tensor([gain(z, W) for z, _, W in layers])
    return taus, gains.mean()


# %%
small = models("softmax", "text")
reads = {"softmax": windows("letters")[0], "text": windows("text")[0]}
for name, x in reads.items():
    for when, m in (("before", untrained(name)), ("after", small[name])):
        layers = around(m, x)
        z, out, _ = layers[0]
        before, after = over_median(z)[0], over_median(out)[0]
        t, g = preference(layers)
        columns = [f"{value:5.2f}" for value in t.tolist()]
        print(f"{name:12} {when:6} training: outlier {before:4.1f} -> {after:4.1f}, "
              f"gain {g:.2f}, tau", *columns)
        if when == "before":
            assert t.mean().abs() < 0.15, "columns agree before training"
            assert 0.7 < g < 1.4, "W_O has a preference before training"
        else:
            assert t.mean() > 0.16, "columns do not agree"
            assert g > 1.6, "W_O does not favour the widest directions"

# %% [markdown]
# Before training $W_O$ passes the outlier on as it is. After training little of the
# outlier is left to pass on (chapter 01); $W_O$ weakens this rest in `softmax`, as in
# SmolLM2, and hardly in `text`. But training also makes what the paper reports: by
# directions, and by columns in most layers, these $W_O$ favour the dimensions that
# vary. Here the real model and the small ones disagree; *why* is open.
#
# ## Beside the paper

# %%
beside(("model", "Llama-2-7B", "SmolLM2-135M"),
       ("tau, columns", "0.32", mean["English", "columns that read z"]),
       ("tau, rows", "not reported", mean["English", "rows that write"]))

# %% [markdown]
# Does the sink *need* a long $z_0$? In chapter 06 $z_0$ gets the length that $z$ has at
# other tokens, and SmolLM2's sink stays.
#
# ## What would falsify this
#
# We would be wrong if the columns had a tau well above chance in most layers of
# SmolLM2, or if shuffled rows had a tau near 0. If the small models had their tau
# before training, their preference would not be learned.
#
# **You can now** test whether a matrix favours some of its inputs, and say which
# control such a test needs.
#
# ## Exercises
#
# **1.** What does a tau mean? For two lists without ties: which share of all pairs do
# both lists put in the same order? Then try the paper's 0.32.


# %%
def share_agreeing(tau):
    ...


check("02.share_agreeing", share_agreeing)

# %% [markdown]
# **2.** Predict before you run the next cell. Shuffle the entries of each *column* of
# SmolLM2's $W_O$. Which of the two taus keeps its value *exactly*, whatever the draw?
# Answer "columns", "rows", "both" or "none".

# %%
prediction = ...
if prediction is not ...:
    for i in (4, 16, 20):
        z, _, W = seen["English"][i]
        for when, w in (("as it is", W), ("columns shuffled", shuffled(W.T).T)):
            columns = tau_columns(z, w)
            rows = tau_rows(z @ w.T, w)
            print(f"layer {i:2} {when:16} columns {columns:5.2f}, rows {rows:5.2f}")
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
# Tau of the columns depends on a basis that the model does not fix, and the gain does
# not.
