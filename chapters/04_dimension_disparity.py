# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 04 · Dimension disparity
#
# **Claim.** In SmolLM2 the state of the first token becomes over a hundred times as
# long as that of an ordinary token, and nearly all of its length lies in one dimension.
# Where this dimension is large there are sinks, and where it is erased there are none.
#
# **You learn** to measure how much a few dimensions dominate a state, and to test
# whether a number carries information. **You need** chapter 03: the neurons that write
# this state. **Run time**: 10 to 30 seconds, once the two small models exist.

# %%
import math

from lesson import ask, beside, check, english, models, plt, random_tokens, real
from lesson import show, windows

import torch

import probe
from chapters import figures
from model import make_tap, record

torch.set_grad_enabled(False)
model, _ = real()
x, _ = random_tokens()
L = model.cfg.num_hidden_layers
C = model.cfg.hidden_size
reads = [f"{i}.resid_pre" for i in range(L)]
patterns = [f"{i}.pattern" for i in range(L)]
_, seen = record(model, x, reads + patterns)
states = [seen[name] for name in reads]  # what each layer reads, (N, T, C)

# %% [markdown]
# ## The first state is long
#
# The *state* of a token is its residual stream, a vector; its *length* is the norm. We
# divide the length at the first token by that at the median token:
#
# $$\text{norm ratio} = \frac{\lVert x_0 \rVert}{\mathrm{median}_{t>0}
# \lVert x_t \rVert}$$


# %%
def norm_ratio(state):
    """(N, T, C) -> a number, the mean over windows."""
    norm = state.norm(dim=-1)  # (N, T)
    median = norm[:, 1:].median(1).values
    return (norm[:, 0] / median).mean().item()


ratio = torch.tensor([norm_ratio(state) for state in states])  # (L,)
library = probe.over_median(states[12].norm(dim=-1), 0).mean()
assert torch.isclose(ratio[12], library), "the same number in probe"
some = [f"{i}: {ratio[i]:.3g}" for i in (3, 11, 12, 29)]
print("length over the median, by layer:", ", ".join(some))
assert ratio[11] < 3, "what layer 11 reads is still long"
assert ratio[12] > 100, "layer 11 does not make it a hundred times as long"

# %% [markdown]
# ## A few dimensions dominate it
#
# How much do a few dimensions dominate a state? The paper divides the largest entry by
# the average entry, both without their signs:
#
# $$\mathrm{DomRatio}(x) = \frac{\max_j |x_j|}{\frac1C \sum_j |x_j|} .$$
#
# It is 1 if all entries have one size, and $C$ if all but one are zero. For noise, $C$
# Gaussian numbers of standard deviation 1, the mean of $|x_j|$ is $\sqrt{2/\pi}$, and
# the largest lies near $\sqrt{2 \ln C}$:
#
# $$\mathrm{DomRatio}_{\text{Gauss}} \approx \sqrt{2 \ln C} \,\big/ \sqrt{2/\pi}
# = \sqrt{\pi \ln C}$$


# %%
def dominance(x):
    """(..., C) -> (...)"""
    return x.abs().amax(-1) / x.abs().mean(-1)


noise = torch.randn(4000, C, generator=torch.Generator().manual_seed(0))
drawn = dominance(noise)
formula = math.sqrt(math.pi * math.log(C))
assert torch.allclose(drawn, probe.dominance(noise)), "the same number in probe"
print(f"Gaussian vectors of {C}: formula {formula:.1f}, drawn {drawn.mean():.1f}")

# %%
def mean_dominance(states, t):
    """DomRatio of token t in every layer, (L,): the mean over windows."""
    return torch.stack([dominance(state[:, t]).mean() for state in states])


readers = [block.input_layernorm for block in model.layers]
normed = [reader(state) for reader, state in zip(readers, states)]
raw_0 = mean_dominance(states, 0)
raw_32 = mean_dominance(states, 32)
normed_0 = mean_dominance(normed, 0)
normed_32 = mean_dominance(normed, 32)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.5))
figures.by_layer(left, {"token 0": ratio}, "Token 0 is long in two waves",
                 ["token 0"], yscale="log", ylabel="length / median length (log)")
curves = {"token 0": raw_0, "token 0, after RMSNorm": normed_0,
          "token 32": raw_32, "token 32, after RMSNorm": normed_32}
