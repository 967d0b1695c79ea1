# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 01 · The variance discrepancy
#
# **Claim.** Averaging makes things alike, and the first token averages nothing but
# itself. So what the first layer hands it varies most: in SmolLM2 on random tokens and
# on English, and before any training as well. How much more depends on what is read and
# on the weights.
#
# **You need** chapter 00, and the variance of a sum. **Run time**: ten seconds, once
# the models exist.

# %%
import math
from dataclasses import replace

import torch
from lesson import beside, check, english, log, models, plt, random_tokens, real
from lesson import show, untrained, windows

import probe
from chapters import figures
from model import GPT, record

torch.set_grad_enabled(False)
model, _ = real()

# %% [markdown]
# ## The law of averaging
#
# A head hands position $t$ a weighted sum of the values of all positions that it may
# see:
#
# $$z_t = \sum_{s \le t} a_{ts}\, v_s$$
#
# Take one coordinate of the values. Call its variance over windows $\sigma^2$, the same
# at every position, and let the values of two positions have correlation $\rho$. Treat
# the weights as given. The variance of a sum is the sum of all covariances, and a
# covariance here is $\sigma^2$ if $s = s'$ and $\rho\sigma^2$ if not:
#
# $$\operatorname{Var} z_t
#   = \sum_{s, s'} a_{ts} a_{ts'} \operatorname{Cov}(v_s, v_{s'})
#   = \sigma^2 \big[ \rho (\textstyle\sum_s a_{ts})^2
#     + (1 - \rho) \textstyle\sum_s a_{ts}^2 \big]$$
#
# - Uniform attention, $a_{ts} = \frac{1}{t+1}$, and independent values, $\rho = 0$:
#   then $\operatorname{Var} z_t = \frac{\sigma^2}{t+1}$.
# - Uniform attention and correlated values: $\sigma^2 \big[\rho +
#   \frac{1-\rho}{t+1}\big]$. Averaging removes only what the values do not share, so
#   the curve stops falling at $\rho\sigma^2$.
# - Any softmax attention: the weights add up to 1, and $n_t = 1 / \sum_s a_{ts}^2$
#   counts the keys that are really used, from 1 to $t + 1$. With $\rho = 0$ the
#   variance is $\sigma^2 / n_t$.
#
# Position 0 has one weight, and it is 1. Its variance is $\sigma^2$, and no other
# position can have more. Try it on random numbers first.

# %%
def bracket(a, rho):
    """a (..., T): weights of each query -> (...): the bracket of the law."""
    return rho * a.sum(-1).square() + (1 - rho) * a.square().sum(-1)


T, rho, generator = 64, 0.2, torch.Generator().manual_seed(0)
shared = torch.randn(4000, 1, 8, generator=generator)  # the same at all positions
own = torch.randn(4000, T, 8, generator=generator)
values = rho**0.5 * shared + (1 - rho) ** 0.5 * own  # (N, T, D)
uniform = torch.tril(torch.ones(T, T)) / torch.arange(1, T + 1)[:, None]
measured, expected = probe.variance(uniform @ values), bracket(uniform, rho)
for t in (0, 1, 7, 63):
    print(f"position {t:2}: measured {measured[t]:.3f}, by the law {expected[t]:.3f}")
assert torch.allclose(measured, expected, rtol=0.1), "the law fails on random numbers"

# %% [markdown]
# ## The law in a real Llama
#
# Only the first layer is needed, so we take a model of one layer with SmolLM2's
# weights. Beside it stands the same shape with random weights: it has learned nothing.

# %%
one = replace(model.cfg, num_hidden_layers=1)
bare, first = GPT(one, seed=0), GPT(one, seed=0)
first.load_state_dict(model.state_dict(), strict=False)  # leaves out the later layers

x = random_tokens()[0]
cases = {"not trained": (bare, x), "random tokens": (first, x),
         "English": (first, english()[0])}

