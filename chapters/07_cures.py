# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 07 · Heads that must rest, and their cures
#
# **Claim.** In a small model whose heads must be silent where there is nothing to look
# for, softmax attention grows a sink on an ordinary first token, in every seed. Three
# cures end it, headnorm takes a part, and how large a part depends on the learning
# rate. Where the first token is of use, the models that were tried go on using it.
#
# **You learn** to ask what a head needs before you cure it. **You need** chapters 00
# and 01. **Run time**: ten seconds, once six small models are trained (two to five
# minutes on two cores; they stay in `out/`).

# %%
from statistics import fmean

from lesson import ROOT, TASK, ask, beside, check, figures, log, models, placed
from lesson import plt, show, windows

import torch

import probe
from data.common import read_json
from data.runs import read_config
from model import ATTENTIONS, make_tap, record

# %% [markdown]
# ## Predict first (exercise 1)
#
# Write $\ell_{ts}$ for the score of key $s \le t$, $A = \mathrm{softmax}(\ell)$, and
# $\sigma(x) = 1 / (1 + e^{-x})$. Five ways to mix the values $v_s$:
#
# $$\text{softmax} \quad z_t = \sum_{s \le t} A_{ts}\, v_s, \qquad
# \text{sigmoid} \quad z_t = \sum_{s \le t} \sigma(\ell_{ts} - \log n)\, v_s$$
#
# $$\text{gated} \quad z_t = \sigma(w \cdot x_t) \sum_{s \le t} A_{ts}\, v_s, \qquad
# \text{logit} \quad z_t = \frac{\sum_{s \le t} e^{\ell_{ts}}\, v_s}
# {e^b + \sum_{s \le t} e^{\ell_{ts}}}$$
#
# $$\text{headnorm} \quad z_t = \lambda \odot \mathrm{RMSNorm}
# \Big(\sum_{s \le t} A_{ts}\, v_s\Big)$$
#
# - **Softmax** weights add up to 1: a head that wants nothing must look somewhere.
# - **Sigmoid** weights do not compete: all may be small. $n$ is the training length.
# - **Gated** (arXiv 2505.06708) multiplies a head's output by a gate, which may close.
# - **Logit**, as in gpt-oss: one learned number $b$ a head, the score of a key that is
#   not there. It changes nothing but that weights may add up to less than 1.
# - **Headnorm**, the paper's: each head's output gets a fixed length, times a learned
#   gain $\lambda$. All positions then vary nearly alike: *parity*.
#
# The same small model is trained with each of them, in five seeds or more. What counts
# is the weight on token 0 that *reaches the output* (gated: attention times gate). With
# which of them is it less than twice that of uniform attention, in *every* seed?

# %%
prediction = [...]  # names out of ATTENTIONS
ask(prediction)

# %% [markdown]
# ## A head with nothing to look for
#
# A window has 16 symbols, drawn independently; the first has no target (-). At a
# *trigger* (W, X, Y or Z) the model must name the symbol before it. Everywhere else the
# target is a random symbol, so that the best answer is always the same: a head has
# nothing to look for. Three layers of four heads read this, and the logits see only
# what the heads of the last layer deliver. So whatever a resting head says disturbs the
# answer.

# %%
softmax = models("softmax")["softmax"]  # trained first, if it is missing: a minute
x, y = windows("rest", 256)
resting = TASK.resting(x)  # (N, T): letters, from a quarter of the window on
shown = (x >= TASK.K).sum(1).argmax()  # the window with most triggers
print("tokens ", " ".join(TASK.symbols[token] for token in x[shown]))
print("targets", " ".join("-" if t < 0 else TASK.symbols[t] for t in y[shown]))
print("resting", " ".join("r" if rests else "." for rests in resting[shown]))

found = probe.chain(softmax, x, queries=resting)
uniform = probe.uniform_weight(resting)
print(f"strongest head: {found['sink']:.2f} of its attention on token 0 "
      f"(uniform: {uniform:.2f})\nvalue of token 0: {found['drain']:.2f} of the mean "
      f"length; its state: {found['norm_ratio']:.1f} times the median")
