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
# mere place to rest: its head uses token 0 as a *ruler*, to measure where it is. So a
# sink that stays here refutes no cure.
#
# **You need** chapters 00, 01 and 04. **Run time**: ten seconds, once eight models
# are trained (about 8 minutes on two cores; they stay in `out/`).

# %%
from statistics import fmean, stdev

from lesson import ROOT, beside, check, figures, models, plt, show, untrained, windows

import torch

import probe
from data.common import read_json
from model import make_tap, record

ATTENTIONS = ("softmax", "sigmoid", "headnorm", "gated")

# %% [markdown]
# ## Four ways to mix
#
# A head has scores $\ell_{ts} = q_t \cdot k_s / \sqrt D$ for the keys $s \le t$, and
# values $v_s$. With $\sigma(x) = 1 / (1 + e^{-x})$ and $A = \mathrm{softmax}(\ell)$:
#
# $$\text{softmax} \quad z_t = \sum_{s \le t} A_{ts}\, v_s, \qquad
# \text{sigmoid} \quad z_t = \sum_{s \le t} \sigma(\ell_{ts} - \log n)\, v_s$$
#
# $$\text{headnorm} \quad z_t = \lambda \odot \mathrm{RMSNorm}
# \Big(\sum_{s \le t} A_{ts}\, v_s\Big)$$
#
# $$\text{gated} \quad z_t = \sigma(w \cdot x_t) \sum_{s \le t} A_{ts}\, v_s$$
#
# - Softmax weights add up to 1: a head that wants nothing must still look somewhere.
# - **Sigmoid** weights do not compete: all may close. $n$ is the training length.
# - **Headnorm**, the paper's: it rescales each head's output to a fixed length;
#   $\lambda$ is learned.
# - **Gated** (arXiv 2505.06708) is known to work: our *positive control*.
#
# ### Predict first (exercise 1)
#
# Four models learn to copy: a passage, then the same over and over in UPPER case, from
# any place. Who has a sink (a head gives token 0 over 0.3) where nothing is copied yet?

# %%
prediction = [...]  # names out of ATTENTIONS

# %%
tiny = [f"tiny-{attn}" for attn in ATTENTIONS]
trained = models(*ATTENTIONS, *tiny)  # what is missing is trained: a minute or two each
rest, _ = windows("rest")
copy = windows("copy")
text = windows("bos")

# %% [markdown]
# ## What a cure is meant to change
#
# Before training, with values of variance $\sigma^2$ (chapter 01), at position $t$,
#
# $$V_t = \frac{\sigma^2}{t + 1} \ \text{(softmax)}, \qquad
# V_t = \frac{(t + 1)\,\sigma^2}{(n + 1)^2} \ \text{(sigmoid)}, \qquad
# V_t \approx 1 \ \text{(headnorm)}.$$
#
# So softmax makes the first token an outlier, sigmoid *reverses* this, and headnorm
# nearly levels it: *parity*. A gate near one half changes nothing.

# %%
curves, gap = {}, {}
for attn in ATTENTIONS:
    _, seen = record(untrained(attn), rest, ["0.z"])
    curves[attn] = probe.variance(seen["0.z"]).detach()
    gap[attn] = probe.over_median(curves[attn], 0).item()

figure, axis = plt.subplots(figsize=(6.4, 3))
figures.by_position(axis, curves, "Before training: outlier, reverse, near parity", {},
                    ylabel="variance of z (log)")
show(figure, "07_variance", "Variance by position before training: softmax and gated "
     "fall, sigmoid rises, headnorm is nearly level.")
assert gap["softmax"] > 5, "no outlier under softmax"
assert gap["gated"] > 5, "no outlier under gated"
assert gap["sigmoid"] < 0.3, "not reversed under sigmoid"
assert gap["headnorm"] < gap["softmax"] / 5, "not level under headnorm"

# %% [markdown]
# ## Where the first token is ordinary
#
# It is any of 16 letters. "x" is a length over that of others, in its peak layer.


