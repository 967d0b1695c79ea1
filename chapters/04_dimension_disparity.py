# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 04 · Dimension disparity
#
# **Claim.** A handful of neurons writes most of the first token's state, so that it becomes several
# times as long as any other and holds its length in fewer dimensions.
#
# **You need** chapter 03: which neurons answer to the first token. **Run time**: under 20 seconds once
# the models exist.

# %%
import math
import sys

sys.path.append("chapters")  # when this was started one folder up
import torch
import torch.nn.functional as F
from lesson import attempt, beside, models, plt, show, windows
from model import GPT, compose, record
import probe

# %%
trained = models("softmax", "headnorm", "micro-softmax")
model = trained["softmax"]
untrained = GPT(model.cfg, seed=0)
x, _ = windows("bos")
L, C = model.cfg.num_hidden_layers, model.cfg.hidden_size

# %% [markdown]
# ## Who wrote this state?
#
# In a decoder every part only *adds* to the state of a token. After layer $l$ the state is
#
# $$x = e + \sum_{l' \le l} \mathrm{attn}_{l'} + \sum_{l' \le l}\sum_i a_i\,W_{down,\cdot i}$$
#
# with $e$ the embedding, and $a_i$ the answer of neuron $i$ of layer $l'$, which it writes along its
# column of $W_{down}$. Let $p_1, p_2, \dots$ be these parts, gathered in any way. Because $x = \sum_n
# p_n$,
#
# $$\frac{\sum_n p_n \cdot x}{\lVert x\rVert^2} = 1$$
#
# so $p_n \cdot x / \lVert x\rVert^2$ is the share of part $n$, and the shares add up to 1 exactly. A
# part that points against the state has a negative share. We gather four: the embedding, all attention
# so far, the five strongest neurons of each layer so far, and all other neurons. *Strongest* is judged
# anew for every token, so a later token gets its own best five, and the comparison is fair.


# %%
@torch.no_grad()
def authors(model, x, t):
    """(L, 4): shares of embedding, attention, the five strongest neurons a layer and all others in token t."""
    names = [f"{i}.{name}" for i in range(len(model.layers)) for name in ("attn_out", "mlp_post", "mlp_out", "resid_post")]
    kept = {name: a[:, t] for name, a in record(model, x, ["embed", *names])[1].items()}
    parts, rows = torch.stack([kept["embed"], *[torch.zeros_like(kept["embed"])] * 3]), []
    for i, block in enumerate(model.layers):
        post, down = kept[f"{i}.mlp_post"], block.mlp.down_proj.weight
        ids = probe.neuron_energy(post, down).topk(probe.TOP).indices
        few = torch.zeros_like(post).scatter(1, ids, post.gather(1, ids)) @ down.T
        parts = parts + torch.stack([torch.zeros_like(few), kept[f"{i}.attn_out"], few, kept[f"{i}.mlp_out"] - few])
        state = kept[f"{i}.resid_post"]
        rows.append(((parts * state).sum(-1) / state.square().sum(-1)).mean(1))
    return torch.stack(rows)


# %%
shares = {"token 0": authors(model, x, 0), "token 30": authors(model, x, 30), "token 0, untrained": authors(untrained, x, 0)}
assert all((s.sum(1) - 1).abs().max() < 1e-3 for s in shares.values()), "the parts do not add up to the state"

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained", sharey=True)
looks = (("black", ""), ("0.85", "////"), ("0.45", ""), ("white", "...."))
for axis, (title, share) in zip(axes, shares.items()):
    low = torch.zeros(L)
    for part, name, (color, hatch) in zip(share.T, ("embedding", "attention", "5 neurons a layer", "other neurons"), looks):
        axis.bar(range(L), part, bottom=low, color=color, hatch=hatch, edgecolor="black", lw=0.5, label=name)
        low = low + part
    probe.dress(axis, title, xlabel="after layer", ylim=(0, 1.02))
axes[0].set_ylabel("share of the state")
axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure, "04_authors")

# %% [markdown]
# The grey block, five neurons a layer, is nearly all of the first token's state, from the layer of the
# super neurons to the end. Other tokens are the work of many, and so is the first token before training.

