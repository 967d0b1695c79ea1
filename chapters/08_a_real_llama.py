# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 08 · A real Llama
#
# **Claim.** The shape of a Llama alone makes the first token's variance an outlier, but it takes
# training to turn that into a sink.
#
# **You need** chapters 00 to 05. **Run time**: seconds with the random model, about a minute with a
# checkpoint of 135 million weights.

# %%
import os
import sys
from pathlib import Path

folder = os.environ.get("LLAMA") or (sys.argv[1] if sys.argv[0].endswith("08_a_real_llama.py") and sys.argv[1:] else None)
folder = Path(folder).resolve() if folder else None  # now, because lesson works from the repository

sys.path.append("chapters")  # when this was started one folder up
import json
import tempfile

import torch
from lesson import attempt, beside, plt, show
from model import GPT, HF_SIZES, Config, record
import probe

# %% [markdown]
# ## Which model?
#
# This chapter looks at whatever Llama you have. Give it a folder in the `LlamaForCausalLM` format (Llama
# 2, 3, 3.1, 3.2, SmolLM2, TinyLlama):
#
# ```sh
# pip install safetensors
# LLAMA=path/to/folder python chapters/08_a_real_llama.py
# python chapters/08_a_real_llama.py path/to/folder               # the same
# ```
#
# In a notebook, set the environment variable `LLAMA` before you start Jupyter. The smallest good one is
# SmolLM2-135M. It is not gated: download `config.json` and `model.safetensors` of
# `HuggingFaceTB/SmolLM2-135M` into one folder, by hand or with the hub's own tool. Nothing in this repository
# downloads it for you.
#
# Without a folder, the same cells run on a Llama-shaped model with **random weights**. It has learned
# nothing. It shows what the *structure* does, and it cannot show a sink. Every table below says which of
# the two you are looking at.

# %%
REAL = folder is not None
if REAL:
    model, N = GPT.from_llama(folder).eval(), 8
else:
    model, N = GPT(Config(vocab_size=1000, hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=8,
                          num_key_value_heads=2, head_dim=16, rope_theta=500000.0), seed=0), 32
cfg = model.cfg
H, K, D = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
WHO = f"{folder.name}, a trained checkpoint" if REAL else "random weights, never trained"
print(f"{WHO}: {sum(p.numel() for p in model.parameters()):,} weights, {cfg.num_hidden_layers} layers")

# %% [markdown]
# ## The shape
#
# The models of chapters 00 to 07 are Llamas already: RMSNorm, rotary positions, SwiGLU, no biases. Two
# things are new in larger ones. Rotary angles use a larger base $\theta$, and keys and values are *grouped*:
# $H$ query heads share $K$ key/value heads (GQA), so that query head $h$ reads
#
# $$g(h) = \left\lfloor \frac{h}{H / K} \right\rfloor$$
#
# `tests/llama_configs` has the published shapes.

# %%
published = {path.stem: Config.from_hf(json.loads(path.read_text())) for path in sorted(Path("tests/llama_configs").glob("*.json"))}
print(f"{'':42}{'width':>7}{'layers':>7}{'H':>4}{'K':>4}{'D':>5}{'theta':>9}")
for name, c in {**published, WHO: cfg}.items():
    print(f"{name[:40]:42}{c.hidden_size:>7}{c.num_hidden_layers:>7}{c.num_attention_heads:>4}{c.num_key_value_heads:>4}"
          f"{c.head_dim:>5}{c.rope_theta:>9.0f}")

# %% [markdown]
# ## Is it the same model?
#
# A checkpoint is a `config.json` and tensors with agreed names. We write a tiny random one ourselves, read it
# back as if it were Meta's, and compare the logits. (That these logits are also those of Hugging Face's
# own Llama is tested in `tests/test_llama.py`.)

# %%
try:
    from safetensors.torch import save_file
except ImportError:
    save_file = None
    print("skipped: pip install safetensors")
small = GPT(Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                   num_key_value_heads=2, rope_theta=500000.0))


def write_checkpoint(model, place):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": model.cfg.rope_theta,
              **{key: getattr(model.cfg, key) for key in HF_SIZES}}
    (place / "config.json").write_text(json.dumps(config))
    save_file({name if name.startswith("lm_head") else f"model.{name}": p.detach() for name, p in model.named_parameters()},
              place / "model.safetensors")


