# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 03 · Super neurons
#
# **Claim.** A few neurons of an early MLP answer to the first token and to hardly any other. Their gate
# and up weights lie along one line, and a neuron of that kind measures variance.
#
# **You need** chapter 00, and SwiGLU: an MLP whose hidden layer is a product of two linear maps.
# **Run time**: under 20 seconds once the models of chapter 00 exist.

# %%
import sys

sys.path.append("chapters")  # when this was started one folder up
import torch
import torch.nn.functional as F
from lesson import attempt, beside, models, plt, show, windows
from model import GPT, record
import probe

# %% [markdown]
# ## One neuron on paper
#
# Let $h$ be what the MLP reads: the state of one token after RMSNorm. Neuron $i$ has a gate row $w_g$,
# an up row $w_u$ and a column of $W_{down}$, along which it writes. Its *answer* is
#
# $$a(h) = \mathrm{silu}(g)\,u, \qquad g = w_g \cdot h, \quad u = w_u \cdot h, \quad \mathrm{silu}(g) = g\,\sigma(g)$$
#
# with $\sigma$ the logistic function. Suppose that both rows lie along one unit vector $s$:
# $w_g = b\,s$ and $w_u = c\,b\,s$ with numbers $b$ and $c$, so that $u = c\,g$. We want to know what such a
# neuron measures. Step by step:
#
# 1. $\sigma(g) = \frac12 + \frac12\tanh\frac g2$, and therefore
#    $\mathrm{silu}(g)\,u = c\left(\frac{g^2}2 + \frac{g^2}2\tanh\frac g2\right)$.
# 2. The first part is even: it is the same for $g$ and $-g$. The second part is odd.
# 3. Close to 0 the tanh is about $g/2$, so the answer is about $c\,g^2/2$: quadratic, on both sides.
# 4. Far to the right the tanh is 1 and the answer is $c\,g^2$; far to the left it is $-1$ and the two parts
#    cancel. The neuron is quadratic on one side and silent on the other.
# 5. Let $g$ vary over tokens, as often positive as negative. The odd part averages to zero, and what
#    remains is exact, not only close to 0: $\mathbb E[a] = \frac c2\,\mathbb E[g^2]$.
#
# So the *mean* of such a neuron's answer is half the second moment of its input. Ordinary inputs, whose
# $g$ is small, leave it cold, and an outlier ten times as large counts a hundred times as much.
#
# What if the rows are not aligned? For a Gaussian input with mean 0, split $u$ into a multiple of $g$
# and a rest that has nothing to do with $g$. The rest averages to zero, and
#
# $$\mathbb E[a] = \tfrac12\,\mathrm{Cov}(g, u) = \tfrac12\,w_g^\top \Sigma\,w_u$$
#
# where $\Sigma$ is the covariance of $h$. Orthogonal rows and a round $\Sigma$: no mean answer at all.

# %%
generator = torch.Generator().manual_seed(0)
first, second = torch.randn(2, 200_000, generator=generator)
variances = torch.linspace(0.5, 9, 8)
measured = {}  # cosine between gate and up -> mean answer at each variance
for cosine in (1.0, 0.5, 0.0, -1.0):
    u = cosine * first + (1 - cosine**2) ** 0.5 * second
    measured[cosine] = torch.stack([(F.silu(v.sqrt() * first) * v.sqrt() * u).mean() for v in variances])
    assert (measured[cosine] - cosine * variances / 2).abs().max() < 0.15, "the mean answer is not Cov(g, u) / 2"

# %%
g = torch.linspace(-6, 6, 200)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for style, (name, y) in zip(probe.STYLES, {"aligned: silu(g) g": F.silu(g) * g, "g² / 2": g**2 / 2, "g²": g**2}.items()):
    left.plot(g, y, label=name, lw=1.2, markevery=40, ms=4, **style)
probe.dress(left, "One answer", {"fontsize": 8}, xlabel="gate g", ylabel="answer, for c = 1", ylim=(-1, 30))
for style, (cosine, y) in zip(probe.STYLES, measured.items()):
    right.plot(variances, y, **(style | {"ls": ""}), label=f"cos(gate, up) = {cosine:g}")
    right.plot(variances, cosine * variances / 2, color=style["color"], lw=0.8)
probe.dress(right, "Mean answer (lines: the formula)", {"fontsize": 8}, xlabel="variance of g and of u", ylabel="mean answer")
show(figure, "03_response")

