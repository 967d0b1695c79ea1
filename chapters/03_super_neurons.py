# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 03 · Super neurons
#
# **Claim.** In SmolLM2 two of the 1,536 neurons of layer 11 answer to the first token
# and to hardly any other. They can be found by their weights alone or by their
# activity. They write into one dimension. Silence them and the model can no longer
# write.
#
# **You need** chapter 00, and SwiGLU: an MLP whose hidden layer is a product of two
# linear maps. **Run time**: about 40 seconds on 2 cores; the two small models must
# exist.

# %%
import torch
import torch.nn.functional as F
from lesson import beside, check, english, figures, models, plt
from lesson import random_tokens, real, show, untrained, windows
from model import make_tap, record
import probe

# %%
model, encoding = real()
x, _ = random_tokens()
layers = range(len(model.layers))
kinds = "mlp_post", "mlp_out", "resid_post"
names = [f"{i}.{kind}" for i in layers for kind in kinds]
seen = record(model, x, names)[1]

# %% [markdown]
# ## Found by weights
#
# Let $h$ be what an MLP reads: the state of one token after RMSNorm. Neuron $i$ has a
# row $w_g$ in the gate matrix, a row $w_u$ in the up matrix, and a column of
# $W_{down}$. Its *answer* is
#
# $$a(h) = \mathrm{silu}(w_g \cdot h)\;(w_u \cdot h)$$
#
# and it adds $a(h)$ times its column to the state. A neuron with long rows can answer
# loudly, and one with a large entry in its column can push one dimension far. So give
# each neuron a score (after arXiv 2603.05498; $\gamma$ is the gain of the norm in
# front):
#
# $$\mathrm{score}_i = \max_j |W_{down,ji}| \cdot \lVert \gamma \odot w_{g,i} \rVert
# \cdot \lVert \gamma \odot w_{u,i} \rVert$$
#
# No token is read for this.


# %%
@torch.no_grad()
def score(block):
    """(F,)"""
    gain, mlp = block.post_attention_layernorm.weight, block.mlp
    gate = (mlp.gate_proj.weight * gain).norm(dim=1)
    up = (mlp.up_proj.weight * gain).norm(dim=1)
    return mlp.down_proj.weight.abs().amax(0) * gate * up


scores = torch.stack([score(block) for block in model.layers])  # (L, F)
assert torch.allclose(scores[11], probe.weight_score(model.layers[11]))
relative = scores / scores.median(1, keepdim=True).values
for i in layers:
    top = relative[i].topk(3)
    if top.values[0] > 20:
        found = zip(top.indices.tolist(), top.values.tolist())
        print(f"layer {i:2}:", *(f"neuron {n} {s:.0f}x" for n, s in found), sep="  ")

# %% [markdown]
# In most layers the largest score is a few times the median. In the layers printed
# here it is more than 20 times. Layer 11 has two such neurons, and then nothing:

# %%
by_weight = relative[11].topk(3)
pair = by_weight.indices[:2]
first, second, third = by_weight.values
assert second > 30 and third < 10, "two neurons of layer 11 stand out by their weights"

# %% [markdown]
# ## Found by activity
#
# The other way is to watch. The *energy* of a write is the squared length of what a
# neuron adds to the state of a token,
#
# $$e_i = a_i^2 \; \lVert W_{down,\cdot i} \rVert^2 .$$


# %%
@torch.no_grad()
def energies(seen, i):
    """(N, T, F)"""
    answers, down = seen[f"{i}.mlp_post"], model.layers[i].mlp.down_proj.weight
    return answers.square() * down.square().sum(0)