# %%
if save_file:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        write_checkpoint(small, Path(place))
        again, tokens = GPT.from_llama(place), torch.arange(20)[None]
        difference = (again(tokens)[0] - small(tokens)[0]).abs().max().item()
        del again  # its weights are mapped to the file
    print(f"largest difference of the logits: {difference}")
    assert difference < 1e-6, "the checkpoint does not come back as it was written"

# %% [markdown]
# ## Random tokens
#
# The paper's claim is about *any* first token, and the strongest form of "any" is a window of uniformly random
# ones. If the checkpoint names a `<|bos|>`, we also look at the same kind of window behind it, and
# keep the two apart. Variance over windows needs a first token that varies, so it is always read from the
# first kind.

# %%
raw = json.loads((folder / "config.json").read_text()) if REAL else {}
bos = raw.get("bos_token_id")
bos = bos if isinstance(bos, int) and 0 <= bos < cfg.vocab_size else None
kinds = {"ordinary first token": probe.draw_windows(N, 64, cfg.vocab_size, bos, False)[0]}
if bos is not None:
    kinds["after <bos>"] = probe.draw_windows(N, 64, cfg.vocab_size, bos, True)[0]
found = {kind: probe.links(model, x) for kind, x in kinds.items()}
chains = {kind: {key: v[0].item() for key, v in probe.summary(f).items()} for kind, f in found.items()}
idx, main, links = kinds["ordinary first token"], chains["ordinary first token"], found["ordinary first token"]

# %% [markdown]
# ## Link 1: what the structure does
#
# Chapter 01 in one line: with weights $A_{ts}$ and values of variance $\sigma^2$ and pairwise correlation $\rho$,
#
# $$\operatorname{Var}(z_t) = \sigma^2 \Big( \rho + (1 - \rho) \sum_{s \le t} A_{ts}^2 \Big)$$
#
# At token 0 the sum is 1; with attention spread evenly it is $\frac1{t+1}$ at token $t$. Nothing in it is
# learned. That is why a random model shows it.

# %%
figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
drawn = {"measured": links["variance"][0, 0], "from the attention weights": links["variance_predicted"][0, 0],
         "1 / (t + 1)": 1 / torch.arange(1, 65)}
probe.draw_variance(axis, drawn, f"Variance of z over windows, layer 0\n{WHO}")
show(figure, "08_variance")
print(f"{WHO}: variance of z_0 over the median, by layer:",
      " ".join(probe.number(v) for v in probe.discrepancy(links["variance"][0]).tolist()))

# %% [markdown]
# With random weights token 0 has the largest variance, and the curve falls with position as averaging alone says;
# training may bend it.

# %%
if not REAL:
    assert main["variance_ratio"] > 10, "token 0 is no variance outlier in the first layer"
    assert 0.6 < main["variance_ratio"] / main["variance_predicted"] < 1.6, "averaging does not explain the outlier"

# %% [markdown]
# ## Links 2 to 7, beside the paper
#
# The paper's numbers are for Llama-2-7B. Our way to find a super neuron is to rank the neurons of each layer
# by weight (chapter 03),
#
# $$|W_{\text{down}}| \cdot \lVert \gamma \odot w_{\text{gate}} \rVert \cdot \lVert \gamma \odot w_{\text{up}} \rVert$$
#
# so it may name another neuron than the paper's cosine does. Indices differ between models anyway; what may be
# compared is how far the first one stands out.

# %%
scores, dims = zip(*(probe.weight_scores(block) for block in model.layers))
best = max(range(cfg.num_hidden_layers), key=lambda i: probe.z_scores(scores[i]).max())
neuron = scores[best].argmax().item()
state = links["dom_first"][0, 1:cfg.num_hidden_layers].argmax().item() + 1  # of the layers that read what others wrote
x0 = record(model, idx, [f"{state}.resid_pre"])[1][f"{state}.resid_pre"][:, 0]
ruler = model.layers[state].input_layernorm(x0).float().abs().mean(0).argmax().item()
sinks = (links["alpha"][0].amax(1) > probe.EPS).nonzero().flatten().tolist()

