# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 07 · Two cures
#
# **Claim.** Where the first token is ordinary, small models with softmax or headnorm
# attention grow a sink, gated ones a smaller one, sigmoid ones none. This sink is no
# mere place to rest: it is a *ruler*, from which a model measures where it is. No cure
# takes away what is useful, so a sink that stays in small models refutes no cure.
#
# **You need** chapters 00, 01 and 04. **Run time**: ten seconds, once eight models
# are trained (about 8 minutes on two cores; they stay in `out/`).

# %%
import json
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from lesson import ROOT, beside, check, figures, models, plt, show, untrained, windows
from model import record

import probe

ATTENTIONS = ("softmax", "sigmoid", "headnorm", "gated")

# %% [markdown]
# ## Four ways to mix
#
# A head has scores $\ell_{ts} = q_t \cdot k_s / \sqrt D$ for the keys $s \le t$, and
# values $v_s$. With $\sigma(x) = 1 / (1 + e^{-x})$ and $A = \mathrm{softmax}(\ell)$:
#
# $$\text{softmax} \quad z_t = \sum_{s \le t} A_{ts}\, v_s$$
#
# $$\text{sigmoid} \quad z_t = \sum_{s \le t} \sigma(\ell_{ts} - \log n)\, v_s$$
#
# $$\text{headnorm} \quad z_t = \lambda \odot \mathrm{RMSNorm}
# \Big(\sum_{s \le t} A_{ts}\, v_s\Big)$$
#
# $$\text{gated} \quad z_t = \sigma(w \cdot x_t) \sum_{s \le t} A_{ts}\, v_s$$
#
# - Softmax weights compete: a row adds up to 1, and a head that wants nothing must
#   still look somewhere. That is what a sink is for (chapter 00).
# - **Sigmoid** weights do not compete: all may close. $n$ is the training length.
# - **Headnorm** is the paper's cure. Each head's result has the same length, wherever
#   it looked; $\lambda$ has $D$ entries, learned, one vector a layer.
# - **Gated** (Qiu et al. 2025, arXiv 2505.06708) is our *positive control*. A head that
#   wants nothing closes its gate. In that paper the sink falls from 0.47 to 0.07.
#
# ### Predict first (exercise 1)
#
# Four models learn to copy: a passage in lower case, then the same again and again in
# UPPER case, from any place of it (`data/tasks.py`). We look where nothing can be
# copied. Who ends with a sink, a head that gives token 0 more than 0.3?

# %%
prediction = [...]  # names out of ATTENTIONS

# %%
names = [*ATTENTIONS, *(f"tiny-{attn}" for attn in ATTENTIONS)]
trained = models(*names)  # what is missing is trained now: a minute or two each

# %% [markdown]
# ## What a cure is meant to change
#
# Before training the scores are near 0 and the values independent, of variance
# $\sigma^2$. Then (chapter 01), at position $t$,
#
# $$V_t = \frac{\sigma^2}{t + 1} \ \text{(softmax)}, \qquad
# V_t = \frac{(t + 1)\,\sigma^2}{(n + 1)^2} \ \text{(sigmoid)}, \qquad
# V_t \approx 1 \ \text{(headnorm)}.$$
#
# So softmax makes the first token an outlier, sigmoid turns that *round*, and headnorm
# levels it: *parity*, or nearly so, for averages of the same 16 letters have a mean in
# common, and that does not vary. A gate near one half changes nothing.

# %%
rest, (cx, cy) = windows("rest")[0], windows("copy")
curves = {}
for attn in ATTENTIONS:
    z = record(untrained(attn), rest, ["0.z"])[1]["0.z"]
    curves[attn] = probe.variance(z).detach()
gap = {attn: probe.over_median(curve, 0).item() for attn, curve in curves.items()}
print({attn: round(g, 2) for attn, g in gap.items()})

figure, axis = plt.subplots(figsize=(6.4, 3.2))
figures.by_position(axis, curves, "Before training: outlier, reverse, near parity", {},
                    ylabel="variance of z (log)")
show(figure, "07_variance", "Variance by position before training: softmax and gated "
     "fall, sigmoid rises, headnorm is nearly level.")
