# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 00 · See a sink, and take it away
#
# **Claim.** In a real Llama most heads *rest* on the first token of a text: they give
# it a large part of their attention, whatever it is. Hide it with a sliding window and
# the model fails; give this one token back and the loss almost recovers.
#
# **You learn** to see an attention sink, to measure it, and to take it away beside a
# control. **You need** PyTorch and a rough idea of attention. **Run time**: ten to
# forty seconds, after a download of 93 MB. The last part uses two small models; if
# they are not in `out/` yet, it trains them first, a few minutes on 2 cores.
#
# Letters in shapes, in all chapters: N windows (texts of T tokens), T positions, H
# heads (K of keys and values), D head width, C model width, F neurons of an MLP, L
# layers.

# %%
from lesson import TASK, beside, check, english, log, look, models, plt
from lesson import random_tokens, real, show, untrained, windows

import torch
import torch.nn.functional as F

import probe
from chapters import figures
from model import record

torch.set_grad_enabled(False)  # we only look
model, encoding = real()
L, H = model.cfg.num_hidden_layers, model.cfg.num_attention_heads
print(f"SmolLM2-135M: {L} layers, {H} heads a layer")

# %% [markdown]
# SmolLM2-135M-Instruct (here *SmolLM2*) is a Llama like the large ones, only smaller,
# and trained further to follow instructions. Our copy's weights were rounded, most to 4
# bits. It puts no special token in front of a text, so its first token is an ordinary
# one.
#
# ## Your own words
#
# Put your own sentence here. Each row of a map is a word that reads, each column a word
# that is looked at; the first word's column is orange. On the right, the five neurons
# of every layer that write most at the first word are silent there; the output calls
# them *super neurons* (chapter 03).

# %%
look("Dear students, today we look inside a language model and ask why its heads look "
     "at the first word", name="00_words")

# %% [markdown]
# Without these neurons no head rests on the first word any more. The second word takes
# the sink over: its neurons are not silent.

# %% [markdown]
# ## Where does a head look?
#
# A head compares its query at position $t$ with the keys of all positions $s \le t$ and
# turns the result into weights that add up to 1:
#
# $$A_{ts} = \frac{\exp(q_t \cdot k_s / \sqrt D)}
#   {\sum_{s' \le t} \exp(q_t \cdot k_{s'} / \sqrt D)}$$
#
# In `model.py` this tensor is called `pattern`, shape (N, H, T, T). `record` runs the
# model and hands over any activation by its name. We ask for it on English that the
# model has never seen, and on tokens drawn at random. If heads look at the first token
# even of random tokens, its meaning cannot be the reason.
#
# A chapter reads few windows of SmolLM2, mostly 4 or 8, and the README 8 or 16 batches
# of 8. So their numbers differ, a variance by a factor of up to 1.6.

# %%
texts = {"English": english()[0], "random tokens": random_tokens()[0]}
names = [f"{i}.pattern" for i in range(L)]
values = [f"{i}.v" for i in range(L)]
patterns = {}
for kind, x in texts.items():
    start = encoding.decode(x[0, :12].tolist())
    print(f"{kind} {tuple(x.shape)}: {start!r}")
    _, kept = record(model, x, names + values)
    patterns[kind] = torch.stack([kept[name] for name in names])  # (L, N, H, T, T)

# %% [markdown]
# ## How much is a sink?
#
# The usual measure (Gu et al. 2025), the *sink score*, is the mean weight that all
# queries give to the first key. A head *has a sink* when its mean score over windows is
# above 0.3:
#
# $$\alpha_0 = \frac1T \sum_{t} A_{t0}$$
#
# Attention that treats all keys alike would reach $\frac1T \sum_t \frac1{t+1}$.

# %%
sinks = {}
for kind, pattern in patterns.items():
    to_first = pattern[..., 0]  # (L, N, H, T): what each query gives to key 0
    scores = to_first.mean(-1)
    sinks[kind] = scores.mean(1)  # (L, H): the mean over windows
library = probe.sink_score(patterns["English"][12], 0).mean(0)
assert torch.allclose(sinks["English"][12], library, atol=1e-5)

uniform = probe.uniform_sink(texts["English"].shape[1])
for kind, sink in sinks.items():
    share = probe.has_sink(sink[12:]).float().mean()
    print(f"{kind}: strongest head {sink.max():.2f} (uniform attention {uniform:.2f}), "
          f"{share:.0%} of the heads from layer 12 on have a sink")
    assert sink.max() > 0.7, "no head rests on token 0"
    assert share > 0.6, "most heads should rest on token 0"

# %%
strongest = sinks["random tokens"].argmax().item()  # counts through all heads
layer, head = divmod(strongest, H)
noise = patterns["random tokens"].mean(1)  # (L, H, T, T): the mean over windows
words = patterns["English"].mean(1)
maps = {"layer 0, random": noise[0, 0],
        f"layer {layer}, random": noise[layer, head],
        f"layer {layer}, English": words[layer, head]}
