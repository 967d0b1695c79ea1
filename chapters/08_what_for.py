# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 08 · What a sink is good for, and what it costs
#
# **Claim.** In SmolLM2 a sliding window works only if it keeps the first token. The
# long state of that token is what coarse quantisation breaks on, and what makes all
# states look poor in directions. Without the few neurons that write it the model
# predicts far worse.
#
# **You need** chapters 00, 03 and 04. **Run time**: half a minute, once
# the small model of text is trained.

# %%
import torch
import torch.nn.functional as F
from lesson import beside, check, english, figures, models, plt, real, show, windows
from model import make_tap

import probe

model, encoding = real()
L = model.cfg.num_hidden_layers

# %% [markdown]
# ## Good for: a stream that never ends
#
# A chat that goes on for hours must forget: keys and values of all tokens do not fit
# into memory. The plain way is a *sliding window*: a query sees the last $w$ keys and
# no older one. A second way keeps the first $s$ tokens as well (StreamingLLM, Xiao et
# al. 2023, arXiv 2309.17453):
#
# $$\text{query } t \text{ sees key } j \iff t - w < j \le t \ \text{ or } \ j < s.$$
#
# ### Predict first (exercise 1)
#
# A window of 32 keys keeps *one* token more. It is token 0, or token 1, or token 8,
# of a text in plain English. Which of these bring back more than half of what the
# window lost? Put their positions into the list.

# %%
prediction = [...]

# %%
T = 256
x, y = english(2, T)
place = torch.arange(T)


def window(width, kept=()):
    """(T, T), True where a query may look. The model itself hides what comes later."""
    near = place[:, None] - place < width
    always = torch.tensor([j in kept for j in range(T)])
    return near | always


@torch.no_grad()
def late_loss(mask=None):
    """Nats per token where the widest window, 128, has lost the first token."""
    logits, _ = model(x, mask=mask)
    losses = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    return losses[:, 128:].mean().item()


# %%
whole = late_loss()
widths = (8, 32, 128)
plain = [late_loss(window(width)) for width in widths]
first_kept = [late_loss(window(width, [0])) for width in widths]
other = {j: late_loss(window(32, [j])) for j in (1, 8)} | {0: first_kept[1]}
print(f"all keys {whole:.2f}")
for width, without, with_0 in zip(widths, plain, first_kept):
    print(f"the last {width:3} keys {without:.2f}, and token 0 {with_0:.2f}")

# %%
figure, axis = plt.subplots(figsize=(6.4, 3.2))
curves = {"the last w keys": plain, "the last w keys and token 0": first_kept}
figures.lines(axis, curves, widths, hot=["the last w keys and token 0"])
axis.plot([32, 32], [other[1], other[8]], "x", color="0.45", label="and token 1, or 8")
axis.axhline(whole, color="black", lw=0.9, ls=":", label="all keys")
axis.set_xscale("log")
figures.dress(axis, "One token kept, and the window works", {}, xlabel="window w (log)",
              ylabel="loss, nats per token\n(positions 128 to 255)")
axis.set_xticks(widths, widths)
show(figure, "08_streaming", "Loss over the width of a sliding window: far above that "
     "with all keys if the first token slides out, close to it if that one is kept.")

# %%
share = {j: (plain[1] - loss) / (plain[1] - whole) for j, loss in other.items()}
print("of what a window of 32 loses, one more token brings back:")
print({f"token {j}": f"{share[j]:.0%}" for j in sorted(share)})
check("08.prediction", prediction)
assert share[0] > 0.5 > 0.25 > max(share[1], share[8]), "token 0 does, others do not"

