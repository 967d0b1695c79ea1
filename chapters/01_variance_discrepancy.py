# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 01 · The variance discrepancy
#
# **Claim.** Averaging makes things alike, and the first token averages nothing but itself. So what
# attention hands it varies more than what any other token gets: before any training, for any tokens.
#
# **You need** chapter 00, and the variance of a sum. **Run time**: seconds, once the two models exist.
#
# This is the first link of the chain. It is about the architecture alone, so most of this chapter is
# about models that have learned nothing.

# %%
import sys

sys.path.append("chapters")  # when this was started one folder up
import math
from dataclasses import replace

import torch
from lesson import attempt, beside, models, plt, show, windows
from model import GPT, Config, record
import probe

# %% [markdown]
# ## The law of averaging, on paper
#
# A head hands position $t$ a weighted sum of the values of all positions it may see:
#
# $$o_t = \sum_{s \le t} a_{ts}\, v_s$$
#
# Take one coordinate of the values. Call its variance over windows $\sigma^2$, the same at every
# position, and let the values of two positions have correlation $\rho$. Treat the weights as given.
# The variance of a sum is the sum of all covariances, and a covariance here is $\sigma^2$ if
# $s = s'$ and $\rho\sigma^2$ if not:
#
# $$\operatorname{Var} o_t = \sum_{s, s'} a_{ts} a_{ts'} \operatorname{Cov}(v_s, v_{s'})
#   = \sigma^2 \big[ \rho (\textstyle\sum_s a_{ts})^2 + (1 - \rho) \textstyle\sum_s a_{ts}^2 \big]$$
#
# Three cases are worth keeping in mind.
#
# - Uniform attention, $a_{ts} = \frac{1}{t+1}$, independent values, $\rho = 0$: the sum of squares is
#   $(t+1) \cdot \frac{1}{(t+1)^2}$, so $\operatorname{Var} o_t = \frac{\sigma^2}{t+1}$.
# - Uniform attention, correlated values: $\sigma^2 \big[\rho + \frac{1-\rho}{t+1}\big]$. Averaging
#   removes only what the values do not share, so the curve stops falling at $\rho\sigma^2$.
# - Any softmax attention: the weights add up to 1, and $n_t = 1 / \sum_s a_{ts}^2$ counts the keys that
#   are really used, from 1 (all on one key) to $t + 1$ (uniform). With $\rho = 0$ the variance is
#   $\sigma^2 / n_t$.
#
# In all three, position 0 has one weight, and it is 1. Its variance is $\sigma^2$, and no other
# position can have more. `probe.predicted_variance` is the bracket. Try it on random numbers first.

# %%
T, rho = 64, 0.2
generator = torch.Generator().manual_seed(0)
shared = torch.randn(4000, 1, 8, generator=generator)  # what all positions of a window have in common
values = rho**0.5 * shared + (1 - rho) ** 0.5 * torch.randn(4000, T, 8, generator=generator)  # (B, T, D)
uniform = torch.tril(torch.ones(T, T)) / torch.arange(1, T + 1)[:, None]
measured = probe.variance_by_position(uniform @ values)
predicted = probe.predicted_variance(uniform, rho)
for t in (0, 1, 7, 63):
    print(f"position {t:2}: measured {measured[t]:.3f}, rho + (1 - rho) / (t + 1) = {predicted[t]:.3f}")
print(f"correlation, estimated from the values alone: {probe.value_correlation(values):.3f}")
assert torch.allclose(measured, predicted, rtol=0.1), "the law of averaging fails on random numbers"

# %% [markdown]
# ## The law in a model
#
# Now the first layer of our decoders, on random tokens. The measured number is the variance over
# windows at each position, averaged over heads and their dimensions; the values are `0.v`, the weights
# `0.pattern`, and $o_t$ is called `0.z`. *Discrepancy* is position 0 over the median of the others.
# Before training the weights are random and pay no regard to the values: the law should hold.


# %%
@torch.no_grad()
def curves(model, x, layer=0, z="z"):
    """Variance by position of one layer: measured and predicted, both (T,)."""
    kept = record(model, x, [f"{layer}.{name}" for name in ("v", "pattern", z)])[1]
    v, pattern, z = kept.values()
    unit = probe.variance_by_position(v).mean()  # sigma^2
    return probe.variance_by_position(z), unit * probe.predicted_variance(pattern, probe.value_correlation(v))


