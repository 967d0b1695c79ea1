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
# long as that of an ordinary one, and nearly all of it is one dimension. Where that
# dimension is large there are sinks, and where it is erased there are none. It marks a
# place, and carries no news.
#
# **You need** chapter 03: the neurons that write it. **Run time**: ten seconds, once
# the two small models exist.

# %%
import math

from lesson import beside, check, english, models, plt, random_tokens, real, show
from lesson import windows

import torch

import probe
from chapters import figures
from model import make_tap, record

torch.set_grad_enabled(False)
model, _ = real()
x, _ = random_tokens()
L, C = model.cfg.num_hidden_layers, model.cfg.hidden_size
names = [f"{i}.{what}" for i in range(L) for what in ("resid_pre", "pattern")]
seen = record(model, x, names)[1]
states = [seen[f"{i}.resid_pre"] for i in range(L)]  # what each layer reads, (N, T, C)

# %% [markdown]
# ## Long
#
# The length of the first state, over that of the median token:
#
# $$\text{norm ratio} = \frac{\lVert x_0 \rVert}{\operatorname{median}_{t>0}
# \lVert x_t \rVert}$$


# %%
def norm_ratio(state):
    """(N, T, C) -> a number, the mean over windows."""
    length = state.norm(dim=-1)
    return (length[:, 0] / length[:, 1:].median(1).values).mean().item()


ratio = torch.tensor([norm_ratio(state) for state in states])
own = probe.over_median(states[12].norm(dim=-1), 0).mean()
assert torch.isclose(ratio[12], own), "the same number in probe"
print("layer:", *(f"{i}: {ratio[i]:.3g}" for i in (0, 2, 3, 8, 11, 12, 20, 28, 29)))
assert ratio[12] > 100 and ratio[11] < 3, "one layer makes it a hundred times as long"

# %% [markdown]
# ## Dominated
#
# How much do a few dimensions dominate a state? The paper's number is
#
# $$\mathrm{DomRatio}(x) = \frac{\max_j |x_j|}{\frac1C \sum_j |x_j|} ,$$
#
# from 1 (all alike) to $C$ (one alone). What would chance give? For $C$ Gaussian
# numbers of standard deviation 1 the mean of $|x_j|$ is $\sqrt{2/\pi}$, and the
# largest lies near $\sqrt{2 \ln C}$:
#
# $$\mathrm{DomRatio}_{\text{Gauss}} \approx \sqrt{2 \ln C} \,\big/ \sqrt{2/\pi}
# = \sqrt{\pi \ln C}$$


# %%
def dominance(x):
    """(..., C) -> (...)"""
    return x.abs().amax(-1) / x.abs().mean(-1)


noise = torch.randn(4000, C, generator=torch.Generator().manual_seed(0))
formula, drawn = math.sqrt(math.pi * math.log(C)), dominance(noise)
assert torch.allclose(drawn, probe.dominance(noise)), "the same number in probe"
print(f"Gaussian vectors of {C}: formula {formula:.1f}, drawn {drawn.mean():.1f}")

# %%
readers = [block.input_layernorm for block in model.layers]
normed = [reader(state) for reader, state in zip(readers, states)]
raw_0, raw = (torch.stack([dominance(s[:, t]).mean() for s in states]) for t in (0, 32))
dom_0, dom = (torch.stack([dominance(s[:, t]).mean() for s in normed]) for t in (0, 32))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.5))
figures.by_layer(left, {"token 0": ratio}, "Over 100 times as long as the median",
                 ["token 0"], yscale="log", ylabel="norm ratio (log)")
curves = {"token 0": raw_0, "token 0, after RMSNorm": dom_0,
          "token 32": raw, "token 32, after RMSNorm": dom}
figures.by_layer(right, curves, "And most of it is one dimension",
                 ["token 0", "token 0, after RMSNorm"], yscale="log", ylim=(3, 3000),
                 ylabel="DomRatio (log)")
right.axhline(formula, color="black", lw=0.9, ls=":", label="Gaussian")
right.axhline(C, color="black", lw=0.9, ls="--", label=f"ceiling {C}")
right.legend(ncols=2, loc="upper left", fontsize=8, columnspacing=1)
show(figure, "04_disparity", "Left: the norm ratio by layer, 10 in the first wave and "
     "over 100 from 12 on. Right: DomRatio of token 0 far above that of token 32.")

# %% [markdown]
# Two things to notice. An ordinary token is no Gaussian vector either: its DomRatio is
# many times the null, because every state has a few large dimensions. And RMSNorm
# takes much of the disparity back: its gain $\gamma$ is small just there. The model
# has learned to turn that dimension down.

# %%
deep = slice(12, 28)
share = states[12][:, 0].square().mean(0) / states[12][:, 0].square().sum(-1).mean()
c = share.argmax().item()
print(f"dimension {c} holds {share[c]:.1%} of the squared length")
gains = [reader.weight.abs() for reader in readers[deep]]
rank = [(gain < gain[c]).sum().item() for gain in gains]
print(f"of {C} gains, smaller than that of dimension {c}, by layer:", *rank)
assert share[c] > 0.9, "one dimension is nearly all of the length"
assert (raw_0 / raw)[deep].mean() > 3 and (dom_0 / dom)[deep].mean() > 1.5, (
    "token 0 is dominated far more than others, and still more after the norm")

# %% [markdown]
# ## Two waves, and the sinks follow
#
# Which dimensions are large, and where? And how much do the heads of that layer attend
# to token 0? Nothing is changed here. The model itself writes, erases and writes
# again, and we look at what attention does.

