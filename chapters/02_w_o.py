# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 02 · What W_O passes on
#
# **Claim.** The output projection passes the outlier of chapter 01 on, and a trained one answers most to
# the directions in which its input varies most. An untrained one passes it on too, without preference.
#
# **You need** chapter 01, and what a singular value is. **Run time**: seconds, once three models exist.
#
# The second link is a matrix. It is the easiest one to measure, and the easiest to read too much into:
# a number can be real and still say nothing about first tokens. So most of this chapter is nulls.

# %%
import sys

sys.path.append("chapters")  # when this was started one folder up
import math

import torch
from lesson import attempt, beside, models, plt, show, windows
from model import GPT, record
import probe

# %%
trained = models("softmax", "micro-softmax", "headnorm")  # headnorm is for the end
untrained = {name: GPT(model.cfg, seed=0) for name, model in trained.items()}
tokens = {name: windows("random symbols" if "micro" in name else "random bytes")[0] for name in trained}


# %%
@torch.no_grad()
def around(model, x):
    """For every layer: z (B, T, H, D), what the layer's W_O makes of it (B, T, C), and W_O (C, H D)."""
    names = [f"{i}.{name}" for i in range(model.cfg.num_hidden_layers) for name in ("z", "attn_out")]
    kept = list(record(model, x, names)[1].values())
    return list(zip(kept[::2], kept[1::2], (block.self_attn.o_proj.weight.detach() for block in model.layers)))


seen = {when: {name: around(m, tokens[name]) for name, m in group.items()}
        for when, group in (("untrained", untrained), ("trained", trained))}

# %% [markdown]
# ## Does the outlier come through?
#
# The heads' outputs stand side by side in one vector $z_t$ with $HD$ entries, and the layer adds
# $y_t = W_O z_t$ to the stream. Let $\Sigma_t$ be the covariance of $z_t$ over windows. Then the
# variance after $W_O$, averaged over the $C$ dimensions of $y_t$, is
#
# $$V^{out}_t = \frac1C \operatorname{tr}\big(W_O\, \Sigma_t\, W_O^\top\big)$$
#
# Suppose that the entries of $W_O$ are independent with variance $w^2$. The expected value of
# $W_O^\top W_O$ is then $C w^2$ times the identity, and
#
# $$E\big[V^{out}_t\big] = w^2 \operatorname{tr} \Sigma_t$$
#
# The sum of all variances comes through, times one constant for all positions. So *any* random matrix
# passes an outlier on. It would take a special matrix to stop it.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for axis, name in zip(axes, ("softmax", "micro-softmax")):
    lines = {}
    for when in seen:
        z, out, _ = seen[when][name][0]
        lines[f"{when}, before W_O"], lines[f"{when}, after W_O"] = map(probe.variance_by_position, (z, out))
    probe.draw_variance(axis, lines, f"{name}, first layer, random tokens")
show(figure, "02_through")

# %% [markdown]
# Each pair of curves, before and after $W_O$, lies on top of each other: the outlier comes through.

# %%
kept = {}
for name in ("softmax", "micro-softmax"):
    for when in seen:
        before, after = (torch.stack([probe.discrepancy(probe.variance_by_position(x)) for x in side])
                         for side in list(zip(*seen[when][name]))[:2])
        kept[name, when] = after / before
        print(f"{name:14} {when:10} discrepancy after W_O over that before, by layer:",
              "  ".join(f"{k:.2f}" for k in kept[name, when].tolist()))
assert all(0.7 < k[0] < 1.4 for k in kept.values()), "W_O of the first layer changes the discrepancy"
assert all((k > 0.7).all() for (_, when), k in kept.items() if when == "untrained"), "a random W_O stops the outlier"

# %% [markdown]
# In the first layer of every model the discrepancy stays about what it was. Deeper in the trained text
# model single layers can weaken it, which layers depends on the seed; "passes it on" is asserted of the
# first layer only.
#
# ## Does it prefer what varies?
#
# The paper asks more: that $W_O$ *favours* dimensions of high variance. For dimension $j$ of $z$ take its
# standard deviation $d_j$, and the length $\lVert c_j \rVert$ of the column of $W_O$ that reads it. Do the
# two lists rank the dimensions alike? Kendall's $\tau$ looks at all pairs: it counts $+1$ for a pair in
# the same order in both lists, $-1$ for one in opposite order, and takes the mean,
#
# $$\tau = \frac{2}{n(n-1)} \sum_{i<j} \operatorname{sign}(d_i - d_j)\,
#   \operatorname{sign}\big(\lVert c_i \rVert - \lVert c_j \rVert\big)$$
#
# For two unrelated rankings of $n$ things it has mean 0 and standard deviation
# $\sqrt{2(2n+5) / (9n(n-1))}$. That is its null, and with few dimensions it is not narrow.