# %%
trained = models("softmax", "micro-softmax")
untrained = {name: GPT(model.cfg, seed=0) for name, model in trained.items()}
random_tokens = {"softmax": windows("random bytes")[0], "micro-softmax": windows("random symbols")[0]}
law = {}
for name, x in (random_tokens | {"softmax, text": windows("text")[0]}).items():
    before, after = (group[name.removesuffix(", text")] for group in (untrained, trained))
    law[name] = {"untrained": curves(before, x), "trained": curves(after, x)}

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
for axis, (name, found) in zip(axes, law.items()):
    lines = {f"{when}, {what}": y for when, pair in found.items() for what, y in zip(("measured", "predicted"), pair)}
    lines["uniform attention, 1 / (t + 1)"] = 1 / torch.arange(1, T + 1)
    probe.draw_variance(axis, lines, f"{name}{'' if 'text' in name else ', random tokens'}: first layer")
    axis.set_ylim(0.25, 60)
show(figure, "01_law")

# %% [markdown]
# Every curve starts high and falls: position 0 is the outlier, and on random tokens the untrained models
# follow their prediction closely.

# %%
gap = {name: {when: probe.discrepancy(pair[0]).item() for when, pair in found.items()} for name, found in law.items()}
for name, found in law.items():
    off = {when: (z / p).log().abs().mean().exp().item() for when, (z, p) in found.items()}
    print(f"{name}: discrepancy before training {gap[name]['untrained']:.1f}, predicted "
          f"{probe.discrepancy(found['untrained'][1]):.1f}; at a typical position the prediction is off by "
          f"a factor {off['untrained']:.2f} before training, {off['trained']:.2f} after")
    assert gap[name]["untrained"] > 3, "an untrained model has no variance discrepancy"
    assert off["untrained"] < 1.25 or "text" in name, "the law of averaging does not describe the untrained model"

# %% [markdown]
# ## How large is it before training?
#
# The size can be worked out too, from nothing but the scale of the initial weights. Call their
# standard deviation $w$. A normed state has $C$ coordinates of size about 1, so a coordinate of a
# query or key has variance $w^2 C$, and a score $q \cdot k / \sqrt D$ has variance
# $\tau^2 = (w^2 C)^2$. Over many keys, weights $e^{x_s} / \sum e^{x_{s'}}$ with Gaussian scores give
#
# $$\sum_s a_{ts}^2 \approx \frac{(t+1)\, E[e^{2x}]}{\big((t+1)\, E[e^x]\big)^2}
#   = \frac{(t+1)\, e^{2\tau^2}}{(t+1)^2\, e^{\tau^2}} = \frac{e^{\tau^2}}{t+1}$$
#
# So random scores make attention forget the share $1 - e^{-\tau^2}$ of its keys. The median of
# $t+1$ over the later positions is $T/2 + 1$, and position 0 has 1: the discrepancy should be
# $(T/2 + 1)\, e^{-\tau^2}$.

# %%
for name, model in untrained.items():
    w, found = model.cfg.initializer_range, gap[name]["untrained"]
    expected = (T / 2 + 1) * math.exp(-((w**2 * model.cfg.hidden_size) ** 2))
    print(f"{name:14} w = {w:g}: expected {expected:.1f}, measured {found:.1f}")
    assert 0.7 < expected / found < 1.4, "the initial scale does not explain the discrepancy"

# %% [markdown]
# ## Is it about the tokens?
#
# Three tests. Turn every window round: the token that stood last is now first. Take only windows that
# begin with a letter. Take text instead of random bytes. If the outlier belonged to some tokens it would
# move or vanish; if it belongs to the place it stays.

# %%
def first_layer(model, x):
    return probe.discrepancy(curves(model, x)[0]).item()


many = {"random bytes": windows("random bytes", 256)[0], "text": windows("text", 256)[0]}
letter = {kind: x[(x[:, 0] >= ord("a")) & (x[:, 0] <= ord("z"))][:64] for kind, x in many.items()}
identity = {(kind, how): [first_layer(m, y) for m in (untrained["softmax"], trained["softmax"])]
            for kind, x in many.items()
            for how, y in (("as they are", x[:64]), ("turned round", x[:64].flip(1)),
                           ("begin with a letter", letter[kind]))}
for (kind, how), (before, after) in identity.items():
    print(f"{kind:12}  {how:20} untrained {before:5.1f}   trained {after:5.2f}")
assert all(before > 3 and after > 1.2 for before, after in identity.values()), "the outlier is not bound to position 0"

# %% [markdown]
# The outlier stays, whatever the tokens. On text it is smaller: bytes repeat within a window, and so do
# their values, so averaging removes less. The law is rough there (right panel above): it takes weights
# and values to be unrelated, and the same byte brings the same of both.
#
# ## What training does to it
#
# Nothing so far needed training. What does training do with the outlier? Look at all layers first.

