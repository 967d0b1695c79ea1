# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 05 · RMSNorm and the lock
#
# **Claim.** RMSNorm removes the length of a state and keeps its direction. So in the
# layers of SmolLM2 where the first state is long, the key of the first token is nearly
# the same, whatever token stands there, and it is not long. In nearly every head with a
# sink the queries point to the side of this key. For other keys that is rare. Without
# the norm in the keys, the model breaks.
#
# **You learn** what a norm before attention does to a long state, and to ask of a
# striking count what it is for another token. **You need** chapter 04: the first state
# is long, and almost all of it is dimension 507. **Run time**: 10 to 30 seconds, once
# three small models are trained.

# %%
from lesson import ask, beside, check, english, figures, models, plt
from lesson import random_tokens, real, show, windows

import torch

import probe
from model import record

model, _ = real()
x, _ = random_tokens()
L = model.cfg.num_hidden_layers
H = model.cfg.num_attention_heads
K = model.cfg.num_key_value_heads
C = model.cfg.hidden_size
first_wave = slice(3, 9)  # layers that read the two waves of chapter 04
second_wave = slice(12, 28)

names = []
for i in range(L):
    for kind in ("resid_pre", "q", "k", "scores", "pattern"):
        names.append(f"{i}.{kind}")
_, seen = record(model, x, names)
states = [seen[f"{i}.resid_pre"] for i in range(L)]  # (N, T, C)

# %% [markdown]
# ## A filter for direction
#
# For a state $x$ with $C$ dimensions and a learned gain $\gamma$,
#
# $$\mathrm{RMSNorm}(x) = \gamma \odot \frac{x}{\sqrt{\frac1C \sum_j x_j^2}}
# = \sqrt C \; \gamma \odot \frac{x}{\lVert x \rVert} ,$$
#
# so the length cancels: $\mathrm{RMSNorm}(b x) = \mathrm{RMSNorm}(x)$ for every
# $b > 0$. If one dimension $c$ dominates, then $x \approx \pm a e_c$ with the unit
# vector $e_c$ along it, and
#
# $$\mathrm{RMSNorm}(x) \approx \pm \sqrt C \, \gamma_c \, e_c .$$
#
# Nothing on the right depends on the token. In SmolLM2 $c$ is 507. How close is the
# normed state to this limit, and do the normed states of two windows, which begin with
# different tokens, have the same direction?

# %%
near = torch.zeros(L)
token_0, token_32 = torch.zeros(L), torch.zeros(L)  # cosine between two windows
own_0, own_32 = torch.zeros(L), torch.zeros(L)  # the same without what all states share
with torch.no_grad():
    for i in range(L):
        norm = model.layers[i].input_layernorm
        normed = norm(states[i])
        sign = states[i][:, 0, 507].mean().sign()
        limit = sign * C**0.5 * norm.weight[507]
        near[i] = normed[:, 0, 507].mean() / limit
        token_0[i] = probe.direction_cos(normed[:, 0])
        token_32[i] = probe.direction_cos(normed[:, 32])
        own = normed - normed.mean((0, 1))
        own_0[i] = probe.direction_cos(own[:, 0])
        own_32[i] = probe.direction_cos(own[:, 32])
for i in (8, 11, 20):
    print(f"layer {i:2}: entry 507 is {near[i]:4.0%} of its limit")
least, usual = token_0[second_wave].min(), token_32[second_wave].mean()
print(f"cosine between two windows, layers 12 to 27: token 0 at least {least:.3f}, "
      f"token 32 on average {usual:.2f}")
least_own, usual_own = own_0[second_wave].min(), own_32[second_wave].mean()
print(f"the same without the mean of all states: token 0 at least {least_own:.3f}, "
      f"token 32 on average {usual_own:.2f}")
assert near[second_wave].min() > 0.95, "far from the limit, though 507 is written"
assert near[11] < 0.5, "at the limit, though 507 is erased"
assert least > 0.98, "token 0 has more than one direction"
assert usual < 0.88, "every token has one direction"
assert least_own > 0.9, "the direction of token 0 is the one that all states share"
assert usual_own.abs() < 0.2, "so has an ordinary token, without the shared mean"