# %%
n = trained["softmax"].cfg.hidden_size  # H D
sd = math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))
generator = torch.Generator().manual_seed(0)
drawn = torch.stack([probe.kendall_tau(*torch.randn(2, n, generator=generator)) for _ in range(500)])
print(f"n = {n}: standard deviation by the formula {sd:.3f}, of 500 unrelated rankings {drawn.std():.3f}")
tau, gain = {}, {}
for when in seen:
    for name, found in seen[when].items():
        tau[name, when] = torch.stack([probe.wo_tau(z, w) for z, _, w in found])
        gain[name, when] = torch.stack([probe.wo_gain(z, w) for z, _, w in found])
        print(f"{name:14} {when:10} tau mean {tau[name, when].mean():5.2f}, by layer",
              "  ".join(f"{t:5.2f}" for t in tau[name, when].tolist()))

# %% [markdown]
# ## A direction is not a dimension
#
# Tau sees single dimensions, but variance may lie slantwise to all of them. So look at directions too.
# A matrix stretches a unit vector $u$ to squared length $\lVert W_O u \rVert^2$. Over all directions the
# mean of this is $\lVert W_O \rVert_F^2 / (HD)$, so for the $m$ leading principal directions $u_i$ of $z$
#
# $$g = \frac{\frac1m \sum_i \lVert W_O u_i \rVert^2}{\lVert W_O \rVert_F^2 / (HD)}$$
#
# is 1 for a matrix without preference. `probe.wo_gain` takes an eighth of the directions. To see how
# much tau owes to the dimensions, turn every head's values by a random rotation and turn $W_O$ back
# (exercise 3): the model stays the same function, and the gain stays, but tau need not.

# %%
turned = {}
for name in ("softmax", "micro-softmax"):
    cfg, found = trained[name].cfg, []
    for z, _, w in seen["trained"][name]:
        turns = torch.randn(cfg.num_attention_heads, cfg.head_dim, cfg.head_dim, generator=generator)
        R = torch.block_diag(*torch.linalg.qr(turns)[0])  # a rotation in each head
        z, w = (z.flatten(2) @ R.T).view_as(z), w @ R.T
        found.append((probe.wo_tau(z, w), probe.wo_gain(z, w)))
    turned[name], same = torch.tensor(found).T
    print(f"{name:14} trained, turned at random: tau by layer", "  ".join(f"{t:5.2f}" for t in turned[name].tolist()),
          f" mean {turned[name].mean():.2f}; gain changed by at most {(same - gain[name, 'trained']).abs().max():.0e}")
    assert torch.allclose(same, gain[name, "trained"], rtol=0.01), "the gain depends on the basis of the values"
    assert turned[name].mean() > 0.15, "in another basis there is no preference"

# %% [markdown]
# Tau moves from layer to layer, and its mean stays positive: the preference is not about the dimensions
# that the code happens to use.

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
for when, mark, shade in (("untrained", "o", "0.7"), ("trained", "x", "black")):
    z, _, w = seen[when]["softmax"][0]
    z, length = z.flatten(2).flatten(0, 1).std(0), w.norm(dim=0)
    axes[0].scatter((z / z.mean()).tolist(), (length / length.mean()).tolist(), s=16, c=shade, marker=mark, label=when)
probe.dress(axes[0], "softmax, first layer: dimensions of z", {"loc": "upper left"},
            xlabel="std of dimension j / mean", ylabel="length of W_O's column j / mean")
for style, (name, when) in zip(probe.STYLES, kept):
    for axis, found in zip(axes[1:], (tau, gain)):
        axis.plot(found[name, when].tolist(), label=f"{name}, {when}", ms=5, lw=1.2, **style)
axes[1].axhspan(-2 * sd, 2 * sd, color="0.9")
probe.dress(axes[1], "Kendall tau (grey: 2 sd of its null)", {}, xlabel="layer", ylabel="tau", ylim=(-0.3, 1.2))
probe.dress(axes[2], "Gain on the top eighth of directions", {}, xlabel="layer", ylabel="gain / mean gain", ylim=(0, 6))
show(figure, "02_preference")

# %% [markdown]
# Left: after training a dimension that varies more has a longer column. Middle and right: untrained
# models stay at their nulls, 0 and 1, and trained ones are above.

