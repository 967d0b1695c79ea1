"""The decoder against a second implementation in numpy, and the promises that others build on."""

import math

import numpy as np
import pytest
import torch

from data.border import UserError
from model import ATTENTIONS, GPT, Config, compose, make_tap, record, rope_frequencies, tap_names
from tests.tiny import LLAMA3, tiny_config, tiny_model, tokens

T = 24
every_attention = pytest.mark.parametrize("attn", ATTENTIONS)


def idle(name, x):
    return x


# ---------------------------------------------------------------- the second implementation

def numpy_forward(gpt, idx, mask=None):
    """Logits (B, T, V) in float64, one query at a time, from the formulas alone."""
    cfg = gpt.cfg
    parameters = gpt.named_parameters(remove_duplicate=False)
    w = {name: p.detach().double().numpy() for name, p in parameters}
    H, K, D = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    freq = numpy_frequencies(cfg)

    def rms(x, gain):
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + cfg.rms_norm_eps) * w[f"{gain}.weight"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def rotated(vector, position):  # one head at one position, as complex numbers
        turned = (vector[: D // 2] + 1j * vector[D // 2:]) * np.exp(1j * position * freq)
        return np.concatenate((turned.real, turned.imag))

    def attend(x, layer, allowed):
        q, k, v = ((x @ w[f"{layer}.{n}_proj.weight"].T).reshape(len(x), -1, D) for n in "qkv")
        for t in range(len(x)):
            q[t] = [rotated(vector, t) for vector in q[t]]
            k[t] = [rotated(vector, t) for vector in k[t]]
        z = np.zeros((len(x), H, D))
        for h in range(H):
            g = h * K // H  # the key/value head that serves query head h
            for t in range(len(x)):
                keys = [s for s in range(t + 1) if allowed[t, s]]
                scores = k[keys, g] @ q[t, h] / math.sqrt(D)
                if cfg.attn == "sigmoid":
                    a = sigmoid(scores - math.log(cfg.max_position_embeddings))
                else:
                    a = np.exp(scores - scores.max())
                    a /= a.sum()
                z[t, h] = a @ v[keys, g]
                if cfg.attn == "headnorm":
                    z[t, h] = rms(z[t, h], f"{layer}.z_norm")
                if cfg.attn == "gated":
                    z[t, h] *= sigmoid(w[f"{layer}.z_gate.weight"][h] @ x[t])
        return z.reshape(len(x), H * D) @ w[f"{layer}.o_proj.weight"].T

    def mlp(x, layer):
        gate, up = x @ w[f"{layer}.gate_proj.weight"].T, x @ w[f"{layer}.up_proj.weight"].T
        return (gate * sigmoid(gate) * up) @ w[f"{layer}.down_proj.weight"].T

    out = []
    for row in idx.numpy():
        allowed = np.ones((len(row), len(row)), bool) if mask is None else mask.numpy()
        x = w["embed_tokens.weight"][row]
        for i in range(cfg.num_hidden_layers):
            layer = f"layers.{i}"
            x = x + attend(rms(x, f"{layer}.input_layernorm"), f"{layer}.self_attn", allowed)
            x = x + mlp(rms(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
        out.append(rms(x, "norm") @ w["lm_head.weight"].T)
    return np.stack(out)


def numpy_frequencies(cfg):
    """As the release of Llama 3.1 puts it, by wavelengths."""
    freq = [cfg.rope_theta ** (-2 * i / cfg.head_dim) for i in range(cfg.head_dim // 2)]
    s = cfg.rope_scaling
    for i, f in enumerate(freq if s else []):
        turns = s["original_max_position_embeddings"] / (2 * math.pi / f)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        if turns < low:
            freq[i] = f / s["factor"]
        elif turns < high:
            smooth = (turns - low) / (high - low)
            freq[i] = (1 - smooth) * f / s["factor"] + smooth * f
    return np.array(freq)


SHAPES = {
    "plain": {}, "wide heads": dict(head_dim=12), "tied": dict(tie_word_embeddings=True),
    "grouped": dict(num_key_value_heads=2), "one key head": dict(num_key_value_heads=1),
    "llama3 rope": dict(num_key_value_heads=2, rope_theta=50.0, rope_scaling=LLAMA3),
}


@pytest.mark.parametrize("shape", SHAPES)
@every_attention
def test_agrees_with_numpy(attn, shape):
    gpt, idx = tiny_model(attn, **SHAPES[shape]), tokens()
    targets = idx.roll(-1, 1)
    logits, loss = gpt(idx, targets)
    wanted = numpy_forward(gpt, idx)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(logits.detach().numpy(), wanted, rtol=0, atol=1e-4)
    log_p = wanted - np.log(np.exp(wanted).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, targets.numpy()[..., None], -1)
    assert loss.item() == pytest.approx(nats.mean(), abs=1e-5)
    targets[:, 5:] = -100  # these do not count
    assert gpt(idx, targets)[1].item() == pytest.approx(nats[:, :5].mean(), abs=1e-5)


@every_attention
def test_mask_agrees_with_numpy(attn):
    gpt, idx = tiny_model(attn, num_key_value_heads=2), tokens()
    draw = torch.rand(T, T, generator=torch.Generator().manual_seed(5))
    mask = (draw < 0.4) | torch.eye(T, dtype=torch.bool)
    wanted = numpy_forward(gpt, idx, mask)
    np.testing.assert_allclose(gpt(idx, mask=mask)[0].detach(), wanted, rtol=0, atol=1e-4)
    assert np.abs(wanted - numpy_forward(gpt, idx)).max() > 0.1


def test_the_llama3_case_covers_all_three_bands():
    scaled = rope_frequencies(tiny_config(rope_theta=50.0, rope_scaling=LLAMA3))
    ratio = (scaled / rope_frequencies(tiny_config(rope_theta=50.0))).tolist()
    assert ratio[-1] == pytest.approx(1 / 8) and any(1 / 8 < r < 1 for r in ratio[:-1])
    by_hand = Config(9, hidden_size=8, num_attention_heads=2, rope_scaling={
        **LLAMA3, "original_max_position_embeddings": 64})  # wavelengths 6.3 and 628
    assert rope_frequencies(by_hand).tolist() == pytest.approx([1.0, 0.01 / 8])


# ---------------------------------------------------------------- two paths, one result

@pytest.mark.parametrize("heads", [4, 2])
@every_attention
def test_fast_and_explicit_path_agree_forward_and_backward(attn, heads):
    """No tap and no mask take the fused kernel, an idle tap or a full mask takes the formulas.
    Every parameter gets a gradient."""
    gpt, idx = tiny_model(attn, num_key_value_heads=heads), tokens()
    results = []
    for options in ({}, {"tap": idle}, {"mask": torch.ones(T, T, dtype=torch.bool)}):
        gpt.zero_grad()
        logits, loss = gpt(idx, idx.roll(-1, 1), **options)
        loss.backward()
        results.append((logits.detach(), {n: p.grad.clone() for n, p in gpt.named_parameters()}))
    for logits, grads in results:
        torch.testing.assert_close(logits, results[0][0], rtol=0, atol=2e-5)
        for name, grad in grads.items():
            size = grad.abs().max()
            assert 0 < size and (grad - results[0][1][name]).abs().max() < 1e-4 * size, name


@pytest.mark.parametrize("scores", ["ordinary", "huge"])
@pytest.mark.parametrize("options", [{}, {"tap": idle}, {"mask": torch.ones(T, T).bool()}],
                         ids=["fused", "tapped", "masked"])
@every_attention
def test_the_future_is_never_seen(attn, options, scores):
    """Huge: a large negative number in place of -inf would lose against scores of 1e4 and above."""
    gpt, idx = tiny_model(attn), tokens()
    with torch.no_grad():
        for layer in gpt.layers if scores == "huge" else []:
            layer.self_attn.q_proj.weight *= 300
            layer.self_attn.k_proj.weight *= 300
    before, seen = gpt(idx, **options)[0], record(gpt, idx, ["0.scores", "0.pattern"])[1]
    assert (seen["0.scores"].abs().max() > 1e4) == (scores == "huge")
    assert (seen["0.pattern"].triu(1) == 0).all() and torch.isfinite(before).all()
    for t in (1, 10, T - 1):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 7) % 50
        after = gpt(changed, **options)[0]
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(-1).all()


@every_attention
def test_bf16(attn):
    """As weights and as autocast; the rope frequencies stay in fp32 when the weights do not."""
    gpt, idx = tiny_model(attn, initializer_range=0.1), tokens()
    exact, frequencies = gpt(idx)[0], gpt.rope_freq.clone()
    with torch.autocast("cpu", torch.bfloat16):
        auto, loss = gpt(idx, idx)
    loss.backward()
    assert {loss.dtype, *(p.grad.dtype for p in gpt.parameters())} == {torch.float32}
    low = gpt.to(torch.bfloat16)(idx)[0]
    assert low.dtype == torch.bfloat16 and torch.equal(gpt.rope_freq, frequencies)
    for logits in (auto, low):
        assert (logits - exact).pow(2).mean().sqrt() < 0.05 * exact.std()


# ---------------------------------------------------------------- mask

@every_attention
def test_mask_is_anded_with_causality(attn):
    gpt, idx = tiny_model(attn), tokens()
    alone = torch.ones(T, T, dtype=torch.bool)
    alone[10, :10] = False  # the intervention of the paper: token 10 sees itself only
    logits, seen = record(gpt, idx, ["0.pattern", "1.pattern"], mask=alone)
    for pattern in seen.values():
        assert (pattern[:, :, 10, :10] == 0).all() and (pattern.triu(1) == 0).all()
        assert (pattern[:, :, 11, :12] > 0).all() and (pattern[:, :, 10, 10] > 0).all()
        if attn != "sigmoid":
            torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, T))
    free = gpt(idx)[0]
    torch.testing.assert_close(logits[:, :10], free[:, :10], rtol=0, atol=2e-5)
    assert (logits[:, 10:] - free[:, 10:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("mask", [
    torch.ones(T, T), torch.ones(T, T).long(), torch.ones(T, T - 1).bool(), torch.ones(T).bool(),
    torch.ones(1, T, T).bool(), torch.zeros(T, T).bool(), torch.ones(T, T).bool().triu(1),
], ids=["float", "integer", "not square", "one row", "a batch", "empty", "future only"])
def test_bad_mask(mask):
    with pytest.raises(UserError, match="^mask"):
        tiny_model()(tokens(), mask=mask)


# ---------------------------------------------------------------- taps

@every_attention
def test_taps_are_called_as_listed_with_the_listed_shapes(attn):
    gpt, idx = tiny_model(attn, num_key_value_heads=2, head_dim=10), tokens()
    called = []
    gpt(idx, tap=lambda name, x: called.append(name) or x)
    assert called == tap_names(gpt.cfg)
    assert ("0.z_raw" in called) == (attn in ("headnorm", "gated"))
    _, seen = record(gpt, idx, called)
    B, C, F, H, K, D = 2, 32, 40, 4, 2, 10
    shapes = {
        "q": (B, T, H, D), "z": (B, T, H, D), "z_raw": (B, T, H, D), "k": (B, T, K, D),
        "v": (B, T, K, D), "scores": (B, H, T, T), "pattern": (B, H, T, T),
        "mlp_pre": (2, B, T, F), "mlp_post": (B, T, F),
    }
    for name, x in seen.items():
        assert x.shape == shapes.get(name.split(".")[-1], (B, T, C)), name
    assert torch.equal(seen["1.resid_pre"], seen["0.resid_post"])
    assert torch.equal(seen["0.resid_mid"], seen["0.resid_pre"] + seen["0.attn_out"])
    assert torch.equal(seen["0.resid_post"], seen["0.resid_mid"] + seen["0.mlp_out"])


@every_attention
def test_every_tap_is_live(attn):
    """What a tap returns is what the model goes on with."""
    gpt, idx = tiny_model(attn, num_key_value_heads=2), tokens()
    generator = torch.Generator().manual_seed(3)
    before = gpt(idx, tap=idle)[0]
    for name in tap_names(gpt.cfg):
        def noisy(x):
            return x + torch.randn(x.shape, generator=generator)
        after = gpt(idx, tap=make_tap(gpt.cfg, {name: noisy}))[0]
        assert (after - before).abs().max() > 1e-3, name


@pytest.mark.parametrize("name", ["resid_pre", "9.z", "0.z_raw", "0.Z", "0.mlp", "logits", ""])
def test_unknown_tap_is_an_error(name):
    for call in (lambda: make_tap(tiny_config(), {name: idle}),
                 lambda: record(tiny_model(), tokens(), [name])):
        with pytest.raises(UserError, match="no activation is called"):
            call()


def test_taps_compose_from_left_to_right_and_are_recorded_as_left():
    gpt, idx = tiny_model(), tokens()
    double = make_tap(gpt.cfg, {"embed": lambda x: 2 * x})
    plus = make_tap(gpt.cfg, {"embed": lambda x: x + 1, "0.mlp_out": torch.zeros_like})
    tap = compose(double, None, plus)
    logits, seen = record(gpt, idx, ["embed", "0.resid_mid", "0.mlp_out", "0.resid_post"], tap)
    assert torch.equal(seen["embed"], 2 * gpt.embed_tokens(idx) + 1)
    assert (seen["0.mlp_out"] == 0).all()
    assert torch.equal(seen["0.resid_post"], seen["0.resid_mid"])
    assert torch.equal(logits, gpt(idx, tap=tap)[0]) and compose(None, None) is None


# ---------------------------------------------------------------- the four variants

def test_same_seed_same_weights_for_every_variant():
    """Also where the head is tied, and whatever the global generator has drawn."""
    for tie in (False, True):
        states = {}
        for attn in ATTENTIONS:
            torch.rand(3)
            gpt = GPT(tiny_config(attn=attn, tie_word_embeddings=tie), seed=4)
            states[attn] = gpt.state_dict()
        plain = states["softmax"]
        for attn, extra in zip(ATTENTIONS, (None, None, "z_norm", "z_gate")):
            own = {name for name in states[attn] if name not in plain}
            assert own == {f"layers.{i}.self_attn.{extra}.weight" for i in range(2) if extra}
            assert all(torch.equal(states[attn][name], p) for name, p in plain.items())
    other = GPT(tiny_config(attn="gated"), seed=8).state_dict()
    for name, p in states["gated"].items():
        assert (p == 1).all() if "norm" in name else not torch.equal(p, other[name])
        assert "norm" in name or p.std() == pytest.approx(0.3, rel=0.2)


def test_gates_all_open_are_softmax_and_all_closed_are_silence():
    """Layers read ones, so that the gates' weights alone set the gates."""
    gated, plain, idx = tiny_model("gated"), tiny_model(), tokens()
    ones = {f"{i}.resid_pre": torch.ones_like for i in range(2)}
    tap = make_tap(gated.cfg, ones)
    for push in (100.0, -100.0):
        for layer in gated.layers:
            layer.self_attn.z_gate.weight.data.fill_(push)
        logits, seen = record(gated, idx, ["0.attn_out", "1.attn_out"], tap)
        if push > 0:
            assert torch.equal(logits, plain(idx, tap=tap)[0])
        else:
            assert all((x == 0).all() for x in seen.values())


# ---------------------------------------------------------------- config

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range")
ABSURD = (True, 0, -1, float("nan"), float("inf"), "8", [8], 10**400)
SCALES = [key for key in LLAMA3 if key != "rope_type"]
BAD_CONFIGS = [  # (field, value, what the line names)
    *((name, value, name) for name in SIZES for value in (*ABSURD, 8.0, 2**24)),
    *((name, value, name) for name in NUMBERS for value in (*ABSURD, None, 1e-320)),
    *(("rope_scaling", {**LLAMA3, key: value}, key) for key in SCALES for value in (*ABSURD, None)),
    ("rope_scaling", {**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "linear"),
    ("rope_scaling", {"rope_type": "yarn"}, "yarn"), ("rope_scaling", {"factor": 4.0}, "rope_sc"),
    ("rope_scaling", "llama3", "rope_scaling"), ("rope_scaling", [], "rope_scaling"),
    ("vocab_size", None, "vocab_size"), ("hidden_size", 30, "num_attention_heads"),
    ("num_key_value_heads", 3, "num_key_value_heads"), ("head_dim", 7, "head_dim"),
    ("head_dim", 2**23, "head_dim"), ("hidden_size", 12, "head_dim"),
    ("tie_word_embeddings", "yes", "tie_word"), ("tie_word_embeddings", 1, "tie_word"),
    ("attn", "linear", "attn"), ("attn", None, "attn"), ("attn", ["softmax"], "attn"),
]


@pytest.mark.parametrize("field, value, named", BAD_CONFIGS,
                         ids=lambda value: str(value)[:20].replace("\n", " "))
def test_bad_config_is_named_in_one_line(field, value, named):
    with pytest.raises(UserError, match=named) as error:
        tiny_config(**{field: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_config_fills_in_what_follows():
    cfg = Config(50, hidden_size=64, num_attention_heads=4)
    assert (cfg.num_key_value_heads, cfg.head_dim) == (4, 16)
    assert Config(50, hidden_size=30, num_attention_heads=4, head_dim=8).head_dim == 8


# ---------------------------------------------------------------- generate

def test_temperature_zero_is_greedy():
    gpt, start = tiny_model(), tokens(1, 4)
    out = gpt.generate(start, 10, temperature=0)
    assert out.shape == (1, 14) and torch.equal(out[:, :4], start)
    for t in range(4, 14):
        assert out[0, t] == gpt(out[:, :t])[0][0, -1].argmax()
    assert torch.equal(gpt.generate(start, 10, top_k=1), out)


def test_seed_decides_the_sample_and_top_k_leaves_out_the_rest():
    gpt, start = tiny_model(initializer_range=0.02), tokens(1, 4)  # flat: nearly any token comes

    def sample(seed, n=1, **options):
        generator = torch.Generator().manual_seed(seed)
        return gpt.generate(start, n, generator=generator, **options)

    assert torch.equal(sample(1, 16), sample(1, 16))
    assert not torch.equal(sample(1, 16), sample(2, 16))
    best = set(gpt(start)[0][0, -1].topk(3).indices.tolist())
    assert {sample(seed, top_k=3)[0, -1].item() for seed in range(60)} == best
    assert len({sample(seed, top_k=1000)[0, -1].item() for seed in range(60)}) > 10


def test_generation_goes_on_beyond_the_context():
    """with the last `max_position_embeddings` tokens in view."""
    gpt, lengths = tiny_model(), []
    gpt.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    assert gpt.generate(tokens(1, T - 2), 6, temperature=0).shape == (1, T + 4)
    assert lengths == [T - 2, T - 1, T, T, T, T]
