# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 01 · The variance discrepancy
#
# **Claim.** Averages vary less than what is averaged, and the first token averages
# nothing but itself. So the attention output of the first layer varies most at the
# first token: in SmolLM2 on random tokens and on English, and before any training as
# well. How much more depends on the text and on the weights.
#
# **You learn** why the first token's average varies most, and to derive by how much.
# **You need** chapter 00, and the variance of a sum. **Run time**: ten to forty
# seconds, once the models exist.

# %%
from dataclasses import replace

from lesson import beside, check, english, models, plt, random_tokens, real, show
from lesson import untrained, windows

import torch

import probe
from chapters import figures
from model import GPT, record

torch.set_grad_enabled(False)
model, _ = real()

# %% [markdown]
# ## The law of averaging
#
# A head gives position $t$ a weighted sum of the values of all positions that this
# position may see:
#
# $$z_t = \sum_{s \le t} a_{ts}\, v_s$$
#
# Take one coordinate of the values. Call its variance over windows $\sigma^2$, the same
# at every position, and let the values of two positions have correlation $\rho$. Treat
# the weights as given. The variance of a sum is the sum of all covariances, and a
# covariance here is $\sigma^2$ if $s = s'$ and $\rho\sigma^2$ if not:
#
# $$\mathrm{Var} z_t
#   = \sum_{s, s'} a_{ts} a_{ts'} \mathrm{Cov}(v_s, v_{s'})
#   = \sigma^2 \big[ \rho (\textstyle\sum_s a_{ts})^2
#     + (1 - \rho) \textstyle\sum_s a_{ts}^2 \big]$$
#
# - Uniform attention, $a_{ts} = \frac{1}{t+1}$: the variance is $\sigma^2 \big[\rho +
#   \frac{1-\rho}{t+1}\big]$. Averaging removes only what the values do not share.
# - Any softmax attention: the weights add up to 1, and $n_t = 1 / \sum_s a_{ts}^2$
#   counts the keys that are really used, from 1 to $t + 1$. With $\rho = 0$ the
#   variance is $\sigma^2 / n_t$.
#
# Position 0 has one weight, and it is 1. Its variance is $\sigma^2$, and no other
# position can have more.
#
# ## The law in a real Llama
#
# Only the first layer is needed, so we take a model of one layer with SmolLM2's
# weights, and one of the same shape with random weights. We measure the variance of
# $z_t$ over windows at each position, averaged over heads and their dimensions:
#
# $$V_t = \frac{1}{HD} \sum_{h,\,j} \mathrm{Var}_{\text{windows}} z_{t,h,j}$$
#
# *Discrepancy* is $V_0$ over the median of the other positions. For the law, $\sigma^2$
# is the variance of the values, and $\rho$ follows from how much the *mean* value of a
# window varies: $\mathrm{Var} \bar v = \sigma^2 (1 + (T - 1) \rho) / T$.

# %%
one = replace(model.cfg, num_hidden_layers=1)
bare = GPT(one, seed=0)
first = GPT(one, seed=0)
first.load_state_dict(model.state_dict(), strict=False)  # leaves out the later layers
x = random_tokens()[0]
cases = {"not trained": (bare, x),
         "random tokens": (first, x),
         "English": (first, english()[0])}


# %%
def variance(z):
    """(N, T, H, D) -> (T,)"""
    over_windows = z.var(0)  # (T, H, D)
    return over_windows.flatten(1).mean(1)


def discrepancy(curve):
    return (curve[0] / curve[1:].median()).item()


def law(pattern, v):
    """(N, H, T, T), (N, T, K, D) -> (T,)"""
    T = v.shape[1]
    sigma2 = v.var(0).mean()
    of_mean = v.mean(1).var(0).mean()  # variance of the mean value of a window
    rho = (T * of_mean / sigma2 - 1) / (T - 1)
    total = pattern.sum(-1)
    squares = pattern.square().sum(-1)
    bracket = rho * total.square() + (1 - rho) * squares
    return sigma2 * bracket.mean((0, 1))


# %% [markdown]
# As a control, give each window the attention weights of its *neighbour* in the batch
# (the last four lines). These weights do not depend on the values that they average.