assert found["sink"] > 0.9, "no sink"
assert found["drain"] < 0.2, "its value is not nearly nothing"

# %%
rows = log("softmax")
figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 2.8))
figures.track(left, rows, lambda row: row["links_rest"]["sink"], color=figures.ACCENT)
left.axhline(uniform, **figures.DOTTED)
figures.dress(left, "A sink is born on an ordinary token (dotted: uniform)",
              ylim=(0, 1), xlabel="step",
              ylabel="attention to token 0,\nstrongest head")
figures.track(right, rows, lambda row: row["val_loss"], color="black")
perfect = read_config(placed("softmax").out)["optimal_loss"]
right.axhline(perfect, **figures.DOTTED)
figures.dress(right, "when most of the task is learned (dotted: perfect)",
              xlabel="step", ylabel="loss, nats")
show(figure, "07_birth", "The loss falls most of its way first. Then attention to "
     "token 0 rises from 0.2 to nearly one.")

# %% [markdown]
# Why token 0? A resting head that averages values leaves noise in the logits, which
# costs loss. One that puts all its weight on *one* key whose value is nothing has no
# noise at all. So hide token 0 from all later queries of the last layer: the heads must
# make noise again.


# %%
def hide(k):
    """A tap: in the last layer no later query sees token k."""
    def change(scores):
        scores[:, :, k + 1:, k] = -torch.inf
        return scores
    return make_tap(softmax.cfg, {"2.scores": change})


def excess(tap=None, mask=None):
    """Loss of softmax at resting queries, in nats above that of a perfect predictor."""
    with torch.no_grad():
        logits, _ = softmax(x, tap=tap, mask=mask)
    symbols = logits.log_softmax(-1)[..., :len(TASK.symbols)]
    best = torch.tensor(len(TASK.symbols)).log()  # all symbols are equally likely
    return (-symbols.mean(-1) - best)[resting].mean().item()


costs = {"nothing hidden": excess(), "token 2 hidden": excess(hide(2)),
         "token 0 hidden": excess(hide(0))}
for name, cost in costs.items():
    print(f"{name:15} {cost:.4f} nats above perfect")
assert costs["token 0 hidden"] > 10 * costs["token 2 hidden"], "any token would do"

# %% [markdown]
# And how do the heads know token 0? Hide it in *all* layers, so that token 1 sees only
# itself, as token 0 did.

# %%
mask = torch.ones(16, 16, dtype=torch.bool)
mask[1:, 0] = False
with torch.no_grad():
    pattern = record(softmax, x, ["2.pattern"], mask=mask)[1]["2.pattern"]
moved = probe.sink_score(pattern, 1, resting).mean().item()
print(f"token 0 hidden in all layers: {moved:.2f} of the attention is on token 1, "
      f"{excess(mask=mask):.4f} nats above perfect")
assert moved > 0.8, "the sink does not move"
assert excess(mask=mask) < 2 * excess(), "token 1 is a worse place to rest"

# %% [markdown]
# The sink moves to token 1, and nothing is lost. So it is not place 0 that counts:
# token 1 is now the one that has *averaged nothing*.
#
# ## The cures
#
# Here are the last layer's heads in windows of letters only, where all queries rest:
# the mean over heads of the weight that reaches the output.

# %%
trained = models("copy", *ATTENTIONS)  # what is missing is trained, two at a time
copier = trained.pop("copy")  # for the end of this chapter
letters = torch.randint(TASK.K, (256, 16), generator=torch.Generator().manual_seed(1))
patterns = {}
for attn, model in trained.items():
    patterns[attn] = probe.reaching(model, letters).mean((0, 1))  # (T, T)
figure = figures.maps(patterns, [(0,)] * 5, "Sigmoid, gated and logit let a head be "
                      "silent")
show(figure, "07_maps", "Maps of five models: a full column at token 0 under softmax, "
     "next to nothing anywhere under sigmoid, gated and logit, and headnorm between.")