# %% [markdown]
# Ordinary states are alike too, because all states share a mean. Subtract this mean:
# the cosine of token 32 falls to about zero, and token 0 keeps its own direction.
#
# A key is a linear map of the normed state, $k_0 = W_K \mathrm{RMSNorm}(x_0)$. So one
# direction means one key, whatever the first token was.
#
# ## What if the norm were left out?
#
# Then keys would change in *length*. The norm divides a state by its *rms*, the root of
# the mean square. In its place we divide by one constant, the median rms of the tokens
# after the first. An ordinary key hardly changes. How long does key 0 become, and how
# large its logit? The *lock gap* (`probe.lock_gap`) says by how much a query prefers
# key 0: it is the logit of key 0 minus the mean logit of the other keys,
#
# $$\mathrm{gap} = \mathrm{mean}_{t>0} \Bigl[ \frac{q_t \cdot k_0}{\sqrt D} -
# \mathrm{mean}_{1 \le s \le t} \frac{q_t \cdot k_s}{\sqrt D} \Bigr] .$$


# %%
def without_norm(state):
    """(N, T): the factor by which each key grows if a constant replaces its rms."""
    rms = state.square().mean(-1).sqrt()
    return rms / rms[:, 1:].median()


# %%
lengths = {"with RMSNorm": torch.zeros(L), "with a constant": torch.zeros(L)}
gaps = {"with RMSNorm": torch.zeros(L, H), "with a constant": torch.zeros(L, H)}
for i in range(L):
    grown = without_norm(states[i])
    factors = {"with RMSNorm": torch.ones_like(grown), "with a constant": grown}
    for name, factor in factors.items():
        length = seen[f"{i}.k"].norm(dim=-1).mean(-1) * factor  # (N, T)
        lengths[name][i] = probe.over_median(length, 0).mean()
        scores = seen[f"{i}.scores"] * factor[:, None, None]
        gaps[name][i] = probe.lock_gap(scores, 0)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.6))
look = dict(hot=["with RMSNorm"], legend={"loc": "upper left"}, yscale="log")
figures.by_layer(left, lengths, "RMSNorm keeps key 0 short", **look,
                 ylim=(0.1, 500), ylabel="length of key 0 / median key (log)")
figures.by_layer(right, gaps, "and its lock gap near ten nats", **look,
                 ylim=(0.05, 5000), ylabel="largest lock gap, nats (log)")
show(figure, "05_without", "Left: length of key 0 by layer: with RMSNorm below 1 where "
     "the state is long, with a constant far above, most from layer 12 on. Right: the "
     "largest lock gap, about 10 nats, with a constant up to hundreds.")

# %%
growth = {}
for name, gap in gaps.items():
    largest = gap.amax(1)  # (L,)
    growth[name] = largest[second_wave].mean() / largest[first_wave].mean()
print(f"largest gap, second wave over first: {growth['with RMSNorm']:.1f} with RMSNorm,"
      f" {growth['with a constant']:.1f} with a constant")
assert 0.3 < growth["with RMSNorm"] < 3, "the gap grows with the length"
assert growth["with a constant"] > 3, "the gap does not grow"
assert lengths["with RMSNorm"][second_wave].max() < 1, "the norm leaves the key long"
assert lengths["with a constant"][second_wave].min() > 1, "the key stays short"

# %% [markdown]
# In the second wave of chapter 04 the state is many times as long as in the first. With
# the norm, the largest gap is about the same in both. With a constant, it grows several
# times.
#
# Now let the model *run* with such keys, and leave all else as it is. Predict (exercise
# 1): does the mean attention to token 0 of layers 12 to 27 "fall", "stay" or "rise"?

# %%
prediction = ...  # "fall", "stay" or "rise"
ask(prediction)


# %%
def constant_scale():
    """A tap: from layer 1 on, keys are made with a constant for each token's rms."""
    grown = {}

    def tap(name, value):
        layer, _, kind = name.rpartition(".")
        if kind == "resid_pre":
            grown[layer] = without_norm(value)[..., None, None]
        if kind == "k" and layer != "0":
            return value * grown[layer]
        return value
    return tap


# %%
taps = {"with RMSNorm": None, "with a constant": constant_scale()}
attention, loss = {}, {}
text, target = english(4)
for name, tap in taps.items():
    (found,), _ = probe.layers(model, x[:4], tap, wanted=[probe.metric("sink")])
    attention[name] = found["sink"][second_wave].mean().item()
    with torch.no_grad():
        loss[name] = model(text, target, tap)[1].item()
    print(f"{name}: attention {attention[name]:.3f}, loss {loss[name]:.2f} nats")