# %%
@torch.no_grad()
def measured(name, quiet, x, y):
    """The chain of a model in the windows `quiet`; also printed: its loss on x, y."""
    found = probe.chain(trained[name], quiet)
    _, loss = trained[name](x, y)
    print(f"{name:14}sink {found['sink']:.2f}, "
          f"first state x {found['norm_ratio']:.2f}, "
          f"DomRatio {found['dominance']:4.1f}, "
          f"value x {found['drain']:.2f}, loss {loss.item():.2f}")
    return found


copying = {}
for attn in ATTENTIONS:
    copying[attn] = measured(attn, rest, *copy)
check("07.prediction", prediction)

# %%
patterns = {}
for attn in ATTENTIONS:
    patterns[attn] = probe.portrait(trained[attn], rest)["map"]
figure = figures.maps(patterns, [(0,)] * 4, "Nothing to copy: three of four look at "
                      "token 0 (seed 0)")
show(figure, "07_maps", "Maps of the strongest head of each attention where nothing "
     "can be copied: a column at token 0 in all but sigmoid.")
uniform = probe.uniform_sink(64)
assert copying["softmax"]["sink"] > probe.SINK, "softmax has no sink"
assert copying["headnorm"]["sink"] > probe.SINK, "headnorm has no sink"
assert copying["gated"]["sink"] > 3 * uniform, "gated looks as if nothing were there"
assert copying["sigmoid"]["sink"] <= probe.SINK, "sigmoid has a sink"

# %% [markdown]
# Headnorm keeps its sink, and gated a part of it: 0.31 ± 0.16 in five seeds, so that a
# single one may lie on either side of 0.3. A test that a good cure fails is no test. So
# ask: *what is this sink for?*
#
# ## The sink is a ruler
#
# A passage has 8 to 24 letters, so it pays to know how many there were. But rotary
# positions tell distances only: a model must measure from something. Let $u_t$ be the
# probability that the next letter is in upper case, while all so far are in lower case.
# We forbid all later tokens to look at token 0, or, as a control, at token 5.


# %%
@torch.no_grad()
def passage_ends(model, x, hidden=None, tap=None):
    """u (T,), mean over the windows x (N, T); `hidden`: a token nobody may look at."""
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    if hidden is not None:
        mask[hidden + 1:, hidden] = False
    logits, _ = model(x, tap=tap, mask=mask)
    upper_case = logits.softmax(-1)[..., 16:32]
    return upper_case.sum(-1).mean(0)


copier = trained["softmax"]
untouched = passage_ends(copier, rest)
without_5 = passage_ends(copier, rest, hidden=5)
without_0 = passage_ends(copier, rest, hidden=0)

# %%
curves = {"untouched": untouched[:32], "token 5 hidden": without_5[:32],
          "token 0 hidden": without_0[:32]}
figure, axis = plt.subplots(figsize=(6.4, 3))
figures.lines(axis, curves, hot=["token 0 hidden"])
figures.dress(axis, "Without token 0 the model is one place behind", {},
              xlabel="position t", ylabel="u: the passage ends")
show(figure, "07_ruler", "The probability that the passage ends, by position. With "
     "token 0 hidden the curve is the same, one place to the right.")
moved = (without_0 - untouched)[1:].abs().mean()
after_shift = (without_0[1:] - untouched[:-1])[1:].abs().mean()
control = (without_5 - untouched)[1:].abs().mean()
print(f"token 0 hidden changes u by {moved:.4f} on average, compared one place "
      f"later by {after_shift:.4f}; token 5 hidden: {control:.4f}")
assert after_shift < moved / 3, "token 0 is no ruler"
assert control < moved / 3, "token 5 does a third as much"

# %% [markdown]
# It counts from token 1, and is wrong by one. Is that the head with the sink? Hide
# token 0 from one head at a time.

# %%
def blind(layer, head):
    """A tap: this head may not look at token 0."""
    def hide(scores):
        scores[:, head, 1:, 0] = -torch.inf
        return scores
    return make_tap(copier.cfg, {f"{layer}.scores": hide})


