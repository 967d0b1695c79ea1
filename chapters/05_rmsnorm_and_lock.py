# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 05 · RMSNorm and the lock
#
# **Claim.** RMSNorm forgets how long a state is and keeps where it points. So the first
# token of SmolLM2 has one key, whatever it is, and that key is of ordinary size. The
# queries of nearly every head point to its side. Leave the norm out of the keys and
# attention becomes a switch, and the model breaks.
#
# **You need** chapter 04: the first state is long, and almost all of it is dimension
# 507. **Run time**: ten seconds on 2 cores, once the two small models are trained.

# %%
import torch
import torch.nn.functional as F
from lesson import beside, check, english, figures, models, plt
from lesson import random_tokens, real, show, windows
from model import record
import probe

# %%
model, _ = real()
x, _ = random_tokens()
L, H = model.cfg.num_hidden_layers, model.cfg.num_attention_heads
K, C = model.cfg.num_key_value_heads, model.cfg.hidden_size
kinds = ("resid_pre", "q", "k", "scores", "pattern")
seen = record(model, x, [f"{i}.{kind}" for i in range(L) for kind in kinds])[1]
states = [seen[f"{i}.resid_pre"] for i in range(L)]  # (N, T, C)

# %% [markdown]
# ## A filter for direction
#
# For a state $x$ with $C$ dimensions and a learned gain $\gamma$,
#
# $$\mathrm{RMSNorm}(x) = \gamma \odot \frac{x}{\sqrt{\frac1C \sum_j x_j^2}}
# = \sqrt C \; \gamma \odot \frac{x}{\lVert x \rVert} ,$$
#
# so the length cancels: $\mathrm{RMSNorm}(b x) = \mathrm{RMSNorm}(x)$ for every $b >
# 0$.
#
# **One dimension dominates.** If $x$ is nearly $\pm a\,e_c$, with $e_c$ the unit
# vector of dimension $c$, then
#
# $$\mathrm{RMSNorm}(x) \approx \pm \sqrt C \, \gamma_c \, e_c .$$
#
# Nothing on the right depends on the token. In SmolLM2 $c$ is 507. Compare:

# %%
with torch.no_grad():
    norms = [block.input_layernorm for block in model.layers]
    normed = [norm(state) for norm, state in zip(norms, states)]
entry = torch.stack([h[:, 0, 507].mean() for h in normed])
gain = torch.stack([norm.weight.detach()[507] for norm in norms])
sign = torch.stack([state[:, 0, 507].mean().sign() for state in states])
limit = sign * C**0.5 * gain
for i in (1, 3, 8, 11, 12, 20, 28):
    print(f"layer {i:2}: entry 507 is {entry[i]:6.2f}, the limit {limit[i]:6.2f}")
away = (entry / limit - 1).abs()
assert away[12:28].max() < 0.05 < 0.5 < away[11], "the limit, where 507 is written"

# %% [markdown]
# **Any direction, with noise.** Let $x = a\,m + n$, with a fixed unit vector $m$ and
# noise of mean squared length $s^2$ that differs from window to window. For two
# windows
#
# $$\cos(x, x') \approx \frac{a^2}{a^2 + s^2} = \frac{r^2}{1 + r^2},
# \qquad r = \frac as .$$
#
# So *one* dimension is not needed. What fixes a direction is that the part shared by
# all windows is longer than the rest: $r = 3$ gives 0.9. In the model, the cosine
# between the normed states of two windows is `probe.direction_cos`.

# %%
fixed = [[probe.direction_cos(h[:, t]).item() for h in normed] for t in (0, 32)]
first, other = torch.tensor(fixed)
print(f"layers 12 to 27: token 0 {first[12:28].min():.3f} or more, token 32 on average "
      f"{other[12:28].mean():.2f}")
assert first[12:28].min() > 0.98 > other[12:28].mean() + 0.1, "one direction"