# %%
texts = {"random bytes": random_tokens["softmax"], "text": windows("text")[0]}
layers = range(trained["softmax"].cfg.num_hidden_layers)
depth = {f"{kind}, {when}": torch.tensor([probe.discrepancy(curves(m["softmax"], x, i)[0]).item() for i in layers])
         for kind, x in texts.items() for when, m in (("untrained", untrained), ("trained", trained))}
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
for style, (name, found) in zip(probe.STYLES, depth.items()):
    print(f"{name:24}", "  ".join(f"layer {i} {d:5.2f}" for i, d in enumerate(found.tolist())))
    axis.plot(found.tolist(), label=name, ms=4, lw=1.2, **style)
axis.axhline(1, color="black", lw=0.8, ls=":")
probe.dress(axis, "softmax: discrepancy by layer", {}, xlabel="layer (dotted: no discrepancy)",
            yscale="log", ylim=(0.8, 20), ylabel="V_0 / median of the others (log)")
show(figure, "01_layers")

# %% [markdown]
# Before training the first layer has the largest gap and depth wears it down; training moves it from the
# first layer to a later one.

# %%
early, late = depth["random bytes, untrained"], depth["random bytes, trained"]
assert early.argmax() == 0 and early[0] > 1.5 * early[1:].max(), "before training a later layer has the largest gap"
assert late[1:].max() > 1.2 * late[0], "after training no later layer has a larger gap than the first"

# %% [markdown]
# Why does depth wear it down? States that have been averaged share what they averaged, so the values of
# later layers are correlated, and $\rho$ is the floor of the law.

# %%
x = random_tokens["softmax"]
deep = record(untrained["softmax"], x, [f"{i}.v" for i in layers])[1]
rho = [probe.value_correlation(v.detach()).item() for v in deep.values()]
print("untrained, correlation of two values by layer:", "  ".join(f"{r:.2f}" for r in rho))
assert abs(rho[0]) < 0.03 and rho[-1] > 0.1, "the values of later layers are not correlated"

# %% [markdown]
# Now the first layer, step by step, beside the sink. `train.py` has measured both; for `softmax` the
# variance is that of windows with ordinary first tokens, the sink that of windows after `<|bos|>`.

# %%
kinds = {"softmax": ("links", "links_bos"), "micro-softmax": ("links_rest", "links_rest")}  # for variance, for sink
history = {name: [(max(row["step"], 1), row[a]["variance_ratio_raw"], row[b]["sink_alpha_max"])
                  for row in probe.read_log(f"out/{name}")] for name, (a, b) in kinds.items()}
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for axis, (name, rows) in zip(axes, history.items()):
    step, ratio, alpha = zip(*rows)
    axis.plot(step, ratio, label="discrepancy, first layer (left)", ms=4, lw=1.2, **probe.STYLES[0])
    right = axis.twinx()
    right.plot(step, alpha, label="sink, strongest head (right)", ms=4, lw=1.2, **probe.STYLES[1])
    right.set(ylim=(0, 0.8), ylabel="mean attention to token 0")
    probe.dress(axis, f"{name}: during training", None, xscale="log", xlabel="training step (log; 0 drawn at 1)",
                ylim=(0, None), ylabel="V_0 / median of the others")
    axis.legend(handles=axis.lines + right.lines, loc="center left", fontsize=7, frameon=False)
show(figure, "01_history")

# %% [markdown]
# The discrepancy of the first layer falls while the sink rises, in both models.

# %%
for name in trained:
    assert gap[name]["trained"] < gap[name]["untrained"] / 2, "training does not shrink the first layer's gap"
    assert gap[name]["trained"] > 1.2, "training removes the first layer's gap"
    (_, ratio, alpha), (_, ratio_end, alpha_end) = history[name][0], history[name][-1]
    assert ratio_end < ratio / 2 and alpha_end > 1.5 * alpha, "variance and sink do not go opposite ways"

# %% [markdown]
# Why does it shrink? The law tells: $\operatorname{Var} o_t = \sigma^2 / n_t$, and trained heads use few
# keys, so the *other* positions average less. Count the keys that the last position uses.


# %%
@torch.no_grad()
def keys_used(model, x):
    pattern = record(model, x, ["0.pattern"])[1]["0.pattern"]  # (B, H, T, T)
    return 1 / pattern[:, :, -1].square().sum(-1).mean().item()


for name, x in random_tokens.items():
    before, after = keys_used(untrained[name], x), keys_used(trained[name], x)
    print(f"{name:14} keys used of {T}: untrained {before:.1f}, trained {after:.1f}")
    assert after < before / 1.5, "trained heads do not use fewer keys"