energy = energies(seen, 11)
down = model.layers[11].mlp.down_proj.weight
assert torch.allclose(energy, probe.energy(seen["11.mlp_post"], down))
at_first, elsewhere = energy[:, 0].mean(0), energy[:, 1:].mean((0, 1))
by_activity = at_first.topk(2).indices
print("by weight:", pair.tolist(), " by activity at token 0:", by_activity.tolist())
assert set(pair.tolist()) == set(by_activity.tolist()), "two ways, the same neurons"

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.7), sharey=True)
for axis, e, of in ((left, at_first, "token 0"), (right, elsewhere, "other tokens")):
    axis.plot(relative[11], e, ls="", marker=".", color="0.55")
    axis.plot(relative[11, pair], e[pair], ls="", marker="o", color=figures.ACCENT)
    for n in pair.tolist():
        axis.annotate(str(n), (relative[11, n], e[n]), (-30, -3),
                      textcoords="offset points", color=figures.ACCENT)
    axis.set(xscale="log", yscale="log", xlim=(0.2, 300))
    figures.dress(axis, f"Written to {of}", xlabel="weight score / median (log)")
left.set_ylabel("energy of the write (log)")
figure.suptitle("Layer 11: two neurons stand out, by weight and at token 0")
show(figure, "03_neurons", "Scatter of 1,536 neurons, weight score against energy. Two "
     "lie far to the right; at token 0 they also lie far above all others.")

# %% [markdown]
# A number for it is the *contrast*: what the five neurons that write most to token $k$
# write there, over what the same five write to the median token,
#
# $$\mathrm{contrast}_k = \frac{f_k}{\operatorname{median}_{t \ne k} f_t}, \qquad
# f_t = \operatorname{mean}_{\text{windows}} \sum_{i \in \mathrm{top}} e_{i,t} .$$
#
# Picking the strongest gives more than 1 by itself. So do the same for an ordinary
# token.


# %%
def contrast(energy, k):
    """energy (N, T, F): see the formula."""
    top = energy[:, k].mean(0).topk(5).indices
    f = energy[..., top].sum(-1).mean(0)  # (T,)
    rest = torch.cat((f[:k], f[k + 1:]))
    return (f[k] / rest.median()).item()


assert abs(contrast(energy, 0) / probe.contrast(energy, 0).item() - 1) < 1e-3
at_0, at_32 = contrast(energy, 0), contrast(energy, 32)
print(f"contrast at token 0 {at_0:.0f}, at token 32 {at_32:.1f}")
assert at_0 > 100 and at_32 < 20, "they answer to token 0 and to no ordinary one"

# %% [markdown]
# It would be larger still, but in two of these eight windows the *second* token gets
# the same answer. Chapter 04 finds them.

# %% [markdown]
# ## What they write
#
# Each writes along its column of $W_{down}$. How much of the column lies in one
# dimension?

# %%
columns = down.detach()[:, pair]  # (C, 2)
share, c = (columns.square() / columns.square().sum(0)).max(0)
print("largest dimension:", c.tolist(), " its share of the squared length:", share)
c = c[0].item()
written = (seen["11.mlp_post"][:, 0, pair] * columns[c]).sum(-1).mean()
whole = seen["11.mlp_out"][:, 0, c].mean()
print(f"into dimension {c} of token 0: two neurons {written:.0f}, the MLP {whole:.0f}")
assert c == 507 and share.min() > 0.5, "both columns are one dimension, mostly"
assert 0.9 < written / whole < 1.1, "two of 1,536 neurons write all of it"

# %% [markdown]
# ## Write, erase, write again
#
# Look at dimension 507 of token 0 in every layer, and at the neuron that writes most
# to it.

# %%
state = torch.stack([seen[f"{i}.resid_post"][:, 0, c].mean() for i in layers])
writes, writers = [], []
for i in layers:
    answer = seen[f"{i}.mlp_post"][:, 0].mean(0)
    each = answer * model.layers[i].mlp.down_proj.weight[c].detach()
    writers.append(each.abs().argmax().item())
    writes.append(each[writers[-1]].item())
    if abs(writes[-1]) > 60:
        rank = (scores[i] > scores[i, writers[-1]]).sum().item() + 1
        print(f"layer {i:2}: neuron {writers[-1]:4} writes {writes[-1]:7.0f}, "
              f"rank {rank} by weight; the state is then {state[i]:6.0f}")

# %%
figure, axis = plt.subplots(figsize=(8.8, 3.5))
axis.plot(state, color=figures.ACCENT, marker="o", label="state of token 0")
axis.bar(layers, writes, color="0.6", label="strongest write")
for i in (2, 9, 11, 28):
    foot = min(writes[i], 0)  # below the bar, whichever way it points
    axis.annotate(f"neuron {writers[i]}", (i - 0.4, foot), (0, -12),
                  textcoords="offset points")