# %% [markdown]
# Left: a parabola of half height near 0, a full one far to the right, silence far to the left. Right:
# the mean answer grows with the variance of the input, and its slope is half the cosine between the
# rows.
#
# Two remarks before we look at real neurons. A negative $c$ turns the sign of the answer, and $W_{down}$
# can turn it back, so only $|\cos|$ matters. And $h$ has passed RMSNorm: its *length* is the same for
# every token. The neuron cannot see that a state is long. It sees which share of its length lies along
# $s$.
#
# ## Looking for them in the weights
#
# If such neurons matter, their weights should stick out before any text is read. The screen (after
# arXiv 2603.05498; $\gamma$ is the gain of the norm in front, $j$ runs over dimensions) is
#
# $$\mathrm{score}_i = \max_j |W_{down,ji}| \cdot \lVert \gamma \odot w_{g,i} \rVert \cdot \lVert \gamma \odot w_{u,i} \rVert$$
#
# Among F unrelated Gaussian numbers the largest lies near $\sqrt{2 \ln F}$ standard deviations above the
# mean. Scores are products, so their tail is a little longer: the untrained model is the better null.

# %%
trained = models("softmax", "micro-softmax")
model, micro = trained["softmax"], trained["micro-softmax"]
untrained = GPT(model.cfg, seed=0)


# %%
@torch.no_grad()
def weights(model):
    """(L,) largest z-score of a layer, (L, F) |cos| between the gate and the up row of every neuron."""
    cos = [F.cosine_similarity(*(p.weight * b.post_attention_layernorm.weight for p in (b.mlp.gate_proj, b.mlp.up_proj)))
           for b in model.layers]
    return torch.stack([probe.z_scores(probe.weight_scores(b)[0]).max() for b in model.layers]), torch.stack(cos).abs()


(z, aligned), (z_before, aligned_before) = weights(model), weights(untrained)
print(f"largest of {model.cfg.intermediate_size} Gaussians: {probe.chance(model.cfg, 64, 0)['neuron_z']:.1f}")
for i in range(len(z)):
    print(f"layer {i}: largest z {z[i]:4.1f} (untrained {z_before[i]:.1f}), "
          f"mean |cos(gate, up)| {aligned[i].mean():.2f} (untrained {aligned_before[i].mean():.2f})")
assert z.max() > 1.3 * z_before.max(), "no neuron stands out by its weights"
assert aligned.mean() > 2 * aligned_before.mean(), "training did not align gate and up rows"

# %% [markdown]
# Training pulls gate and up rows together in *every* layer, so an aligned neuron is nothing rare. What
# stands out are a few with large weights, mostly in early layers.
#
# ## Looking for them at work
#
# The other way to find them is to watch. Neuron $i$ adds $a_i(h)\,W_{down,\cdot i}$ to the state, so the
# *energy* of its write is
#
# $$e_i = a_i^2\,\lVert W_{down,\cdot i}\rVert^2, \qquad \mathrm{share} = \frac{\text{the 5 largest } e_i}{\sum_i e_i}$$
#
# In each layer we take the five neurons that write most to token 0, and compare what they write to token
# 0 with what they write to other tokens: their *contrast*. We keep the layer where it is largest. The
# last layer is left out: no attention comes after it, so nothing written there can make a sink.

# %%
@torch.no_grad()
def energies(model, x, mask=None):
    """(L, N, T, F): energy of every neuron's write."""
    kept = record(model, x, [f"{i}.mlp_post" for i in range(len(model.layers))], mask=mask)[1]
    return torch.stack([probe.neuron_energy(a, b.mlp.down_proj.weight) for a, b in zip(kept.values(), model.layers)])


def contrast(energy, ids):
    """energy (N, T, F): what the neurons `ids` write to token 0, over what they write to another."""
    few = energy[..., ids].sum(-1)
    return (few[:, 0].mean() / few[:, 1:].mean()).item()


def strongest(model, x):
    """(layer, ids): the five neurons that write most to token 0, of the layer where their contrast is largest."""
    e = energies(model, x)[:-1]
    ids = e[:, :, 0].mean(1).topk(probe.TOP).indices  # (L - 1, 5)
    layer = max(range(len(e)), key=lambda i: contrast(e[i], ids[i]))
    return layer, ids[layer]