title = "The first layer looks around, a later head rests on token 0"
figure = figures.maps(maps, ((0,), (0,), (0,)), title)
show(figure, "00_maps", "Three attention maps. In layer 0 attention is spread over all "
     "earlier keys; in the later head nearly all of it is in column 0.")

# %% [markdown]
# Every row is a query. (The column at key 1 is from two of the eight windows, where
# heads rest on token 1 as well.) Now all heads, one cell each.

# %%
figure, axes = plt.subplots(2, 2, figsize=(8.8, 4.6), width_ratios=[24, 1])
for axis, (kind, sink) in zip(axes[:, 0], sinks.items()):
    axis.imshow(figures.shade(sink.T, figures.ACCENT), aspect="auto")
    axis.grid(False)
    title = f"{kind}: attention of each head to the first token"
    figures.dress(axis, title, ylabel="head")
axes[1, 0].set_xlabel("layer")
axes[0, 1].axis("off")
figures.shades(axes[1, 1], [figures.ACCENT])
show(figure, "00_heads", "A cell for every head of every layer. Layers 3 to 9 and 12 "
     "to 29 are deep orange, on random tokens layer 2 half so; 0, 1, 10, 11 are pale.")

# %% [markdown]
# Two stretches of layers have sinks. Between them layer 11 has none, and layer 10
# hardly any. Chapter 03 shows what switches the sinks off and on again.
#
# ## The strongest head looks, and takes next to nothing
#
# The weights of a row must add up to 1, so a head that has nothing to add must still
# put its attention somewhere. Attention to a value of length zero adds nothing. *Value
# drain* is the length of $v_0$, the value of the first token, over the mean length.