# %%
check("05.prediction", prediction)
good, bad = loss["with RMSNorm"], loss["with a constant"]
assert attention["with RMSNorm"] < 0.75, "all attention is on key 0 anyway"
assert attention["with a constant"] > 0.95, "some attention is left for other keys"
assert bad > good + 1, "the model can do without"

# %% [markdown]
# A gap of hundreds of nats makes softmax a switch: all attention goes to key 0, and the
# head reads nothing else. So RMSNorm lets the direction of the long state pass, which
# is the same in every window, and gives it an *ordinary* length, so that a head can
# divide its attention between key 0 and the others.
#
# ## The lock
#
# Why do nearly all queries of a head prefer key 0? The paper's answer: they share a
# direction, and key 0 lies on its side. Here we look whether it is so; chapter 06 cuts
# it. Let all queries after the first be the rows of a matrix $Q$. The unit vector $u$
# with the largest $\lVert Q u \rVert^2$ is the leading *right singular vector* $u_1$ of
# $Q$; of its two signs take the side of the mean query. We measure $\cos(u_1, k_0)$
# (`probe.lock_cos`; exercise 3 writes $u_1$) before *rotation*, which turns $q$ and $k$
# by angles that grow with their positions. We also count, after rotation, the later
# queries with $q_t \cdot k_0 > 0$. If they are more than 95 % of all later queries, the
# head is *locked*.

# %%
def liking(t):
    """Of every head after layer 0: the share of later queries with q · k_t > 0."""
    likes = [seen[f"{i}.scores"][:, :, t + 1:, t] > 0 for i in range(1, L)]
    return torch.cat(likes, 1).float().mean((0, 2))