# %% [markdown]
# A key is a linear map of the normed state, $k_0 = W_K \,\mathrm{RMSNorm}(x_0)$. So one
# one direction means one key, whatever the first token was.
#
# ## What if the norm were left out?
#
# A cosine cannot tell: it has a norm of its own. What would change is *size*. Take the
# keys,
#
# $$k_t = W_K \,\mathrm{RMSNorm}(x_t) = W_K \Bigl(\gamma \odot
# \frac{x_t}{\mathrm{rms}(x_t)}\Bigr) ,$$
#
# and divide by one constant instead of each token's own rms: the median over tokens. An
# ordinary key hardly changes. How long is the key of token 0, and what becomes of its
# logit? The *lock gap* is the logit of key 0 above the mean of the other keys,
#
# $$\mathrm{gap} = \operatorname{mean}_{t>0} \Bigl[ \frac{q_t \cdot k_0}{\sqrt D} -
# \operatorname{mean}_{1 \le s \le t} \frac{q_t \cdot k_s}{\sqrt D} \Bigr] .$$


# %%
def lock_gap(scores):
    """(N, H, T, T) -> (H,), nats"""
    rows = scores[:, :, 1:]
    keys = torch.arange(1, rows.shape[-1])  # of query t: as many others as its position
    rest = rows.tril(1)[..., 1:].sum(-1) / keys
    return (rows[..., 0] - rest).mean((0, 2))


def without_norm(state):
    """(N, T): by what every key grows if a constant takes the place of its rms."""
    rms = state.square().mean(-1).sqrt()
    return rms / rms[:, 1:].median()


# %%
lengths = {"with RMSNorm": [], "with a constant": []}
gaps = {name: [] for name in lengths}
for i in range(L):
    grown = without_norm(states[i])
    length, scores = seen[f"{i}.k"].norm(dim=-1).mean(-1), seen[f"{i}.scores"]
    for name, by in zip(lengths, (torch.ones_like(grown), grown)):
        long = length * by
        lengths[name].append((long[:, 0] / long[:, 1:].median(1).values).mean())
        gaps[name].append(lock_gap(scores * by[:, None, None]))
gaps = {name: torch.stack(values) for name, values in gaps.items()}  # (L, H)
lengths = {name: torch.stack(values) for name, values in lengths.items()}
own = probe.lock_gap(seen["18.scores"], 0)
assert torch.allclose(gaps["with RMSNorm"][18], own, atol=1e-3), "the same in probe"

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.6))
figures.by_layer(left, lengths, "RMSNorm keeps key 0 short",
                 ["with RMSNorm"], {"loc": "upper left"}, yscale="log", ylim=(0.1, 500),
                 ylabel="length of key 0 / median key (log)")
figures.by_layer(right, gaps, "and its logit within a few nats",
                 ["with RMSNorm"], dict(loc="upper left"), yscale="log",
                 ylim=(0.5, 5000), ylabel="largest lock gap, nats (log)")
show(figure, "05_without", "Left: length of key 0 by layer, below 1 with RMSNorm, far "
     "above with a constant. Right: its logit, about 10 nats, and hundreds without.")

# %% [markdown]
# Chapter 04 found two waves: dimension 507 is about 800 in the first and 23,000 in the
# second. With the norm the logits do not know: both waves have gaps of the same order.
# With a constant, the second wave has gaps of hundreds of nats. A softmax with a gap
# of hundreds is a switch: it puts everything on key 0 or nothing.

# %%
kept, constant = (g.amax(1) for g in gaps.values())
one, two = slice(3, 9), slice(12, 28)
for name, g in (("RMSNorm", kept), ("a constant", constant)):
    print(f"{name}: gap {g[one].mean():.0f} nats in the first wave, "
          f"{g[two].mean():.0f} in the second")
grows, grows_alone = (g[two].mean() / g[one].mean() for g in (kept, constant))
assert 0.3 < grows < 3 < grows_alone, "the norm hides the length, a constant does not"
assert lengths["with RMSNorm"][two].max() < 1 < lengths["with a constant"][two].min()

# %% [markdown]
# Now let the model *run* with such keys. Queries, values and MLPs are left as they
# are. Predict: does the mean attention to token 0 of layers 12 to 27 "fall", "stay" or
# "rise"?

# %%
prediction = ...  # "fall", "stay" or "rise"