# %%
v = kept[f"{layer}.v"]  # (N, T, K, D), of the random tokens
length = v.norm(dim=-1)
ratio = length[:, 0] / length.mean(1)
drain = ratio.mean(0)  # (K,): one for each key/value head
assert torch.allclose(drain, probe.value_drain(v, 0), atol=1e-5)
group = H // model.cfg.num_key_value_heads  # so many heads share a value
own = drain[head // group]
print(f"layer {layer}, head {head} reads a value of {own:.2f} of the mean")
assert own < 0.25, "the value of the first token is as long as the others"

# %% [markdown]
# ## Take it away
#
# Does the model need the first token, or could it rest anywhere? Give it a *sliding
# window*: each query sees the last 32 tokens and no others. `mask` is True where a
# query may look. One mask gives token 0 back. The *control* gives token 16 back: if any
# extra token helps, this must help as well.

# %%
def window_mask(T, width, keep=()):
    """(T, T): each query sees the last `width` tokens, and the tokens in `keep`."""
    t = torch.arange(T)
    distance = t[:, None] - t  # from query to key, (T, T)
    mask = (distance >= 0) & (distance < width)
    for key in keep:
        mask[key:, key] = True
    return mask


T, width = 128, 32
x, y = english(T=T)
masks = {"all tokens": window_mask(T, T),
         "last 32": window_mask(T, width),
         "last 32 and token 0": window_mask(T, width, [0]),
         "last 32 and token 16": window_mask(T, width, [16])}
losses = {}
for name, mask in masks.items():
    logits, _ = model(x, mask=mask)
    each = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")  # (N, T)
    losses[name] = each.mean(0)

# %%
figure, axis = plt.subplots(figsize=(8.8, 3.2))
middles = range(8, T, 16)  # of 16 positions each
curves = {}
for name, loss in losses.items():
    curves[name] = loss.view(-1, 16).mean(1)
figures.lines(axis, curves, x=middles, hot=["last 32 and token 0"])
axis.axvline(width, color="black", lw=0.9, ls=":")
title = "Hide the first token and the model fails; show it and the loss hardly rises"
figures.dress(axis, title, {}, xlabel="position (dotted: token 0 goes out of sight)",
              ylabel="loss on English, nats")
axis.set_ylim(2.5, 5.9)
show(figure, "00_window", "Loss by position. With the last 32 tokens alone it rises by "
     "more than a nat when token 0 is out of sight, and stays low if that is kept.")

# %%
extra = {}
whole = losses["all tokens"][width:].mean()
for name, loss in losses.items():
    late = loss[width:].mean()
    extra[name] = late - whole
    print(f"{name:22} {late:.2f} nats, {extra[name]:+.2f}")
assert extra["last 32"] > 1, "the window alone does not hurt"
assert extra["last 32 and token 0"] < 0.35 * extra["last 32"], "token 0 mends nothing"
assert extra["last 32 and token 16"] > 0.7 * extra["last 32"], "any token would do"

# %% [markdown]
# One old token cannot be worth that much as *text*. Its worth is that heads rest on it.
# StreamingLLM (Xiao et al. 2023) uses this: keep a window of keys and values, and the
# first four tokens. Chapter 08 lets the model write that way.
#
# ## In a small model that you train
#
# A finished model cannot show how a sink is *born*. Two small models can.
#
# - `softmax` is what `python train.py` trains. Its tokens are letters drawn at random,
#   so that the first one is as ordinary as all others. At a few tokens its heads must
#   look for something; at all others there is nothing to find, and they must rest
#   (chapter 07).
# - `text` has read the Python standard library byte by byte, and each of its windows
#   began with one special token, `<|bos|>`.

# %%
small = models("softmax", "text")
cases = {"softmax, any first letter": ("softmax", "rest"),
         "text, after <|bos|>": ("text", "bos"),
         "text, any first byte": ("text", "text")}
for title, (name, kind) in cases.items():
    x, _ = windows(kind)
    queries = TASK.resting(x) if kind == "rest" else None  # those that must rest
    before = probe.chain(untrained(name), x, queries=queries)["sink"]
    trained = probe.chain(small[name], x, queries=queries)
    after, rate = trained["sink"], trained["sink_rate"]
    print(f"{title:26} strongest head {before:.2f} before training, "
          f"{after:.2f} after; {rate:.0%} of heads have a sink")
    if kind == "text":
        assert after < probe.SINK, "the text model has a sink on any first byte"
    else:
        assert after > probe.SINK, "no sink was born"
        assert before < probe.SINK, "the sink was there before training"

# %% [markdown]
# The text model rests on `<|bos|>` and not on other first tokens: to be the first is
# not enough, it must be this very token. In SmolLM2 and in `softmax` any token can come
# first, and *which* token it is does not tell it apart. How they find it is the
# question of chapters 01 to 05.
#
# The story of the paper is a chain, and `train.py` measures every link while it trains.
# The figure shows three, on other windows than above, each from its least to its
# greatest value: attention to the first token (the sink), the length of its value over
# the mean, and the length of its *state*, the vector that the layers pass on, over the
# median. Does the state grow before the sink, as the story says?

# %%
rows = log("softmax")
links = {"sink": "sink", "value": "drain", "length of the state": "norm_ratio"}
figure = figures.birth(rows, links, "links_rest",
                       "The long state comes after the sink")
show(figure, "00_birth", "Three lines over the steps of training: the value of the "
     "first token begins to shrink, then the sink rises; the state grows long only "
     "afterwards.")
half, steps = {}, [row["step"] for row in rows]
for name, key in links.items():
    values = [row["links_rest"][key] for row in rows]
    whole = values[-1] - values[0]
    past_half = [(value - values[0]) / whole >= 0.5 for value in values]
    half[name] = steps[past_half.index(True)]
    print(f"{name}: half of its way at step {half[name]}")
assert half["sink"] < half["length of the state"], "the long state comes first"

# %% [markdown]
# Here the long state comes *after* the sink, so it cannot be what this sink was born
# from. Five seeds agree (`tests/results/claims.md`). The finished SmolLM2 needs the
# neurons that write its long state, and its direction (chapter 06); how *its* sink was
# born we have not seen.
#
# ## Beside the paper

# %%
with_sink = probe.has_sink(sinks["English"]).any(1)  # (L,)
earliest = with_sink.nonzero()[0].item()
at_random = probe.has_sink(sinks["random tokens"]).any(1).nonzero()[0].item()
beside(("model", "Llama-2-7B, Llama-3", "SmolLM2-135M"),
       ("sink from layer", "2", f"{earliest} in English, {at_random} on random tokens"),
       ("depends on the token", "no", "no: random tokens have it too"))

# %% [markdown]
# ## What would falsify this
#
# If the small models had a sink before training, the causal mask alone would make it.
# If sinks came on text and not on random tokens, words would make them. If token 16 had
# helped as much as token 0, any extra token would do. The assertions above exclude all
# three.
#
# **You can now** say how much a head rests on a token, hide a token with a mask, and
# tell what a control rules out.
#
# ## Exercises
#
# Replace `...` by your answer and run the cell again.
#
# **1.** Write the sink score of one attention map. `pattern` is (T, T), rows are
# queries; give the score of key `k`, averaged over the queries that can see it.


# %%
def sink_score(pattern, k):
    ...


check("00.sink_score", sink_score)

# %% [markdown]
# **2.** An experiment: hide token `key` from every query but its own. Build this mask,
# (T, T), True where a query may look. All other keys up to the query stay in sight.
# (The model hides later keys in any case.)


# %%
def hidden(T, key):
    ...


check("00.hidden", hidden)

# %% [markdown]
# **3.** Predict before you run the next cell: hide token 0 from all others, in English.
# The heads that rested there must look elsewhere. At which position will they rest now?
# Give a number from 0 to 63, or "nowhere" if you think that their attention will spread
# over many tokens.

# %%
prediction = ...
mask = hidden(64, 0)
right = getattr(mask, "shape", None) == (64, 64) and not mask[1:, 0].any()
if not right:
    print("prediction: not yet. Exercise 2 first, whose mask it needs")
elif prediction is not ...:
    x, y = english()
    _, seen = record(model, x, names[12:], mask=mask)
    moved = torch.cat(list(seen.values()))
    print("attention to a key, mean over the heads from layer 12 on:")
    for key in (0, 1, 2, 16):
        print(f"token {key:2}: {probe.sink_score(moved, key).mean():.2f}")
    _, before = model(x, y)
    _, after = model(x, y, mask=mask)
    print(f"loss {before:.2f} -> {after:.2f}")
    check("00.prediction", prediction)
