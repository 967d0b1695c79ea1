# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 07 · Heads that must rest, and their cures
#
# **Claim.** Where heads must be silent, softmax attention grows a sink on an ordinary
# first token, in every seed of a small model. Some cures end it; one takes a part, at
# its best learning rate most. Where the first token is of use, every attention tried
# goes on using it.
#
# **You learn** to ask what a head needs before you cure it. **You need** chapters 00
# and 01. **Run time**: ten seconds, once six small models are trained (four minutes on
# two fast cores, twelve on slow or busy ones).

# %%
from statistics import fmean

from lesson import ROOT, TASK, ask, check, figures, log, models, plt, show, windows

import torch

import probe
from data.common import read_json
from model import ATTENTIONS

# %% [markdown]
# ## A head with nothing to look for
#
# A window has 16 random symbols; the first has no target (-). At a *trigger* (W, X, Y
# or Z) the model must name the symbol before it. Everywhere else the target is random,
# and a head has nothing to add. The logits see only what the heads of the last of three
# layers deliver. So a head that is not silent disturbs the answer.

# %%
softmax = models("softmax")["softmax"]  # trained first, if it is missing: a minute
x, y = windows("rest", 256)
shown = (x >= TASK.K).sum(1).argmax()  # the window with most triggers
print("tokens ", *(TASK.symbols[token] for token in x[shown]))
print("targets", *("-" if token < 0 else TASK.symbols[token] for token in y[shown]))

resting = TASK.resting(x)  # (N, T): no trigger, and not in the first quarter
found, uniform = probe.chain(softmax, x, queries=resting), probe.uniform_weight(resting)
print(f"{found['sink']:.2f} of the strongest head's attention is on token 0 (uniform: "
      f"{uniform:.2f}); its value: {found['drain']:.2f} of the mean length")
assert found["sink"] > 0.9 and found["drain"] < 0.2, "it does not rest on nothing"

figure, axis = plt.subplots(figsize=(6.4, 2.6))
figures.track(axis, log("softmax"), lambda row: row["links_rest"]["sink"],
              color=figures.ACCENT)
axis.axhline(uniform, **figures.DOTTED)
figures.dress(axis, "A sink is born on an ordinary token (dotted: uniform)",
              ylim=(0, 1), xlabel="step",
              ylabel="attention to token 0,\nstrongest head")
show(figure, "07_birth", "Between steps 65 and 333 attention to token 0 rises from "
     "uniform to nearly one.")

# %% [markdown]
# A resting head that averages values puts noise into the logits. With all its weight on
# *one* key whose value is nothing it adds nothing. Why token 0? It is the only one that
# has averaged nothing (exercise 2).
#
# ## Five ways to attend: predict first (exercise 1)
#
# Let $\ell_{ts}$ be the score of key $s \le t$, $A_{ts}$ its softmax over $s$, $\sigma$
# the sigmoid.
#
# - *Softmax*: $z_t = \sum_s A_{ts} v_s$. The weights add up to 1.
# - *Sigmoid*: the weights are $\sigma(\ell_{ts} - \log n)$, $n$ the training length.
# - *Gated* (arXiv 2505.06708): $\sigma(w \cdot x_t) z_t$ with the normed state $x_t$.
# - *Logit* (gpt-oss): the weights are $e^{\ell_{ts}} / (e^b + \sum_r e^{\ell_{tr}})$,
#   with the learned score $b$ of a key that is not there.
# - *Headnorm* (the paper): $\lambda \odot \mathrm{RMSNorm}(z_t)$, with a learned gain
#   $\lambda$.
#
# With which is the weight on token 0 that *reaches the output* (gated: attention times
# gate) less than twice that of uniform attention, in every seed?

# %%
prediction = [...]  # names out of ATTENTIONS
ask(prediction)

# %%
trained = models("copy", *ATTENTIONS)  # what is missing is trained, two at a time
letters, _ = windows("letters", 256)  # no trigger: all queries rest
patterns = {attn: probe.reaching(trained[attn], letters).mean((0, 1))
            for attn in ATTENTIONS}  # mean over windows and heads: (T, T)
