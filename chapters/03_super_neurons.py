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
# linear maps. **Run time**: ten seconds on 2 cores; the two small models must
# exist.

# %%
import torch
from lesson import beside, check, english, models, plt, random_tokens, real, show
from lesson import untrained, windows

import probe
from chapters import figures
from model import make_tap, record

torch.set_grad_enabled(False)
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
# here it is more than 20 times. Layer 11 has two such neurons, and then nothing.

# %%
by_weight = relative[11].topk(3)
pair = by_weight.indices[:2]
first, second, third = by_weight.values

# %% [markdown]
# ## Found by activity
#
# The other way is to watch. The *energy* of a write is the squared length of what a
# neuron adds to the state of a token,
#
# $$e_i = a_i^2 \; \lVert W_{down,\cdot i} \rVert^2 .$$


# %%
def energies(seen, i):
    """(N, T, F)"""
    answers, down = seen[f"{i}.mlp_post"], model.layers[i].mlp.down_proj.weight
    return answers.square() * down.square().sum(0)


energy = energies(seen, 11)
at_first, elsewhere = energy[:, 0].mean(0), energy[:, 1:].mean((0, 1))
by_activity = at_first.topk(2).indices
print("by weight:", pair.tolist(), " by activity at token 0:", by_activity.tolist())
same = set(pair.tolist()) == set(by_activity.tolist())
assert same and second > 30 > 10 > third, "two ways do not find the same two neurons"

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


down = model.layers[11].mlp.down_proj.weight
library = probe.contrast(probe.energy(seen["11.mlp_post"], down), 0).item()
at_0, at_32 = contrast(energy, 0), contrast(energy, 32)
print(f"contrast at token 0 {at_0:.0f}, at token 32 {at_32:.1f}")
assert abs(at_0 / library - 1) < 1e-3
assert at_0 > 100 and at_32 < 20, "they answer to token 0 and to no ordinary one"

# %% [markdown]
# ## What they write
#
# Each writes along its column of $W_{down}$. How much of the column lies in one
# dimension?

# %%
columns = down[:, pair]  # (C, 2)
share, c = (columns.square() / columns.square().sum(0)).max(0)
print("largest dimension:", c.tolist(), " its share of the squared length:", share)
c = c[0].item()
written = (seen["11.mlp_post"][:, 0, pair] * columns[c]).sum(-1).mean()
total = seen["11.mlp_out"][:, 0, c].mean()
print(f"into dimension {c} of token 0: two neurons {written:.0f}, the MLP {total:.0f}")
assert share.min() > 0.5 and 0.9 < written / total < 1.1, "they do not write all of it"

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
    each = answer * model.layers[i].mlp.down_proj.weight[c]
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
def silent(ids, net=model, layer=11):
    """A tap: these neurons of a layer answer 0."""
    def change(a):
        a = a.clone()
        a[..., ids] = 0
        return a
    return make_tap(net.cfg, {f"{layer}.mlp_post": change})


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
kept = {name: value / sink["untouched"] for name, value in sink.items()}
assert kept["pair silent"] < 0.5 and kept["two others"] > 0.9, "any two would do"

# %% [markdown]
# Without the pair the state is as long as any other, and from layer 16 on attention to
# it is low. Layers 12 to 15 keep a part of their sinks: they have another way to know
# the first token.
#
# ## Let it write
#
# Four copies of one prompt, side by side: nothing silent, the pair, two others, and the
# pair silent at every token *but the first*. Predict before you run: does the last copy
# write like the "untouched" one, or like the one with the pair "silent"?

# %%
prediction = ...  # "untouched" or "silent"


# %%
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
whole, gone, same, _ = texts
assert "Paris" in whole and "Paris" not in gone and same == whole

# %%
check("03.prediction", prediction)

# %% [markdown]
# One token, two neurons, one dimension, and the model can or cannot say "Paris". The
# loss on English text says the same in a number.

# %%
text, target = english(4)
losses = {name: model(text, target, tap)[1].item() for name, tap in taps.items()}
print(", ".join(f"{name} {loss:.2f} nats" for name, loss in losses.items()))