# %%
for name in ("softmax", "micro-softmax"):
    (t0, t1), (g0, g1) = ([found[name, when].mean().item() for when in seen] for found in (tau, gain))
    null = sd / math.sqrt(len(tau[name, "trained"]))  # of a mean over layers
    print(f"{name:14} tau untrained {t0:.2f}, trained {t1:.2f} (null +-{2 * null:.2f}); gain {g0:.2f}, {g1:.2f}")
    assert abs(t0) < 3 * null, "an untrained W_O has a preference"
    assert 0.8 < g0 < 1.25, "an untrained W_O has a preferred subspace"
    assert t1 > 0.15 > 2 * null, "a trained W_O shows no preference"
    assert g1 > 1.6, "a trained W_O does not favour where z varies"

# %% [markdown]
# ## Is it a preference for the first token?
#
# Here is the step that is easy to skip. The outlier *is* variance, so a matrix that favours variance
# might favour the first token. But the other tokens vary as well, if less. Take what each token's $z$ is
# beyond its mean over windows, and let the same gain be that of these vectors:
#
# $$g_t = \frac{\operatorname{tr}(W_O\, \Sigma_t\, W_O^\top)}{\operatorname{tr} \Sigma_t}
#   \Big/ \frac{\lVert W_O \rVert_F^2}{HD}$$

# %%
def gain_at(z, w):
    """Gain of W_O on the deviations of position 0, and of all other positions."""
    z = z.flatten(2)
    z, scale = z - z.mean(0), w.square().sum() / w.shape[1]
    return torch.stack([(part @ w.T).square().sum() / part.square().sum() / scale for part in (z[:, 0], z[:, 1:])])


selective = {}
for name in ("softmax", "micro-softmax"):
    first, rest = torch.stack([gain_at(z, w) for z, _, w in seen["trained"][name]]).mean(0)
    selective[name] = (first / rest).item()
    print(f"{name:14} gain on the first token {first:.2f}, on the others {rest:.2f}, ratio {selective[name]:.2f}")
    assert first > 1.5 and rest > 1.5, "W_O does not favour what varies, at the first token or at the others"
    assert 0.5 < selective[name] < 2, "W_O treats the first token differently from the others"

# %% [markdown]
# $W_O$ favours what varies, *at every position alike*. The first token gains nothing on the others by
# it. That fits the figure at the top: if $W_O$ did single out the first token, the curve after it would
# be steeper than the curve before. Averaged over layers $W_O$ passes the outlier on, and does no more.
#
# ## The spectrum
#
# To prefer some directions a matrix must have unequal singular values. A Gaussian matrix has unequal
# ones as well, so it is the null. Effective rank, the exponential of the entropy of the singular values
# taken as shares, says in one number how many directions count.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
rank = {}
for axis, name in zip(axes, ("softmax", "micro-softmax")):
    matrices = {when: torch.stack([w for *_, w in seen[when][name]]) for when in ("trained", "untrained")}
    matrices["Gaussian"] = torch.randn(16, n, n, generator=generator)
    for style, (when, many) in zip(probe.STYLES, matrices.items()):
        s = torch.linalg.svdvals(many)  # (layers, n), largest first
        s = s / s.square().mean(-1, keepdim=True).sqrt()
        rank[name, when] = torch.stack([probe.effective_rank(w) for w in many]).mean().item()
        axis.plot(range(1, n + 1), s.mean(0).tolist(), label=f"{when}, effective rank {rank[name, when]:.0f}",
                  markevery=8, ms=4, lw=1.2, **style)
    probe.dress(axis, f"{name}: singular values of W_O, mean over layers", {}, xlabel="rank",
                ylabel="singular value / root mean square")
show(figure, "02_spectrum")

# %% [markdown]
# The untrained matrix lies on the Gaussian one; the trained one has a few larger values and many
# smaller ones.

# %%
for name in ("softmax", "micro-softmax"):
    top = {when: max(probe.top_singular(w).item() for *_, w in seen[when][name]) for when in seen}
    print(f"{name:14} largest singular value / root mean square, strongest layer:",
          ", ".join(f"{when} {t:.2f}" for when, t in top.items()))
    assert 0.97 < rank[name, "untrained"] / rank[name, "Gaussian"] < 1.03, "the untrained W_O is not Gaussian"
    assert rank[name, "trained"] < 0.95 * rank[name, "Gaussian"], "the trained W_O is as flat as a Gaussian matrix"