assert min(gap["softmax"], gap["gated"]) > 5 > 0.3 > gap["sigmoid"], "no outlier"
assert gap["headnorm"] < gap["softmax"] / 5, "headnorm does not level the variance"

# %% [markdown]
# ## Where the first token is ordinary
#
# It is any of 16 letters. This is the paper's puzzle.


# %%
def effective_rank(states):
    """(N, T, C) -> exp(-sum p_i ln p_i), p_i the shares of the singular values
    (Roy and Vetterli 2007)."""
    share = F.normalize(torch.linalg.svdvals(states.flatten(0, 1)), p=1, dim=0)
    return torch.special.entr(share).sum().exp().item()


@torch.no_grad()
def portrait(model, quiet, x, y):
    """What is left of the chain in the windows `quiet`, and the loss on x, y."""
    c = probe.chain(model, quiet)
    depth = [f"{i}.resid_post" for i in range(len(model.layers))]
    states = record(model, quiet, depth)[1].values()
    c["effective rank"] = fmean(effective_rank(s) for s in states)
    return c | {"loss": model(x, y)[1].item()}


SHOWN = {"sink": "sink, strongest head", "norm_ratio": "length of token 0",
         "dominance": "DomRatio", "drain": "length of its value",
         "effective rank": "effective rank", "loss": "loss"}


def table(found):
    print(f"{'':22}" + "".join(f"{attn:>10}" for attn in found))
    for key, label in SHOWN.items():
        cells = (f"{probe.digits(c[key]):>10}" for c in found.values())
        print(f"{label:22}" + "".join(cells))


# %%
copying = {attn: portrait(trained[attn], rest, cx, cy) for attn in ATTENTIONS}
table(copying)
check("07.prediction", prediction)

# %%
patterns = {attn: figures.portrait(trained[attn], rest)["map"] for attn in ATTENTIONS}
figure = figures.maps(patterns, [(0,)] * 4, "Nothing to copy: three of four look at "
                      "token 0")
show(figure, "07_maps", "Maps of the strongest head of each attention where nothing "
     "can be copied: a column at token 0 in all but sigmoid.")
sinks = {attn for attn in ATTENTIONS if copying[attn]["sink"] > probe.SINK}
assert sinks == {"softmax", "headnorm", "gated"}, f"sinks in {sinks}"

# %% [markdown]
# Headnorm keeps its sink. Does that refute the paper? Look at **gated** first. It is
# known to work, and it keeps one here too. A test that a good cure fails is no test.
# So ask the question behind it: *what is this sink for?*
#
# ## The sink is a ruler
#
# A passage has 8 to 24 letters. Whether it may end now depends on how many there were.
# Rotary positions tell a head how far away a key is, and not where it is itself. To
# know its place, a model must measure from something. Let $u_t$ be the probability
# that the next letter is in upper case, while all letters so far are in lower case. We
# forbid all later tokens to look at token 0, or, as a control, at token 5.


# %%
@torch.no_grad()
def passage_ends(model, x, hidden=None):
    """u (T,), mean over the windows x (N, T); `hidden`: a token nobody may look at."""
    T = x.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool)
    if hidden is not None:
        mask[hidden + 1:, hidden] = False
    p = model(x, mask=mask)[0].softmax(-1)
    return p[..., 16:32].sum(-1).mean(0)  # the upper case


u = {title: passage_ends(trained["softmax"], rest, hidden) for title, hidden in
     (("untouched", None), ("token 5 hidden", 5), ("token 0 hidden", 0))}
figure, axis = plt.subplots(figsize=(6.4, 3))
figures.lines(axis, {title: curve[:32] for title, curve in u.items()},
              hot=("token 0 hidden",))
figures.dress(axis, "Without token 0 the model is one place behind", {},
              xlabel="position t", ylabel="u: the passage ends")
show(figure, "07_ruler", "The probability that the passage ends, by position. With "
     "token 0 hidden the curve is the same, one place to the right.")

# %%
free, without, other = u["untouched"], u["token 0 hidden"], u["token 5 hidden"]
moved = (without - free)[1:].abs().mean()
after_shift = (without[1:] - free[:-1])[1:].abs().mean()
control = (other - free).abs().mean()
print(f"token 0 hidden changes u by {moved:.4f} on average, compared one place "
      f"later by {after_shift:.4f}; token 5 hidden: {control:.4f}")