# %% [markdown]
# In the text model the prediction also got worse with training (the factor printed above): its weights
# now follow the content of the values, and the law takes them as given.
#
# ## The trap
#
# `softmax` was trained with `<|bos|>` in front of every window, so let us measure there. Position 0 is
# then the same token every time, it sees nothing else, and its variance *over windows* is nothing at all.
# An outlier becomes the opposite of one, through the choice of windows. So use ordinary first tokens, as
# above, and beside it the *spread*: the variance over the dimensions of one vector, which sees a fixed
# token too.

# %%
bos, _ = windows("bos")
trap = {}
for when, m in (("untrained", untrained["softmax"]), ("trained", trained["softmax"])):
    z = record(m, bos, ["0.z"])[1]["0.z"].detach()
    trap[when] = {"variance over windows": probe.variance_by_position(z),
                  "spread over dimensions": probe.spread_by_position(z).mean(0)}

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for axis, (when, found) in zip(axes, trap.items()):
    for style, (name, y) in zip(probe.STYLES, found.items()):
        axis.plot(range(1, T + 1), (y / y.median()).tolist(), label=name, markevery=[0, 1, 3, 7], ms=5, lw=1.2, **style)
    probe.dress(axis, f"softmax, {when}, windows after <|bos|>", {}, xscale="log", xlabel="position t + 1 (log)",
                ylabel="V_t / median over positions")
show(figure, "01_trap")

# %% [markdown]
# At position 0 the black curve is zero in both models; the dashed one shows the outlier before training,
# and shows that it is gone after.

# %%
for when, found in trap.items():
    over_windows, spread = (probe.discrepancy(y).item() for y in found.values())
    print(f"{when:10} position 0 against the others: variance over windows {over_windows:.3g}, spread {spread:.2f}")
    assert over_windows < 1e-9, "a fixed first token varies between windows"  # but for rounding
assert probe.discrepancy(trap["untrained"]["spread over dimensions"]) > 1.5, "the spread misses the outlier too"
assert probe.discrepancy(trap["trained"]["spread over dimensions"]) < 1.5, "the trained <|bos|> is an outlier"

# %% [markdown]
# So on the windows that `softmax` was trained on, its first layer no longer has this outlier. Keep that in
# mind for chapter 06, where cutting this link changes nothing in that model.
#
# ## Two cures, before training
#
# The paper proposes to take the outlier away. *Headnorm* divides each head's $o_t$ by its root mean
# square, so all positions are handed vectors of one size. *Sigmoid attention* lets every key pass with
# a weight near $1/T$, whatever the others do. Put that into the law, with $\rho = 0$:
#
# $$\operatorname{Var} o_t \approx \sigma^2 \sum_{s \le t} \frac{1}{T^2} = \sigma^2\, \frac{t+1}{T^2}$$
#
# This does not *flatten* the curve. It turns it over: the first token has the least variance of all.

# %%
x = random_tokens["softmax"]
other = {attn: GPT(replace(trained["softmax"].cfg, attn=attn), seed=0) for attn in ("headnorm", "sigmoid")}
cures = {"softmax": law["softmax"]["untrained"][0], "headnorm": curves(other["headnorm"], x)[0]}
cures["sigmoid"], cures["sigmoid, predicted"] = curves(other["sigmoid"], x)
raw = curves(other["headnorm"], x, z="z_raw")[0]  # before the norm headnorm is softmax
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
probe.draw_variance(axis, cures, "Untrained, first layer, random bytes")
show(figure, "01_cures")

# %% [markdown]
# Softmax falls, headnorm is flat, and sigmoid rises just as its prediction does.

# %%
ratio = {name: probe.discrepancy(y).item() for name, y in cures.items()}
print("discrepancy:", ", ".join(f"{name} {r:.2f}" for name, r in ratio.items()))
assert torch.allclose(raw, cures["softmax"], rtol=1e-3), "headnorm differs from softmax before its norm"
assert 0.8 < ratio["headnorm"] < 1.3, "headnorm does not flatten the variance"
assert ratio["sigmoid"] < 0.2, "sigmoid does not turn the curve over"

# %% [markdown]
# ## Beside the paper

# %%
beside(("model", "Llama-2-7B and Llama-3, trained", "softmax (text) | micro-softmax"),
       ("tokens", "random", "random"),
       ("position 0 is the outlier, layer 1", "yes, decaying with t",
        " | ".join(f"{gap[name]['trained']:.1f} times the median" for name in trained)),
       ("the same before training", "not reported",
        " | ".join(f"{gap[name]['untrained']:.1f} times" for name in trained)),
       ("depends on the tokens", "no", f"no: at least {min(b for b, _ in identity.values()):.1f} times, untrained"),
       ("sigmoid attention", "removes it", f"reverses it: {ratio['sigmoid']:.2f} times, untrained"),
       ("headnorm", "meant to even it out", f"evens it out: {ratio['headnorm']:.2f} times, untrained"))

