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
# its best learning rate most.
#
# **You learn** to ask what a head needs before you cure it. **You need** chapters 00
# and 01. **Run time**: ten seconds, after three minutes of training (ten on busy
# cores).

# %%
from statistics import fmean

from lesson import ROOT, TASK, ask, check, figures, log, models, plt, show, windows

import probe
from data.common import read_json
from model import ATTENTIONS

# %% [markdown]
# ## A head with nothing to look for
#
# A window has 16 random symbols. At a *trigger* (W, X, Y or Z) the model must name the
# symbol before it. Elsewhere the target is random (the first token has none, -), and a
# head has nothing to add. The logits see only what the heads of the last of three
# layers deliver. So a head that is not silent disturbs the answer.

# %%
softmax = models("softmax")["softmax"]  # trained first, if it is missing: a minute
x, y = windows("rest", 256)
shown = (x >= TASK.K).sum(1).argmax()  # the window with most triggers
print("tokens ", *(TASK.symbols[token] for token in x[shown]))
print("targets", *("-" if token < 0 else TASK.symbols[token] for token in y[shown]))

resting = TASK.resting(x)  # (N, T): no trigger, and not in the first quarter
found, uniform = probe.chain(softmax, x, queries=resting), probe.uniform_weight(resting)
print(f"sink {found['sink']:.2f} (uniform {uniform:.2f}), value {found['drain']:.2f}")
assert found["sink"] > 0.9 and found["drain"] < 0.2, "it does not rest on nothing"
figure, axis = plt.subplots(figsize=(6.4, 2.6))
figures.track(axis, log("softmax"), lambda row: row["links_rest"]["sink"],
              color=figures.ACCENT)
axis.axhline(uniform, **figures.DOTTED)
figures.dress(axis, "A sink is born on an ordinary token (dotted: uniform)",
              ylim=(0, 1), xlabel="step", ylabel="attention to token 0")
show(figure, "07_birth", "Attention to token 0 rises from uniform to nearly one.")

# %% [markdown]
# A resting head that averages values puts noise into the logits. With all its weight on
# *one* key whose value is nearly nothing (printed: its length over the mean) it adds
# none. Why token 0? It is the only one that has averaged nothing (exercise 2).
#
# ## Five ways to attend: predict first (exercise 1)
#
# With the score $\ell_{ts}$ of key $s \le t$ and its softmax $A_{ts}$ over $s$:
#
# - *Softmax*: $z_t = \sum_s A_{ts} v_s$. The weights add up to 1.
# - *Sigmoid*: the weights are $\sigma(\ell_{ts} - \log n)$, $n$ the training length.
# - *Gated* (arXiv 2505.06708): $\sigma(w \cdot x_t) z_t$ with the normed state $x_t$.
# - *Logit* (gpt-oss): the weights are $e^{\ell_{ts}} / (e^b + \sum_r e^{\ell_{tr}})$,
#   with the learned score $b$ of a key that is not there.
# - *Headnorm* (the paper): $\lambda \odot \mathrm{RMSNorm}(z_t)$, where $\lambda$ is
#   learned.
#
# With which is the weight on token 0 that *reaches the output* (gated: attention times
# gate) below 0.22, twice that of uniform attention, in every seed?

# %%
prediction = [...]  # names out of ATTENTIONS
ask(prediction)

# %%
trained = models(*ATTENTIONS)  # what is missing is trained, two at a time
letters, _ = windows("letters", 256)  # no trigger
patterns = {attn: probe.reaching(trained[attn], letters).mean((0, 1))
            for attn in ATTENTIONS}  # mean over windows and heads: (T, T)
figure = figures.maps(patterns, [(0,)] * 5, "Three cures let heads be silent")
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
# at all positions (chapter 01) and may be nothing. With *readout final* the usual MLP
# and norm follow, and no head must be silent.

# %%
grid = read_json(ROOT / "tests/results/rest.json")["grid"]  # python -m tests.rest
variants = read_json(ROOT / "tests/results/why.json")["runs"]  # python -m tests.why
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
# "No sink on token 0" is not "no sink": headnorm's heads also rest on symbols that they
# recognise ([all numbers](../tests/results/rest.md)). This model trains 0.15 million
# weights; the paper reports no sink under headnorm, at 152 million.
#
# ## Built into SmolLM2
#
# `python -m tests.retrofit` builds a cure into SmolLM2, which then trains 500 steps on
# Python's standard library. *Scaled*, headnorm's control, gives all heads the same mean
# length by constants. On random tokens headnorm, scaled and sigmoid take the sink at
# once; what counts is what comes back. Heads with a sink at the end, over all orders of
# the batches, and the price in nats above softmax ([each](../tests/results/cures.md)):
#
# | SmolLM2 as | orders | random tokens | text | price |
# |---|---|---|---|---|
# | softmax | 1 | 75% | 73% | +0.00 |
# | headnorm | 6 | 9% to 46% | 21% to 65% | +0.36 to +0.47 |
# | scaled | 6 | 31% to 67% | 71% to 74% | +0.05 to +0.10 |
# | sigmoid | 2 | 1% to 3% | 1% to 28% | +0.44 to +0.52 |
# | gated | 1 | 74% | 72% | +0.00 |
# | logit | 2 | 31% to 41% | 65% to 66% | -0.01 to +0.02 |
#
# (Counted is attention without gates, as a share of each query's sum.) What headnorm
# takes depends on the order, and in one its control takes more; in text more than half
# is there in all but one. Sigmoid ends the sink in one order; in the other it costs
# over half a nat, too much to judge it.
#
# ## A sink may be of use
#
# The model `copy` counts letters from token 0, as with a ruler: chapter 08 shows it. So
# do such models with headnorm or gated attention, with a sink or without: neither takes
# away the *use* ([five seeds](../tests/results/cures.md)).
#
# ## What would falsify this
#
# - A seed of softmax that learns without a sink, or one of the three cures that gives
#   token 0 more than uniform attention.
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