# %%
grid = read_json(ROOT / "tests/results/rest.json")["grid"]  # python -m tests.rest
variants = read_json(ROOT / "tests/results/why.json")["runs"]  # python -m tests.why


def runs(name, rate="0.005"):
    """Five seeds; at 0.005 ten of softmax, of headnorm and of each variant."""
    more = variants.get(name, {}) if rate == "0.005" else {}
    return [*(grid.get(name, {}).get(rate, {}) | more).values()]


def on_first(run):
    """The weight on token 0 that reaches the output, mean over the last heads."""
    return fmean(run["weights"]["reaching"])


def dots(rows, title, name, alt):
    """A row of seeds for each of these {label: runs}."""
    figure, axis = plt.subplots(figsize=(6.4, 3))
    seeds = {label: [*map(on_first, found)] for label, found in rows.items()}
    figures.dots(axis, seeds, title, hot=["softmax"], xlim=(-0.02, 1.02),
                 xlabel="weight on token 0, a dot a seed (dotted: uniform attention)")
    axis.axvline(uniform, **figures.DOTTED)
    show(figure, name, alt)
    for label, found in rows.items():
        largest = fmean(fmean(run["weights"]["largest"]) for run in found)
        loss = fmean(run["loss"]["rest"] for run in found)
        print(f"{label:30} token 0 {fmean(seeds[label]):.2f}, largest key of a "
              f"query {largest:.2f}, {loss:.4f} nats above perfect")


cures = {attn: runs(attn) for attn in ATTENTIONS}
cures["headnorm, rate 0.01"] = runs("headnorm", "0.01")
dots(cures, "Three cures end the sink; headnorm takes a part of it", "07_seeds",
     "Weight on token 0 of five or ten seeds of each attention: softmax near one, "
     "headnorm spread from 0.16 to 0.73, at rate 0.01 mostly below 0.2, others zero.")
check("07.prediction", prediction)
mean = {attn: fmean(map(on_first, found)) for attn, found in cures.items()}
assert min(map(on_first, cures["softmax"])) > 0.9, "a seed of softmax has no sink"
for attn in ("sigmoid", "gated", "logit"):
    assert max(map(on_first, cures[attn])) < uniform, f"{attn} has a sink"
assert uniform < mean["headnorm"] < 0.7 * mean["softmax"], "headnorm takes no part"
assert mean["headnorm, rate 0.01"] < 0.5 * mean["headnorm"], "the rate does not matter"

# %% [markdown]
# How much headnorm takes depends on the seed and on the learning rate: most of the sink
# at 0.01, where it and softmax learn best. (Three rates of each attention:
# `tests/results/rest.md`.) So a cure that is judged at one rate is not judged.
#
# And "no sink on token 0" is not "no sink". Look at the *largest key*, as a share of a
# query's own attention: headnorm's heads still rest on one key, often token 0, else
# mostly one of two symbols that it recognises (`tests/results/rest.md`), and their
# noise is about that of softmax. (Of the three others hardly any attention reaches the
# output, and their noise is a tenth.)
#
# ## Why does headnorm take what it takes?
#
# It does two things at once, so there are two explanations:
#
# - *parity*, the paper's: heads rest on the first token because its $z$ varies most.
#   Headnorm lets all tokens vary alike.
# - *silence*: a head that has nothing to say rests on a value that is nothing. Headnorm
#   gives every output full length, so that no head can be silent by resting.
#
# `python -m tests.why` has trained models that have one of the two effects, or both.
# The norm stands in layer 0, where the chain begins, in layer 2, where a head must
# rest, or in both. *Levelled* attention, in all layers, divides $z_t$ by the root
# $(\sum_s A_{ts}^2)^{1/2}$: by the law of chapter 01 all positions then vary nearly
# alike, but a value that is nothing stays nothing. In the last row the residual, the
# MLP and the norm behind the heads may ignore what a resting head says.