# %% [markdown]
# Both claims hold here: the outlier is there at step 0, and it does not ask who the first token is. Two
# findings go beyond them. Training shrinks the outlier of the first layer, so the sink does not grow
# *because it grows*: a signal of place is there from the start, and the later links have to learn to
# use it. And sigmoid attention does not hide the place of the first token. It marks it with the
# opposite sign.
#
# The law itself is older than the paper: Chi et al. (2023, arXiv 2305.13571) use it to explain how
# decoders without position embeddings can tell places apart.
#
# ## What would falsify this
#
# A flat curve in the untrained model would mean that the outlier is learned. An outlier that moved when
# the windows were turned round would mean that it belongs to tokens. A measured curve far from
# `predicted_variance` would mean that something else than averaging is at work. All three are asserted.
#
# ## Exercises
#
# **1.** The bracket of the law, for one row of weights: the variance of $\sum_s a_s v_s$ in units of
# $\sigma^2$. `weights` is (n,) and need not add up to 1.


# %%
def aggregate_variance(weights, rho):
    ...


def check_aggregate_variance(answer):
    got = answer(torch.full((4,), 0.25), 0.0)
    assert got is not None, "Return a number: add up the covariances of all pairs of terms."
    close = lambda a, b: abs(float(a) - b) < 1e-5
    assert close(got, 0.25), "Four equal weights on independent values leave a quarter of the variance."
    assert close(answer(torch.tensor([1.0]), 0.5), 1), "One value alone keeps its variance, whatever rho is."
    assert close(answer(torch.full((4,), 0.25), 1.0), 1), "Values that are all the same lose nothing by averaging."
    assert close(answer(torch.tensor([0.7, 0.3]), 0.5), 0.79), "Unequal weights: 0.49 + 0.09, and each pair twice."
    assert close(answer(torch.full((3,), 0.5), 0.2), 1.05), "Weights need not add up to 1: do not normalise them."


attempt(check_aggregate_variance, aggregate_variance)

# %% [markdown]
# **2.** Chapter 06 forges an outlier: token `k` may see only itself. Build that pattern, otherwise
# uniform and causal: (T, T), rows are queries. Which positions are outliers now?


# %%
def blocked_pattern(T, k):
    ...


def check_blocked_pattern(answer):
    got = answer(16, 10)
    assert got is not None, "Return a (T, T) tensor whose row t holds the weights of query t."
    assert got.shape == (16, 16) and torch.allclose(got.sum(-1), torch.ones(16)), "Every row must add up to 1."
    assert torch.equal(got, got.tril()), "No query may look ahead."
    variance = probe.predicted_variance(got)
    assert torch.isclose(variance[10], torch.tensor(1.0)), "Token k should keep the whole variance, as token 0 does."
    assert torch.isclose(variance[11], torch.tensor(1 / 12)), "Only row k changes: later queries see all keys."
    plain = torch.tril(torch.ones(5, 5)) / torch.arange(1, 6)[:, None]
    assert torch.allclose(answer(5, 0), plain), "For k = 0 nothing is new: that is uniform attention."


attempt(check_blocked_pattern, blocked_pattern)

# %% [markdown]
# **3.** Predict the discrepancy of an untrained first layer from the standard deviation `std` of its
# weights, the width `C` and the window `T`. Your answer is tried against untrained models with other
# weights, other widths and other windows.


# %%
def initial_discrepancy(std, C, T):
    ...


def check_initial_discrepancy(answer):
    assert answer(0.02, 64, 64) is not None, "Return a number: see 'How large is it before training?'."
    for std, C, length in ((0.02, 64, 64), (0.1, 64, 64), (0.06, 128, 32)):
        cfg = Config(vocab_size=257, hidden_size=C, num_hidden_layers=1, num_attention_heads=2, initializer_range=std)
        tokens = torch.randint(256, (128, length), generator=torch.Generator().manual_seed(1))
        got, found = float(answer(std, C, length)), first_layer(GPT(cfg, seed=1), tokens)
        assert 0.8 < got / found < 1.25, \
            f"std {std}, C {C}, T {length}: you say {got:.1f}, an untrained model has {found:.1f}. " \
            "Small weights give nearly uniform attention; what do larger ones do to the scores?"


attempt(check_initial_discrepancy, initial_discrepancy)