figure = figures.maps(patterns, [(0,)] * 5,
                      "Sigmoid, gated and logit let a head be silent")
show(figure, "07_maps", "A column at token 0 under softmax, a fading one under "
     "headnorm, next to nothing anywhere under sigmoid, gated and logit.")

# %% [markdown]
# ## Why does headnorm take a part?
#
# It does two things at once. *Parity*, the paper's reason: heads rest on the first
# token because its $z$ varies most, and now all vary alike. *Silence*: heads rest on a
# value that is nothing, and now no output can be nothing. Variants tell them apart: the
# norm only in layer 0, where the chain begins, only in layer 2, where heads must rest,
# or in both. *Levelled* attention, $z_t / (\sum_s A_{ts}^2)^{1/2}$, varies nearly alike
# at all positions (chapter 01) and may be nothing. With *readout final* an MLP follows,
# and no head must be silent.

# %%
results = ROOT / "tests/results"
grid = read_json(results / "rest.json")["grid"]  # python -m tests.rest
variants = read_json(results / "why.json")["runs"]  # python -m tests.why
runs = {attn: grid[attn]["0.005"] | variants.get(attn, {})
        for attn in ("softmax", "sigmoid", "gated", "logit", "headnorm")}
runs["headnorm, rate 0.01"] = grid["headnorm"]["0.01"]  # its best; the others: 0.005
for name in ("norm in layer 0", "norm in layer 2", "norm in layers 0 and 2", "levelled",
             "softmax, readout final"):
    runs[name] = variants[name]
seeds = {name: [fmean(run["weights"]["reaching"]) for run in each.values()]
         for name, each in runs.items()}  # mean over the heads of the last layer

figure, axis = plt.subplots(figsize=(6.4, 4))
figures.dots(axis, seeds, "Three cures end the sink; headnorm takes a part",
             hot=["softmax"], xlim=(-0.02, 1.02),
             xlabel="weight on token 0, a dot a seed (dotted: uniform attention)")
axis.axvline(uniform, **figures.DOTTED)
show(figure, "07_seeds", "Near one: softmax, mostly norm in layer 0. Zero: sigmoid, "
     "gated, logit. As uniform: readout final. All others spread between.")
check("07.prediction", prediction)
mean = {name: fmean(values) for name, values in seeds.items()}
print(*(f"{name}: {value:.2f}" for name, value in mean.items()), sep="\n")
assert min(seeds["softmax"]) > 0.9, "a seed of softmax has no sink"
for cure in ("sigmoid", "gated", "logit"):
    assert max(seeds[cure]) < uniform, f"{cure} has a sink"
assert mean["headnorm, rate 0.01"] < 0.5 * mean["headnorm"], "the rate does not matter"
assert mean["levelled"] < 0.5 < 0.9 < mean["norm in layer 0"], "parity explains it"
assert mean["softmax, readout final"] < 1.2 * uniform, "no need to rest, but a sink"

# %% [markdown]
# Neither explains it alone. Parity in layer 0 leaves the sink, and the norm in layer 2
# leaves two thirds of it in the mean. Levelled heads could rest on token 0 in silence,
# yet most of their weight is elsewhere. But where no head must be silent no sink is
# born, and *logit*, whose only change is that a head need not look anywhere, ends it:
# here a head needs a reason to rest.
#
# One seed, or one learning rate, judges no cure. And "no sink on token 0" is not "no
# sink": headnorm's heads also rest on symbols that they recognise ([all
# numbers](../tests/results/rest.md)). This model trains 0.15 million weights; the paper
# reports no sink under headnorm, at 152 million.
#
# ## Built into SmolLM2
#
# `python -m tests.retrofit` builds a cure into SmolLM2, which then trains 500 steps on
# Python's standard library. *Scaled*, headnorm's control, gives all heads the same mean
# length by constants. On random tokens sigmoid and both of these take the sink at once;
# what counts is what comes back.