axis.set_yscale("symlog", linthresh=30)
axis.set(ylim=(-2e5, 2e5), yticks=[-1e4, -100, 0, 100, 1e4])
figures.dress(axis, "Dimension 507 of the first token: written, erased, written again",
              dict(loc="lower left"), xlabel="layer", ylabel="value (symlog)")
show(figure, "03_waves", "Line of dimension 507 by layer: up at layer 2, down at 9, "
     "far up at 11, down at 28, with bars for the one neuron that writes most.")
early, between, late = state[3:8].min(), state[10], state[12:27].min()
assert early > 3 * between.abs() and late > 10 * early, "two waves"

# %% [markdown]
# The same few neurons write and erase: each has the first or second score of its
# layer, or nearly so. So a glance at the weights tells where a sink begins and ends.
#
# ## What if they are silent?
#
# So far this is a portrait. Now an experiment: the pair answers 0 at every token. As a
# control, silence the two neurons next in score. Where will attention to token 0
# change?


# %%
def silent(ids, tokens=slice(None)):
    """A tap: these neurons of layer 11 answer 0 at these tokens."""
    def change(a):
        a = a.clone()
        a[:, tokens, ids] = 0
        return a
    return make_tap(model.cfg, {"11.mlp_post": change})


two = relative[11].topk(4).indices[2:]  # the third and the fourth
taps = {"untouched": None, "pair silent": silent(pair), "two others": silent(two)}
wanted = [n for n in probe.numbers() if n.key in ("sink", "norm_ratio")]
sinks, ratios = {}, {}
for name, tap in taps.items():
    found = probe.layers(model, x[:4], tap, wanted=wanted)[0][0]
    sinks[name], ratios[name] = found["sink"].mean(1), found["norm_ratio"]
    print(f"{name:16} largest norm ratio after layer 11: {ratios[name][12:].max():.1f}")

# %%
figure, axis = plt.subplots(figsize=(8.8, 3.2))
figures.by_layer(axis, sinks, "Two silent neurons of layer 11 take most later sinks",
                 ["untouched"], dict(loc="upper left", ncols=3), ylim=(0, 0.95),
                 ylabel="attention to token 0,\nmean of heads")
axis.axhline(probe.uniform_sink(64), color="black", lw=0.9, ls=":")
show(figure, "03_silent", "Attention to token 0 by layer. Up to layer 11 the curves "
     "are one; after it the curve of the silent pair falls to chance by layer 21.")
sink = {name: v[12:].mean().item() for name, v in sinks.items()}
assert sink["pair silent"] < 0.5 * sink["untouched"], "the pair makes the later sinks"
assert sink["two others"] > 0.9 * sink["untouched"], "two others do not"

# %% [markdown]
# The state is no longer than any other now, and from layer 16 on attention to it is
# low. Layers 12 to 15 keep a part of their sinks: they have another way to know the
# first token.
#
# ## Let it write
#
# Four copies of one prompt, side by side: nothing silent, the pair, two others, and the
# pair silent at every token *but the first*. Predict before you run: does the last copy
# write like the "untouched" one, or like the one with the pair "silent"?

# %%
prediction = ...  # "untouched" or "silent"


# %%
@torch.no_grad()
def write(prompt, tap, copies=4, new=12):
    """The likeliest token each time: a list of texts, one a copy."""
    ids = torch.tensor([encoding.encode_ordinary(prompt)] * copies)
    for _ in range(new):
        best = model(ids, tap=tap)[0][:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, best), dim=1)
    return [encoding.decode(row) for row in ids.tolist()]


def by_copy(a):
    a = a.clone()
    a[1][:, pair] = 0
    a[2][:, two] = 0
    a[3][1:, pair] = 0
    return a


texts = write("The capital of France is", make_tap(model.cfg, {"11.mlp_post": by_copy}))
for name, text in zip(("untouched", "pair silent", "two others", "but at 0"), texts):
    print(f"{name:12} {text!r}")