# %% [markdown]
# The measured number is the variance of $z_t$ over windows at each position, averaged
# over heads and their dimensions:
#
# $$V_t = \frac{1}{HD} \sum_{h,\,j} \operatorname{Var}_{\text{windows}} z_{t,h,j}$$
#
# *Discrepancy* is $V_0$ over the median of the other positions. For the law, $\sigma^2$
# is the variance of the values, and $\rho$ follows from how much the *mean* value of a
# window varies: $\operatorname{Var} \bar v = \sigma^2 (1 + (T - 1) \rho) / T$.

# %%
def variance(z):
    return z.var(0).flatten(1).mean(1)  # (N, T, H, D) -> (T,)


def discrepancy(curve):
    return (curve[0] / curve[1:].median()).item()


def law(pattern, v):
    sigma2, T = v.var(0).mean(), v.shape[1]
    rho = (T * v.mean(1).var(0).mean() / sigma2 - 1) / (T - 1)
    return sigma2 * bracket(pattern, rho).mean((0, 1))


curves, strangers = {}, {}
for name, (m, x) in cases.items():
    v, a, z = record(m, x, ["0.v", "0.pattern", "0.z"])[1].values()
    curves[name] = {"measured": variance(z), "by the law": law(a, v)}
    library = {"measured": probe.variance(z), "by the law": probe.averaging_law(a, v)}
    for line, curve in curves[name].items():
        assert torch.allclose(curve, library[line], rtol=1e-3)
    wide = v.repeat_interleave(a.shape[1] // v.shape[2], dim=2).transpose(1, 2)
    strangers[name] = variance((a.roll(1, 0) @ wide).transpose(1, 2))

# %% [markdown]
# The last two lines of the loop are a control. They give each window the attention
# weights of its *neighbour* in the batch. These cannot know what they average.

# %%
figure, axes = plt.subplots(1, 3, figsize=(8.8, 3.3), sharey=True)
for axis, (name, found) in zip(axes, curves.items()):
    unit = found["measured"].median()
    lines = {line: y / unit for line, y in found.items()}
    figures.by_position(axis, lines, name, {} if axis is axes[0] else None)
axes[0].set_ylabel("variance / its median")
figure.suptitle("What the first token is given varies most (large dots)")
show(figure, "01_law", "Variance by position, three panels. All fall from position 0 "
     "on. Without training as by the law, with training less.")

# %%
gap, off, off_stranger = {}, {}, {}
for name, found in curves.items():
    expected = found["by the law"]
    gap[name] = discrepancy(found["measured"])
    off[name] = (found["measured"] / expected).log().abs().mean().exp().item()
    off_stranger[name] = (strangers[name] / expected).log().abs().mean().exp().item()
    print(f"{name:13} discrepancy {gap[name]:4.1f}, "
          f"by the law {discrepancy(expected):4.1f}")
    print(f"{'':13} a position is off by a factor {off[name]:.2f}; "
          f"with a neighbour's weights by {off_stranger[name]:.2f}")
assert gap["random tokens"] > 4 and gap["English"] > 2
assert off["not trained"] < 1.2, "the law fails before training"
assert off_stranger["random tokens"] < 1.25 < off["random tokens"], "see the control"

# %% [markdown]
# Token 0 is the outlier each time. Without training the law tells how much. After
# training it overrates averaging, and the control says why: with a neighbour's weights
# it is right again. Trained weights depend on what they average, and the law takes them
# as given. On English the outlier is smaller, and by the law as well: attention is less
# even there.
#
# ## How large is it before training?
#
# This can be worked out from nothing but the scale $w$ of the initial weights. A normed
# state has $C$ coordinates of size about 1, so a coordinate of a query or key has
# variance $w^2 C$, and a score $q \cdot k / \sqrt D$ has variance $\tau^2 = (w^2 C)^2$.
# Over many keys, weights $e^{x_s} / \sum e^{x_{s'}}$ with Gaussian scores give
#
# $$\sum_s a_{ts}^2 \approx \frac{(t+1)\, E[e^{2x}]}{\big((t+1)\, E[e^x]\big)^2}
#   = \frac{e^{\tau^2}}{t+1}$$
#
# The median of $t+1$ over the later positions is $T/2 + 1$, and position 0 has 1: the
# discrepancy should be $(T/2 + 1)\, e^{-\tau^2}$.

# %%
small = models("softmax", "tiny-softmax")
reads = {"softmax": windows("rest")[0], "tiny-softmax": windows("text")[0]}
shapes = {"SmolLM2": (bare, gap["not trained"])}
for name, x in reads.items():
    start = untrained(name)
    shapes[name] = (start, discrepancy(variance(record(start, x, ["0.z"])[1]["0.z"])))
for name, (m, found) in shapes.items():
    tau2 = (m.cfg.initializer_range**2 * m.cfg.hidden_size) ** 2
    expected = (T / 2 + 1) * math.exp(-tau2)
    print(f"{name:12} not trained: expected {expected:.1f}, measured {found:.1f}")
    if name != "tiny-softmax":  # its bytes repeat in a window: values are correlated
        assert 0.7 < expected / found < 1.4, "the initial scale does not explain it"

# %% [markdown]
# So such a gap alone says nothing about what a model has learned: the architecture
# makes it. Chi et al. (2023) used the same law to explain how a decoder without
# position embeddings can tell places apart.
#
# ## Is it about the tokens?
#
# Turn every window round: the token that stood last is now first. If the outlier
# belonged to tokens it would move to the other end.

# %%
turned = {}
for name, (m, x) in cases.items():
    turned[name] = discrepancy(variance(record(m, x.flip(1), ["0.z"])[1]["0.z"]))
    print(f"{name:13} as it is {gap[name]:4.1f}, turned round {turned[name]:4.1f}")
assert min(turned.values()) > 2, "the outlier is not bound to position 0"

# %% [markdown]
# ## The trap
#
# Many models see one fixed token first, such as `<|bos|>`. Give SmolLM2's windows the
# same first token. It sees nothing else, so its variance *over windows* is zero: the
# choice of windows has turned the outlier into its opposite. So use ordinary first
# tokens, as above, or the *spread*: the variance over the dimensions of one vector.
# That sees a fixed token too.

# %%
fixed = random_tokens()[0].clone()
fixed[:, 0] = fixed[0, 0]
z = record(first, fixed, ["0.z"])[1]["0.z"]
trap = {"over windows": variance(z), "over dimensions": z.var(-1).mean((0, 2))}
for name, curve in trap.items():
    print(f"same first token, variance {name}: {discrepancy(curve):.2g} x the median")
hidden, seen = map(discrepancy, trap.values())
assert hidden < 1e-6 and seen > 1.3, "windows hide a fixed token, the spread does not"

# %% [markdown]
# ## Deeper layers
#
# The later chapters say that the first state becomes *one fixed vector*. If so, the
# same trap must open by itself, on random tokens.

# %%
names = [f"{i}.z" for i in range(model.cfg.num_hidden_layers)]
deep = record(model, random_tokens()[0], names)[1].values()
depth = torch.tensor([discrepancy(variance(z)) for z in deep])
figure, axis = plt.subplots(figsize=(8.8, 3))
title = "The outlier of the first layer becomes the token that varies least"
figures.by_layer(axis, {"token 0": depth}, title, hot=["token 0"], yscale="log",
                 ylabel="$V_0$ / median of the others (log)")
axis.axhline(1, color="black", lw=0.9, ls=":")
show(figure, "01_layers", "Discrepancy by layer: above 1 in the first layers, then "
     "below, and from layer 12 on below a hundredth.")
assert depth[0] > 4 and depth[12:28].max() < 0.1

# %% [markdown]
# ## In one that you train
#
# `train.py` measures the first layer's discrepancy while it trains, on windows with
# ordinary first tokens. For `tiny-softmax` the sink is that of windows after `<|bos|>`.

# %%
logs = {"softmax": ("links_rest", "links_rest"),
        "tiny-softmax": ("links", "links_bos")}
figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.2))
history = {}
for axis, (name, (a, b)) in zip(axes, logs.items()):
    rows = log(name)
    steps = [max(row["step"], 1) for row in rows]
    history[name] = ratio = [row[a]["variance"] for row in rows]
    figures.lines(axis, {"discrepancy (left)": ratio}, x=steps)
    right = axis.twinx()
    sink = [row[b]["sink"] for row in rows]
    figures.lines(right, {"sink (right)": sink}, x=steps, hot=["sink (right)"])
    right.set(ylim=(0, 1))
    right.grid(False)
    axis.legend(handles=axis.lines + right.lines, loc="upper left")
    axis.set_ylim(0, 1.6 * max(ratio))
    figures.dress(axis, name, xscale="log", xlabel="step (log; 0 is drawn at 1)")