# %% [markdown]
# ## In one that you train
#
# `softmax` copies letters, and any letter can come first. `tiny-softmax` reads text,
# and each window begins with `<|bos|>`. Here is the layer of largest contrast (without
# the last one, which no attention follows).


# %%
def strongest(net, x):
    """(layer, contrast, its five neurons)"""
    names = [f"{i}.mlp_post" for i in range(len(net.layers) - 1)]
    answers = record(net, x, names)[1].values()
    es = [probe.energy(a, block.mlp.down_proj.weight)
          for a, block in zip(answers, net.layers)]
    found = [contrast(e, 0) for e in es]
    i = found.index(max(found))
    return i, found[i], es[i][:, 0].mean(0).topk(5).indices


small = models("softmax", "tiny-softmax")
inputs = {"softmax": windows("rest")[0], "tiny-softmax": windows("bos")[0]}
for name, net in small.items():
    i, after, five = strongest(net, inputs[name])
    before = strongest(untrained(name), inputs[name])[1]
    ranks = score(net.layers[i]).argsort(descending=True).argsort()[five] + 1
    print(f"{name}, layer {i}: contrast {after:.0f} (untrained {before:.1f}); "
          f"ranks of the five by weight {sorted(ranks.tolist())}")
    assert after > max(10, 2 * before), "neurons of the first token"

# %% [markdown]
# So far they agree with SmolLM2: a few neurons answer to the first token, and the
# first by weight are among them.
#
# By what do the neurons of `softmax` know the first token? It can be any letter.
# But it sees nothing except itself. Let tokens 10, 25 and 45 see only themselves:

# %%
net, fresh, alone = small["softmax"], windows("rest", seed=1)[0], [10, 25, 45]
layer, _, five = strongest(net, inputs["softmax"])
mask = torch.ones(64, 64, dtype=torch.bool)
mask[alone] = torch.eye(64, dtype=torch.bool)[alone]
weight, curves = net.layers[layer].mlp.down_proj.weight, {}
for name, m in (("every token sees all", None), ("10, 25, 45 see themselves", mask)):
    post = record(net, fresh, [f"{layer}.mlp_post"], mask=m)[1][f"{layer}.mlp_post"]
    e = probe.energy(post, weight)[..., five].sum(-1).mean(0)
    curves[name] = e / e[0]
figure, axis = plt.subplots(figsize=(8.8, 3))
figures.lines(axis, curves, hot=["10, 25, 45 see themselves"], marker="")
figures.dress(axis, "To these neurons, a first token is one that sees only itself",
              {"loc": "upper right"}, yscale="log", xlabel="position",
              ylabel="energy / that at token 0 (log)", ylim=(None, 30))
show(figure, "03_alone", "Energy of five neurons by position: high at token 0, and as "
     "high at tokens 10, 25 and 45 once these see only themselves.")
assert curves["10, 25, 45 see themselves"][alone].min() > 0.3

# %% [markdown]
# Now silence the five, and five others of like weight.

# %%
others = probe.similar(score(net.layers[layer]), five)
for name, ids in (("untouched", []), ("five silent", five), ("five others", others)):
    found = probe.chain(net, inputs["softmax"], silent(ids, net, layer))
    print(f"{name:12} strongest sink {found['sink']:.2f}")

# %% [markdown]
# Here they disagree: the sink of `softmax` hardly changes. (Chapter 06 silences five
# neurons in *every* layer, and then a good part of it goes.) What else could its keys
# read? Chapter 04 compares how long the state of the first token is in both.
#
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
# **2.** What does such a neuron measure? Give the mean answer of a neuron with rows
# `gate` and `up` (C,) to Gaussian input $h$ with mean 0 and covariance `cov` (C, C).
# Hint: $\mathrm{silu}(g) = \frac g2 + \frac g2\tanh\frac g2$. Write the row `up` as a
# multiple of `gate` plus a rest whose product with $h$ does not depend on $g$. Which
# parts of the answer are odd in $g$?


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