# %% [markdown]
# ## Where could the preference come from?
#
# If it is not about the first token, why is it there? One reason needs no token at all. Dimension $j$ of
# a head's value is made by row $r_j$ of $W_V$ and read by column $c_j$ of $W_O$, and attention only
# averages in between. So for any $\lambda > 0$
#
# $$r_j \to \lambda\, r_j, \qquad c_j \to c_j / \lambda$$
#
# changes nothing that the model computes. The loss $\mathcal L$ is constant along this change. Its
# derivative at $\lambda = 1$ must be zero:
#
# $$r_j \cdot \nabla_{r_j} \mathcal L - c_j \cdot \nabla_{c_j} \mathcal L = 0$$
#
# Under plain gradient flow, $\dot r_j = -\nabla_{r_j} \mathcal L$ and likewise for $c_j$, this says that
# $\lVert r_j \rVert^2 - \lVert c_j \rVert^2$ does not change, and weight decay makes it shrink
# exponentially. So training drives the two lengths together: *a long row gets a long column*. And a long
# row makes a $z_j$ that varies much. AdamW is not gradient flow, so this is a guess about what it does.
# But it can be checked on the weights, and there is a control: in a headnorm model $z$ is divided by its
# own size before $W_O$. One dimension cannot be scaled without moving the others, and the identity fails.

# %%
def rows_and_columns(model):
    """For every layer: W_V (H D, C), whose rows are r_j, and W_O (C, H D), whose columns are c_j."""
    return [(block.self_attn.v_proj.weight, block.self_attn.o_proj.weight) for block in model.layers]