# %%
print(WHO)
beside(("V_0 / median V_t, first layer", "an outlier", main["variance_ratio"]),
       ("Kendall tau of W_O and its input", "0.32", main["wo_tau"]),
       ("super neuron (index means nothing elsewhere)", "7890", f"{neuron} of layer {best}"),
       ("  largest weight score, in standard deviations", "not reported", main["neuron_z"]),
       ("  the dimension it writes most into", "2533", f"{dims[best][neuron].item()}"),
       ("DomRatio of token 0, largest of all layers", "262.9, layer 2", f"{probe.number(main['dom_ratio_max'])}"),
       ("  Gaussian noise of this width", "not reported", probe.gaussian_dominance(cfg.hidden_size)),
       ("  its largest dimension", "2533", f"{ruler}, layer {state} reads"),
       ("norm of token 0 / median, largest", "a jump", main["norm_ratio"]),
       ("cosine of normed x_0 between windows", "near 1", main["norm_direction_cos"]),
       ("share of q.k_0 > 0, strongest head", "nearly 100 %", f"{main['lock_positive']:.0%}"),
       ("sink from layer", "2", str(sinks[0]) if sinks else "none"),
       ("strongest head, attention to token 0", "not reported", main["sink_alpha_max"]))

# %%
print(f"uniform attention {probe.uniform_alpha(64):.3f}; strongest head by kind of window:",
      {kind: round(c["sink_alpha_max"], 3) for kind, c in chains.items()})

# %%
if REAL:
    assert max(c["sink_alpha_max"] for c in chains.values()) > probe.EPS, "this checkpoint has no sink on the first token"
else:
    assert main["sink_alpha_max"] < 0.15, "a random model has a sink"
    assert main["dom_ratio_max"] < 2 * probe.gaussian_dominance(cfg.hidden_size), "a random model has a dimension that rules"
    assert abs(main["norm_direction_cos"]) < 0.3, "a random model turns every first token into one direction"
    print("random weights: the variance outlier is there, and none of the links after it")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
for style, (kind, f) in zip(probe.STYLES, found.items()):
    axes[0].plot(f["norm_ratio"][0], label=kind, ms=4, lw=1.2, **style)
    axes[1].plot(f["dom_first"][0], label=f"token 0, {kind}", ms=4, lw=1.2, **style)
axes[1].plot(links["dom_rest"][0], label="other tokens, ordinary first token", ms=4, lw=1.2, **probe.STYLES[2])
axes[1].axhline(probe.gaussian_dominance(cfg.hidden_size), color="black", lw=0.8, ls=":")
scale = dict(yscale="log") if REAL else dict(ylim=(0, None))
for axis, title, label in zip(axes, ("Length of the first state", "Dominance of one dimension (dotted: Gaussian)"),
                              ("norm of token 0 / median", "DomRatio")):
    axis.xaxis.get_major_locator().set_params(integer=True)
    probe.dress(axis, title, {}, xlabel="layer that reads the state (last: the end)", ylabel=label, **scale)
probe.draw_sinks(axes[2], {kind: f["alpha"][0] for kind, f in found.items()})
figure.suptitle(WHO, fontsize=11)
show(figure, "08_layers")

# %% [markdown]
# Random weights: the first state is somewhat longer than the others, as its variance is, but no dimension
# rules it and no head rests on it. For a trained Llama the paper reports that all three jump in the first layers.
#
# ## Heads in groups
#
# Under GQA the heads of a group read the same key and the same value of token 0. So a drained value is
# drained for all of them at once, while each query decides alone whether it turns towards the key.

