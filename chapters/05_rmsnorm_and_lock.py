# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 05 · RMSNorm and the lock
#
# **Claim.** RMSNorm forgets how long a state is and keeps where it points. A first token that points
# one way in every window therefore has one key in every window, and the queries of later heads lean
# towards it.
#
# **You need** chapter 04: the first token's state is large, and large in few dimensions. **Run time**:
# about ten seconds, once the two models of chapter 00 are trained.

# %%
import sys

sys.path.append("chapters")  # when this was started one folder up
import torch
import torch.nn.functional as F
from lesson import attempt, beside, models, plt, show, windows
from model import GPT, RMSNorm, record, rope_turns, rotate
import probe

# %%
trained = models("softmax", "micro-softmax")
text, micro = trained["softmax"], trained["micro-softmax"]
untrained = {name: GPT(model.cfg, seed=0) for name, model in trained.items()}
x = {"softmax": windows("bos")[0], "micro-softmax": windows("random symbols")[0]}
found = {name: probe.links(model, x[name]) for name, model in trained.items()}
found_before = {name: probe.links(model, x[name]) for name, model in untrained.items()}

# %% [markdown]
# ## A filter for direction
#
# For a state $x \in \mathbb R^C$ and a learned gain $\gamma \in \mathbb R^C$,
#
# $$\mathrm{RMSNorm}(x) = \gamma \odot \frac{x}{\sqrt{\frac1C \sum_j x_j^2}}
# = \sqrt C \; \gamma \odot \frac{x}{\lVert x \rVert}$$
#
# (we drop the tiny $\epsilon$ under the root). The length cancels: for every $b > 0$
# $\mathrm{RMSNorm}(b x) = \mathrm{RMSNorm}(x)$. Two steps lead to the paper's link.
#
# **One dimension dominates.** Let $x = \pm a\, e_c$, where $e_c$ is the unit vector of dimension $c$
# and $a > 0$. Then $\lVert x \rVert = a$, and
#
# $$\mathrm{RMSNorm}(\pm a\, e_c) = \pm \sqrt C \, \gamma_c \, e_c .$$
#
# Nothing on the right depends on the token, only a sign does.
#
# **Any direction, with noise.** Let $x = a m + n$: a fixed unit vector $m$, and noise $n$ with mean
# zero and mean squared length $s^2$ that differs from window to window. Divide by $a$: the direction
# of $x$ is that of $m + n / a$, so it goes to $m$ as $a$ grows, whatever $m$ is. How fast? For two
# windows with independent noise
#
# $$\mathbb E\,[x \cdot x'] = a^2, \qquad \mathbb E \lVert x \rVert^2 = a^2 + s^2
# \quad\Longrightarrow\quad \cos(x, x') \approx \frac{a^2}{a^2 + s^2} = \frac{r^2}{1 + r^2}, \qquad r = \frac as .$$
#
# The approximation replaces the mean of a quotient by the quotient of the means. So no single
# dimension is needed: what makes a direction fixed is that the part shared by all windows is longer
# than the rest.


# %%
def shared_over_rest(v):
    """(N, ..., C) -> (...): length of the mean over windows, over the rms length of what is left."""
    mean = v.mean(0)
    return mean.norm(dim=-1) / (v - mean).square().sum(-1).mean(0).sqrt()


norm, axis_c = RMSNorm(64, 1e-5), torch.eye(64)[7]
noise = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) / 8  # mean squared length 1
ratios = torch.logspace(-1, 1.3, 12)
simulated = torch.stack([probe.direction_cos(norm(a * axis_c + noise)) for a in ratios]).detach()
predicted = ratios**2 / (1 + ratios**2)
limit = norm(1000 * axis_c + noise)[0].detach()
print("the largest entry of the limit:", round(limit.max().item(), 2), " sqrt(C):", 64**0.5)
assert (simulated - predicted).abs().max() < 0.05, "the formula for the cosine does not describe the simulation"