# %%
measured, expected, strangers = {}, {}, {}
for name, (m, x) in cases.items():
    _, seen = record(m, x, ["0.v", "0.pattern", "0.z"])
    v, a, z = seen["0.v"], seen["0.pattern"], seen["0.z"]
    measured[name] = variance(z)
    expected[name] = law(a, v)
    assert torch.allclose(measured[name], probe.variance(z), rtol=1e-3)
    assert torch.allclose(expected[name], probe.averaging_law(a, v), rtol=1e-3)
    group = a.shape[1] // v.shape[2]  # so many heads share a value
    values = v.repeat_interleave(group, dim=2).transpose(1, 2)  # (N, H, T, D)
    z = a.roll(1, 0) @ values  # the weights move on by one window
    strangers[name] = variance(z.transpose(1, 2))

# %%
figure, axes = plt.subplots(1, 3, figsize=(8.8, 3.3), sharey=True)
for axis, name in zip(axes, cases):
    unit = measured[name].median()
    lines = {"measured": measured[name] / unit, "by the law": expected[name] / unit}
    legend = {} if axis is axes[0] else None
    figures.by_position(axis, lines, name, legend)
axes[0].set_ylabel("variance / median of the measured")
figure.suptitle("The attention output varies most at the first token (large marks)")
show(figure, "01_law", "Variance by position, three panels. All fall from position 0 "
     "on. Without training as by the law, with training less.")

# %%
def factor_off(curve, by_law):
    """By which factor a position is off, up or down: its geometric mean."""
    difference = (curve / by_law).log()
    return difference.abs().mean().exp().item()


gap, off, off_stranger = {}, {}, {}
for name, by_law in expected.items():
    gap[name] = discrepancy(measured[name])
    off[name] = factor_off(measured[name], by_law)
    off_stranger[name] = factor_off(strangers[name], by_law)
    print(f"{name:13} discrepancy {gap[name]:4.1f}, "
          f"of the law's own curve {discrepancy(by_law):4.1f}")
    print(f"{'':13} a position is off by a factor {off[name]:.2f}; "
          f"with a neighbour's weights by {off_stranger[name]:.2f}")
assert gap["not trained"] > 4, "the architecture alone makes no outlier"
assert gap["random tokens"] > 4, "token 0 is no outlier on random tokens"
assert gap["English"] > 2, "token 0 is no outlier on English"
assert off["not trained"] < 1.2, "the law fails before training"
above = (measured["random tokens"] / expected["random tokens"]).log().mean()
assert off["random tokens"] > 1.25, "the law holds after training"
assert above > 0.2, "the law does not overrate averaging"
assert off_stranger["random tokens"] < 1.25, "with a neighbour's weights it fails too"

# %% [markdown]
# Token 0 is the outlier each time. Without training the law says how much: the
# architecture alone makes a gap. After training the law overrates averaging at most
# positions, and the control says why: with a neighbour's weights the law is right
# again. Trained weights depend on the values that they average, and the law takes the
# weights as given.
#
# ## Is it about the tokens?
#
# Reverse every window: the token that stood last is now first. If the outlier belonged
# to certain tokens, it would move to the other end.

# %%
def first_z(m, x, mask=None):
    """z of the first layer, (N, T, H, D)."""
    _, seen = record(m, x, ["0.z"], mask=mask)
    return seen["0.z"]


def first_gap(m, x):
    return discrepancy(variance(first_z(m, x)))


for name, (m, x) in cases.items():
    turned = first_gap(m, x.flip(1))
    print(f"{name:13} as it is {gap[name]:4.1f}, reversed {turned:4.1f}")
    assert turned > 2, "the outlier is not bound to position 0"

# %% [markdown]
# ## The trap
#
# Many models see one fixed token first, such as `<|bos|>`. Give SmolLM2's windows the
# same first token. It sees nothing else, so its variance *over windows* is zero, the
# least of all. So use ordinary first tokens, as above.

# %%
fixed = random_tokens()[0].clone()
fixed[:, 0] = fixed[0, 0]
z = first_z(first, fixed)
over_windows = discrepancy(variance(z))
print(f"same first token, variance over windows: {over_windows:.2g} x the median")
assert over_windows < 1e-6, "the variance over windows shows a fixed token"

# %% [markdown]
# ## Deeper layers
#
# Chapter 05 shows that the state of the first token becomes *one fixed vector*,
# whatever the token is. If so, its variance must be the least in deep layers, on random
# tokens too.

