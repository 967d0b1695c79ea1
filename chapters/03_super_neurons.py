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
# and to few others. They can be found by their weights or by their activity, and both
# write into one dimension. Silence them and the model writes no sensible text.
#
# **You learn** to find the few neurons that write the state of the first token, and to
# silence them. **You need** chapter 00, and SwiGLU: an MLP whose hidden layer is one
# linear map times the silu of another, $\mathrm{silu}(u) = u / (1 + e^{-u})$. **Run
# time**: ten to twenty seconds, once the two small models exist.

# %%
from lesson import beside, check, look, models, plt, random_tokens, real, show
from lesson import untrained, windows

import torch

import probe
from chapters import figures
from model import make_tap, record

torch.set_grad_enabled(False)
model, encoding = real()
x, _ = random_tokens()
layers = range(len(model.layers))
answers = [f"{i}.mlp_post" for i in layers]
states = [f"{i}.resid_post" for i in layers]
_, seen = record(model, x, answers + states)

# %% [markdown]
# ## Found by weights
#
# Let $h$ be what an MLP reads: the state of one token (its vector in the residual
# stream) after RMSNorm, which divides it by the root of the mean of its squares and
# multiplies each entry by a learned *gain* $\gamma_j$ (chapter 05). Neuron $i$ has a
# row $w_g$ in the gate matrix, a row $w_u$ in the up matrix, and a column of
# $W_{down}$. It adds this column to the state, times its *answer*
#
# $$a(h) = \mathrm{silu}(w_g \cdot h)\;(w_u \cdot h)$$
#
# A neuron with long rows can answer loudly, and one with a large entry in its column
# can push one dimension far. So give each neuron a score, for which no token is read
# (after arXiv 2603.05498):
#
# $$\mathrm{score}_i = \max_j |W_{down,ji}| \cdot \lVert \gamma \odot w_{g,i} \rVert
# \cdot \lVert \gamma \odot w_{u,i} \rVert$$


# %%
def score(block):
    """(F,)"""
    mlp = block.mlp
    gain = block.post_attention_layernorm.weight
    gate = (mlp.gate_proj.weight * gain).norm(dim=1)
    up = (mlp.up_proj.weight * gain).norm(dim=1)
    return mlp.down_proj.weight.abs().amax(0) * gate * up


scores = torch.stack([score(block) for block in model.layers])  # (L, F)
assert torch.allclose(scores[11], probe.weight_score(model.layers[11]))
relative = scores / scores.median(1, keepdim=True).values
for i in layers:
    largest, ids = relative[i].topk(3)
    if largest[0] > 20:
        words = [f"neuron {n} {relative[i, n]:.0f}x" for n in ids.tolist()]
        print(f"layer {i:2}:", *words, sep="  ")
pair = relative[11].topk(2).indices

# %% [markdown]
# In most layers the largest score is a few times the median, in those printed more than
# 20 times. Layer 11 has two such neurons, and then nothing. If such neurons, few and
# strong, answer to the first token, we call them *super neurons*.
#
# ## Found by activity
#
# The other way is to watch the answers. The *energy* of a write is the squared length
# of what a neuron adds to the state of a token. Take the five neurons that write most
# to token $k$. Their *contrast* is their energy there over that at the median token:
#
# $$e_i = a_i^2 \; \lVert W_{down,\cdot i} \rVert^2, \qquad
# \mathrm{contrast}_k = \frac{f_k}{\mathrm{median}_{t \ne k} f_t}, \qquad
# f_t = \mathrm{mean}_{\text{windows}} \sum_{i \in \mathrm{top}} e_{i,t}$$
#
# Choosing the strongest neurons makes the contrast larger than 1 at any token. So token
# 32 is the control.

# %%
down = model.layers[11].mlp.down_proj.weight
energy = seen["11.mlp_post"].square() * down.square().sum(0)  # (N, T, F)
at_first = energy[:, 0].mean(0)  # (F,)
elsewhere = energy[:, 1:].flatten(0, 1).median(0).values
by_activity = at_first.topk(2).indices
print("by weight:", pair.tolist(), " by activity at token 0:", by_activity.tolist())
_, second, third = relative[11].topk(3).values
assert second > 30, "fewer than two neurons stand out by weight"
assert third < 10, "more than two neurons stand out by weight"
assert set(pair.tolist()) == set(by_activity.tolist()), "activity finds two others"