lock, sink = [], []
for i in range(1, L):
    key = seen[f"{i}.k"][:, 0].repeat_interleave(H // K, 1)  # of every query head
    lock.append(probe.lock_cos(seen[f"{i}.q"], key, 0))
    sink.append(probe.sink_score(seen[f"{i}.pattern"], 0).mean(0))
lock = torch.cat(lock)  # of all heads after layer 0
sink = torch.cat(sink)
positive = liking(0)
locked = positive > 0.95
has_sink = probe.has_sink(sink)

# %%
figure, axis = plt.subplots(figsize=(8.8, 3.9))
axis.plot(lock[locked], sink[locked], "o", color=figures.ACCENT,
          label="more than 95 % of its queries have q · k₀ > 0")
axis.plot(lock[~locked], sink[~locked], "x", color="0.4", label="fewer of its queries")
axis.axhline(probe.SINK, color="black", lw=0.9, ls=":")
figures.dress(axis, "Nearly every sink has its queries on the side of key 0",
              {"loc": "upper left"}, xlabel="cos(u₁, k₀) of a head, before rotation",
              ylabel="attention to token 0 (dotted: 0.3, a sink)", ylim=(0, 1.15))
show(figure, "05_heads", "Scatter of 261 heads. Those with nearly all queries on the "
     "side of key 0 lie mostly above the sink threshold, the others nearly all below "
     "it.")

# %%
both = (locked & has_sink).sum()
print(f"{len(sink)} heads: {has_sink.sum()} with a sink, {locked.sum()} locked, {both} "
      "both")
locked_share = locked.view(L - 1, H).float().mean(1)  # of each layer from 1 on
few = 1 + (locked_share < 0.5).nonzero()[:, 0]
print("layers with few locked:", few.tolist())
control = {t: (liking(t) > 0.95).sum().item() for t in (1, 32)}
print(f"the same count of locked heads for keys 1 and 32: {control}")
assert both / has_sink.sum() > 0.9, "sinks without the lock"
assert has_sink[~locked].float().mean() < 0.3, "heads that are not locked have sinks"
assert max(control.values()) < locked.sum() / 4, "heads are locked to any key"

# %% [markdown]
# Most heads are locked to key 0. So it says little by itself that heads with a sink are
# locked. The control says more: to another key few heads are locked. The crosses are
# mostly heads of layers in which dimension 507 is not yet written, or erased.
#
# ## In small models that you train
#
# `text` and `softmax` are those of chapter 00. A third model, `copy`, has learned to
# continue random letters that repeat; here it reads letters that do not. In the head
# with the strongest sink of each we compare the mean logit of key 0 and of the other
# keys.


# %%
def after_first(net, tokens, kind):
    """The scores or the pattern of every head after layer 0, (N, heads, T, T)."""
    names = [f"{i}.{kind}" for i in range(1, net.cfg.num_hidden_layers)]
    _, seen = record(net, tokens, names)
    return torch.cat(list(seen.values()), 1)


inputs = {"text": windows("bos")[0], "softmax": windows("letters")[0],
          "copy": windows("quiet")[0]}  # nothing that repeats
key_0, others, above = {}, {}, {}
for name, net in models("text", "softmax", "copy").items():
    scores = after_first(net, inputs[name], "scores")
    pattern = after_first(net, inputs[name], "pattern")
    attends = probe.sink_score(pattern, 0).mean(0)
    head = attends.argmax()
    logits = scores[:, head, 1:, 0]
    gap = probe.lock_gap(scores, 0)[head]
    key_0[name] = logits.mean().item()
    others[name] = key_0[name] - gap.item()
    above[name] = (logits > 0).float().mean().item()
    print(f"{name}: sink {attends[head]:.2f}, logit of key 0 {key_0[name]:.1f}, "
          f"above 0 for {above[name]:.0%} of queries; of the others {others[name]:.1f}")

# %%
assert min(key_0["text"], key_0["softmax"]) > 3, "queries do not prefer key 0"
assert abs(others["text"]) < 3, "the other keys do not score about zero"
assert max(others["softmax"], others["copy"]) < -2, "they do not score below zero"
assert min(above["text"], above["softmax"]) > 0.95, "not all queries prefer key 0"
assert above["copy"] < 0.8, "nearly all queries of copy score key 0 above zero"

# %% [markdown]
# In `text` and `softmax`, as in SmolLM2, nearly all queries have $q \cdot k_0 > 0$: key
# 0 scores high. The other keys score about zero in `text` and far below in `softmax`.
# In `copy` key 0 scores above zero for some two thirds of the queries only, but the
# *others* lie far below. Attention sees only *differences*, so all three are sinks. The
# paper counts whether $q \cdot k_0$ is above zero; attention asks whether it is above
# the others.
#
# ## Beside the paper

# %%
beside(("model", "Llama-2-7B", "SmolLM2-135M"),
       ("q.k_0 > 0 in heads that lock", "nearly 100 %",
        f"{positive[has_sink].mean():.1%} in heads with a sink"),
       ("normed x_0 on its axis", "about sqrt(C) gamma_c",
        f"{near[second_wave].mean():.1%} of it"),
       ("without RMSNorm in the keys", "not reported",
        f"loss {good:.1f} to {bad:.1f} nats"))

# %% [markdown]
# ## What would falsify this
#
# Lock gaps that grow with the length of the first state, though the norm is in place.
# As many heads locked to key 32 as to key 0. In SmolLM2, heads with a sink whose
# queries lie on both sides of key 0, as in `copy`.
#
# **You can now** say what of a state reaches a key, and why a sink needs no long key.
#
# ## Exercises
#
# **1.** The prediction above the cell that runs with a constant.
#
# **2.** What does RMSNorm make of a state whose dimension `c` goes to plus (`sign` 1)
# or minus (`sign` -1) infinity, while the others stay? `gamma` is the gain (C,); return
# the limit (C,).


# %%
def norm_limit(gamma, c, sign):
    ...


check("05.norm_limit", norm_limit)

# %% [markdown]
# **3.** Write $u_1$, the direction that the queries `q` (M, D) of one head share: a
# unit vector (D,), with the mean query on its positive side. Do not subtract the mean,
# and do not call `probe.leading_query`.


# %%
def common_direction(q):
    ...


check("05.common_direction", common_direction)

# %% [markdown]
# **4.** An experiment. Remove the sinks by changing only the keys of token 0. Given `k`
# (N, T, K, D), the keys of a layer before rotation, and `q` (N, T, H, D), its queries,
# return keys in which `k[:, 0]` is changed, and is *as long as before*. The check uses
# them in layers 12 to 27 and wants the mean attention to token 0 below 0.15.


# %%
def unlock(k, q):
    ...


check("05.unlock", unlock)