assert "Paris" in texts[0] and "Paris" not in texts[1], "it cannot write any more"
assert texts[2] == texts[0], "without two others it writes the same"

# %%
check("03.prediction", prediction)

# %% [markdown]
# One token, two neurons, one dimension, and the model can or cannot say "Paris". The
# loss on English text says the same in a number.

# %%
text, target = english(4)
with torch.no_grad():
    losses = {name: model(text, target, tap)[1].item() for name, tap in taps.items()}
print(", ".join(f"{name} {loss:.2f} nats" for name, loss in losses.items()))
assert losses["pair silent"] > losses["untouched"] + 0.5 > losses["two others"]

# %% [markdown]
# ## What does such a neuron measure?
#
# Write $g = w_g \cdot h$ and $u = w_u \cdot h$. If both rows lie along one line, $u =
# b\,g$, then, because $\mathrm{silu}(g) = \frac g2 + \frac g2\tanh\frac g2$,
#
# $$a = b \left(\tfrac12 g^2 + \tfrac12 g^2 \tanh\tfrac g2\right) .$$
#
# The first part is even and quadratic, the second is odd. If $g$ is as often positive
# as negative, the odd part averages to zero: the *mean* answer is half the second
# moment of its input. For Gaussian $h$ with covariance $\Sigma$, and rows that need
# not be aligned,
#
# $$\mathbb E[a] = \tfrac12\,\mathrm{Cov}(g, u) = \tfrac12\,w_g^\top \Sigma\,w_u .$$
#
# Orthogonal rows have no mean answer. A neuron is still quadratic for a large input of
# one direction: for $g \gg 0$ the answer is $g\,u$, and doubling $h$ makes it four
# times as large.

# %%
gate, noise = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0))
for cosine in (1.0, 0.5, 0.0, -1.0):
    up = cosine * gate + (1 - cosine**2) ** 0.5 * noise
    mean = (F.silu(2 * gate) * 2 * up).mean().item()
    print(f"cos {cosine:4}: mean answer {mean:5.2f}, formula {2 * cosine:5.2f}")
    assert abs(mean - 2 * cosine) < 0.1, "the mean answer is half of Cov(g, u)"


# %%
@torch.no_grad()
def aligned(block):
    """(F,) cosine of the gate and the up row of each neuron."""
    gain, mlp = block.post_attention_layernorm.weight, block.mlp
    return F.cosine_similarity(mlp.gate_proj.weight * gain, mlp.up_proj.weight * gain)


for i, n in ((2, 90), (2, 430), (9, 200), (11, 1229), (11, 1487), (28, 678)):
    cos = aligned(model.layers[i])
    print(f"layer {i:2}, neuron {n:4}: cos(gate, up) {cos[n]:5.2f}; "
          f"all of the layer, mean |cos| {cos.abs().mean():.2f}")

# %% [markdown]
# The pair of layer 11 is aligned, six times as much as the rest of its layer. Neuron
# 90 of layer 2 is not, and it writes just as one-sidedly. Alignment is common among
# them but is not what makes them.
#
# ## In one that you train
#
# Two small models of chapter 00: `tiny-softmax` reads text, and each window begins with
# `<|bos|>`; `softmax` copies symbols, and its first tokens are ordinary. Here is
# the layer of largest contrast (without the last one, which no attention follows).


# %%
@torch.no_grad()
def strongest(small, x):
    """(layer, its five neurons, the energies (N, T, F) there)."""
    names = [f"{i}.mlp_post" for i in range(len(small.layers) - 1)]
    kept = record(small, x, names)[1]
    weights = [block.mlp.down_proj.weight for block in small.layers]
    es = [probe.energy(a, w) for a, w in zip(kept.values(), weights)]
    i = max(range(len(es)), key=lambda i: contrast(es[i], 0))
    return i, es[i][:, 0].mean(0).topk(5).indices, es[i]