# %%
drain = links["drain"][0].unflatten(-1, (K, H // K))  # (L, K, heads of the group)
gap = links["lock_gap"][0].unflatten(-1, (K, H // K))
print(f"{WHO}: value drain, largest difference within a group {(drain.amax(-1) - drain.amin(-1)).max():.3f}, "
      f"between groups {(drain.amax(1) - drain.amin(1)).max():.3f}")
print(f"lock gap (nats), largest difference within a group {(gap.amax(-1) - gap.amin(-1)).max():.3f}")
assert torch.equal(drain.amax(-1), drain.amin(-1)), "heads of one group read different values"
assert K == H or (gap.amax(-1) - gap.amin(-1)).max() > 0, "heads of one group have the same queries"

# %% [markdown]
# ## Another first token
#
# The paper's test: token $k = 10$ may look at itself only, as the first token does. Its variance should rise
# to that of token 0, and in a trained Llama a sink should appear there. We measure both.

# %%
k, mask = 10, probe.block_aggregation(64, 10)
free, alone = probe.chain(model, idx, k=k), probe.chain(model, idx, mask=mask, k=k)
beside((f"V_{k} / median V_t, first layer", "", free["variance_ratio"]), ("  when it sees only itself", "like token 0", alone["variance_ratio"]),
       (f"strongest head, attention to token {k}", "", free["sink_alpha_max"]), ("  when it sees only itself", "a sink", alone["sink_alpha_max"]))
print(f"{WHO}; of the last number, token {k} looking at itself makes {1 / (64 - k):.3f}")
if not REAL:
    assert alone["variance_ratio"] > 3 * free["variance_ratio"], "seeing only itself does not raise the variance"
    assert alone["sink_alpha_max"] < 0.15, "a random model makes a sink of token 10"

# %% [markdown]
# Structure gives the variance to any token that may not average. Random weights make nothing of it. In the
# copying model of chapter 00, which is trained, the same mask does move the sink (chapter 06).
#
# ## What would falsify this
#
# A random Llama with a sink would: then no training is needed, and links 3 to 6 explain nothing. A trained
# Llama *without* a variance outlier in its first layer, but with a sink on random tokens, would falsify the
# first link. The first is asserted above; for the second, give this chapter a real checkpoint and read the table.
# Two cautions for that reading: chance values depend on the width, so compare with the Gaussian row and
# not with our small models; and one checkpoint is one seed.
#
# ## Exercises
#
# Replace `...` by your answer and run the cell again.
#
# **1.** Which key/value head serves query head `h`, if there are `heads` query heads and `kv_heads`
# key/value heads?


# %%
def kv_head(h, heads, kv_heads):
    ...


def check_kv_head(answer):
    got = answer(0, 8, 2)
    assert got is not None, "Return a whole number from 0 to kv_heads - 1."
    assert [answer(h, 8, 2) for h in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1], \
        "Groups are neighbours: heads 0 to 3 share the first key/value head. (0, 1, 0, 1, ... is another convention.)"
    assert [answer(h, 9, 3) for h in (2, 3, 8)] == [0, 1, 2], "Each group has heads / kv_heads members."
    assert answer(31, 32, 1) == 0, "With one key/value head, everybody reads it."
    assert answer(5, 32, 32) == 5, "With as many as query heads, everybody has their own."


attempt(check_kv_head, kv_head)

# %% [markdown]
# **2.** While a model writes, it keeps the keys and values of all earlier tokens of every layer. How many
# bytes is this cache for `tokens` tokens, if a number takes `size` bytes? `cfg` is a `Config`. (A
# sink must stay in the cache, or the model breaks: chapter 07.)


# %%
def cache_bytes(cfg, tokens, size=2):
    ...


def check_cache_bytes(answer):
    got = answer(published["Llama-2-7B"], 1)
    assert got is not None, "Return a number of bytes."
    assert got == 2 * 32 * 32 * 128 * 2, "One token of Llama-2-7B: a key and a value, in 32 layers, 32 heads, 128 wide, 2 bytes each."
    assert answer(published["Llama-2-7B"], 4096) == 2**31, "It grows with the number of tokens."
    assert answer(published["Llama-3-8B"], 4096) == 2**29, "Llama-3-8B has 8 key/value heads for 32 query heads: count what is stored."
    assert answer(published["Llama-3.2-1B"], 1, 4) == 2 * 16 * 8 * 64 * 4, "Use cfg.head_dim, and the size that is asked for."


attempt(check_cache_bytes, cache_bytes)

# %% [markdown]
# **3.** The key of token 0 is not rotated, but queries are: at position $t$, pair $i$ of a query turns by
# $t\,\theta^{-2i/D}$. A lock must survive this, so it needs pairs that turn slowly. How many of the $D/2$ pairs
# make less than one full turn within `tokens` positions?


# %%
def slow_pairs(theta, head_dim, tokens):
    ...


def check_slow_pairs(answer):
    got = answer(10000.0, 4, 100)
    assert got is not None, "Return a whole number from 0 to head_dim / 2."
    assert got == 1, "D = 4 has two pairs: one turns once in 2 pi = 6.3 tokens, the other in 628."
    assert answer(10000.0, 4, 6) == 2 and answer(10000.0, 4, 629) == 0, "A full turn is 2 pi, and i counts from 0."
    assert answer(10000.0, 128, 4096) == 18, "Llama 2 at its training length: count the i with tokens * theta^(-2i/D) < 2 pi."
    assert answer(500000.0, 128, 8192) == 29, "Llama 3: a larger theta leaves more slow pairs."


attempt(check_slow_pairs, slow_pairs)