(found,), _ = probe.layers(copier, rest)
attends = found["sink"]  # (L, H)
L, H = attends.shape
off = torch.zeros(L, H)
for layer in range(L):
    for head in range(H):
        blinded = passage_ends(copier, rest, tap=blind(layer, head))
        off[layer, head] = (blinded - untouched)[1:].abs().mean()
most, second = off.flatten().topk(2).values
print(f"hidden from one head: most {most:.4f}, second {second:.4f}")
assert off.argmax() == attends.argmax(), "another head measures"
assert most > 2 * second, "several heads measure"

# %% [markdown]
# That head reads there how far the model has come. If each letter ends its passage with
# equal chance, softmax has no sink ("memoryless" in `tests/results/cures.md`).
#
# ## In text, after `<|bos|>`
#
# `<|bos|>` has an embedding of its own: a head finds it *by name*, and needs no chain.

# %%
named = {}
for attn in ATTENTIONS:
    named[attn] = measured(f"tiny-{attn}", text[0], *text)
for attn in ("softmax", "headnorm", "gated"):
    assert named[attn]["sink"] > probe.SINK, f"{attn} has no sink on <|bos|>"
assert named["sigmoid"]["sink"] <= probe.SINK, "sigmoid has a sink on <|bos|>"

# %%
softmax, headnorm = named["softmax"], named["headnorm"]
assert headnorm["norm_ratio"] < 0.8 * softmax["norm_ratio"], "no shorter state"
assert headnorm["dominance"] < 0.8 * softmax["dominance"], "no lower DomRatio"
assert softmax["drain"] < 0.5, "softmax does not drain v_0"
assert headnorm["drain"] > 1, "headnorm does not make v_0 long"

# %% [markdown]
# Headnorm does change the outlier: a shorter first state and a lower DomRatio, as the
# paper says. And softmax *drains* $v_0$, headnorm makes it long. Why? Let a head put
# weight $a$ on $v_0$, of length $d$, and the rest on a mixture of length 1 at a right
# angle to it: $\lVert z \rVert^2 = a^2 d^2 + (1 - a)^2$. With softmax, $d \to 0$ and
# $a \to 1$ make $z$ vanish. Headnorm divides by $\lVert z \rVert$: the nearest thing to
# nothing is a *constant*, which later layers can subtract, and a long $v_0$ buys one
# with less attention. Two explanations remain: equal variance, or that a head can no
# longer output nothing.
#
# ## Five seeds, several learning rates
#
# `python -m tests.cures` has trained these, with equal data, order and first weights.

# %%
grid = read_json(ROOT / "tests/results/cures.json")["grid"]
RATES = sorted(grid["softmax"], key=float)


def seeds(attn, rate, key):
    """Of each seed its sink, rank, or excess: loss over that of a perfect predictor."""
    values = []
    for seed, run in sorted(grid[attn][rate].items()):
        numbers = run["chain"] | run
        values.append(numbers[key])
    return values


# %%
figure, axes = plt.subplots(1, len(RATES), figsize=(8.8, 2.9), sharey=True)
for axis, rate in zip(axes, RATES):
    for place, attn in enumerate(ATTENTIONS):
        sinks = seeds(attn, rate, "sink")
        losses = seeds(attn, rate, "excess")
        color = figures.ACCENT if attn == "softmax" else "black"
        axis.plot([place] * len(sinks), sinks, "o", color=color, mfc="none", ms=7)
        print(f"{rate:>6} {attn:9} sink {fmean(sinks):.2f} ± {stdev(sinks):.2f}, "
              f"excess {fmean(losses):.3f} ± {stdev(losses):.3f}")
    axis.axhline(probe.SINK, color="black", lw=0.9, ls=":")
    axis.set_xticks(range(4), ATTENTIONS, rotation=30)
    figures.dress(axis, f"rate {rate}", ylim=(0, 1), xlim=(-0.5, 3.5))
axes[0].set_ylabel("attention to token 0,\nstrongest head")
show(figure, "07_seeds", "The sink of each attention, a dot a seed, a panel a learning "
     "rate: sigmoid stays below 0.3, headnorm is as high as softmax.")