# %% [markdown]
# Token 0 holds almost nothing that helps to predict word 200 of a text. It holds a
# *place to rest*. When that place slides out of view, every resting head must put its
# attention on tokens that mean something, and adds what it should not. Xiao et al.
# keep four tokens, for models that rest on several. Here one is enough.
#
# ## Costs: one scale for all
#
# *int8* stores a number as a whole number $n$ from -127 to 127 and one scale $s$:
#
# $$s = \frac{\max |x|}{127}, \qquad n = \mathrm{round}(x / s), \qquad x \approx s\,n.$$
#
# The scale is set by the largest $|x|$ of all that shares it. Let the state that enters
# each layer go through int8, with one scale for the whole tensor, with one a token, and
# with one for the whole tensor but token 0, which stays exact.


# %%
def int8(values, scale):
    return (values / scale).round() * scale


def per_tensor(values):
    return int8(values, values.abs().amax() / 127)


def per_token(values):
    return int8(values, values.abs().amax(-1, keepdim=True) / 127)


def but(p):
    """One scale for all tokens but p, which stays exact."""
    def quantise(values):
        rest = values.clone()
        rest[:, p] = 0
        return probe.at_token(p, lambda _: values[:, p])(per_tensor(rest))
    return quantise


# %%
x, y = english()


@torch.no_grad()
def quantised(change, layers=range(L)):
    """The loss, if the state that enters these layers goes through `change`."""
    edits = {f"{i}.resid_pre": change for i in layers}
    return model(x, y, tap=make_tap(model.cfg, edits))[1].item()


ways = {"exact": lambda values: values, "a scale a token": per_token,
        "one scale,\ntoken 0 exact": but(0), "one scale,\ntoken 32 exact": but(32),
        "one scale": per_tensor}
losses = {name: quantised(change) for name, change in ways.items()}
exact, by_token, without_0, without_32, one_scale = losses.values()

# %%
figure, axis = plt.subplots(figsize=(6.4, 3))
colors = ["0.6", "0.6", figures.ACCENT, "0.6", "0.6"]
axis.bar(list(losses), list(losses.values()), color=colors)
axis.grid(False, axis="x")
figures.dress(axis, "int8 with one scale breaks on the first token",
              ylabel="loss, nats per token")
show(figure, "08_int8", "Loss with states in int8: a scale a token costs nothing, one "
     "scale for all makes the model useless, and an exact token 0 repairs most of it.")
print({name.replace("\n", " "): round(loss, 2) for name, loss in losses.items()})
assert by_token < exact + 0.3 and one_scale > exact + 5, "a scale a token is needed"
repaired = (one_scale - without_0) / (one_scale - exact)
control = (one_scale - without_32) / (one_scale - exact)
print(f"exact states repair: token 0 {repaired:.0%}, token 32 {control:.0%}")
assert repaired > 2 / 3 and control < 1 / 3, "most of the damage is done by token 0"

# %% [markdown]
# Token 0 is some hundred times as long as the others (chapter 04), so a scale that
# fits it leaves the others a handful of whole numbers. This is why large models are
# quantised with a scale a token, or with their outliers kept apart (Dettmers et al.
# 2022, arXiv 2208.07339).
#
# With token 0 exact something is still lost. Exercise 3 asks who else is long.
#
# ## Costs: all states look alike
#
# How many directions do the states use? Put them into the rows of a matrix with
# singular values $\sigma_i$. Its *effective rank* (Roy and Vetterli 2007) is
#
# $$\exp\Big(-\sum_i p_i \ln p_i\Big), \qquad p_i = \sigma_i \Big/ \sum_j \sigma_j.$$
#
# It is $n$ for $n$ equal singular values, and 1 if one is all there is. We read it
# with and without the rows of token 0. The same pass over the text gives the gradient
# that the next section needs.


# %%
def effective_rank(states):
    """(N, T, C): a row for each token."""
    share = F.normalize(torch.linalg.svdvals(states.flatten(0, 1)), p=1, dim=0)
    return torch.special.entr(share).sum().exp().item()


dice = torch.Generator().manual_seed(0)
noise = torch.randn(8, 64, model.cfg.hidden_size, generator=dice)
print(f"effective rank of noise of this shape: {effective_rank(noise):.0f}")