# %% [markdown]
# ## Is the first token such a state?
#
# `probe.direction_cos` is the mean cosine between the normed states of two different windows. Two
# cases:
#
# - `softmax`, windows after `<|bos|>`. Token 0 is the same in every window and sees only itself. Its
#   cosine is **trivially 1**, before training too. It proves nothing.
# - `micro-softmax`, random symbols. Token 0 is any of 24 symbols. Here the cosine is a measurement.

# %%
L = micro.cfg.num_hidden_layers
reads = [f"{i}.resid_pre" for i in range(L)]
cosine, ratio = {}, {}
for name, model in (("trained", micro), ("untrained", untrained["micro-softmax"])):
    states = list(record(model, x["micro-softmax"], reads)[1].values())
    normed = [layer.input_layernorm(s).detach() for layer, s in zip(model.layers, states)]
    cosine[name] = torch.stack([probe.direction_cos(v) for v in normed])  # (L, T)
    gained = [layer.input_layernorm.weight.detach() * s for layer, s in zip(model.layers, states)]
    ratio[name] = torch.stack([shared_over_rest(v) for v in gained])
for name, c in cosine.items():
    for i, row in enumerate(c):
        print(f"{name:9} layer {i} reads: token 0 {row[0]:.2f}, others {row[1:].mean():.2f}")