assert max(after_shift, control) < moved / 3, "token 0 is no ruler"

# %% [markdown]
# Deprived of token 0 the model counts from token 1, and is wrong by one. It does not
# *rest* on token 0, or not only. It reads there how far it has come. In this task a
# passage whose end cannot be foreseen (each letter the last one with equal chance)
# leaves softmax without a sink (`tests/results/cures.md`, "memoryless").
#
# And where repeats begin with token 0, heads look at it to read its *letter*. So ask of
# any sink in a small model what it is good for, before you try to cure it.
#
# ## In text, after `<|bos|>`
#
# Here the sink has a third reason. `<|bos|>` is one token with an embedding of its own:
# a head finds it *by name*, and needs no chain.

# %%
bx, by = windows("bos")
text = {attn: portrait(trained[f"tiny-{attn}"], bx, bx, by) for attn in ATTENTIONS}
table(text)
sinks = {attn for attn in ATTENTIONS if text[attn]["sink"] > probe.SINK}
assert sinks == {"softmax", "headnorm", "gated"}, f"sinks on <|bos|> in {sinks}"

# %% [markdown]
# What headnorm does change in text is the outlier: a shorter first state and a lower
# DomRatio, as the paper says. And the value: softmax *drains* $v_0$, headnorm makes it
# longer than others. Why? Let a head put weight $a$ on $v_0$, of length $d$, and the
# rest on a mixture of length 1 at a right angle to it. Then
#
# $$\lVert z \rVert^2 = a^2 d^2 + (1 - a)^2, \qquad
# \cos(z, v_0) = \frac{a\,d}{\sqrt{a^2 d^2 + (1 - a)^2}}.$$
#
# With softmax, $d \to 0$ and $a \to 1$ make $z$ vanish: *nothing*. Headnorm divides by
# $\lVert z \rVert$, so no value is short enough. The nearest thing to nothing is a
# *constant*, which later layers can subtract, and a long $v_0$ buys one with less
# attention. So there are two readings of the cure: parity of variance, or a no-op that
# is lost.

# %%
soft, head = text["softmax"], text["headnorm"]
assert head["norm_ratio"] < 0.8 * soft["norm_ratio"], "its first state is as long"
print(f"length of the value of <|bos|>: {soft['drain']:.2f}, {head['drain']:.2f}")

# %% [markdown]
# ## Five seeds, two learning rates
#
# One model is an anecdote. `python -m tests.cures` trains each attention with five
# seeds at two learning rates, with equal data, order and first weights.

# %%
grid = json.loads((ROOT / "tests/results/cures.json").read_text())["grid"]
RATES = sorted(grid["softmax"], key=float)


def seeds(attn, rate, read):
    """read(run) of each seed, in order."""
    return [read(run) for _, run in sorted(grid[attn][rate].items())]


def sink_of(run):
    return run["chain"]["sink"]


figure, axes = plt.subplots(1, len(RATES), figsize=(8.8, 2.9), sharey=True)
for axis, rate in zip(axes, RATES):
    for place, attn in enumerate(ATTENTIONS):
        sinks = seeds(attn, rate, sink_of)
        color = figures.ACCENT if attn == "softmax" else "black"
        axis.plot([place] * len(sinks), sinks, "o", color=color, mfc="none", ms=7)
    axis.axhline(probe.SINK, color="black", lw=0.9, ls=":")
    axis.set_xticks(range(4), ATTENTIONS, rotation=30)
    figures.dress(axis, f"learning rate {rate}", ylim=(0, 1), xlim=(-0.5, 3.5))
axes[0].set_ylabel("attention to token 0,\nstrongest head")
show(figure, "07_seeds", "The sink of each attention, a dot a seed, at two learning "
     "rates: sigmoid stays below 0.3, headnorm is as high as softmax.")