# %%
first = torch.stack([state[:, 0].abs().mean(0) for state in states])  # (L, C)
sink = torch.stack([probe.sink_score(seen[f"{i}.pattern"], 0).mean() for i in range(L)])
for i in (1, 3, 8, 11, 12, 20, 29):
    print(f"layer {i:2} reads {first[i, c]:5.0f} in dimension {c}, at most "
          f"{first[i].max():5.0f}; attention {sink[i]:.2f}")
chance = probe.uniform_sink(64)
written = torch.cat([sink[3:9], sink[12:28]])
missing = torch.stack([sink[0], sink[1], sink[11]])
assert missing.max() < 2 * chance < 4 * chance < written.min(), "no write, no sink"

# %%
figure, (top, below) = plt.subplots(2, 1, figsize=(8.8, 4.6), sharex=True)
largest = first[3].topk(3).indices.tolist()
large = {f"dimension {i}": first[:, i] for i in largest}
large["median dimension"] = first.median(1).values
figures.by_layer(top, large, f"Dimension {c} comes, goes and comes again",
                 [f"dimension {c}"], dict(ncols=2), yscale="log", xlabel=None,
                 ylabel="|x| of token 0 (log)", ylim=(0.03, 3e6))
figures.by_layer(below, {"heads": sink}, "and so do the sinks", ["heads"],
                 ylabel="attention to token 0,\nmean of heads", ylim=(0, None))
below.axhline(chance, color="black", lw=0.9, ls=":")
show(figure, "04_waves", "Above: size of three dimensions of token 0 by layer, in two "
     "waves. Below: attention to token 0, high in the same layers, at chance between.")

# %% [markdown]
# Before the first wave and between the two, attention to token 0 is near or below
# chance (dotted). The heads of layer 11 have nothing to find. Such a large entry is
# called a *massive activation* (Sun et al. 2024, arXiv 2402.17762). The first wave is
# some thirty times smaller than the second, and has its sinks all the same.
#
# ## Does it say anything?
#
# Change one number: dimension 507 of token 0, in the state that layer 12 reads. Set it
# to zero, or set it to the mean that it has on *random* tokens, the same for every
# text. Predict: which of the two does English text not notice?

# %%
prediction = ...  # "zero", "mean", "both" or "neither"


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
losses = {name: model(text, target, tap)[1].item() for name, tap in taps.items()}
print(", ".join(f"{name} {loss:.2f} nats" for name, loss in losses.items()))
worse = {name: loss - losses["untouched"] for name, loss in losses.items()}
assert worse["zero"] > 1 and abs(worse["mean"]) < 0.1, "its mean is as good, zero not"
check("04.prediction", prediction)

# %% [markdown]
# So this dimension carries no news. It is a constant that marks a place, and the rest
# of the model is built on it. The same is known of Llama-3.2-1B: four dimensions set
# to zero ruin it, set to their mean they change nothing.
#
# ## In one that you train
#
# `tiny-softmax` reads text after `<|bos|>`, `softmax` letters where there is nothing to
# copy. We look at the states that some later layer reads.

# %%
small = models("tiny-softmax", "softmax")
inputs = {"text after <|bos|>": ("tiny-softmax", windows("bos")[0]),
          "nothing to copy": ("softmax", windows("rest")[0])}
longest, dominated = {}, {}
for what, (name, tokens) in inputs.items():
    both, _ = probe.layers(small[name], tokens, ks=(0, 32))
    longest[what] = both[0]["norm_ratio"][:-1].max().item()
    here, there = dominated[what] = [f["dominance"][:-1].max().item() for f in both]
    print(f"{name}, {what}: longest {longest[what]:.1f}, DomRatio {here:.1f}, of "
          f"token 32 {there:.1f}, sink {probe.summary(both[0])['sink']:.2f}")
here, there = dominated["text after <|bos|>"]
assert longest["text after <|bos|>"] > 1.5 < here / there, "as in SmolLM2, but smaller"
here, there = dominated["nothing to copy"]
assert longest["nothing to copy"] < 2 > here / there, "a sink without the disparity"

# %% [markdown]
# The text model agrees with SmolLM2, in small: its first state is the long one, and a
# few dimensions dominate it. The copying model does not. Where it has nothing to copy,
# its first state is about as long as the others, and an *ordinary* state is the more
# dominated one. The sink is there all the same. So a sink does not *need* this link.
# Why, then, does a real model have it? One guess: it reads many kinds of token, and a
# state that is a hundred times as long cannot be disturbed by any of them.
#
# ## Beside the paper

# %%
beside(("model", "Llama-2-7B", "SmolLM2-135M"),
       ("dimension", "2533", str(c)),
       ("DomRatio of token 0 after RMSNorm", "262.9 (C = 4096)", dom_0.max().item()),
       ("  token 32", "not reported", dom.max().item()))

# %% [markdown]
# ## What would falsify this
#
# Sinks in layer 11, where the dimension is erased, would show that heads find the
# first token without it. A loss that notices the mean would show that it carries a
# message. Both are asserted. That a large dimension is not *necessary* for a sink, the
# model that copies shows.
#
# ## Exercises
#
# **1.** The prediction above the cell that changes one number.
#
# **2.** One dimension of a state has size s, all `width` - 1 others have size 1. How
# large is s for a DomRatio of `ratio`? Give `math.inf` where no s is large enough.
# Then try the paper's 262.9 with 4096 dimensions and with 64.


# %%
def spike_for(ratio, width):
    ...


check("04.spike_for", spike_for)

# %% [markdown]
# **3.** An experiment. Must the first state be long? Given the state `x` (N, T, C)
# that layer 12 reads, change token 0 only, make it *at most a tenth as long*, and keep
# the loss on English text within 0.3 nats of that of the untouched model. To make
# dimension 507 alone smaller is not the way: try `with_507(9000)` first, and think
# about why.


# %%
def shorten(x):
    ...


check("04.shorten", shorten)