for when, f in (("trained", found), ("untrained", found_before)):
    print(f"{when:9} <|bos|> in the text model, lowest of all layers: {f['softmax']['direction'].min():.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
left.plot(ratios, predicted, color="black", lw=1, label="r² / (1 + r²)")
left.plot(ratios, simulated, ls="", marker="+", ms=8, color="0.4", label="one dimension + Gaussian noise")
left.plot(ratio["trained"][-1, 1:], cosine["trained"][-1, 1:], ls="", marker="s", ms=4, mfc="none", color="0.5",
          label=f"other tokens, layer {L - 1} reads")
left.plot(ratio["trained"][-1, 0], cosine["trained"][-1, 0], ls="", marker="o", ms=9, color="black",
          label=f"token 0, layer {L - 1} reads")
probe.dress(left, "RMSNorm as a filter", dict(fontsize=8), xscale="log", xlabel="r: shared part over the rest (log)",
            ylabel="cosine between windows")
for style, i in zip(probe.STYLES, range(L)):
    right.plot(range(1, 65), cosine["trained"][i], markevery=[0, 1, 3, 7, 15], ms=5, label=f"layer {i} reads", **style)
right.plot(range(1, 65), cosine["untrained"][-1], color="black", ls=(0, (1, 4)), label=f"untrained, layer {L - 1}")
probe.dress(right, "micro-softmax, random symbols", dict(fontsize=8), xscale="log", xlabel="position t + 1 (log)",
            ylabel="cosine between windows", ylim=(0, 1))
show(figure, "05_filter")

# %% [markdown]
# Left: the formula, the simulation and the model agree, and token 0 is further up the curve than the
# others; right: this holds only for the state that the last layer reads, so the direction is made by
# the layers before it.

# %%
last, embedded = cosine["trained"][-1], cosine["trained"][0]
assert (embedded[0] - embedded[1:].mean()).abs() < 0.05, "the embeddings of first tokens are special already"
assert last[0] > last[1:].mean() + 0.05, "token 0 has no more of a fixed direction than the others"
assert last[0] > 3 * cosine["untrained"][-1, 0], "it has it before training"
assert found_before["softmax"]["direction"].min() > 0.999, "<|bos|> should be trivially the same in every window"

# %% [markdown]
# Do not read the curve as "fixed against free". Other tokens have a large common part too. Between the
# embedding and the second layer the cosine even falls, for all positions alike. It does not grow layer
# by layer.
#
# A second question is the same in both models: is the direction kept from layer to layer? That number
# needs its null as well, because a residual stream changes little anyway.

# %%
elsewhere = probe.links(text, x["softmax"], k=32)
for name, f in (("token 0", found), ("token 0, untrained", found_before)):
    print(f"{name:20}", "  ".join(f"{c:.2f}" for c in f["softmax"]["layer_cos"][0].tolist()))
print(f"{'token 32':20}", "  ".join(f"{c:.2f}" for c in elsewhere["layer_cos"][0].tolist()))
kept, kept_other = (f["layer_cos"][0, 1:].mean().item() for f in (found["softmax"], elsewhere))
assert kept > kept_other + 0.05, "the direction of <|bos|> is not kept better than that of token 32"

# %% [markdown]
# Each number is the cosine of a normed state with the normed state one layer earlier. `<|bos|>` gets
# its direction early and then hardly moves; token 32 moves more, layer after layer.
#
# ## One direction, one key
#
# Let $W_K^{(h)}$, shape (D, C), make the keys of head $h$. If dimension $c$ alone survived the norm,
# the key of the first token would be a column of that matrix, the same for every token:
#
# $$k_0 = W_K^{(h)}\, \mathrm{RMSNorm}(x_0) \approx \pm \sqrt C \, \gamma_c \, W_K^{(h)} e_c .$$
#
# In our models $c$ holds only a share $p$ of the squared length (chapter 04). Is the prediction any
# good then? If all columns of $W_K^{(h)}$ were equally long and unrelated, the part from $c$ would be
# $\sqrt p$ of the key's length, so $\cos(k_0, W_K^{(h)} e_c) \approx \sqrt p$. That is the null.


# %%
@torch.no_grad()
def key_against_columns(model, windows_, i):
    """Cosine of k_0 with every column of W_K, turned by the sign of that dimension: (H, C), and the largest c."""
    kept = record(model, windows_, [f"{i}.resid_pre", f"{i}.k"])[1]
    normed = model.layers[i].input_layernorm(kept[f"{i}.resid_pre"])[:, 0]
    key = kept[f"{i}.k"][:, 0].mean(0)  # (H, D)
    columns = model.layers[i].self_attn.k_proj.weight.unflatten(0, key.shape)  # (H, D, C)
    c = normed.abs().mean(0).argmax().item()
    share = (normed[:, c].square().mean() / normed.square().sum(-1).mean()).item()
    return F.cosine_similarity(key[..., None], columns * normed.mean(0).sign(), dim=1), c, share

# %%
alpha = found["softmax"]["alpha"][0]  # (L, H)
head = divmod(alpha[1:].argmax().item(), alpha.shape[1])
head = (head[0] + 1, head[1])  # the strongest head after the first layer
cosines, c, share = key_against_columns(text, x["softmax"], head[0])
single = cosines[head[1], c].item()
by_chance = cosines[head[1]].abs().mean().item()
print(f"layer {head[0]}, head {head[1]}: dimension {c} holds {share:.0%} of the normed x_0")
print(f"cosine of k_0 with column {c} of W_K {single:.2f}; sqrt(p) {share**0.5:.2f}; "
      f"mean |cosine| with all columns {by_chance:.2f}")
assert single > 0.4 and single > 2 * by_chance, "the key of token 0 is not the column of the dominant dimension"
assert single > share**0.5, "the dominant dimension reaches the key no better than any other would"

# %% [markdown]
# The column points much the way the key does, more than its share of the state would give: this head
# reads that dimension with preference. So the shortcut of the paper is a fair first guess here, and
# not exact.
#
# ## What do the queries have in common?
#
# Stack the $M$ queries of a head, from all windows and positions after the first, into a matrix $Q$,
# (M, D). Which unit vector $u$ do they lean on most, whatever the sign? Maximise
#
# $$\sum_{t} (q_t \cdot u)^2 = \lVert Q u \rVert^2 = u^\top Q^\top Q\, u \quad\text{subject to}\quad u^\top u = 1 .$$
#
# With a multiplier $\mu$ the gradient vanishes where $Q^\top Q u = \mu u$: $u$ is an eigenvector, the
# sum equals $\mu$, and the largest belongs to the leading *right singular vector* $u_1$ of $Q$, with
# $\mu = \sigma_1^2$. Its share of all squared length is $\sigma_1^2 / \sum_i \sigma_i^2$; queries that
# point everywhere alike would give $1/D$. A singular vector has no sign. `probe.leading_query` takes
# the sign for which the mean query has a positive part along it. The lock is then
#
# $$\mathrm{lock\_cos} = \cos(u_1, k_0).$$
#
# **Before or after rotation?** Here $q$ and $k$ are compared *before* their rotary turns, because
# $u_1$ collects queries of many positions. The logits below are *after* rotation. For the key at hand
# it is the same: position 0 is turned by the angle 0. Only the queries turn, so a lock that lasts to
# the end of the window must live in pairs of dimensions that turn slowly.

# %%
some = torch.randn(1, 1, 64, 32, generator=torch.Generator().manual_seed(1))
turned = rotate(some, *rope_turns(text.rope_freq, 64))
assert torch.equal(turned[:, :, 0], some[:, :, 0]) and not torch.equal(turned[:, :, 1], some[:, :, 1])

# %%
lock, strongest = {}, {}
for name, model in trained.items():
    a = found[name]["alpha"][0]
    i, h = divmod(a[1:].argmax().item(), a.shape[1])
    strongest[name] = (i + 1, h)
    kept = record(model, x[name], [f"{i + 1}.q", f"{i + 1}.k"])[1]
    queries = kept[f"{i + 1}.q"][:, 1:]
    u = probe.leading_query(queries)
    keys = kept[f"{i + 1}.k"].unbind(1)  # T of (N, H, D)
    lock[name] = torch.stack([probe.lock_cos(u, key)[:, h].mean() for key in keys])
    sigma = torch.linalg.svdvals(queries[:, :, h].flatten(0, 1)).square()
    print(f"{name}, layer {i + 1} head {h}: u_1 carries {sigma[0] / sigma.sum():.0%} of the queries; "
          f"1/D is {1 / len(sigma):.0%}")
    print(f"    cos(u_1, k_0) {lock[name][0]:.2f}, best of the other positions {lock[name][1:].max():.2f}")

# %%
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
for style, (name, c) in zip(probe.STYLES, lock.items()):
    axis.plot(range(1, 65), c, markevery=[0, 1, 3, 7, 15, 31], ms=5, lw=1.2,
              label=f"{name}, layer {strongest[name][0]} head {strongest[name][1]}", **style)
axis.axhline(0, color="black", lw=0.6)
probe.dress(axis, "Which key is nearest to the common query?", dict(fontsize=8), xscale="log",
            xlabel="position of the key t + 1 (log)", ylabel="cos(u_1, k_t), before rotation", ylim=(-1, 1))
show(figure, "05_keys")

# %% [markdown]
# In both models the first key is nearer to the common query than any other key.

# %%
for name, c in lock.items():
    assert c[0] > c[1:].max() + 0.05, f"{name}: another key is as near to the common query as the first"
assert lock["softmax"][0] > 0.4, "the first key does not point towards the common query"

# %% [markdown]
# The second assertion is for the text model alone, with reason. Softmax sees only *differences*:
# adding a constant to all logits of a row changes no weight. In one of five seeds of the copying task
# $\cos(u_1, k_0)$ is slightly negative, and all other keys are far more so. (One more has neither lock
# nor sink.) "Positive" is what the paper counts; "above the others" is what attention needs. So look
# at both:
#
# $$\mathrm{positive} = \Pr_{t>0}\,[\,q_t \cdot k_0 > 0\,], \qquad
# \mathrm{gap} = \operatorname{mean}_{t>0}\Bigl[\frac{q_t \cdot k_0}{\sqrt D}
# - \operatorname{mean}_{1 \le s \le t} \frac{q_t \cdot k_s}{\sqrt D}\Bigr].$$

# %%
figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
for axis, (name, f) in zip(axes, found.items()):
    probe.draw_lock(axis, f["lock_gap"][0], f["alpha"][0], name)
show(figure, "05_lock")

# %% [markdown]
# Few heads have a gap of several nats, all in later layers, and the dark ones (with a sink) are among
# them.

# %%
at = lambda f, name, key: f[name][key][0][strongest[name]].item()
rows = [("heads that lock: tokens with q.k_0 > 0", "nearly 100 %", at(found, "softmax", "lock_positive")),
        ("  the same head, untrained", "not reported", at(found_before, "softmax", "lock_positive")),
        ("  micro-softmax", "not reported", at(found, "micro-softmax", "lock_positive")),
        ("cos(u_1, k_0), before rotation", "high, no number found", at(found, "softmax", "lock_cos")),
        ("  the same head, untrained", "not reported", at(found_before, "softmax", "lock_cos")),
        ("logit of key 0 above the others, nats", "not reported", at(found, "softmax", "lock_gap")),
        ("  micro-softmax", "not reported", at(found, "micro-softmax", "lock_gap"))]
beside(*rows)
assert at(found, "softmax", "lock_positive") > 0.95, "the strongest head is not locked for nearly all tokens"
assert at(found_before, "softmax", "lock_positive") < 0.9, "it was locked before training"
assert at(found, "micro-softmax", "lock_gap") > 1, "no lock on an ordinary first token"

# %% [markdown]
# ## Do the heads that lock have the sink?
#
# Kendall's tau counts pairs of heads: +1 if the head with the stronger lock always has the stronger
# sink, 0 if the two are unrelated. For $n$ unrelated heads its standard deviation is $\sqrt{2(2n+5) /
# (9n(n-1))}$. Beware of one number: the gap is made of the logits from which attention is made, so *it
# must* go with alpha, in an untrained model too. The cosine, from queries and keys one by one, can
# fail.

# %%
n = alpha[1:].numel()
spread = (2 * (2 * n + 5) / (9 * n * (n - 1))) ** 0.5
tau = {}
for when, f in (("trained", found["softmax"]), ("untrained", found_before["softmax"])):
    for key in ("lock_cos", "lock_positive", "lock_gap", "predisposition"):
        tau[key, when] = probe.kendall_tau(f[key][0, 1:].flatten(), f["alpha"][0, 1:].flatten()).item()
for key in ("lock_cos", "lock_positive", "lock_gap"):
    print(f"{key:14} against alpha, {n} heads: tau {tau[key, 'trained']:.2f}, untrained {tau[key, 'untrained']:.2f}, "
          f"chance 0 ± {spread:.2f}")
assert tau["lock_cos", "trained"] > 0.3 and tau["lock_positive", "trained"] > 0.5, "lock and sink are unrelated"

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True)
for axis, key, label in zip(axes, ("lock_cos", "lock_positive"),
                            ("cos(u_1, k_0), before rotation", "share of queries with q.k_0 > 0")):
    for f, style in ((found_before, dict(marker="s", mfc="none", color="0.6", label="untrained")),
                     (found, dict(marker="o", color="black", label="trained"))):
        axis.plot(f["softmax"][key][0, 1:].flatten(), f["softmax"]["alpha"][0, 1:].flatten(), ls="", ms=6, **style)
    axis.axhline(probe.EPS, color="black", lw=0.8, ls=":")
    probe.dress(axis, "softmax, heads after the first layer", dict(fontsize=8), xlabel=label,
                ylabel="mean attention to token 0" if key == "lock_cos" else None)