# %%
few = {name: share[:, 2] for name, share in shares.items()}
print("share of five neurons a layer:", ", ".join(f"{name} {share.min():.2f} to {share.max():.2f}" for name, share in few.items()))
assert few["token 0"].min() > 0.6, "more than a few neurons write the first token"
assert few["token 0"].mean() > 1.4 * few["token 30"].mean(), "every token is written by few neurons"
assert few["token 0"].mean() > 1.4 * few["token 0, untrained"].mean(), "it is so before training"

# %% [markdown]
# ## What do they write?
#
# The paper describes the way from neuron to dimension: the column of $W_{down}$ along which a super
# neuron writes is sparse and heavy-tailed, so one large answer becomes a few large dimensions. A number
# for heavy tails is the *kurtosis* of the entries $w_j$ of a column (about 0, not about the mean),
#
# $$\mathrm{kurt}(w) = \frac{\frac1C\sum_j w_j^4}{\left(\frac1C\sum_j w_j^2\right)^2}$$
#
# 3 for a Gaussian, a little less for a sample as small as C = 64, and C for a single dimension alone.


# %%
@torch.no_grad()
def writes(model, x, i):
    """(5,) ids of the strongest neurons of layer i at token 0, (5,) mean answers, (5, C) mean writes, (F,) kurtosis."""
    answer = record(model, x, [f"{i}.mlp_post"])[1][f"{i}.mlp_post"][:, 0].mean(0)
    down = model.layers[i].mlp.down_proj.weight
    ids = probe.neuron_energy(answer, down).topk(probe.TOP).indices
    return ids, answer[ids], answer[ids, None] * down[:, ids].T, probe.kurtosis(down.T)