at_0 = probe.contrast(energy, 0)
at_32 = probe.contrast(energy, 32)
print(f"contrast at token 0 {at_0:.1e}, at token 32 {at_32:.1f}")
assert at_0 > 100, "they do not answer to token 0"
assert at_32 < 20, "an ordinary token has such neurons too"

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.7), sharey=True)
written = {"token 0": at_first, "the median token": elsewhere}
for axis, (of, e) in zip(axes, written.items()):
    axis.plot(relative[11], e, ls="", marker=".", color="0.55")
    axis.plot(relative[11, pair], e[pair], ls="", marker="o", color=figures.ACCENT)
    for n in pair.tolist():
        axis.annotate(str(n), (relative[11, n], e[n]), (-30, -3),
                      textcoords="offset points", color=figures.ACCENT)
    axis.set(xscale="log", yscale="log", xlim=(0.2, 300))
    figures.dress(axis, f"Written to {of}", xlabel="weight score / median (log)")
axes[0].set_ylabel("energy of the write (log)")
figure.suptitle("Layer 11: two neurons stand out, by weight and at token 0")
show(figure, "03_neurons", "Scatter of 1,536 neurons, weight score against energy. Two "
     "lie far to the right, and at token 0, not at the median token, far above all "
     "others.")

# %% [markdown]
# To the median token the pair writes almost nothing, but in two of the eight windows it
# answers to token 1.
#
# How do the two recognise the first token, when it can be any token? The first token
# sees only itself. So let tokens 10, 25 and 45 see only themselves:

# %%
mask = torch.ones(64, 64, dtype=torch.bool)  # the model itself hides later keys
for t in (10, 25, 45):
    mask[t] = False
    mask[t, t] = True
_, masked = record(model, x, ["11.mlp_post"], mask=mask)
for n in pair.tolist():
    for name, kept in (("as usual", seen), ("alone", masked)):
        answer = kept["11.mlp_post"][:, [0, 10, 25, 45], n].mean(0)
        print(f"neuron {n}, tokens 0, 10, 25, 45 {name:9}", answer.int().tolist())
    assert (answer / answer[0]).min() > 0.8, "it knows token 0 by something else"

# %% [markdown]
# ## Write, erase, write again
#
# Each of the two writes along its column of $W_{down}$, and nearly all of the squared
# length of this column lies in one dimension. Look at this dimension of token 0 in
# every layer, and at the neuron that writes most to it.

# %%
squares = down[:, pair].square()  # (C, 2)
share, dimension = (squares / squares.sum(0)).max(0)
print("largest dimension:", dimension.tolist(), "its share of the squared length:",
      *(f"{part:.0%}" for part in share))
assert share.min() > 0.9, "they write into many dimensions"
assert dimension[0] == dimension[1], "they write into two dimensions"
c = dimension[0].item()

# %%
state, writers, writes = [], [], []
for i, block in enumerate(model.layers):
    state.append(seen[f"{i}.resid_post"][:, 0, c].mean().item())
    answer = seen[f"{i}.mlp_post"][:, 0].mean(0)  # (F,)
    each = answer * block.mlp.down_proj.weight[c]
    writer = each.abs().argmax().item()
    write = each[writer].item()
    if abs(write) > 60:
        rank = (scores[i] > scores[i, writer]).sum() + 1
        print(f"layer {i:2}: neuron {writer:4} writes {write:7.0f}, "
              f"rank {rank} by weight; the state is then {state[i]:6.0f}")
    writers.append(writer)
    writes.append(write)

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
figures.dress(axis, f"Dimension {c} of the first token: written, erased, written again",
              dict(loc="lower left"), xlabel="after layer", ylabel="value (symlog)")
show(figure, "03_waves", f"Line of dimension {c} by layer: up at layer 2, down at 9, "
     "far up at 11, down at 28, with bars for the one neuron that writes most.")
early = min(state[3:8])
between = abs(state[10])
late = min(state[12:27])
assert early > 3 * between, "the first wave is not erased"
assert late > 10 * early, "the second wave is no larger than the first"

# %% [markdown]
# Each of these neurons is among the first three of its layer by weight. So the weights
# tell where to look, but not how much a neuron writes: the one of layer 27, with 174
# times the usual score, moves the state by less than 1 %.
#
# ## What if they are silent?
#
# So far we have only observed. Now an experiment: the pair answers 0 at every token. As
# a control, silence the two neurons next in score.


# %%
def silent(ids, start=0):
    """A tap: these neurons of layer 11 answer 0, from token `start` on."""
    def change(a):
        a = a.clone()
        a[:, start:, ids] = 0
        return a
    return make_tap(model.cfg, {"11.mlp_post": change})


two = relative[11].topk(4).indices[2:]  # the third and the fourth
taps = {"untouched": None, "pair silent": silent(pair), "two others": silent(two)}
wanted = [probe.metric("sink")]
sinks, sink = {}, {}
for name, tap in taps.items():
    (found,), _ = probe.layers(model, x[:4], tap, wanted=wanted)
    sinks[name] = found["sink"].mean(1)  # (L,)
    sink[name] = sinks[name][12:].mean()
assert sink["pair silent"] < 0.5 * sink["untouched"], "the pair does not matter"
assert sink["two others"] > 0.9 * sink["untouched"], "any two would do"