# %%
states = {}


def keep(name, value):
    """A tap that keeps the state that enters each layer, and its gradient."""
    if name == "embed":
        value.requires_grad_()
    if name.endswith("resid_pre"):
        value.retain_grad()
        states[name] = value
    return value


model.requires_grad_(False)  # only the states need a gradient
model(x, y, tap=keep)[1].backward()
slopes = torch.stack([state.grad.norm(dim=-1).mean(0) for state in states.values()])
states = torch.stack([state.detach() for state in states.values()])  # (L, N, T, C)

# %%
with_0 = [effective_rank(state) for state in states]
without = [effective_rank(state[:, 1:]) for state in states]
figure, axis = plt.subplots(figsize=(6.4, 3))
curves = {"all tokens": torch.tensor(with_0), "without token 0": torch.tensor(without)}
figures.by_layer(axis, curves, "One long row hides the others", hot=["all tokens"],
                 legend={}, ylabel="effective rank of the states", ylim=(0, None))
show(figure, "08_rank", "Effective rank over depth: from layer 12 on the states with "
     "token 0 have hardly any directions; without it as many as in the first layers.")

# %%
middle = slice(12, 20)
both = torch.tensor([with_0, without])
collapsed, rest = both[:, middle].mean(1).tolist()
print(f"layers 12 to 19: {collapsed:.0f} with token 0, {rest:.0f} without")
assert collapsed < rest / 5, "token 0 alone makes the effective rank small"

# %% [markdown]
# The others are not alike at all: the collapse is in the measure. The paper reports
# that its cure raises the effective rank from 344 to 446. Where a sink is cured, ask
# how much of such a gain is left without the first token (chapter 07 does).
#
# ## Costs: a state that training cannot move
#
# $g_t = \partial\,\mathrm{loss} / \partial x_t$ says how the loss answers to a small
# step of the state of token $t$. Every norm divides by the length of the state:
# $\mathrm{RMSNorm}(c\,x) = \mathrm{RMSNorm}(x)$, so a state $c$ times as long has a
# gradient $c$ times as short, as long as everything else is equal.

# %%
lengths = states.norm(dim=-1).mean(1)  # (L, T)
early, late = 6, 16
figure, axes = plt.subplots(1, 2, figsize=(8.8, 3))
for axis, layer in zip(axes, (early, late)):
    axis.plot(slopes[layer], color="black")
    axis.plot(0, slopes[layer, 0], "o", color=figures.ACCENT, ms=7, label="token 0")
    figures.dress(axis, f"into layer {layer}", {}, xlabel="position", ylim=(0, None),
                  ylabel="length of the gradient")
figure.suptitle("The long state hears little of the loss")
show(figure, "08_gradient", "Length of the gradient by position: into layer 6 token 0 "
     "has more than most, into layer 16, where its state is long, far less.")

# %%
slope = probe.over_median(slopes, 0)  # (L,): token 0 over the median of the others
length = probe.over_median(lengths, 0)
for layer in (2, early, late, 28):
    print(f"into layer {layer:2}, token 0 / others: gradient {slope[layer]:.2f}, "
          f"length {length[layer]:.1f}")
assert slope[2:11].min() > 1, "before layer 11 token 0 hears less than others"
assert slope[12:].max() < 0.6, "afterwards less"
assert (slope * length)[12:20].min() > 5, "its direction no longer matters"

# %% [markdown]
# The gradient is small, but not as small as the length would make it. Multiply both:
# what a turn by a small *angle* does is still many times what it does elsewhere,
# because so many queries read this key. So the direction matters much, and a step of
# usual size hardly turns it. That is a stable anchor, and it is dear: such a state
# needs numbers with a wide range.
#
# ## The price of going without
#
# Chapter 03 silenced the neurons that write the long state. What does it cost on text?