show(figure, "05_heads")

# %% [markdown]
# Every head with a sink (above the dotted line) is locked; a lock by the cosine alone does not yet
# make a sink.
#
# ## Can one tell from the weights alone?
#
# Take dimension $c$ into which the strongest super neuron of the earlier layers writes (chapter 03, by
# weights alone), the column $W_K^{(h)} e_c$, and the direction $u$ that queries of shapeless input
# would share, the leading left singular vector of $W_Q^{(h)} \operatorname{diag}(\gamma)$. Our score
# is
#
# $$\mathrm{predisposition}_h = \bigl|\cos(u,\; W_K^{(h)} e_c)\bigr| .$$
#
# No text, no forward pass. It can at best be a hint: real input has a shape.

# %%
print(f"weights alone against alpha: tau {tau['predisposition', 'trained']:.2f}, chance 0 ± {spread:.2f}")
print(f"measured lock_positive against alpha: tau {tau['lock_positive', 'trained']:.2f}")
assert tau["predisposition", "trained"] < tau["lock_positive", "trained"], "the weights say as much as the measured lock"

# %% [markdown]
# With ten heads this hint is not outside chance in one model. Over the five seeds of the recipe it is
# positive every time, and always behind the measured lock. So: weak, perhaps real, not asserted. What
# would decide it is a larger model with hundreds of heads; chapter 08 opens one.
#
# ## What would falsify this
#
# - If the first token's normed state varied between windows as much as that of the others, there would
#   be no fixed key to lock on. Measured on ordinary first tokens, where it is not trivial.
# - If another key were as near to the common query as the first, the lock would not be on the first
#   token.
# - If heads with a sink had no lock, attention would find the first token in another way.
#
# All of this is correlation. Chapter 06 turns the direction of $x_0$ and takes the locked part out of
# $k_0$.
#
# ## Exercises
#
# **1.** What does RMSNorm make of a state whose dimension `c` goes to plus (`sign` = 1) or minus
# (`sign` = -1) infinity, while all others stay as they are? `gamma` is the gain, shape (C,). Give the
# limit, shape (C,).