# %%
names = [f"{i}.z" for i in range(model.cfg.num_hidden_layers)]
_, seen = record(model, random_tokens()[0], names)
depth = torch.tensor([discrepancy(variance(seen[name])) for name in names])
figure, axis = plt.subplots(figsize=(8.8, 3))
title = "Token 0 varies more than others in layers 0 to 2, hardly at all from 12 on"
figures.by_layer(axis, {"token 0": depth}, title, hot=["token 0"], yscale="log",
                 ylabel="$V_0$ / median of the others\n(log; dotted: 1)")
axis.axhline(1, color="black", lw=0.9, ls=":")
show(figure, "01_layers", "Discrepancy by layer: above 1 in layers 0 to 2 and again in "
     "10 and 11, and from layer 12 on below a hundredth.")
assert depth[0] > 4, "the first layer has no outlier"
assert depth[12:28].max() < 0.1, "the first state is no fixed vector"

# %% [markdown]
# In layers 10 and 11 it varies once more: what they read has lost its one large entry
# (chapter 03).
#
# ## In a small model that you train
#
# `softmax` and `text` are those of chapter 00. We measure the discrepancy before and
# after training, on windows with ordinary first tokens: letters only, at which the
# heads of `softmax` must rest, and text from any place.

# %%
small = models("softmax", "text")
reads = {"softmax": windows("letters")[0], "text": windows("text")[0]}
for name, x in reads.items():
    before = first_gap(untrained(name), x)
    after = first_gap(small[name], x)
    print(f"{name}: discrepancy {before:.1f} before training, {after:.1f} after")
    assert after < before / 2, "the gap of the mean stays"

# %% [markdown]
# While these two are trained, most of the gap disappears. (In a third model, which
# copies letters, it ends at 1.6 to 2.1 in four seeds and at 28.8 in one: `micro` in
# `tests/results/claims.md`, C1.) On these windows `softmax` still has a sink (chapter
# 04), and `text` has none (chapter 00). SmolLM2 keeps a larger gap: 10.5 on random
# tokens, a third of what its shape has before training, and 5 on English.
#
# These numbers show only that a cue to position, the larger variance, exists before
# training. Whether a sink uses it takes an experiment, which chapter 06 makes. A value
# that was not mixed with others varies more, but it also has another *mean*. In
# SmolLM2, on random tokens, this mean alone makes a sink at another token, and the
# variance alone does not. Small models differ (chapter 06; `tests/results/claims.md`,
# Q8).
#
# ## Beside the paper

# %%
beside(("model", "Llama-2-7B, Llama-3", "SmolLM2-135M"),
       ("outlier in the first layer, random tokens", "yes", gap["random tokens"]),
       ("the same on text", "yes", gap["English"]))

# %% [markdown]
# ## What would falsify this
#
# A flat curve before training would mean that the outlier is learned. An outlier that
# moved when the windows were reversed would belong to certain tokens. An untrained
# curve far from the law would mean that averaging is not the reason. The assertions
# above exclude all three.
#
# **You can now** derive the variance of an average of values, and tell what training
# adds to what was there before.
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
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    mask[10, :10] = False
    x, _ = random_tokens(32)
    usual = variance(first_z(first, x))
    alone = variance(first_z(first, x, mask))
    for t in (0, 1, 9, 10, 11, 63):
        before = usual[t] / usual.median()
        after = alone[t] / alone.median()
        print(f"position {t:2}: {before:4.1f} -> {after:4.1f} x the median")
check("01.prediction", prediction)

# %% [markdown]
# **3.** An experiment on models of other shapes: predict the discrepancy of a first
# layer before training from the standard deviation `std` of its weights, the width `C`
# and the window `T`. A normed state (divided by the root of the mean of its squares)
# has coordinates of size about 1. So a coordinate of a query or key has variance
# `std**2 * C`. What variance $\tau^2$ has a score $q \cdot k / \sqrt D$? Over many
# keys, Gaussian scores $x$ of this variance give
#
# $$\sum_s a_{ts}^2 \approx \frac{(t+1)\, E[e^{2x}]}{\big((t+1)\, E[e^x]\big)^2}
#   = \frac{e^{\tau^2}}{t+1}$$


# %%
def initial_discrepancy(std, C, T):
    ...


check("01.initial_discrepancy", initial_discrepancy)