figure.suptitle("The sink comes with training, and most of the discrepancy goes")
show(figure, "01_history", "Two models in training: the discrepancy of the first layer "
     "falls, and the sink rises.")

# %% [markdown]
# So the sink does not grow *because the gap grows*. A sign of place is there from the
# start, and the later links have to learn to use it.
#
# SmolLM2 and these two disagree. Its first layer has kept a third of what its shape has
# before training; theirs have kept little. By the law, $\sigma^2 / n_t$, it can be a
# matter of how many keys the *others* use. Count those of the last position, head by
# head.

# %%
def keys_used(m, x):
    pattern = record(m, x, ["0.pattern"])[1]["0.pattern"]
    return (1 / pattern[:, :, -1].square().sum(-1)).mean(0)


used = {"SmolLM2": keys_used(first, random_tokens()[0])}
used |= {name: keys_used(small[name], x) for name, x in reads.items()}
print(f"keys that the last of {T} positions uses, in each head:")
for name, keys in used.items():
    print(f"{name:12}", *(f"{n:.0f}" for n in keys.tolist()))
for name, (before, *_, after) in history.items():
    print(f"{name}: discrepancy {before:.1f} before training, {after:.1f} after")
    assert after < before / 2 and used["SmolLM2"].mean() > 1.5 * used[name].mean()