# %%
def constant_scale():
    """A tap: from layer 1 on, keys are made with a constant for each token's rms."""
    grown = {}

    def tap(name, value):
        layer, _, what = name.rpartition(".")
        if what == "resid_pre":
            grown[layer] = without_norm(value)[..., None, None]
        return value * grown[layer] if what == "k" and layer != "0" else value
    return tap


wanted = [n for n in probe.numbers() if n.key == "sink"]
attention, loss = {}, {}
text, target = english(4)
for name, tap in (("RMSNorm", None), ("constant", constant_scale())):
    found = probe.layers(model, x[:4], tap, wanted=wanted)[0][0]["sink"]
    attention[name] = found[two].mean().item()
    with torch.no_grad():
        loss[name] = model(text, target, tap)[1].item()
    print(f"{name}: attention {attention[name]:.3f}, loss {loss[name]:.2f} nats")
switch = attention["constant"] > 0.95 > attention["RMSNorm"] + 0.2
assert switch and loss["constant"] > loss["RMSNorm"] + 1, "a switch that cannot read"

# %%
check("05.prediction", prediction)

# %% [markdown]
# So RMSNorm does two things for a sink. It makes the direction of a long state the
# *same* in every window, and it makes its size *ordinary*, so that a head can rest on
# it as much as it wants and no more.
#
# ## The lock
#
# Which unit vector do the queries of a head lean on most? Stack them, from all windows
# and all positions after the first, into a matrix $Q$ with a row for each. Maximise
# $\lVert Q u \rVert^2$ for $\lVert u \rVert = 1$: the answer is the leading *right
# singular vector* $u_1$ of $Q$. It has no sign of its own, so take the one for which
# the mean query has a positive part along it. The lock is then $\cos(u_1, k_0)$,
# before rotation. Beside it stand the share of later queries with $q_t \cdot k_0 > 0$
# (after rotation; key 0 is turned by the angle 0), and the attention to token 0.

# %%
def leading(q):
    """(N, T, H, D) -> (H, D)"""
    rows = q.flatten(0, 1).transpose(0, 1)  # (H, N T, D)
    u = torch.linalg.svd(rows, full_matrices=False)[2][:, 0]
    return u * (rows.mean(1) * u).sum(-1, keepdim=True).sign()