balance, broken = {}, {}
for name, kind in (("softmax", "bos"), ("micro-softmax", "copy"), ("headnorm", "bos")):
    loss = trained[name](*windows(kind, 16))[1]
    (v, o), slopes = rows_and_columns(trained[name])[0], torch.autograd.grad(loss, rows_and_columns(trained[name])[0])
    row, column = (v * slopes[0]).sum(1), (o * slopes[1]).sum(0)  # the two sides of the identity, first layer
    broken[name] = ((row - column).abs().max() / column.abs().max()).item()
    balance[name] = [torch.stack([probe.kendall_tau(v.norm(dim=1), o.norm(dim=0)) for v, o in rows_and_columns(m)])
                     .mean().item() for m in (untrained[name], trained[name])]
    print(f"{name:14} identity off by {broken[name]:.0e} of its size; tau between row and column lengths: "
          f"untrained {balance[name][0]:.2f}, trained {balance[name][1]:.2f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for axis, name in zip(axes, ("softmax", "headnorm")):
    for shade, mark, i in (("black", "x", 0), ("0.6", "o", 3)):
        v, o = (weight.detach() for weight in rows_and_columns(trained[name])[i])
        axis.scatter(v.norm(dim=1).tolist(), o.norm(dim=0).tolist(), s=16, c=shade, marker=mark, label=f"layer {i}")
    probe.dress(axis, f"{name}, trained", {}, xlabel="length of W_V's row j", ylabel="length of W_O's column j")
show(figure, "02_balance")

# %% [markdown]
# Softmax: the longer a row, the longer its column; headnorm: far less so.

# %%
for name in ("softmax", "micro-softmax"):
    assert broken[name] < 1e-3, "the loss changes when a row and its column are scaled against each other"
    assert abs(balance[name][0]) < 0.15 and balance[name][1] > 0.45, "training does not bring rows and columns together"
assert broken["headnorm"] > 0.1, "headnorm has the symmetry too"
assert balance["headnorm"][1] < balance["softmax"][1] - 0.2, "rows and columns are as close without the symmetry"
print(f"tau between the std of z and W_O: softmax {tau['softmax', 'trained'].mean():.2f}, "
      f"headnorm {tau['headnorm', 'trained'].mean():.2f}")
assert tau["headnorm", "trained"].mean() > 0.15, "without the symmetry there is no preference at all"

# %% [markdown]
# The balance is real, and stronger than tau itself. It is not the whole story: headnorm has little of it
# and still prefers dimensions that vary. Another push may be the gradient itself. That of $c_j$ is a sum
# of terms proportional to $z_j$, so the columns of dimensions that vary get the largest gradients, while
# weight decay shortens all columns. What would decide is a run without weight decay, and one with the
# rows of $W_V$ held at one length.
#
# ## Beside the paper

# %%
two = ("softmax", "micro-softmax")
both = lambda found: " | ".join(f"{found[name]:.2f}" for name in two)
mean = lambda found, when: {name: found[name, when].mean().item() for name in two}
beside(("model", "Llama-2-7B", "softmax (text) | micro-softmax"),
       ("outlier after W_O / before, layer 1", "passed on, no number",
        both({name: kept[name, "trained"][0] for name in two})),
       ("Kendall tau, mean over layers", "0.32", both(mean(tau, "trained"))),
       ("the same before training", "not reported", both(mean(tau, "untrained"))),
       ("gain on the most varying directions", "not reported", both(mean(gain, "trained"))),
       ("gain on the first token / on the others", "not reported", both(selective)),
       ("tau of rows of W_V and columns of W_O", "not reported", both({name: b[1] for name, b in balance.items()})))

# %% [markdown]
# The paper's number reproduces: tau is positive and of that order, and training made it. What does not
# show here is that this helps the *first token*. And no number in this chapter says that the sink needs
# $W_O$ to do anything. For that it takes an intervention, in chapter 06.
#
# ## What would falsify this
#
# A first layer whose curve is flat after $W_O$ would break the link. A tau of the same size in the
# untrained model would make the preference an accident of the tokens. And a gain much larger on the
# first token than on the others would contradict *us*: it would mean that $W_O$ is tuned to it after all.
#
# ## Exercises
#
# **1.** Write Kendall's tau for two lists without ties, from the pairs themselves. `a` and `b` are (n,).


# %%
def kendall(a, b):
    ...


def check_kendall(answer):
    up = torch.arange(4.0)
    got = answer(up, up**3)
    assert got is not None, "Return a number: agreeing pairs minus disagreeing pairs, over all pairs."
    assert abs(float(got) - 1) < 1e-6, "Two lists in the same order have tau 1, whatever their values are."
    assert abs(float(answer(up, -up)) + 1) < 1e-6, "Opposite orders have tau -1."
    swapped = torch.tensor([0.0, 2.0, 1.0, 3.0])
    assert abs(float(answer(up, swapped)) - 4 / 6) < 1e-6, "One swapped neighbour: 5 of 6 pairs agree, and 1 does not."
    a, b = torch.randn(2, 30, generator=torch.Generator().manual_seed(2))
    known = probe.kendall_tau(a, b).item()
    assert abs(float(answer(a, b)) - known) < 1e-5, "It is not Kendall's tau on 30 random numbers."


attempt(check_kendall, kendall)

# %% [markdown]
# **2.** The gain of a matrix (C, n) in one direction (n,): the squared length that it gives to a unit
# vector, over the mean of that over all directions. The direction may come with any length.


# %%
def direction_gain(weight, direction):
    ...


def check_direction_gain(answer):
    got = answer(torch.eye(3), torch.tensor([1.0, 0.0, 0.0]))
    assert got is not None, "Return a number: |W u|^2 over |W|^2 / n, with |W|^2 the sum of all squared entries."
    assert abs(float(got) - 1) < 1e-6, "The identity has no preference: its gain is 1 in every direction."
    lopsided, first = torch.diag(torch.tensor([2.0, 0.0])), torch.tensor([1.0, 0.0])
    assert abs(float(answer(lopsided, first)) - 2) < 1e-6, "diag(2, 0) answers to one of two directions only."
    assert abs(float(answer(lopsided, 10 * first)) - 2) < 1e-6, "Only the direction counts, not the length."
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    every = sum(float(answer(w, u)) for u in torch.eye(4)) / 4
    assert abs(every - 1) < 1e-5, "Over a whole basis the mean gain is 1, for a matrix of any shape: n is its width."


attempt(check_direction_gain, direction_gain)

# %% [markdown]
# **3.** Is tau a property of what the model computes? Attention averages over positions and never mixes
# dimensions of a head, so the basis of a head's values is free: turn it by a rotation `R` (D, D), and
# turn it back in $W_O$. For one head, given `v` (D, C) and `o` (C, D), return the two new matrices.


# %%
def turn_values(v, o, R):
    ...


def check_turn_values(answer):
    generator = torch.Generator().manual_seed(0)
    v, o = torch.randn(6, 10, generator=generator), torch.randn(10, 6, generator=generator)
    o[:, 0] *= 5
    R = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    got = answer(v, o, R)
    assert got is not None and len(got) == 2, "Return two matrices: the new v and the new o."
    assert torch.allclose(got[0], R @ v, atol=1e-5), "The new values are R v x for every state x."
    assert torch.allclose(got[1] @ got[0], o @ v, atol=1e-4), \
        "W_O W_V has to stay what it was. The inverse of a rotation is its transpose."
    before, after = o.norm(dim=0), got[1].norm(dim=0)
    assert after.max() / after.min() < 0.8 * before.max() / before.min(), "Turn o as well."


attempt(check_turn_values, turn_values)

# %% [markdown]
# The model is the same function, and its columns have other lengths: tau depends on a basis that the
# model does not fix, and the gain does not. That is why this chapter shows both.