# %%
VARIANTS = {"softmax": "softmax", "norm in layer 0": "norm in layer 0: parity",
            "levelled": "levelled: parity",
            "norm in layer 2": "norm in layer 2: no silence",
            "norm in layers 0 and 2": "norm in 0 and 2: both",
            "softmax, readout final": "readout final: no need to rest"}
dots({label: runs(name) for name, label in VARIANTS.items()},
     "No sink where no head needs to rest (last row)", "07_why",
     "Weight on token 0, a row of seeds for each variant: with the norm in layer 0 "
     "mostly near one; levelled mostly below 0.45; with the norm in layer 2, or in 0 "
     "and 2, spread; as under uniform attention where nothing has to be silent.")
why = {name: fmean(map(on_first, runs(name))) for name in VARIANTS}
assert why["norm in layer 0"] > 0.9, "parity in layer 0 takes the sink"
assert why["levelled"] < 0.5, "levelled attention keeps the sink"
assert why["norm in layers 0 and 2"] < why["norm in layer 2"] - 0.1
assert why["softmax, readout final"] < 1.2 * uniform, "no need to rest, but a sink"

# %% [markdown]
# Neither explains it alone. Parity in layer 0 leaves the sink, and the norm in layer 2
# takes a third of it. Levelled attention takes most of it, although its heads may be
# silent; but they still put nearly all their attention on *one* key a query, now mostly
# another letter: they rest elsewhere. Where nothing has to be silent, softmax has no
# sink: a head needs a reason to rest. (Twelve variants, and what each explanation had
# said of them before: `tests/results/rest.md`. All this is about this small model.)
#
# ## Built into SmolLM2
#
# `python -m tests.retrofit` builds headnorm into the finished SmolLM2 and trains it for
# 500 steps on Python's standard library, the *text* below. Its control, *scaled*, gives
# each head of a layer the same mean length, by constants. Both take the whole sink at
# first, on random tokens; what counts is what comes back.

# %%
retrofit = read_json(ROOT / "tests/results/retrofit.json")


def sink_and_loss(name):
    """Of a retrained SmolLM2: % of the heads with a sink on random tokens
    and in text, and the loss on text."""
    end = retrofit[name]["end"]
    shares = [100 * fmean(chain["share"] for chain in end[kind])
              for kind in ("random", "text")]
    return *shares, fmean(end["losses"])


_, _, whole = sink_and_loss("softmax")
left = {}
for name in ("softmax", "headnorm", "scaled", "gated", "logit", "sigmoid"):
    orders = [each for each in retrofit if each.partition(",")[0] == name]
    if orders:
        left[name], in_text, losses = zip(*map(sink_and_loss, sorted(orders)))
        print(f"{name:8} % of heads with a sink, on random tokens:",
              *(f"{share:.0f}" for share in left[name]), "| in text:",
              *(f"{share:.0f}" for share in in_text), "| loss",
              *(f"{round(loss - whole, 2) + 0.0:+.2f}" for loss in losses))  # no -0.00
assert min(left["headnorm"]) < left["softmax"][0] / 5, "it comes back in every order"
assert max(left["headnorm"]) > left["softmax"][0] / 2, "it stays away in every order"
assert min(left["scaled"]) > 50, "the control is a cure as well"

# %% [markdown]
# (A number for each order of batches. In headnorm's third and in logit's first a head
# counts by its mean over the windows, which can find ten points more; elsewhere it
# counts in each window.) Under headnorm the sink on random tokens stays away in some
# orders of the batches and comes back in others; in text it comes back in most. Its
# loss is some 0.4 nats higher each time. So a single training with a cure decides
# little, in a real model too. Gated pays nothing, and still has its sink. The learned
# logit costs next to nothing too, takes less than half of it on random tokens, and
# little in text. Sigmoid has no sink in one order, at a loss that is 0.44 nats higher;
# in the other it has not healed: more than half a nat is missing.
#
# ## A sink that is of use: the ruler
#
# Another small model copies. It reads 8 to 24 letters, then the same again and again in
# UPPER case. To expect the end of the letters it must count them; rotary positions tell
# only distances, so that it must measure from something. In windows that repeat nothing
# let $u_t$ be the probability that the next letter is in upper case. Hide token 0 from
# all later queries, or, as a control, token 5.