early = range(L // 2)  # here the state of the first token is built; later layers add little to it
layer = max(early, key=lambda i: writes(model, x, i)[2].sum(0).norm().item())
for i in early:
    ids, answers, written, tails = writes(model, x, i)
    for n, a, w in zip(ids.tolist()[:3], answers, written):
        print(f"layer {i}, neuron {n:3}: answer {a:6.2f}, length of its write {w.norm():5.2f}, largest in dimension "
              f"{w.abs().argmax().item():2}, kurtosis {probe.kurtosis(w):4.1f} (mean of the layer {tails.mean():.1f})")

# %%
ids, answers, written, tails = writes(model, x, layer)
state = record(model, x, [f"{layer}.resid_post"])[1][f"{layer}.resid_post"][:, 0].mean(0)
figure, axis = plt.subplots(figsize=(10, 3.2), layout="constrained")
axis.bar(range(C), state, color="0.8", edgecolor="black", lw=0.4, label="mean state of token 0 after the layer")
axis.plot(written.sum(0), label=f"what five neurons of layer {layer} write", **(probe.STYLES[0] | {"ls": ""}), ms=3.5)
axis.axhline(0, color="black", lw=0.6)
probe.dress(axis, f"Layer {layer}", {"fontsize": 8}, xlabel="dimension", ylabel="x_j", xlim=(-1, C))
show(figure, "04_written")

# %% [markdown]
# The dots follow the bars: what five neurons of one layer write has the shape of the whole state, its
# largest dimension included.

# %%
cos = F.cosine_similarity(written.sum(0), state, dim=0).item()
print(f"cosine of their write and the state {cos:.2f}; a random direction would have {(2 / (math.pi * C)) ** 0.5:.2f}")
print(f"kurtosis of their columns {tails[ids].mean():.1f}, of all columns {tails.mean():.1f}")
assert cos > 0.7, "the five neurons write something else than the state"
assert tails[ids].mean() > 1.15 * tails.mean(), "their columns are no more heavy-tailed than others"

# %% [markdown]
# Look also at the table: the strongest neurons of different layers often write into the same dimension.
# No layer has to do it all. And the size of the effect is not the paper's: their single dimension dwarfs
# all others, ours is the first among several.
#
# ## Long
#
# The plainest number for the disparity is the length of the first state over that of the median token,
# at the entrance of every layer:
#
# $$\text{norm ratio} = \frac{\lVert x_0 \rVert}{\mathrm{median}_{t>0}\,\lVert x_t \rVert}$$

# %%
kinds = {"softmax": (model, x), "headnorm": (trained["headnorm"], x), "softmax, untrained": (untrained, x),
         "micro-softmax": (trained["micro-softmax"], windows("random symbols")[0])}
found = {name: probe.links(*pair) for name, pair in kinds.items()}
norm = {name: f["norm_ratio"][0] for name, f in found.items()}  # (L + 1,)
figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
for style, (name, y) in zip(probe.STYLES, norm.items()):
    axis.plot(y, label=name, lw=1.2, ms=5, **style)
probe.dress(axis, "Length of the first state", {"fontsize": 8}, xlabel="state (what layer i reads; the last one is the end)",
            ylabel="length / median token", ylim=(0, None))
show(figure, "04_norm")

# %% [markdown]
# With softmax the first state becomes several times as long as others and stays so. Before training it
# is as long as any, and headnorm makes less of it.

# %%
inner = {name: y[1:-1] for name, y in norm.items()}  # the states that an attention reads, behind the first layer
for name, y in inner.items():
    print(f"{name:20} largest norm ratio of a state that a later layer reads {y.max():.2f}")
assert inner["softmax"].max() > 3 > 2 * inner["softmax, untrained"].max(), "the first state is not longer than others"
assert inner["headnorm"].max() < 0.9 * inner["softmax"].max(), "headnorm leaves the length as it is"
assert inner["micro-softmax"].max() < inner["softmax"].max() / 2, "the ordinary first token would have the disparity too"

# %% [markdown]
# The last line deserves a pause. `micro-softmax` has a sink (chapter 00) and neurons that answer to its
# first token (chapter 03), but *no state that a later layer reads is much longer than others*. A sink
# does not need this link.
#
# ## Dominated
#
# RMSNorm divides by the length, so attention never sees it. What passes is the *shape*. The paper's
# number is
#
# $$\mathrm{DomRatio}(x) = \frac{\max_j |x_j|}{\frac1C\sum_j |x_j|}$$
#
# after RMSNorm. It lies between 1 and C: a state of one dimension alone reaches C, which is 64 here and
# 4096 in Llama-2-7B. For C Gaussian numbers the mean of $|x_j|$ is $\sqrt{2/\pi} = 0.80$ and the largest
# lies near $\sqrt{2 \ln C}$, which gives the null $\sqrt{2\ln C}/0.80$. It is a little too high at small
# C, so we draw Gaussian states as well, and get the spread with them.

# %%
first, rest = found["softmax"]["dom_first"][0], found["softmax"]["dom_rest"][0]
drawn = probe.dominance(torch.randn(4000, C, generator=torch.Generator().manual_seed(0)))
high = drawn.quantile(0.975).item()
place = norm["softmax"][1:-1].argmax().item() + 1  # the state where the first token is longest
p = record(model, x, [f"{place}.resid_pre"])[1][f"{place}.resid_pre"]
size = model.layers[place].input_layernorm(p).detach().abs().sort(-1, descending=True).values
noise = torch.randn(4000, C, generator=torch.Generator().manual_seed(0)).abs().sort(-1, descending=True).values

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
curves = {"token 0": first, "other tokens": rest, "token 0, untrained": found["softmax, untrained"]["dom_first"][0],
          "token 0, headnorm": found["headnorm"]["dom_first"][0]}
left.axhspan(drawn.quantile(0.025).item(), high, color="0.9", label="95 % of Gaussian vectors")
for style, (name, y) in zip(probe.STYLES, curves.items()):
    left.plot(y, label=name, lw=1.2, ms=5, **style)
probe.dress(left, "DomRatio by state", {"fontsize": 8, "loc": "upper left", "ncols": 2}, ylim=(0, 1.4 * first.max().item()),
            xlabel="state (what layer i reads; last: the end)", ylabel="max |x_j| / mean |x_j|")
probe.draw_dimensions(right, {"token 0": size[:, 0].mean(0), "other tokens": size[:, 1:].mean((0, 1)),
                              "Gaussian vector": noise.mean(0)}, f"Dimension profile, what layer {place} reads")
show(figure, "04_dominance")

# %% [markdown]
# Left: how far the first token rises above the grey band and above other tokens. Right: the same state,
# dimension by dimension; a steeper curve has its length in fewer dimensions.

# %%
size = size.double()
dims = lambda s: probe.energy_dimensions(s).mean().item()
beside(("model", "Llama-2-7B", f"softmax, what layer {place} reads"),
       ("DomRatio of token 0", "262.9", first[place].item()),
       ("  other tokens", "not reported", rest[place].item()),
       ("  formula for a Gaussian vector", f"{probe.gaussian_dominance(4096):.1f} (ours)", probe.gaussian_dominance(C)),
       ("  ceiling C", "4096", str(C)),
       ("largest |x_j| / median |x_j|", "not reported", probe.max_over_median(size[:, 0]).mean().item()),
       ("  other tokens", "not reported", probe.max_over_median(size[:, 1:]).mean().item()),
       ("dimensions with 90 % of the length squared", "not reported", dims(size[:, 0])),
       ("  other tokens", "not reported", dims(size[:, 1:])),
       ("  Gaussian vectors", "not reported", dims(noise)),
       ("DomRatio of token 0, mean of layers", "82.7 at 152M", first[1:].mean().item()),
       ("  with headnorm", "33.7 at 152M", found["headnorm"]["dom_first"][0, 1:].mean().item()))

# %%
print(f"token 0 over other tokens, DomRatio {first[place] / rest[place]:.2f}; above 97.5 % of Gaussian vectors: {first[place] > high}")
assert first[1:].mean() > 1.05 * rest[1:].mean(), "the first token is no more dominated than others"
assert dims(size[:, 0]) < 0.9 * dims(size[:, 1:]) and dims(size[:, 0]) < 0.9 * dims(noise), "its length is spread as widely"

# %% [markdown]
# Be careful with this number: it depends on the seed. In some trainings the DomRatio of the first token
# is several times that of other tokens, in others barely more, inside the grey band (the README's tables
# have five seeds). The direction is the paper's, the size is not, and with 64 dimensions it cannot be:
# 262.9 is beyond the ceiling. At this scale the *length* is the sturdy part of the disparity.
#
# ## One token can flatten a whole window
#
# Why call it a disparity at all, rather than a detail of one token? Take the states of all tokens as the
# rows of a matrix with singular values $s_i$, and $p_i = s_i / \sum_j s_j$. The *effective rank* (Roy
# and Vetterli 2007) is $\exp(-\sum_i p_i \ln p_i)$: how many directions the states use.

# %%
for name, f in list(found.items())[:3]:
    print(f"{name:20} effective rank, mean of states: {f['erank_with'][0, 1:].mean():.1f} with token 0, "
          f"{f['erank_without'][0, 1:].mean():.1f} without")
lost = {name: (f["erank_without"] / f["erank_with"])[0, 1:].mean().item() for name, f in found.items()}
assert lost["softmax"] > 1.1 > lost["softmax, untrained"], "the first token does not hide the others"
assert lost["softmax"] > lost["headnorm"] > lost["softmax, untrained"], "headnorm hides as much"
beside(("effective rank, softmax", "343.7 at 152M", found["softmax"]["erank_with"][0, 1:].mean().item()),
       ("effective rank, headnorm", "446.0 at 152M", found["headnorm"]["erank_with"][0, 1:].mean().item()))

# %% [markdown]
# Leave out one token of 64, and the others turn out to use more directions than the whole window seemed
# to. A gain in effective rank, as the paper reports it for headnorm, is therefore partly a statement
# about token 0.
#
# ## Do the neurons make it? A first cut
#
# So far everything was bookkeeping, and correlation. The test is to silence the neurons and look again:
# the five strongest at token 0 in each layer answer 0, at every token. The control silences five others
# of each layer with about the same weight score. If any five neurons of that size would do, the control
# shows it.

# %%
seen = probe.observe(model, x)
like = [probe.similar_neurons(score, ids) for score, ids in zip(seen["scores"], seen["neurons"])]
silence = lambda chosen: compose(*(probe.ablate_neurons(model.cfg, i, ids) for i, ids in enumerate(chosen)))
runs = {"untouched": found["softmax"], "silenced": probe.links(model, x, silence(seen["neurons"])),
        "control": probe.links(model, x, silence(like))}
length = {name: f["norm_ratio"][0, 1:-1].max().item() for name, f in runs.items()}
shape = {name: f["dom_first"][0, 1:].max().item() for name, f in runs.items()}
gone = lambda of, name, null: (of["untouched"] - of[name]) / (of["untouched"] - null)
for what, of, null in (("norm ratio", length, 1.0), ("DomRatio", shape, probe.gaussian_dominance(C))):
    print(f"largest {what:10} " + ", ".join(f"{name} {v:.2f}" for name, v in of.items())
          + f"; of what is above {null:.1f}: {gone(of, 'silenced', null):.0%} gone, control {gone(of, 'control', null):.0%}")
assert gone(length, "silenced", 1.0) > 0.8, "the length is there without these neurons"
assert abs(gone(length, "control", 1.0)) < 0.2, "any neurons of that weight would do"
assert shape["silenced"] < shape["untouched"] and abs(shape["control"] / shape["untouched"] - 1) < 0.1, "the shape does not move"

# %% [markdown]
# The length is gone entirely: these neurons make it, and others of equal weight do not. The shape gives
# way less, and how much depends on the seed: about half of what is above a Gaussian's, give or take a
# quarter (README, cut matrix). What is left is a short state with dominant dimensions of its own. Does
# the *sink* go with the length? That is chapter 06.
#
# ## What would falsify this
#
# If silencing neurons of like weight shortened the first state as well, five neurons a layer would be a
# story about any five. If token 30 owed as much of its state to its own five neurons, few authors would
# be the rule. If the untrained model had such a state, it would be architecture. All three are asserted
# above. The word *dominated* stands on weaker feet: what would decide it is a wider model, where the
# ceiling is far away.
#
# ## Exercises
#
# **1.** One dimension of a state has size s, all C - 1 others have size 1. How large must s be for a
# DomRatio of `ratio`? Give infinity where no s is large enough. Then try Llama's 262.9 with C = 4096,
# and with C = 64.


# %%
def spike_for(ratio, width):
    ...


def check_spike_for(answer):
    got = answer(1.0, 64)
    assert got is not None, "Return s. Begin with: ratio = s / mean, and the mean is (s + C - 1) / C."
    assert abs(got - 1) < 1e-6, "All dimensions alike have DomRatio 1."
    for ratio, width in ((10.0, 64), (3.5, 8), (262.9, 4096)):
        state = torch.ones(width, dtype=torch.float64)
        state[-1] = answer(ratio, width)
        assert abs(probe.dominance(state).item() - ratio) < 0.01, f"a state with this s has not DomRatio {ratio} at C = {width}"
    assert answer(64.0, 64) == answer(262.9, 64) == math.inf, "The DomRatio never reaches C while the others are not 0."


attempt(check_spike_for, spike_for)

# %% [markdown]
# **2.** Write the bookkeeping of this chapter: `parts` (P, C) are vectors whose sum is the state. Give
# the share of each, (P,).


# %%
def shares_of(parts):
    ...


def check_shares_of(answer):
    got = answer(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert got is not None, "Return a tensor (P,) that adds up to 1."
    assert torch.allclose(got, torch.tensor([9 / 25, 16 / 25])), "Parts at right angles share by their squared lengths."
    got = answer(torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))
    assert torch.allclose(got, torch.tensor([2.0, -1.0])), "A part that points against the state has a negative share."
    parts = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    got = answer(parts)
    assert got.shape == (5,) and abs(got.sum().item() - 1) < 1e-5, "They must add up to 1 for any parts."


attempt(check_shares_of, shares_of)

# %% [markdown]
# **3.** A DomRatio of 5 is nothing in 4096 dimensions. Give the *surprise* of the state `x` (C,): how
# many standard deviations its DomRatio lies above the mean of Gaussian vectors of the same width. Draw
# at least 1000 of them.


# %%
def surprise(x):
    ...


def check_surprise(answer):
    g = torch.Generator().manual_seed(2)
    got = answer(torch.randn(64, generator=g))
    assert got is not None, "Return a number: (DomRatio - mean) / std, over drawn Gaussian vectors."
    typical = [float(answer(torch.randn(64, generator=g))) for _ in range(30)]
    assert abs(sum(typical) / 30) < 0.8 and max(typical) < 6, "Gaussian states should surprise by about 0 on average."
    spike = torch.randn(64, generator=g)
    spike[7] = 40.0
    assert float(answer(spike)) > 10, "One dimension forty times the size of the others is a surprise."
    assert abs(float(answer(spike)) - float(answer(5 * spike))) < 4, "DomRatio does not depend on the length, nor should this."
    narrow, wide = torch.ones(16), torch.ones(1024)
    narrow[0] = wide[0] = 3.8
    assert float(answer(narrow)) > float(answer(wide)), "Draw vectors as wide as x: a wide Gaussian has a larger DomRatio."


attempt(check_surprise, surprise)