lock, positive, sink = [], [], []
for i in range(1, L):
    q, key = seen[f"{i}.q"], seen[f"{i}.k"][:, 0].repeat_interleave(H // K, 1)
    lock.append(F.cosine_similarity(leading(q[:, 1:]), key, dim=-1).mean(0))
    positive.append((seen[f"{i}.scores"][:, :, 1:, 0] > 0).float().mean((0, 2)))
    sink.append(probe.sink_score(seen[f"{i}.pattern"], 0).mean(0))
assert torch.allclose(lock[-1], probe.lock_cos(q, key, 0), atol=1e-3), "as in probe"
lock, positive, sink = (torch.cat(v) for v in (lock, positive, sink))  # (heads,)
locked = positive > 0.95

# %%
figure, axis = plt.subplots(figsize=(8.8, 3.9))
kinds = {"more than 95 % of its queries have q · k₀ > 0":
         (locked, dict(marker="o", color=figures.ACCENT)),
         "fewer of its queries": (~locked, dict(marker="x", color="0.4"))}
for label, (which, style) in kinds.items():
    axis.plot(lock[which], sink[which], ls="", label=label, **style)
axis.axhline(probe.SINK, color="black", lw=0.9, ls=":")
figures.dress(axis, "A sink only where nearly all queries are on the side of key 0",
              {"loc": "upper left"}, xlabel="cos(u₁, k₀) of a head, before rotation",
              ylabel="attention to token 0", ylim=(0, 1.15))
show(figure, "05_heads", "Scatter of 261 heads. Those with nearly all queries on the "
     "side of key 0 lie mostly above the sink threshold, the others below it.")

# %%
has_sink = sink > probe.SINK
both = (locked & has_sink).sum()
print(f"{len(sink)} heads: {has_sink.sum()} with a sink, {locked.sum()} locked, {both} "
      f"both; Kendall tau of the two axes {probe.kendall_tau(lock, sink):.2f}")
unlocked = has_sink[~locked].float().mean()
assert both / has_sink.sum() > 0.9 and unlocked < 0.3, "a sink only with the lock"

# %% [markdown]
# The grey crosses are mostly heads of the layers in which the dimension is not there:
# before it is written, and after it is erased (layers 1, 10 and 11).
#
# ## In one that you train
#
# Of the head with the strongest sink: the mean logit of key 0, and that of the others.

# %%
def strongest(net, tokens):
    """The logits (N, T, T) of the head after layer 0 that attends most to token 0."""
    names = [f"{i}.scores" for i in range(1, net.cfg.num_hidden_layers)]
    scores = torch.cat(list(record(net, tokens, names)[1].values()), 1)
    hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return scores[:, probe.sink_score(pattern, 0).mean(0).argmax()]


inputs = {"tiny-softmax": windows("bos")[0], "softmax": windows("rest")[0]}
key_0, others = {}, {}
for name, net in models(*inputs).items():
    scores = strongest(net, inputs[name])
    key_0[name] = scores[:, 1:, 0].mean().item()
    others[name] = key_0[name] - lock_gap(scores[:, None]).item()
    found = probe.chain(net, inputs[name])
    print(f"{name}: sink {found['sink']:.2f}, cos(u1, k_0) {found['lock_cos']:.2f}, "
          f"logit of key 0 {key_0[name]:.1f}, of the others {others[name]:.1f}")

# %%
assert key_0["tiny-softmax"] > 3 > abs(others["tiny-softmax"]), "key 0 is liked"
assert others["softmax"] < -2 < key_0["softmax"], "all other keys are disliked"

# %% [markdown]
# `tiny-softmax` locks as SmolLM2 does: queries like key 0, and the other keys leave
# them cold. In `softmax`, where nothing is to be copied, queries need not like key 0,
# because they dislike all *others*. Why is that enough? Softmax sees only
# *differences*: a key that every query likes by 0 is a sink if every other key is
# disliked. "On the side of the queries" is the paper's count; "above the others" is
# what attention needs.
#
# ## Beside the paper

# %%
beside(("model", "Llama-2-7B", "SmolLM2-135M"),
       ("q.k_0 > 0 in heads that lock", "nearly 100 %",
        f"{positive[has_sink].mean():.1%} in heads with a sink"),
       ("sink from", "layer 2", "layer 2; none in layer 11"),
       ("normed x_0 on its axis", "about sqrt(C) gamma_c",
        f"{(entry / limit)[two].mean():.1%} of it"),
       ("without RMSNorm in the keys", "not reported",
        f"loss {loss['RMSNorm']:.1f} to {loss['constant']:.1f} nats"))

# %% [markdown]
# ## What would falsify this
#
# Gaps that follow the length of the first state, with the norm in place. Heads with a
# sink whose queries are on both sides of key 0. Heads of layer 11 with a sink though
# the dimension is erased. The first two are asserted here, the third in chapter 04. In
# the copying model the second happens: there no lock holds the sink.
#
# ## Exercises
#
# **1.** The prediction above the cell that runs with a constant.
#
# **2.** What does RMSNorm make of a state whose dimension `c` goes to plus (`sign` 1)
# or minus (`sign` -1) infinity, while the others stay? `gamma` is the gain (C,); give
# (C,).


# %%
def norm_limit(gamma, c, sign):
    ...


check("05.norm_limit", norm_limit)

# %% [markdown]
# **3.** The direction that the queries `q` (M, D) of one head share: a unit vector
# (D,), with the mean query on its positive side. Do not subtract the mean. Neither
# `leading` nor `probe.leading_query` may be called.


# %%
def common_direction(q):
    ...


check("05.common_direction", common_direction)

# %% [markdown]
# **4.** An experiment. Take the sinks away by the keys of token 0 alone. Given `k` (N,
# T, K, D), the keys of a layer before rotation, and `q` (N, T, H, D), its queries,
# return keys in which `k[:, 0]` is changed, and is *as long as before*. The check uses
# it in layers 12 to 27 and wants the mean attention to token 0 below 0.15.


# %%
def unlock(k, q):
    ...


check("05.unlock", unlock)