# %%
for rate in RATES:
    base = seeds("softmax", rate, lambda run: run["excess"])
    for attn in ATTENTIONS:
        sinks = seeds(attn, rate, sink_of)
        losses = seeds(attn, rate, lambda run: run["excess"])
        gaps = [a - b for a, b in zip(losses, base)]
        print(f"{rate:>6} {attn:9} sink {fmean(sinks):.2f} ± {stdev(sinks):.2f}, loss "
              f"above perfect {fmean(losses):.3f}, minus softmax {fmean(gaps):+.3f}")
means = {attn: fmean(seeds(attn, "0.005", sink_of)) for attn in ATTENTIONS}
assert max(seeds("sigmoid", "0.005", sink_of)) < probe.SINK, "sigmoid has a sink"
assert means["gated"] < 0.8 * means["softmax"], "gated is as high as softmax"
assert means["headnorm"] > 0.8 * means["softmax"], "headnorm is lower than softmax"

# %% [markdown]
# Sigmoid has no sink in any seed, and pays with the highest loss. Headnorm does not
# lower the sink. At the higher rate its loss is lower than softmax's, by about as much
# as in the paper: the loss can gain without a cure. Gated lowers the sink; where it
# ends it in all seeds, at the higher rate, two of them have not learned yet.
#
# ## Beside the paper

# %%
losses = {attn: seeds(attn, "0.01", lambda run: run["excess"]) for attn in ATTENTIONS}
same = [a - b for a, b in zip(losses["headnorm"], losses["softmax"])]
rank = {attn: fmean(seeds(attn, "0.01", lambda run: run["rank"])) for attn in losses}
beside(("weights, tokens seen", "152M, 20B", "0.2M, 4M"),
       ("sink under headnorm", "none", means["headnorm"]),
       ("sink under sigmoid", "none", means["sigmoid"]),
       ("sink under gated (2505.06708)", "0.47 to 0.07",
        f"{means['softmax']:.2f} to {means['gated']:.2f}"),
       ("loss, headnorm minus softmax", "-0.0391",
        f"{fmean(same):+.3f} ± {stdev(same):.3f}"),
       ("DomRatio, headnorm / softmax", "0.41",
        f"text {head['dominance'] / soft['dominance']:.2f}"),
       ("effective rank, headnorm / softmax", f"{446.0 / 343.7:.2f}",
        rank["headnorm"] / rank["softmax"]))
assert fmean(same) < 0, "headnorm's loss is not lower"

# %% [markdown]
# Others found the same norm "negligible" for the loss (Differential Transformer, -0.002
# at 1.4B weights) or a gain of 0.030 (2505.06708). Models of our size decide nothing
# between them.
#
# ## What would falsify this
#
# A task in which a model measures nothing from token 0, reads nothing there, and has a
# sink all the same. (We looked for one in 46 settings, `tests/results/cures.md`.) There
# the cures could be tested. Or a model whose curve $u$ stays when token 0 is hidden.
#
# ## Exercises
#
# **1.** The prediction at the start.
#
# **2.** Write head-wise RMSNorm. `z` is (B, T, H, D), `gain` is (D,), for all heads.


# %%
def head_norm(z, gain, eps=1e-5):
    ...


check("07.head_norm", head_norm)

# %% [markdown]
# **3.** How much attention $a$ does a head need for a cosine of `cosine` with $v_0$, if
# that is `d` times as long as the rest? Solve the formula above for $a$.


# %%
def attention_needed(cosine, d):
    ...


check("07.attention_needed", attention_needed)

# %% [markdown]
# **4.** An experiment. How much do the gates of sigmoid really weigh? In
# `trained["sigmoid"]` and the windows `rest`, take the pattern of the layer
# after the first whose head has the largest row-normalised sink (`probe.sink_score`),
# and give the mean *raw* weight on token 0 of the queries 1 to 63 of this head.
# `record` gives `i.pattern`, (N, H, T, T).

# %%
raw_weight = ...
check("07.raw_weight", raw_weight)

# %% [markdown]
# **5.** An experiment. `tiny-softmax`, which reads text, has drained $v_0$. Make it 2,
# 5, 10 or 20 times as long, in every layer (`probe.at_token(0, ...)` on `i.v`). What is
# the smallest of these that costs more than 0.1 nats on `bx, by`?

# %%
longer = ...
check("07.longer", longer)