# %%
quiet, _ = windows("quiet")


def passage_ends(unseen=None):
    """u (T,), mean over the windows; `unseen`: a token that no later one sees."""
    seen = torch.ones(64, 64, dtype=torch.bool)
    if unseen is not None:
        seen[unseen + 1:, unseen] = False
    with torch.no_grad():
        logits, _ = copier(quiet, mask=seen)
    upper = logits.softmax(-1)[..., 16:32]  # ids 16 to 31 are the upper-case letters
    return upper.sum(-1).mean(0)


untouched, without_0, without_5 = passage_ends(), passage_ends(0), passage_ends(5)
curves = {"untouched": untouched[:32], "token 5 hidden": without_5[:32],
          "token 0 hidden": without_0[:32]}
figure, axis = plt.subplots(figsize=(6.4, 3))
figures.lines(axis, curves, hot=["token 0 hidden"])
figures.dress(axis, "Without token 0 the model is one place behind", {},
              xlabel="position t", ylabel="u: the passage ends")
show(figure, "07_ruler", "The probability that the passage ends, by position. With "
     "token 0 hidden the curve is the same, one place to the right.")
moved = (without_0 - untouched)[1:].abs().mean()
after_shift = (without_0[2:] - untouched[1:-1]).abs().mean()
control = (without_5 - untouched)[1:].abs().mean()
print(f"token 0 hidden changes u by {moved:.4f} on average, compared one place "
      f"later by {after_shift:.4f}; token 5 hidden: {control:.4f}")
assert after_shift < moved / 3, "token 0 is no ruler"
assert control < moved / 3, "token 5 does a third as much"

# %% [markdown]
# It counts from token 1, and is wrong by one. In five seeds each of softmax, sigmoid,
# headnorm and gated, with a sink or without, token 0 is such a ruler
# (`tests/results/cures.md`). So none of these takes away this *use*, and a large sink
# is not needed for it.
#
# ## Beside the paper

# %%
beside(("weights, tokens seen", "152M, 20B", "0.15M, 1.5M"),
       ("sink under softmax, headnorm", "yes, none",
        f"{mean['softmax']:.2f}, {mean['headnorm']:.2f}"),
       ("sink under gated (2505.06708)", "0.47 to 0.07",
        f"{mean['softmax']:.2f} to {mean['gated']:.2f}"))

# %% [markdown]
# ## What would falsify this
#
# - A seed in which softmax learns this task without a sink.
# - A seed of sigmoid, gated or logit with one.
# - A large text model, trained with a learned logit from the start, that keeps its
#   sink: then it rests there for another reason than that it must look somewhere.
#
# **You can now** say which of two explanations an experiment tells apart, and why a
# cure must be tried in a model that has no other use for its sink.
#
# ## Exercises
#
# **1.** The prediction at the start.
#
# **2.** Write head-wise RMSNorm. `z` is (N, T, H, D), `gain` is (D,), for all heads.


# %%
def head_norm(z, gain, eps=1e-5):
    ...


check("07.head_norm", head_norm)

# %% [markdown]
# **3.** Write the weights of *logit*: `scores` (..., T), `b` a number, the score of a
# key that is not there. The weights of the T keys are asked for.


# %%
def weights_with_logit(scores, b):
    ...


check("07.weights_with_logit", weights_with_logit)

# %% [markdown]
# **4.** An experiment. In the model with softmax, make the value of token 0 in the last
# layer 8 times as long, then 16 times (`make_tap` with an edit of `2.v`; the edit is
# `probe.at_token(0, lambda v: 8 * v[:, 0])`, which changes token 0 alone). By which
# factor, a whole number, does `excess` grow from 8 to 16? Why is it this one?

# %%
longer = ...
check("07.longer", longer)