# %%
def norm_limit(gamma, c, sign):
    ...


def check_norm_limit(answer):
    gamma = torch.linspace(0.5, 2.0, 12)
    got = answer(gamma, 3, 1)
    assert got is not None, "Return a vector of the shape of gamma."
    assert got.shape == gamma.shape, "One number for each dimension: the limit is a vector of width C."
    assert (got != 0).sum() == 1 and got[3] != 0, "Against infinity all other dimensions vanish. Which one is left?"
    for c, sign in ((3, 1), (0, -1), (11, -1)):
        with torch.no_grad():
            norm = RMSNorm(12, 1e-5)
            norm.weight.copy_(gamma)
            state = torch.ones(12)
            state[c] = sign * 1e6
            wanted = norm(state)
        assert torch.allclose(answer(gamma, c, sign), wanted, atol=1e-3), \
            "Put x = sign a e_c into the formula: what is the root mean square of one entry a among zeros? Is the gain in?"


attempt(check_norm_limit, norm_limit)

# %% [markdown]
# **2.** By what factor must the shared part exceed the rest, $r = a/s$, for the cosine between two
# windows to be `cosine`? Give $r$ for any cosine between 0 and 1 (1 excluded).


# %%
def ratio_for(cosine):
    ...


def check_ratio_for(answer):
    got = answer(0.5)
    assert got is not None, "Return r. Solve cosine = r² / (1 + r²) for r."
    assert abs(float(got) - 1) < 1e-6, "A cosine of one half means that both parts are equally long."
    for r in (0.0, 0.25, 2.0, 9.0):
        assert abs(float(answer(r * r / (1 + r * r))) - r) < 1e-6, "Is it r or r squared?"


attempt(check_ratio_for, ratio_for)

# %% [markdown]
# **3.** Find the direction that most queries of one head share. `q` is (M, D). Return a unit vector
# (D,), its sign such that the mean query has a positive part along it. Do not subtract the mean first.


# %%
def common_direction(q):
    ...


def check_common_direction(answer):
    generator = torch.Generator().manual_seed(3)
    fixed = F.normalize(torch.randn(8, generator=generator), dim=0)
    q = 3 * fixed + torch.randn(500, 8, generator=generator)
    got = answer(q)
    assert got is not None, "Return the leading right singular vector of q: torch.linalg.svd gives it."
    assert got.shape == (8,), "One vector of width D: right singular vectors live where queries live, left ones do not."
    assert abs(float(got.norm()) - 1) < 1e-4, "It has to be a unit vector."
    assert abs(float(got @ fixed)) > 0.98, "Take the largest singular value, and leave the mean in."
    assert got @ fixed > 0 and answer(-q) @ fixed < 0, "A singular vector has no sign: turn it towards the mean query."
    few = q[:5]  # fewer queries than dimensions
    assert torch.allclose(answer(few), probe.leading_query(few[:, None, None])[0], atol=1e-4), "It should work for M < D."


attempt(check_common_direction, common_direction)