figures.by_layer(right, curves, "In both its DomRatio is above that of token 32",
                 ["token 0", "token 0, after RMSNorm"], yscale="log", ylim=(3, 3000),
                 ylabel="DomRatio (log)")
right.axhline(formula, color="black", lw=0.9, ls=":", label="Gaussian")
right.axhline(C, color="black", lw=0.9, ls="--", label=f"ceiling {C}")
right.legend(ncols=2, loc="upper left", fontsize=8, columnspacing=1)
show(figure, "04_disparity", "Left: the norm ratio by layer, up to 10 in the first "
     "wave, 161 at layer 12, then falling, to 14 at layer 29. Right: DomRatio of token "
     "0, in both waves far above that of token 32, at layer 11 far below it.")

# %% [markdown]
# An ordinary token is no Gaussian vector either: in most layers its state has a few
# large dimensions. So compare the two tokens in the *same* layer: in the two waves the
# DomRatio of token 0 is up to eleven times that of token 32. In the second wave RMSNorm
# undoes much of the difference: its learned gain $\gamma$ is small in the dimension
# that dominates.

# %%
squares = states[12][:, 0].square()  # (N, C)
share = squares.mean(0) / squares.sum(-1).mean()
c = share.argmax().item()
print(f"dimension {c} holds {share[c]:.1%} of the squared length")
assert share[c] > 0.9, "one dimension is nearly all of the length"

deep = slice(12, 28)
smaller = []
for reader in readers[deep]:
    gain = reader.weight.abs()
    smaller.append((gain < gain[c]).sum().item())
print(f"of {C} gains at most {max(smaller)} are smaller than that of dimension {c}")
before = raw_0 / raw_32
after = normed_0 / normed_32
print("DomRatio of token 0 over that of token 32, layer by layer from 12 to 27:")
for name, ratio_of_two in {"raw": before[deep], "normed": after[deep]}.items():
    print(f"{name:6} {ratio_of_two.min():.1f} to {ratio_of_two.max():.1f}")
assert before[deep].mean() > 3, "token 0 is hardly dominated more than token 32"
assert after[deep].mean() > 1.5, "RMSNorm takes the difference away"

# %% [markdown]
# ## Two waves, and the sinks follow
#
# Chapter 03 saw the model write this dimension, erase it and write it again. How much
# do the heads of each layer attend to token 0? We change nothing here.

# %%
first = torch.stack([state[:, 0].abs().mean(0) for state in states])  # (L, C)
sink = torch.stack([probe.sink_score(seen[name], 0).mean() for name in patterns])
for i in (3, 11, 12):
    print(f"layer {i:2} reads {first[i, c]:5.0f} in dimension {c}; "
          f"attention {sink[i]:.2f}")
baseline = probe.uniform_sink(64)
written = torch.cat([sink[3:9], sink[12:28]])
missing = torch.stack([sink[0], sink[1], sink[11]])
assert missing.max() < 2 * baseline, "sinks where the dimension is small"
assert written.min() > 4 * baseline, "no sinks where the dimension is large"

# %%
figure, (top, below) = plt.subplots(2, 1, figsize=(8.8, 4.6), sharex=True)
curves = {}
for i in first[3].topk(3).indices.tolist():
    curves[f"dimension {i}"] = first[:, i]
curves["median dimension"] = first.median(1).values
figures.by_layer(top, curves, f"Dimension {c} comes, goes and comes again",
                 [f"dimension {c}"], dict(ncols=2), yscale="log", xlabel=None,
                 ylabel="|x| of token 0 (log)", ylim=(0.03, 3e6))
title = "The sinks come and go with it (dotted: uniform)"
figures.by_layer(below, {"heads": sink}, title, ["heads"], xlabel="layer that reads it",
                 ylabel="attention to token 0,\nmean of heads", ylim=(0, None))
below.axhline(baseline, color="black", lw=0.9, ls=":")
show(figure, "04_waves", "Above: size of three dimensions of token 0 by layer, in two "
     "waves. Below: attention to token 0, high in the same layers, low between.")

# %% [markdown]
# In layers 0, 1 and 11 attention to token 0 is near or below that of uniform attention
# (dotted); in layer 10, where the dimension is not yet quite erased, it is three times
# that. The first wave is some thirty times smaller than
# the second, and there are sinks in it all the same. Such a large entry is called a
# *massive activation* (Sun et al. 2024, arXiv 2402.17762).
#
# ## Does this number depend on the text?
#
# We change one number: dimension 507 of token 0, in the state that layer 12 reads. We
# set it to zero, or to the mean that it has on *random* tokens, the same number for
# every text. Predict (exercise 1): which of the two changes leaves the loss on English
# text as it was?