# %%
rows = probe.cuts(model, x, y, names=("cut neurons",))
prices = [row["after"][0]["loss"] - row["before"][0]["loss"] for row in rows]
for row, price in zip(rows, prices):
    print(f"{row['says']:34} attention to token 0 {row['after'][0]['resting']:.2f}, "
          f"loss {price:+.2f}")
assert prices[0] > 0.3 and abs(prices[1]) < prices[0] / 5, "the sink is free of charge"

# %% [markdown]
# The neurons are silent at *one* token of 64, and all others are predicted worse.
# What a model has learned to rest on cannot be taken away afterwards for nothing.
# Taking it away *before* training is what chapter 07 tries.
#
# ## In one that you train
#
# The small model of text knows its first token, `<|bos|>`. Does it need it, too? (The
# copying model would not tell: what it copies slides out of a window as well.)


# %%
small, (bx, by) = models("tiny-softmax")["tiny-softmax"], windows("bos")


@torch.no_grad()
def small_loss(tap=None, **how):
    logits, _ = small(bx, **how, tap=tap)
    losses = F.cross_entropy(logits.transpose(1, 2), by, reduction="none")
    return losses[:, 32:].mean().item()


near, inner = window(16)[:64, :64], window(16, [0])[:64, :64]  # of 64 positions
edits = {f"{i}.resid_pre": per_tensor for i in range(small.cfg.num_hidden_layers)}
toy = {"all keys": small_loss(), "the last 16": small_loss(mask=near),
       "and token 0": small_loss(mask=inner),
       "int8, one scale": small_loss(make_tap(small.cfg, edits))}
print({name: round(loss, 2) for name, loss in toy.items()})
assert toy["the last 16"] > toy["and token 0"] + 0.5, "the toy streams without token 0"
assert toy["int8, one scale"] < toy["all keys"] + 0.1, "int8 breaks the toy"

# %% [markdown]
# The same place to rest, and none of the cost: here one scale is good enough. Why?
# Its first state is some five times as long as the others, not a hundred times
# (chapter 04), and 127 steps are enough for both. So a sink does not need the enormous
# state, not even on a token that cannot be known by its name: `softmax` has neither.
# Why, then, do large models build it, and pay?
#
# A first token can be good for something else. `softmax` measures from it how long its
# passage has lasted, as chapter 07 shows.
#
# ## Beside the paper and its neighbours

# %%
beside(("window that keeps first tokens", "as good as all keys (2309.17453)",
        f"loss {first_kept[2]:.2f}, all keys {whole:.2f}"),
       ("window that does not", "loss explodes", f"{plain[2]:.2f}"),
       ("effective rank, softmax", "343.7 (152M weights)", f"{collapsed:.0f}"),
       ("  without token 0", "not reported", f"{rest:.0f}"))

# %% [markdown]
# ## What would falsify this
#
# Another token, kept beside a window, does as much as token 0. Quantisation with one
# scale works as soon as *any* token is exact. The effective rank stays low when token
# 0 is left out. Other neurons of like weight cost as much. All are asserted above,
# for this model, 16 short stretches of one text, and masks rather than a real cache:
# positions are counted from the start of the text, which a stream without end cannot
# do.
#
# ## Exercises
#
# **1.** The prediction at the start: which tokens bring the window back?
#
# **2.** Why does one row hide the others? Take `n` rows at right angles to each
# other, one of length `c`, all others of length 1. What is their effective rank? (The
# singular values are the lengths.) Try `c` of 100 and of 10,000.


# %%
def rank_of_rows(n, c):
    ...


check("08.rank_of_rows", rank_of_rows)

# %% [markdown]
# **3.** An experiment. With token 0 exact, some windows still have a long token in
# layers 4 to 10, before the great wave of layer 11. In `states[6]` find the tokens,
# other than the first, with an entry above 300, and decode them:
# `encoding.decode([x[n, t].item()])`. They are all the same word. Which? (Blanks do
# not count.)

# %%
word = ...
check("08.word", word)
