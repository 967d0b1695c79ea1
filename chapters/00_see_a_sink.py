# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 00 · See a sink
#
# **Claim.** A trained decoder sends much of its attention to the first token of the window, whatever
# comes later; the same decoder before training does not.
#
# **You need** PyTorch and a rough idea of attention. **Run time**: seconds, once two models are
# trained; four minutes on 2 cores if they are not. They stay in `out/`, and later chapters use them too.
#
# Letters in shapes, in all chapters: B windows in a batch, T position, H head, D head width, C model
# width, F neurons of an MLP, L layer.

# %%
import sys

sys.path.append("chapters")  # when this was started one folder up
import torch
import lesson
from lesson import attempt, beside, models, plt, show, windows
from model import GPT, record
import probe

# %% [markdown]
# ## Two small models
#
# `softmax` has read the Python standard library, byte by byte, and every window it saw began with
# the same token, `<|bos|>`. `micro-softmax` has never seen `<|bos|>`. It learned a game: 24 symbols,
# a random passage, and then the same passage over and over. Its first token is any of the symbols.
# Both are Llama-style decoders with about 0.2 to 0.3 million weights.

# %%
trained = models("softmax", "micro-softmax")
model = trained["softmax"]
untrained = GPT(model.cfg, seed=0)  # the weights that training began with
x, y = windows("bos")
print("windows (B, T):", tuple(x.shape))
print(repr(lesson.data.load("stdlib", vocab_size=257).decode(x[0])))

# %% [markdown]
# ## Where does a head look?
#
# A head compares its query at position $t$ with the keys of all positions $s \le t$ and turns the
# result into weights that add up to 1:
#
# $$A_{ts} = \frac{\exp(q_t \cdot k_s / \sqrt D)}{\sum_{s' \le t} \exp(q_t \cdot k_{s'} / \sqrt D)}$$
#
# In `model.py` this tensor is called `pattern`, shape (B, H, T, T). `record` runs the model and hands
# over any activation by its name.

# %%
names = [f"{i}.pattern" for i in range(model.cfg.num_hidden_layers)]
after = torch.stack(list(record(model, x, names)[1].values()))  # (L, B, H, T, T)
before = torch.stack(list(record(untrained, x, names)[1].values()))
print("every row adds up to", after.sum(-1).mean().item())

# %% [markdown]
# ## How much is a sink?
#
# The usual measure (Gu et al., ICLR 2025) is the mean weight that all queries give to the key at 0:
#
# $$\alpha_0 = \frac1T \sum_{t} A_{t0}$$
#
# and a head *has a sink* when $\alpha_0 > 0.3$. Attention that treats all keys alike would reach
# $\frac1T \sum_t \frac1{t+1}$, which is `uniform_alpha`.

# %%
alpha = probe.sink_scores(after.flatten(0, 1)).unflatten(0, after.shape[:2]).mean(1)  # (L, H)
alpha_before = probe.sink_scores(before.flatten(0, 1)).unflatten(0, before.shape[:2]).mean(1)
chance = probe.uniform_alpha(x.shape[1])
for i, row in enumerate(alpha):
    print(f"layer {i}:", "  ".join(f"head {h} {a:.2f}" for h, a in enumerate(row.tolist())))
print(f"strongest head before training {alpha_before.max():.2f}, uniform attention {chance:.2f}")

# %%
layer, head = divmod(alpha.argmax().item(), alpha.shape[1])
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axis, pattern, title in zip(axes, (before, after), ("before training", "after training")):
    image = probe.draw_attention(axis, pattern[layer, :, head].mean(0), f"layer {layer}, head {head}, {title}")
figure.colorbar(image, ax=axes, label="attention, mean over windows")
show(figure, "00_maps")

# %% [markdown]
# The dark column on the left of the second map is the sink: late queries still look at position 0.

# %%
beside(("model", "Llama-2-7B and Llama-3", f"{sum(p.numel() for p in model.parameters()):,} weights"),
       ("sink from layer", "2", str((alpha.amax(1) > probe.EPS).nonzero()[0].item())),
       ("strongest head, attention to token 0", "not reported", alpha.max().item()),
       ("the same before training", "not reported", alpha_before.max().item()))
