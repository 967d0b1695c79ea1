"""The decoder against a second implementation in numpy, and the promises that the rest of the repository builds on."""

import math

import numpy as np
import pytest
import torch

from model import ATTENTIONS, GPT, Config, ModelError, compose, make_tap, record, rope_frequencies, tap_names

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
T = 24


def config(attn="softmax", **change):
    return Config(**{**dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                            max_position_embeddings=T, initializer_range=0.3, attn=attn), **change})


def build(attn="softmax", seed=0, **change):
    """A model whose norms have gains other than one, so that a forgotten gain shows."""
    gpt = GPT(config(attn, **change), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in gpt.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5, generator=generator)
    return gpt


def tokens(B=2, length=T, seed=0):
    return torch.randint(50, (B, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the second implementation

def numpy_forward(gpt, idx, mask=None):
    """Logits (B, T, V) in float64, one query at a time, from the formulas alone."""
    cfg = gpt.cfg
    w = {name: p.detach().double().numpy() for name, p in gpt.named_parameters(remove_duplicate=False)}
    H, K, D, eps = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.rms_norm_eps

    def rms(x, gain):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain

    freq = np.array([cfg.rope_theta ** (-2 * i / D) for i in range(D // 2)])
    if cfg.rope_scaling:
        s = cfg.rope_scaling
        for i, f in enumerate(freq):
            wavelength = 2 * math.pi / f
            long = s["original_max_position_embeddings"] / s["low_freq_factor"]
            short = s["original_max_position_embeddings"] / s["high_freq_factor"]
            if wavelength > long:
                freq[i] = f / s["factor"]
            elif wavelength > short:
                smooth = (s["original_max_position_embeddings"] / wavelength - s["low_freq_factor"]) / (
                    s["high_freq_factor"] - s["low_freq_factor"])
                freq[i] = (1 - smooth) * f / s["factor"] + smooth * f

    def rotated(vector, position):  # one head at one position, as complex numbers
        turned = (vector[: D // 2] + 1j * vector[D // 2:]) * np.exp(1j * position * freq)
        return np.concatenate((turned.real, turned.imag))

    def attend(x, layer, allowed):
        length = len(x)
        q, k, v = ((x @ w[f"{layer}.self_attn.{n}_proj.weight"].T).reshape(length, -1, D) for n in "qkv")
        for vectors in (q, k):
            for t in range(length):
                vectors[t] = [rotated(vector, t) for vector in vectors[t]]
        z = np.zeros((length, H, D))
        for h in range(H):
            g = h * K // H  # the key/value head that serves query head h
            for t in range(length):
                keys = [s for s in range(t + 1) if allowed[t, s]]
                scores = np.array([q[t, h] @ k[s, g] / math.sqrt(D) for s in keys])
                if cfg.attn == "sigmoid":
                    a = 1 / (1 + np.exp(-(scores - math.log(cfg.max_position_embeddings))))
                else:
                    a = np.exp(scores - scores.max())
                    a /= a.sum()
                z[t, h] = sum(a_s * v[s, g] for a_s, s in zip(a, keys))
                if cfg.attn == "headnorm":
                    z[t, h] = rms(z[t, h], w[f"{layer}.self_attn.z_norm.weight"])
        return z.reshape(length, H * D) @ w[f"{layer}.self_attn.o_proj.weight"].T

    out = []
    for b, row in enumerate(idx.numpy()):
        allowed = np.ones((len(row), len(row)), bool) if mask is None else mask.expand(len(idx), -1, -1)[b].numpy()
        x = w["embed_tokens.weight"][row]
        for i in range(cfg.num_hidden_layers):
            layer = f"layers.{i}"
            x = x + attend(rms(x, w[f"{layer}.input_layernorm.weight"]), layer, allowed)
            h = rms(x, w[f"{layer}.post_attention_layernorm.weight"])
            gate, up = h @ w[f"{layer}.mlp.gate_proj.weight"].T, h @ w[f"{layer}.mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
        out.append(rms(x, w["norm.weight"]) @ w["lm_head.weight"].T)
    return np.stack(out)


SHAPES = {"plain": {}, "grouped": dict(num_key_value_heads=2), "one key head": dict(num_key_value_heads=1),
          "wide heads": dict(head_dim=12), "tied": dict(tie_word_embeddings=True),
          "llama3 rope": dict(num_key_value_heads=2, rope_theta=50.0, rope_scaling=LLAMA3)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_agrees_with_numpy(attn, shape):
    gpt, idx = build(attn, **SHAPES[shape]), tokens()
    logits, loss = gpt(idx, targets=idx.roll(-1, 1))
    wanted = numpy_forward(gpt, idx)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(logits.detach().numpy(), wanted, rtol=0, atol=1e-4)
    p = wanted - np.log(np.exp(wanted).sum(-1, keepdims=True))
    nats = -np.mean(np.take_along_axis(p, idx.roll(-1, 1).numpy()[..., None], -1))
    assert loss.item() == pytest.approx(nats, abs=1e-5)


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_mask_agrees_with_numpy(attn):
    gpt, idx = build(attn, num_key_value_heads=2), tokens()
    generator = torch.Generator().manual_seed(5)
    mask = (torch.rand(2, T, T, generator=generator) < 0.4) | torch.eye(T, dtype=torch.bool)
    for m in (mask, mask[:1], mask[0]):
        np.testing.assert_allclose(gpt(idx, mask=m)[0].detach().numpy(), numpy_forward(gpt, idx, m), rtol=0, atol=1e-4)


def test_the_llama3_case_covers_all_three_bands():
    ratio = (rope_frequencies(config(**SHAPES["llama3 rope"])) / rope_frequencies(config(rope_theta=50.0))).tolist()
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 8) and any(1 / 8 < r < 1 for r in ratio[1:-1])


# ---------------------------------------------------------------- two paths, one result

@pytest.mark.parametrize("attn", ["softmax", "headnorm"])
@pytest.mark.parametrize("heads", [4, 2])
def test_fast_and_explicit_path_agree_forward_and_backward(attn, heads):
    """No tap and no mask take the fused kernel, an idle tap takes the formulas."""
    gpt, idx = build(attn, num_key_value_heads=heads), tokens()
    results = []
    for options in ({}, {"tap": lambda name, x: x}, {"mask": torch.ones(T, T, dtype=torch.bool)}):
        gpt.zero_grad()
        logits, loss = gpt(idx, idx.roll(-1, 1), **options)
        loss.backward()
        results.append((logits.detach(), {n: p.grad.clone() for n, p in gpt.named_parameters()}))
    for logits, grads in results[1:]:
        torch.testing.assert_close(logits, results[0][0], rtol=0, atol=2e-5)
        for name, grad in grads.items():
            assert 0 < grad.abs().max() and (grad - results[0][1][name]).abs().max() < 1e-4 * grad.abs().max(), name


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("tapped", [False, True])
def test_the_future_is_never_seen(attn, tapped):
    gpt, idx = build(attn), tokens()
    tap = (lambda name, x: x) if tapped else None
    before = gpt(idx, tap=tap)[0]
    for t in (1, 10, T - 1):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 7) % 50
        after = gpt(changed, tap=tap)[0]
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(-1).all()


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_a_prefix_alone_gives_the_same_logits(attn):
    gpt, idx = build(attn), tokens()
    torch.testing.assert_close(gpt(idx[:, :9])[0], gpt(idx)[0][:, :9], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_the_future_is_never_seen_even_with_huge_scores(attn):
    """A large negative number in place of -inf would lose against scores of 1e4 and above."""
    gpt = build(attn, initializer_range=0.1)
    with torch.no_grad():
        for layer in gpt.layers:
            layer.self_attn.q_proj.weight *= 1e3
            layer.self_attn.k_proj.weight *= 1e3
    idx = tokens()
    changed = idx.clone()
    changed[:, 12:] = (changed[:, 12:] + 7) % 50
    logits, seen = record(gpt, idx, ["0.scores", "0.pattern"])
    assert seen["0.scores"].abs().max() > 1e4
    assert (seen["0.pattern"].triu(1) == 0).all() and torch.isfinite(logits).all()
    mask = torch.ones(T, T, dtype=torch.bool)
    for options in ({}, {"mask": mask}):
        assert torch.equal(gpt(idx, **options)[0][:, :12], gpt(changed, **options)[0][:, :12])


# ---------------------------------------------------------------- mask

@pytest.mark.parametrize("attn", ATTENTIONS)
def test_mask_is_anded_with_causality(attn):
    gpt, idx = build(attn), tokens()
    everything = torch.ones(T, T, dtype=torch.bool)
    torch.testing.assert_close(gpt(idx, mask=everything)[0], gpt(idx)[0], rtol=0, atol=2e-5)
    alone = everything.clone()
    alone[10] = False
    alone[10, 10] = True  # the intervention of the paper: token 10 sees itself only
    _, seen = record(gpt, idx, ["0.pattern", "1.pattern"], mask=alone)
    for pattern in seen.values():
        assert (pattern[:, :, 10, :10] == 0).all() and (pattern[:, :, 10, 10] > 0).all()
        assert (pattern[:, :, 11, :12] > 0).all() and (pattern.triu(1) == 0).all()
        if attn != "sigmoid":
            assert (pattern[:, :, 10, 10] == 1).all()
    torch.testing.assert_close(gpt(idx, mask=alone)[0][:, :10], gpt(idx)[0][:, :10], rtol=0, atol=2e-5)
    assert (gpt(idx, mask=alone)[0][:, 10:] - gpt(idx)[0][:, 10:]).abs().amax(-1).min() > 1e-3
    both = torch.stack((everything, alone))
    logits = gpt(idx, mask=both)[0]
    torch.testing.assert_close(logits[0], gpt(idx)[0][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(logits[1], gpt(idx, mask=alone)[0][1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("mask", [
    torch.ones(T, T), torch.ones(T, T, dtype=torch.long), torch.ones(T, T - 1, dtype=torch.bool),
    torch.ones(T - 1, T - 1, dtype=torch.bool), torch.ones(T, dtype=torch.bool), torch.ones(3, T, T, dtype=torch.bool),
    torch.ones(2, 4, T, T, dtype=torch.bool), torch.zeros(T, T, dtype=torch.bool), torch.ones(T, T, dtype=torch.bool).triu(1),
    torch.stack((torch.ones(T, T, dtype=torch.bool), torch.zeros(T, T, dtype=torch.bool)))],
    ids=["float", "integer", "not square", "too small", "one row", "another batch", "per head", "empty", "future only",
         "empty in one sequence"])
def test_bad_mask(mask):
    with pytest.raises(ModelError, match="mask"):
        build()(tokens(), mask=mask)


# ---------------------------------------------------------------- taps

def names_called(gpt):
    called = []
    gpt(tokens(), tap=lambda name, x: called.append(name) or x)
    return called


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_taps_are_called_as_listed_with_the_listed_shapes_and_change_nothing(attn):
    gpt, idx = build(attn, num_key_value_heads=2, head_dim=10), tokens()
    assert names_called(gpt) == tap_names(gpt.cfg)
    assert ("0.z_raw" in tap_names(gpt.cfg)) == (attn == "headnorm")
    logits, seen = record(gpt, idx, tap_names(gpt.cfg))
    torch.testing.assert_close(logits, gpt(idx)[0], rtol=0, atol=2e-5)
    B, C, F, H, K, D = 2, 32, 40, 4, 2, 10
    shapes = {"q": (B, T, H, D), "z": (B, T, H, D), "z_raw": (B, T, H, D), "k": (B, T, K, D), "v": (B, T, K, D),
              "scores": (B, H, T, T), "pattern": (B, H, T, T), "mlp_pre": (2, B, T, F), "mlp_post": (B, T, F)}
    for name, x in seen.items():
        assert x.shape == shapes.get(name.split(".")[-1], (B, T, C)), name
    assert torch.equal(seen["1.resid_pre"], seen["0.resid_post"])
    assert torch.equal(seen["0.resid_mid"], seen["0.resid_pre"] + seen["0.attn_out"])
    assert torch.equal(seen["0.resid_post"], seen["0.resid_mid"] + seen["0.mlp_out"])


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_every_tap_is_live(attn):
    """What a tap returns is what the model goes on with."""
    gpt, idx = build(attn, num_key_value_heads=2), tokens()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        before = gpt(idx, tap=lambda name, x: x)[0]
        for name in tap_names(gpt.cfg):
            noise = make_tap(gpt.cfg, {name: lambda x: x + torch.randn(x.shape, generator=generator)})
            assert (gpt(idx, tap=noise)[0] - before).abs().max() > 1e-3, name


@pytest.mark.parametrize("name", ["resid_pre", "9.z", "0.z_raw", "0.Z", "0.mlp", "logits", ""])
def test_unknown_tap_is_an_error(name):
    cfg = config("softmax")
    with pytest.raises(ModelError, match="no activation is called"):
        make_tap(cfg, {name: lambda x: x})
    with pytest.raises(ModelError, match="no activation is called"):
        record(build(), tokens(), [name])


def test_taps_compose_from_left_to_right():
    gpt, idx = build(), tokens()
    double, plus = make_tap(gpt.cfg, {"embed": lambda x: 2 * x}), make_tap(gpt.cfg, {"embed": lambda x: x + 1})
    _, seen = record(gpt, idx, ["embed"], tap=compose(double, None, plus))
    assert torch.equal(seen["embed"], 2 * gpt.embed_tokens(idx) + 1)
    assert compose(None, None) is None


def test_an_edit_and_a_recording_see_the_same():
    """record() keeps what the tap has left, and downstream activations follow from it."""
    gpt, idx = build(), tokens()
    cut = make_tap(gpt.cfg, {"0.mlp_out": torch.zeros_like})
    logits, seen = record(gpt, idx, ["0.mlp_out", "0.resid_post", "0.resid_mid"], tap=cut)
    assert (seen["0.mlp_out"] == 0).all() and torch.equal(seen["0.resid_post"], seen["0.resid_mid"])
    assert torch.equal(logits, gpt(idx, tap=cut)[0])


# ---------------------------------------------------------------- the three variants

def test_same_seed_same_weights_for_every_variant():
    states = {attn: GPT(config(attn), seed=4).state_dict() for attn in ATTENTIONS}
    for attn in ATTENTIONS:
        for name, p in states["softmax"].items():
            assert torch.equal(states[attn][name], p), name
        extra = states[attn].keys() - states["softmax"].keys()
        assert extra == ({f"layers.{i}.self_attn.z_norm.weight" for i in range(2)} if attn == "headnorm" else set())
    assert all((states["headnorm"][name] == 1).all() for name in states["headnorm"] if "norm" in name)


def test_seed_decides_and_the_global_generator_does_not():
    torch.manual_seed(1)
    a = GPT(config(), seed=7).state_dict()
    torch.manual_seed(2)
    b, c = GPT(config(), seed=7).state_dict(), GPT(config(), seed=8).state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(not torch.equal(a[n], c[n]) for n in a if a[n].dim() == 2)
    w = a["embed_tokens.weight"]
    assert w.mean().abs() < 0.03 and w.std() == pytest.approx(0.3, rel=0.05)


def test_headnorm_has_unit_rms_per_head_at_initialisation():
    gpt = GPT(config("headnorm"))
    _, seen = record(gpt, tokens(), ["0.z", "0.z_raw", "1.z"])
    for name in ("0.z", "1.z"):
        rms = seen[name].pow(2).mean(-1).sqrt()
        assert rms.shape == (2, T, 4) and rms.min() > 0.99 and rms.max() < 1.001
    size = seen["0.z_raw"].pow(2).mean((0, 2, 3))
    assert size[0] > 2 * size[-1]  # what the norm takes away: the first token's larger variance


def test_sigmoid_bias_and_exact_zeros():
    gpt, idx = build("sigmoid"), tokens()
    _, seen = record(gpt, idx, ["0.scores", "0.pattern"])
    below = torch.ones(T, T, dtype=torch.bool).tril()
    wanted = torch.sigmoid(seen["0.scores"] - math.log(T))
    torch.testing.assert_close(seen["0.pattern"][..., below], wanted[..., below])
    assert (seen["0.pattern"][..., ~below] == 0).all() and (seen["0.pattern"][..., below] > 0).all()
    flat = GPT(config("sigmoid", initializer_range=1e-6, max_position_embeddings=512))
    _, seen = record(flat, idx, ["0.pattern"])  # scores of 0: each gate open by 1/(1 + 512)
    torch.testing.assert_close(seen["0.pattern"][..., below], torch.full((2, 4, below.sum()), 1 / 513), rtol=1e-4, atol=0)


def test_softmax_patterns_sum_to_one():
    for attn in ("softmax", "headnorm"):
        _, seen = record(build(attn), tokens(), ["1.pattern"])
        torch.testing.assert_close(seen["1.pattern"].sum(-1), torch.ones(2, 4, T))


def test_tied_head():
    gpt = GPT(config(tie_word_embeddings=True))
    assert gpt.lm_head.weight is gpt.embed_tokens.weight
    free = GPT(config())
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in gpt.parameters()) == 50 * 32
    with torch.no_grad():
        gpt.embed_tokens.weight *= 2
    assert torch.equal(gpt.lm_head.weight, gpt.embed_tokens.weight)
    other = GPT(config(tie_word_embeddings=True), seed=9)
    other.load_state_dict(gpt.state_dict())
    assert torch.equal(other(tokens())[0], gpt(tokens())[0])


def test_ignored_targets_do_not_count():
    gpt, idx = build(), tokens()
    targets = idx.roll(-1, 1)
    part = targets.clone()
    part[:, 5:] = -100
    _, loss = gpt(idx, part)
    _, wanted = gpt(idx[:, :5], targets[:, :5])
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_bf16(attn):
    """As weights and as autocast; the rope frequencies stay in fp32 when the weights do not."""
    gpt, idx = build(attn, initializer_range=0.1), tokens()
    exact = gpt(idx)[0]
    frequencies = gpt.rope_freq.clone()
    with torch.autocast("cpu", torch.bfloat16):
        auto, loss = gpt(idx, idx)
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in gpt.parameters())
    low = gpt.to(torch.bfloat16)(idx)[0]
    assert low.dtype == torch.bfloat16 and torch.equal(gpt.rope_freq, frequencies)
    for logits in (auto, low):
        assert (logits - exact).pow(2).mean().sqrt() < 0.05 * exact.std()


# ---------------------------------------------------------------- config

@pytest.mark.parametrize("change, named", [
    ({"vocab_size": 0}, "vocab_size"), ({"vocab_size": 50.0}, "vocab_size"), ({"vocab_size": True}, "vocab_size"),
    ({"vocab_size": "50"}, "vocab_size"), ({"hidden_size": -1}, "hidden_size"), ({"hidden_size": 30}, "num_attention_heads"),
    ({"intermediate_size": None}, "intermediate_size"), ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_attention_heads": 0}, "num_attention_heads"), ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"), ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": 7}, "head_dim"), ({"head_dim": 0}, "head_dim"), ({"hidden_size": 12}, "head_dim"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"), ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"), ({"rope_theta": float("inf")}, "rope_theta"),
    ({"rope_theta": "1e4"}, "rope_theta"), ({"initializer_range": -0.02}, "initializer_range"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"), ({"attn": "linear"}, "attn"), ({"attn": None}, "attn"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"), ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "factor": "x"}}, "rope_scaling"), ({"rope_scaling": {**LLAMA3, "factor": 0.0}}, "rope_scaling"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
])
def test_bad_config_is_named_in_one_line(change, named):
    with pytest.raises(ModelError, match=named) as error:
        config(**change)
    assert "\n" not in str(error.value)


def test_config_fills_in_what_follows():
    cfg = Config(50, hidden_size=64, num_attention_heads=4)
    assert (cfg.num_key_value_heads, cfg.head_dim) == (4, 16)
    assert Config(50, hidden_size=30, num_attention_heads=4, head_dim=8).head_dim == 8


# ---------------------------------------------------------------- generate

def test_temperature_zero_is_greedy_and_deterministic():
    gpt, start = build(), tokens(1, 4)
    a, b = gpt.generate(start, 10, temperature=0), gpt.generate(start, 10, temperature=0)
    assert torch.equal(a, b) and a.shape == (1, 14) and torch.equal(a[:, :4], start)
    for t in range(4, 14):
        assert a[0, t] == gpt(a[:, :t])[0][0, -1].argmax()


def test_seed_decides_the_sample():
    gpt, start = build(), tokens(1, 4)
    def sample(seed):
        return gpt.generate(start, 16, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))


def test_top_k_leaves_out_the_rest():
    gpt, start = build(initializer_range=0.02), tokens(1, 4)  # small weights: without top_k nearly any token comes
    best = set(gpt(start)[0][0, -1].topk(3).indices.tolist())
    generator = torch.Generator().manual_seed(0)
    drawn = {gpt.generate(start, 1, top_k=3, generator=generator)[0, -1].item() for _ in range(60)}
    assert drawn == best
    assert len({gpt.generate(start, 1, generator=generator)[0, -1].item() for _ in range(60)}) > 10
    assert torch.equal(gpt.generate(start, 5, top_k=1), gpt.generate(start, 5, temperature=0))
    assert gpt.generate(start, 2, top_k=1000).shape == (1, 6)


def test_generation_goes_on_beyond_the_context():
    """with the last `max_position_embeddings` tokens in view."""
    gpt, lengths = build(), []
    gpt.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    assert gpt.generate(tokens(1, T - 2), 6, temperature=0).shape == (1, T + 4)
    assert lengths == [T - 2, T - 1, T, T, T, T]