# %%
x, fresh = windows("bos")[0], windows("bos", seed=1)[0]  # neurons are chosen on x and judged on fresh windows
found, numbers = {"untrained": (untrained, *strongest(untrained, x)), "trained": (model, *strongest(model, x))}, {}
for name, (m, i, ids) in found.items():
    e, score = energies(m, fresh)[i], probe.weight_scores(m.layers[i])[0].detach()
    share = probe.neuron_share(e)
    numbers[name] = {"layer": float(i), "share of the top 5, token 0": share[:, 0].mean().item(),
                     "share of the top 5, other tokens": share[:, 1:].mean().item(),
                     "contrast of the top 5": contrast(e, ids),
                     "contrast of the 5 largest weights": contrast(e, score.topk(probe.TOP).indices),
                     "overlap of the two lists": probe.neuron_overlap(e[:, 0].mean(0), score).item()}
for key in numbers["trained"]:
    print(f"{key:34} trained {numbers['trained'][key]:8.2f}   untrained {numbers['untrained'][key]:6.2f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axis, (name, (m, i, _)) in zip(axes, found.items()):
    post = record(m, fresh, [f"{i}.mlp_post"])[1][f"{i}.mlp_post"].abs()
    score = probe.weight_scores(m.layers[i])[0].detach()
    probe.draw_neurons(axis, score, post[:, 0].mean(0), post[:, 1:].mean((0, 1)), f"{name}: neurons of layer {i}")
show(figure, "03_neurons")

# %% [markdown]
# In the trained model a few crosses, most of them at large weights, lie far above every circle: these
# neurons answer to the first token and are almost silent for the rest. Before training none does so.

# %%
after, before = numbers["trained"], numbers["untrained"]
assert after["share of the top 5, token 0"] > 0.9 > before["share of the top 5, token 0"], "the write is not in few neurons"
key = "contrast of the top 5"
assert after[key] > max(100, 10 * before[key]), "the neurons answer to other tokens as well"
assert after["contrast of the 5 largest weights"] > 100, "the weights alone do not find neurons of the first token"
assert after["overlap of the two lists"] > 4 * probe.TOP / model.cfg.intermediate_size, "the two lists have nothing in common"

# %% [markdown]
# Mind three nulls. Five neurons out of 172 also carry about half of an *untrained* write, because
# energies are very unequal by chance. Five neurons picked for being strong at token 0 are stronger there
# in an untrained model too: picking is not finding. And in layer 0 a large share is nothing special for
# other tokens either, since a byte has few neurons of its own there. What chance does not give is the
# contrast.
#
# ## Do their rows point at the first token?
#
# The paper shows it for one neuron: the cosine between its rows and the state that the MLP reads is high
# at position 0 and about 0 elsewhere. Here is the mean $|\cos|$ of the gate and of the up rows of our
# five. A random direction in C dimensions has $|\cos| \approx \sqrt{2/(\pi C)}$.

# %%
@torch.no_grad()
def row_cosines(model, x, layer, ids):
    """(2, T): mean |cos| between the gate rows, and the up rows, of these neurons and the normed states."""
    block = model.layers[layer]
    h = block.post_attention_layernorm(record(model, x, [f"{layer}.resid_mid"])[1][f"{layer}.resid_mid"])
    rows = (block.mlp.gate_proj.weight[ids], block.mlp.up_proj.weight[ids])
    return torch.stack([(F.normalize(h, dim=-1) @ F.normalize(w, dim=-1).T).abs().mean((0, 2)) for w in rows])


chance = (2 / (torch.pi * model.cfg.hidden_size)) ** 0.5
cos_before, cos = (row_cosines(m, fresh, i, ids) for m, i, ids in found.values())
_, layer, five = found["trained"]

# %%
figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
curves = {"gate rows": cos[0], "up rows": cos[1], "both, untrained": cos_before.mean(0)}
for style, (name, y) in zip(probe.STYLES, curves.items()):
    axis.plot(y, label=name, lw=1, ms=3.5, **style)
axis.axhline(chance, color="black", lw=0.8, ls=":", label="random direction")
probe.dress(axis, f"Layer {layer}: rows of the top 5 and the state that they read", {"fontsize": 8}, ylim=(0, 1),
            xlabel="position", ylabel="mean |cos|")
show(figure, "03_cosines")

# %% [markdown]
# One peak at position 0, in the gate and in the up rows, and close to the level of a random direction
# for all the rest.

# %%
both = cos.mean(0)
beside(("model", "Llama-2-7B", f"softmax, layer {layer}"),
       ("neurons", "7890", ", ".join(str(i) for i in five.tolist())),
       ("|cos| of rows and state, position 0", "high", both[0].item()),
       ("  other positions", "about 0", both[1:].mean().item()),
       ("  position 0, untrained", "not reported", cos_before[:, 0].mean().item()),
       ("  random direction", "not reported", chance),
       ("|cos| of gate and up, these neurons", "not reported", aligned[layer, five].mean().item()),
       ("  all neurons of the layer", "not reported", aligned[layer].mean().item()))
assert both[0] > 2.5 * both[1:].mean(), "the rows are no closer to the first token than to others"
assert both[0] > 1.5 * cos_before[:, 0].mean(), "picking alone would give this cosine"
assert aligned[layer, five].mean() > 3 * aligned_before[layer].mean(), "gate and up of these neurons are not aligned"

# %% [markdown]
# ## A first token known by its place only
#
# So far the neurons may simply know `<|bos|>`: its embedding is like no other, and a neuron that reads
# $g^2$ does not ask whether a large $g$ is always the same or varies. The game of `micro-softmax` is the
# harder test. Its first token is any of 24 symbols, and the windows here are random symbols. Neurons are
# again chosen on one draw of windows and judged on another.

# %%
x, fresh = windows("random symbols")[0], windows("random symbols", seed=1)[0]
null, (deep, chosen) = GPT(micro.cfg, seed=0), strongest(micro, x)
deep_null, chosen_null = strongest(null, x)
ratio, ratio_null = contrast(energies(micro, fresh)[deep], chosen), contrast(energies(null, fresh)[deep_null], chosen_null)
print(f"contrast of the top 5 of layer {deep}: {ratio:.0f}; untrained, layer {deep_null}: {ratio_null:.1f}")
assert ratio > max(10, 3 * ratio_null), "no neuron tells an ordinary first token from the others"

# %% [markdown]
# The neurons exist here too, and they cannot know the token by name. What do they know it by? In this
# decoder positions enter only through the angles between queries and keys, so a token that sees nothing
# but itself gets weight 1 on its own value, wherever it stands. Its state is then *exactly* what it
# would be at position 0: to see only itself is all that makes a first token, apart from its name. Let
# tokens 10, 25 and 45 see only themselves, and look at the same five neurons.

# %%
places, T = (10, 25, 45), fresh.shape[1]
mask = torch.stack([probe.block_aggregation(T, k) for k in places]).all(0)
curve = lambda model, i, ids, mask=None: energies(model, fresh, mask)[i][..., ids].sum(-1).mean(0)
plain, alone = curve(micro, deep, chosen), curve(micro, deep, chosen, mask)
before = curve(null, deep_null, chosen_null)
moved = energies(micro, fresh.roll(-places[0], 1))[deep][:, 0, chosen].sum(-1).mean()  # token 10 put first
print(f"token {places[0]} on its own: {alone[places[0]]:.4g}; the same symbol in first place: {moved:.4g}")
assert torch.allclose(alone[places[0]], moved, rtol=1e-3), "something besides aggregation tells the first token apart"
assert all(alone[k] > 5 * plain[k] for k in places), "a token that sees only itself is no first token to these neurons"

# %%
figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
curves = {"micro-softmax": plain, "tokens 10, 25, 45\nsee only themselves": alone, "untrained": before}
for style, (name, y) in zip(probe.STYLES, curves.items()):
    axis.plot(y / y[0], label=name, lw=1, ms=3.5, **style)
probe.dress(axis, f"micro-softmax, random symbols: the same five neurons of layer {deep}", 
            {"fontsize": 8, "loc": "center left", "bbox_to_anchor": (1, 0.5)},
            yscale="log", xlabel="position", ylabel="energy / energy at position 0 (log)")
show(figure, "03_alone")

# %% [markdown]
# The answer falls steeply within the first few positions, as more tokens are averaged, and a token that
# averages nothing gets it back in full.
#
# This is the link from averaging to neurons, and in this model it is causal: nothing but the mask
# differs between the two curves. Two things do *not* show, and belong in the same breath. Weights alone
# are no guide to these neurons: whether the largest of that layer answer to the first token depends on
# the seed. The outliers are in the last layer, answer to other tokens nearly as much, and feed no
# attention.

# %%
for i in (deep, len(micro.layers) - 1):
    score = probe.weight_scores(micro.layers[i])[0].detach()
    seen = contrast(energies(micro, fresh)[i], score.topk(probe.TOP).indices)
    overlap = probe.neuron_overlap(energies(micro, x)[i][:, 0].mean(0), score).item()
    print(f"layer {i}: largest z {probe.z_scores(score).max():.1f}, contrast of the 5 largest weights {seen:.2g}, "
          f"overlap with the most active {overlap:.1f}")
assert seen < ratio / 3, "the weight outliers of the last layer would be neurons of the first token"
assert probe.z_scores(score).max() > weights(micro)[0][deep], "the weight outliers are not in the last layer"

# %% [markdown]
# And alignment is not what sets them apart: gate and up rows of all neurons of that layer are aligned,
# and the five are not always more so than the rest.

# %%
beside(("micro-softmax, layer", "", str(deep)),
       ("|cos| of gate and up, the five", "not reported", weights(micro)[1][deep, chosen].mean().item()),
       ("  all neurons of the layer", "not reported", weights(micro)[1][deep].mean().item()),
       ("  untrained", "not reported", weights(null)[1][deep].mean().item()))

# %% [markdown]
# ## What would falsify this
#
# If the five neurons answered to a token that sees only itself no more than to any other, they would
# know the first token by something else. If an untrained model had the same contrast, it would come from
# picking. Both are asserted above. Not shown here is that the sink *needs* these neurons. That takes an
# intervention: chapter 04 silences them and looks at the state, chapter 06 at the sink. The paper's
# authors do not report one. Nor is it shown that it is the variance they answer to: a token that sees
# only itself differs from others in more than that, and chapter 06 takes the differences apart.
#
# ## Exercises
#
# **1.** Write the mean answer of a SwiGLU neuron to Gaussian input with mean 0 and covariance `cov` (C,
# C).


# %%
def mean_answer(gate, up, cov):
    ...


def check_mean_answer(answer):
    g = torch.Generator().manual_seed(1)
    gate, up, mix = torch.randn(6, generator=g), torch.randn(6, generator=g), torch.randn(6, 6, generator=g) / 2
    got = answer(gate, gate, torch.eye(6))
    assert got is not None, "Return a number: half the covariance of g and u."
    assert abs(float(got) - float(gate @ gate) / 2) < 1e-4, "For aligned rows and a round input it is half of |w|^2."
    assert abs(float(answer(gate, -gate, torch.eye(6))) + float(gate @ gate) / 2) < 1e-4, "Opposed rows answer with a minus sign."
    h = torch.randn(400_000, 6, generator=g) @ mix.T
    seen = float((F.silu(h @ gate) * (h @ up)).mean())
    assert abs(float(answer(gate, up, mix @ mix.T)) - seen) < 0.05, "Cov(w_g . h, w_u . h) for a covariance that is not round?"


attempt(check_mean_answer, mean_answer)

# %% [markdown]
# **2.** A neuron that belongs to the first token spends its energy there. For `energy` (N, T, F) give,
# for each neuron, the share of its whole energy that it spends at token 0. Its null is 1 / T. A neuron
# that never answers has share 0.


# %%
def spent_first(energy):
    ...


def check_spent_first(answer):
    got = answer(torch.ones(3, 8, 5))
    assert got is not None, "Return a tensor (F,)."
    assert tuple(got.shape) == (5,) and torch.allclose(got, torch.tensor(1 / 8)), "Equal energy everywhere: 1 / T for each neuron."
    energy = torch.ones(2, 4, 3)
    energy[:, 1:, 0], energy[..., 1], energy[1, 0, 2] = 0, 0, 6
    got = answer(energy)
    assert not got.isnan().any(), "A neuron that never answers has no energy to share: avoid 0 / 0."
    assert torch.allclose(got[:2], torch.tensor([1.0, 0.0])), "All energy at token 0: share 1. None at all: share 0."
    assert torch.allclose(got[2], torch.tensor(7 / 13)), "Add up over windows first, then divide."


attempt(check_spent_first, spent_first)

# %% [markdown]
# **3.** Fool the neurons without any mask. Change one token of every window, and not the first, so that
# token 1 gets exactly the answer that token 0 gets, in every window.


# %%
def twin(x):
    ...


def check_twin(answer):
    given = windows("random symbols", 16, seed=3)[0]
    got = answer(given.clone())
    assert got is not None, "Return windows (N, T)."
    assert got.shape == given.shape and (got[:, 0] == given[:, 0]).all(), "Leave the first token as it is."
    assert (got != given).sum(1).max() <= 1, "Change one token of a window, no more."
    e = energies(micro, got)[deep][..., chosen].sum(-1)
    assert torch.allclose(e[:, 1], e[:, 0], rtol=1e-2, atol=1e-6 * float(e.max())), \
        "Token 1 averages its own value with that of token 0. When does an average of two change nothing?"


attempt(check_twin, twin)