# %%
retrofit = read_json(results / "retrofit.json")
usual, back = fmean(retrofit["softmax"]["end"]["losses"]), {}
rows = [("", "loss", "heads with a sink, random tokens", "in text")]
for cure in ("softmax", "headnorm", "scaled", "gated", "logit", "sigmoid"):
    names = sorted(name for name in retrofit if name.split(",")[0] == cure)
    ends = [retrofit[name]["end"] for name in names]
    price = round(fmean(fmean(end["losses"]) for end in ends) - usual, 2) + 0.0  # no -0
    back[cure], text = ([fmean(chain["share"] for chain in end[kind]) for end in ends]
                        for kind in ("random", "text"))
    in_words = (" ".join(f"{s:4.0%}" for s in shares) for shares in (back[cure], text))
    rows.append((cure, f"{price:+.2f}", *in_words))
probe.table(rows, left=4)
whole = back["softmax"][0]
assert min(back["headnorm"]) < whole / 5, "it never takes most of the sink"
assert max(back["headnorm"]) > whole / 2, "it takes half of it in every order"
assert min(back["scaled"]) > whole / 5, "the control is a cure as well"

# %% [markdown]
# (A number for each order of the batches; loss: nats above softmax's only order, their
# mean. Attention itself is counted here, gates are not.)
#
# What headnorm takes on random tokens depends on the order, and in one its control
# takes more; in text more than half is back in all but one. Its price is 0.4 nats.
# Sigmoid ends the sink in one order, at +0.44; in the other it has not healed (+0.52).
# Gated and logit cost hardly anything, and leave two fifths of it or more, in text nine
# tenths.
#
# ## A sink that is of use: the ruler
#
# The small model `copy` reads 8 to 24 letters, then, in most windows, the same again
# and again in UPPER case. To expect the end of the letters it must count them, from
# some token: rotary positions tell only distances. In windows that repeat nothing, hide
# token 0 or, as a control, token 5.

# %%
quiet, _ = windows("quiet")
curves = {}
for name, hidden in {"untouched": 63, "token 5 hidden": 5, "token 0 hidden": 0}.items():
    seen = torch.ones(64, 64, dtype=torch.bool)
    seen[hidden + 1:, hidden] = False  # 63 is the last: nobody looks there
    logits, _ = trained["copy"](quiet, mask=seen)
    upper = logits.softmax(-1)[..., 16:32].sum(-1)  # the ids of upper-case letters
    curves[name] = upper.mean(0)[:32].detach()
figure, axis = plt.subplots(figsize=(6.4, 2.8))
figures.lines(axis, curves, hot=["token 0 hidden"])
figures.dress(axis, "Without token 0 the model is one place behind", {},
              xlabel="position", ylabel="probability that the letters end")
show(figure, "07_ruler", "With token 0 hidden, the same curve one place to the right.")
before, without_5, without_0 = curves.values()
moved = (without_0 - before)[1:].abs().mean()
assert (without_0[2:] - before[1:-1]).abs().mean() < moved / 3, "token 0 is no ruler"
assert (without_5 - before)[1:].abs().mean() < moved / 3, "token 5 does a third as much"

# %% [markdown]
# Now it counts from token 1. So do models with headnorm, gated and sigmoid (which has
# not learned to copy), with a sink or without ([five
# seeds](../tests/results/cures.md)): none takes away the *use*.
#
# ## What would falsify this
#
# - A seed of softmax that learns without a sink, or one of the three cures with one.
# - A large text model with a learned logit from the start that keeps its sink: then it
#   rests for another reason than that it must look somewhere.
#
# **You can now** ask what a head needs, and judge a cure where the sink has no use.
#
# ## Exercises
#
# **1.** The prediction above.
#
# **2.** Move the sink of `softmax` to token 1: hide one token from all others, in all
# layers, by a mask (16, 16), True where a query may look. Why does it move there?

# %%
mask = ...
check("07.mask", mask)