# %%
figure, axis = plt.subplots(figsize=(8.8, 3.2))
figures.by_layer(axis, sinks, "With two neurons silent, most later sinks go",
                 ["untouched"], dict(loc="upper left", ncols=3), ylim=(0, 0.95),
                 xlabel="layer (dotted line: uniform attention)",
                 ylabel="attention to token 0,\nmean of heads")
axis.axhline(probe.uniform_sink(64), color="black", lw=0.9, ls=":")
show(figure, "03_silent", "Attention to token 0 by layer. Up to layer 11 the curves "
     "are one; after it that of the silent pair rises to 0.4 at most, and from layer "
     "21 on is near the baseline.")

# %% [markdown]
# Layers 12 to 15 keep a part of their sinks. Why is not tested here.
#
# Here is one head, with words on the axes:

# %%
look("Dear students, today we look inside a language model and ask why it looks back",
     layer=24, head=3, silence={11: pair.tolist()}, name="03_words")

# %% [markdown]
# ## Let it write
#
# The model continues a prompt as it is, with the pair silent, and with two others
# silent. Predict a fourth text: the pair is silent at every token *but the first*. Will
# it be like the "untouched" text, or like that with the pair "silent"? Your prediction
# adds the fourth text.

# %%
prediction = ...  # "untouched" or "silent"
if prediction is not ...:
    taps["but at token 0"] = silent(pair, start=1)
prompt = encoding.encode_ordinary("The capital of France is")
texts = {}
for name, tap in taps.items():
    ids = torch.tensor([prompt])
    for step in range(12):
        logits, _ = model(ids, tap=tap)
        likeliest = logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, likeliest), dim=1)
    texts[name] = encoding.decode(ids[0].tolist())
    print(f"{name:14} {texts[name]!r}")
assert "Paris" in texts["untouched"], "the model does not know it"
assert "Paris" not in texts["pair silent"], "it writes without the pair"
assert texts["two others"] == texts["untouched"], "any two would do"
if prediction is not ...:
    same = texts["but at token 0"] == texts["untouched"]
    assert same, "the pair matters at other tokens"
check("03.prediction", prediction)

# %% [markdown]
# ## In a small model that you train
#
# `softmax` is what `python train.py` trains, and any letter can come first. `text`
# reads text after `<|bos|>`. Of all layers but the last, whose writes no attention
# reads, we print the largest contrast.

# %%
def largest_contrast(model, x):
    (found,), _ = probe.layers(model, x)
    return found["neuron_contrast"][:-1].max()


small = models("softmax", "text")
inputs = {"softmax": windows("rest")[0], "text": windows("bos")[0]}
for name, x in inputs.items():
    after = largest_contrast(small[name], x)
    before = largest_contrast(untrained(name), x)
    print(f"{name}: contrast {after:.0f}, untrained {before:.1f}")
    assert after > 10, "no neurons of the first token"
    assert after > 2 * before, "the neurons are there before training"

# %% [markdown]
# In them, too, a few neurons answer to the first token. Chapter 06 asks how much of the
# sink depends on these neurons: there the models disagree.
#
# ## Beside the paper

# %%
effect = (f"sink {sink['untouched']:.2f} to {sink['pair silent']:.2f}, "
          f"control {sink['two others']:.2f}")
beside(("model", "Llama-2-7B", "SmolLM2-135M"),
       ("neurons", "7890 of an early layer", f"{pair.tolist()} of layer 11"),
       ("write into dimension", "2533", str(c)),
       ("silenced", "not reported", effect))

# %% [markdown]
# The entry of $W_{down}$ by which neuron 7890 writes into dimension 2533 is the "super
# weight" of Yu et al. 2024 (arXiv 2411.07191): set to zero, it alone ruins the model.
#
# ## What would falsify this
#
# The story would fail if weight and activity found different neurons, if an ordinary
# token had neurons of its own with the same contrast, or if silencing two others took
# the sink as well. The assertions above exclude all three. Not shown is that *every*
# Llama has such a pair. Why SmolLM2 writes in two waves is open.
#
# **You can now** rank neurons by what they write, silence some of them beside others,
# and see what the model then says.
#
# ## Exercises
#
# **1.** The prediction above the cell that writes.
#
# **2.** Fool the neurons. Change one token of every window of `x` (N, T), not the
# first, so that the pair gives token 1 the same answer as token 0.


# %%
def twin(x):
    ...


check("03.twin", twin)

# %% [markdown]
# **3.** An experiment. The pair is silent, and your function is given what the MLP of
# layer 11 then adds, `out` (N, T, C). Change no more than *one number a window*, and
# put back into it what the two neurons wrote, to within a tenth. The loss on English
# text must come back to within 0.3 nats of that of the untouched model.


# %%
def rescue(out):
    ...


check("03.rescue", rescue)