# %%
prediction = ...  # "zero", "mean", "both" or "neither"
ask(prediction)


def with_507(value):
    """A tap that sets dimension 507 of token 0, before layer 12."""
    def change(state):
        state = state.clone()
        state[:, 0, c] = value
        return state
    return make_tap(model.cfg, {"12.resid_pre": change})


text, target = english(4)
mean = states[12][:, 0, c].mean()
taps = {"untouched": None, "zero": with_507(0), "mean": with_507(mean)}
losses = {}
for name, tap in taps.items():
    _, loss = model(text, target, tap)
    losses[name] = loss.item()
words = [f"{name} {loss:.2f} nats" for name, loss in losses.items()]
print(", ".join(words))
assert losses["zero"] - losses["untouched"] > 1, "the model does without it"
assert abs(losses["mean"] - losses["untouched"]) < 0.1, "its value tells of the text"
check("04.prediction", prediction)

# %% [markdown]
# So this entry of token 0 tells later layers nothing about the text. It is a constant,
# and the model cannot do without it. Sun et al. found the same in Llama-2-7B.
#
# ## In small models that you train
#
# `text` reads text after `<|bos|>`. `softmax` reads letters only, at which its heads
# have nothing to look for and must rest.

# %%
inputs = {"text": windows("bos")[0], "softmax": windows("letters")[0]}
for name, net in models("text", "softmax").items():
    middle = inputs[name].shape[1] // 2  # an ordinary token
    (at_0, ordinary), _ = probe.layers(net, inputs[name], ks=(0, middle))
    longest = at_0["norm_ratio"][:-1].max()
    i = at_0["dominance"][:-1].argmax()  # the two tokens in the same layer
    here, there = at_0["dominance"][i], ordinary["dominance"][i]
    strongest = probe.summary(at_0)["sink"]
    print(f"{name}: longest {longest:.1f}, DomRatio after RMSNorm {here:.1f}, "
          f"of token {middle} {there:.1f}, sink {strongest:.2f}")
    assert longest > 1.5, "its first state is not long"
    assert here > 1.5 * there, "its first state is not dominated"

# %% [markdown]
# Both agree with SmolLM2, on a smaller scale. But not every sink *needs* this link. In
# `softmax` the sink came before the long state (chapter 00), and it stays when the
# large dimensions are clipped (chapter 06). In a third model, which copies letters, the
# first state is hardly longer than the others and less dominated than an ordinary one,
# and in four seeds of five it has a sink all the same (`micro` in
# `tests/results/claims.md`, C5 and C7).
#
# ## Beside the paper

# %%
beside(("model", "Llama-2-7B", "SmolLM2-135M"),
       ("dimension", "2533", str(c)),
       ("DomRatio of token 0 after RMSNorm", "262.9 (C = 4096)", normed_0.max().item()),
       ("  token 32, same layer", "not reported", normed_32[normed_0.argmax()].item()))

# %% [markdown]
# ## What would falsify this
#
# Sinks in layer 11, where the dimension is erased, would show that heads find the
# first token without it. A loss that rises when the mean takes its place would show
# that it carries information. The assertions above fail in either case.
#
# **You can now** say whether a few dimensions dominate a state, more than in noise and
# more than in its neighbours, and whether a large number says anything.
#
# ## Exercises
#
# **1.** The prediction above the cell that changes one number.
#
# **2.** One dimension of a state has size s, the other `width` - 1 have size 1. Which s
# gives a DomRatio of `ratio`? Return `math.inf` where no s is large enough. Then try
# the paper's 262.9 with 4096 dimensions and with 64.


# %%
def spike_for(ratio, width):
    ...


check("04.spike_for", spike_for)

# %% [markdown]
# **3.** An experiment. Must the first state be long? Given the state `x` (N, T, C) that
# layer 12 reads, change token 0 only, make it *at most a tenth as long*, and keep the
# loss on English text within 0.3 nats of that of the untouched model. It does not help
# to make dimension 507 alone smaller: even at 0 the rest is longer than a tenth. Look
# at the loss, `model(text, target, with_507(9000))[1]`, and think of what RMSNorm then
# sees.


# %%
def shorten(x):
    ...


check("04.shorten", shorten)