assert alpha.max() > probe.EPS, "no head of the trained model has a sink"
assert alpha.max() > 2.5 * alpha_before.max(), "training made no difference"

# %% [markdown]
# ## It looks, but it takes nothing
#
# Why would training want this? The weights of a row must add up to 1, so a head that has nothing to
# say has to put them somewhere. A value of length zero is the place: weight on it adds nothing to the
# output. *Value drain* is the length of $v_0$ over the mean length of all values; below 0.2 looking at
# token 0 is close to looking away.

# %%
values = record(model, x, [f"{layer}.v"])[1][f"{layer}.v"]  # (B, T, H, D)
drain = probe.value_drain(values)[:, head].mean().item()
print(f"value drain of the strongest head: {drain:.2f}")
assert drain < 0.5, "the value of the first token is as long as the others"

# %% [markdown]
# ## A first token that is like any other
#
# `<|bos|>` has an embedding of its own, so the model can know it by name. The puzzle of the paper is
# harder: real models put sinks on the first token *even when it is an ordinary one*. The second model
# has this puzzle. On random symbols there is nothing to copy, so every query rests.

# %%
micro = trained["micro-softmax"]
rest, _ = windows("random symbols")
micro_chain = probe.chain(micro, rest)
micro_before = probe.chain(GPT(micro.cfg, seed=0), rest)
beside(("first token", "any", "any of 24 symbols"),
       ("strongest head, attention to token 0", "not reported", micro_chain["sink_alpha_max"]),
       ("the same before training", "not reported", micro_before["sink_alpha_max"]))
assert micro_chain["sink_alpha_later"] > 2 * micro_before["sink_alpha_later"], "no sink on ordinary tokens"

# %% [markdown]
# It is weaker than the first, and it is the more interesting one: nothing but its *place* tells this
# token apart. Chapters 01 to 05 follow how a network can find a place.
#
# ## The birth of a sink
#
# `train.py` measures every link of the chain while it trains and keeps the numbers in `log.jsonl`.

# %%
figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
probe.draw_birth(axis, probe.read_log("out/softmax"), "links_bos", "softmax, windows after <|bos|>")
show(figure, "00_birth")

# %% [markdown]
# Each line is one link, from its least to its greatest value during training; the chapters go through
# them one by one.
#
# ## What would falsify this
#
# If the untrained model had the same dark column, the sink would come from the causal mask alone. If a
# model trained on windows *without* any fixed first token never preferred position 0, sinks would be
# about `<|bos|>` and not about place. Both are asserted above.
#
# ## Exercises
#
# Replace `...` by your answer and run the cell again.
#
# **1.** Write the sink score of one attention map. `pattern` is (T, T), rows are queries; give the score
# of key `k`, averaged over the queries that can see it.


# %%
def sink_score(pattern, k):
    ...


def check_sink_score(answer):
    pattern = torch.tril(torch.ones(4, 4)) / torch.arange(1, 5)[:, None]  # uniform attention
    got = answer(pattern, 0)
    assert got is not None, "Return a number: the mean of column k over the queries t >= k."
    assert abs(float(got) - (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4) < 1e-6, "For k = 0 take the mean of the whole first column."
    assert abs(float(answer(pattern, 2)) - (1 / 3 + 1 / 4) / 2) < 1e-6, \
        "Queries before k cannot see it: leave them out of the mean, or a late key could never be a sink."


attempt(check_sink_score, sink_score)

# %% [markdown]
# **2.** A sink of 0.3 means little in a short window: uniform attention over T = 4 tokens gives more.
# From which T on is the score of uniform attention, $\frac1T\sum_{t<T}\frac1{t+1}$, below `level`?


# %%
def shortest_window(level):
    ...


def check_shortest_window(answer):
    got = answer(0.5)
    assert got is not None, "Return the least T whose uniform score is below `level`."
    assert got == 5, "For 0.5 it is 5: (1 + 1/2 + 1/3 + 1/4) / 4 = 0.52 is still above, one more token is below."
    assert answer(0.3) == 10 and answer(0.075) == 64, "Add up 1 / (t + 1) with t from 0, and divide by T."


attempt(check_shortest_window, shortest_window)