# %% [markdown]
# It is: the small models' first layers have heads that look at few keys, so all tokens
# vary. *Why* a real model leaves its first layer so even, and a small one does not, is
# open. (A model of four or six layers has no layer to spare. What would you train to
# find out?)
#
# What is left of the gap is still used. Chapter 06 hands the first token what the
# others are given on average, and the sink goes, in `softmax` and in SmolLM2.
#
# ## Beside the paper

# %%
beside(("model", "Llama-2-7B, Llama-3", "SmolLM2-135M"),
       ("outlier in layer 1, random tokens", "yes", gap["random tokens"]),
       ("the same on text", "yes", gap["English"]),
       ("before training", "not reported", gap["not trained"]),
       ("turned round", "not reported", turned["random tokens"]))

# %% [markdown]
# ## What would falsify this
#
# A flat curve without training would mean that the outlier is learned. An outlier that
# moved when the windows were turned round would belong to tokens. An untrained curve
# far from the law would mean that something else than averaging is at work. All three
# are asserted.
#
# ## Exercises
#
# **1.** The law for one row of weights: the variance of $\sum_s a_s v_s$. `weights` is
# (n,) and need not add up to 1. This time each value has its own standard deviation:
# `sigma` is (n,), and `rho` the correlation of any two.


# %%
def sum_variance(weights, sigma, rho):
    ...


check("01.sum_variance", sum_variance)

# %% [markdown]
# **2.** Predict before you run this cell: SmolLM2's token 10 may see only itself, and
# everything else is as usual. At which positions does the variance of the first layer's
# $z$ change? Give a list.

# %%
prediction = ...
if prediction is not ...:
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[10, :10] = False
    x, V = random_tokens(32)[0], {}
    for when, seen in (("as usual", None), ("token 10 alone", mask)):
        V[when] = variance(record(first, x, ["0.z"], mask=seen)[1]["0.z"])
    for t in (0, 1, 9, 10, 11, 63):
        before, after = (v[t] / v.median() for v in V.values())
        print(f"position {t:2}: {before:4.1f} -> {after:4.1f} x the median")
check("01.prediction", prediction)

# %% [markdown]
# **3.** An experiment on models that you make yourself. Predict the discrepancy of an
# untrained first layer from the standard deviation `std` of its weights, the width `C`
# and the window `T`. Your answer is tried on other weights, widths and windows than
# above.


# %%
def initial_discrepancy(std, C, T):
    ...


check("01.initial_discrepancy", initial_discrepancy)