small = models("tiny-softmax", "softmax")
inputs = {"tiny-softmax": windows("bos")[0], "softmax": windows("rest")[0]}
for name in small:
    (i, ids, e), (_, _, null) = (strongest(m, inputs[name])
                                 for m in (small[name], untrained(name)))
    top = e.topk(5, dim=-1).values.sum(-1) / e.sum(-1)  # the share of five neurons
    print(f"{name}, layer {i}: contrast {contrast(e, 0):.0f} (untrained "
          f"{contrast(null, 0):.1f}); share of the top five at token 0 "
          f"{top[:, 0].mean():.2f}, at others {top[:, 1:].mean():.2f}")
    assert contrast(e, 0) > max(10, 2 * contrast(null, 0)), "neurons of the first token"

# %% [markdown]
# The share of five neurons hardly tells token 0 from the others: in any token few
# neurons do most. The contrast tells them apart.
#
# By what do the neurons of `softmax` know the first token? It can be any symbol.
# But it sees nothing except itself. Let tokens 10, 25 and 45 see only themselves:

# %%
micro, fresh = small["softmax"], windows("rest", seed=1)[0]
layer, ids, _ = strongest(micro, inputs["softmax"])
mask = torch.ones(64, 64, dtype=torch.bool)
mask[[10, 25, 45]] = torch.eye(64, dtype=torch.bool)[[10, 25, 45]]
weight = micro.layers[layer].mlp.down_proj.weight
curves = {}
for name, m in (("every token sees all", None), ("10, 25, 45 see themselves", mask)):
    post = record(micro, fresh, [f"{layer}.mlp_post"], mask=m)[1][f"{layer}.mlp_post"]
    e = probe.energy(post, weight)[..., ids].sum(-1).mean(0).detach()
    curves[name] = e / e[0]
figure, axis = plt.subplots(figsize=(8.8, 3))
figures.lines(axis, curves, hot=["10, 25, 45 see themselves"], marker="")
figures.dress(axis, "To these neurons, a first token is one that sees only itself",
              {"loc": "upper right"}, yscale="log", xlabel="position",
              ylabel="energy / that at token 0 (log)", ylim=(None, 8))
show(figure, "03_alone", "Energy of five neurons by position: high at token 0, and as "
     "high at tokens 10, 25 and 45 once these see only themselves.")
assert curves["10, 25, 45 see themselves"][[10, 25, 45]].min() > 0.5

# %% [markdown]
# ## Beside the paper

# %%
beside(("model", "Llama-2-7B", "SmolLM2-135M"),
       ("neurons", "7890 of an early layer", "1229 and 1487 of layer 11"),
       ("write into dimension", "2533", "507"),
       ("weight score over the median", "no number", f"{first:.0f} and {second:.0f}"),
       ("silenced", "not reported", f"sink {sink['untouched']:.2f} to "
        f"{sink['pair silent']:.2f}, control {sink['two others']:.2f}"))

# %% [markdown]
# Neuron 7890 and dimension 2533 are the "super weight" of Yu et al. 2024 (arXiv
# 2411.07191): setting that one weight to zero ruins the model. The same happens here
# with two neurons.
#
# ## What would falsify this
#
# The story fails if the two lists, by weight and by activity, had nothing in common,
# if an ordinary token had neurons of its own with the same contrast, or if silencing
# two others took the sink as well. All three are asserted. Not shown is that *every*
# Llama does it in one layer: SmolLM2 itself needs two waves, and nobody knows why.
#
# ## Exercises
#
# **1.** The prediction above the cell that writes.
#
# **2.** The mean answer of a SwiGLU neuron with rows `gate` and `up` (C,) to Gaussian
# input with mean 0 and covariance `cov` (C, C).


# %%
def mean_answer(gate, up, cov):
    ...


check("03.mean_answer", mean_answer)

# %% [markdown]
# **3.** Fool the neurons. Change one token of every window of `x` (N, T), not the
# first, so that token 1 of SmolLM2 gets the same answer from the pair as token 0.


# %%
def twin(x):
    ...


check("03.twin", twin)

# %% [markdown]
# **4.** An experiment. The pair is silent, and your function is given what the MLP of
# layer 11 then adds, `out` (N, T, C). Change no more than *one number a window*, and
# bring the loss on English text back to within 0.3 nats of that of the untouched
# model.


# %%
def rescue(out):
    ...


check("03.rescue", rescue)