# %%
means, price = {}, {}
for attn in ATTENTIONS:
    means[attn] = fmean(seeds(attn, "0.005", "sink"))
    price[attn] = fmean(seeds(attn, "0.005", "excess"))
assert max(seeds("sigmoid", "0.005", "sink")) < probe.SINK, "a seed of sigmoid has one"
assert price["sigmoid"] == max(price.values()), "sigmoid's loss is not the highest"
assert means["headnorm"] > 0.8 * means["softmax"], "headnorm lowers the sink"
assert means["gated"] < 0.8 * means["softmax"], "gated does not lower the sink"

# %%
loss, rank = {}, {}
for attn in ("softmax", "headnorm"):  # each at its best learning rate
    excess = {rate: fmean(seeds(attn, rate, "excess")) for rate in RATES}
    best = min(RATES, key=excess.get)
    loss[attn] = seeds(attn, best, "excess")
    rank[attn] = fmean(seeds(attn, best, "rank"))
pairs = zip(loss["headnorm"], loss["softmax"])  # of each seed
gaps = [with_norm - without for with_norm, without in pairs]
assert fmean(gaps) < 0, "headnorm's loss is not lower"

# %% [markdown]
# At 0.005, the rate of `train.py`, sigmoid has no sink in any seed, and the highest
# loss. Gated lowers the sink, headnorm does not. Each at its best rate headnorm's loss
# is lower, and at 0.02 it learns where softmax is lost: training can improve although
# the sink stays.
#
# ## Built into SmolLM2, and beside the paper
#
# `python -m tests.retrofit` builds headnorm into the finished SmolLM2 and trains it on.
# *Scaled*, its control, brings heads to one length, not tokens. On random tokens both
# take the whole sink; what counts is what comes back. (In *text* it came back under
# headnorm too, with other batches: `tests/results/cures.md`.)

# %%
left = {}  # share of heads with a sink, after training on
for name, run in read_json(ROOT / "tests/results/retrofit.json").items():
    rates = [chain["sink_rate"] for chain in run["end"]["random"]]
    left[name] = fmean(rates)
assert left["headnorm"] < left["softmax"] / 5, "no cure there"
assert left["scaled"] > 0.5, "the control is a cure as well"

# %%
beside(("weights, tokens seen", "152M, 20B", "0.2M, 4M"),
       ("sink under headnorm", "none", means["headnorm"]),
       ("sink under gated (2505.06708)", "0.47 to 0.07",
        f"{means['softmax']:.2f} to {means['gated']:.2f}"),
       ("heads with a sink, SmolLM2 with headnorm", "-", left["headnorm"]),
       ("the same with its control, scaled", "-", left["scaled"]),
       ("loss, headnorm minus softmax", "-0.0391",
        f"{fmean(gaps):+.3f} ± {stdev(gaps):.3f}"),
       ("DomRatio, headnorm / softmax", "0.41",
        f"text {headnorm['dominance'] / softmax['dominance']:.2f}"),
       ("effective rank, headnorm / softmax", f"{446.0 / 343.7:.2f}",
        rank["headnorm"] / rank["softmax"]))

# %% [markdown]
# ## What would falsify this
#
# A model whose curve $u$ stays when token 0 is hidden; softmax with a sink for nothing
# in a small task (137 runs found one that comes and goes: `tests/results/cures.md`).
#
# ## Exercises
#
# **1.** The prediction at the start.
# **2.** Write head-wise RMSNorm. `z` is (B, T, H, D), `gain` is (D,), for all heads.


# %%
def head_norm(z, gain, eps=1e-5):
    ...


check("07.head_norm", head_norm)

# %% [markdown]
# **3.** An experiment. `tiny-softmax`, which reads text, has drained $v_0$. Make it 2,
# 5, 10 or 20 times as long, in every layer (`probe.at_token(0, ...)` on `i.v`). What is
# the smallest of these that costs more than 0.1 nats on `text`?

# %%
longer = ...
check("07.longer", longer)
