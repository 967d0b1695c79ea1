"""The decoder: it equals the formulas written in numpy, sees no future, and opens to taps."""

import math

import numpy as np
import pytest
import torch

from data.common import UserError
from model import (ATTENTIONS, GPT, HF_SIZES, Config, RMSNorm, compose, make_tap, record,
                   rope_frequencies, tap_names)
from tests.tiny import LLAMA3, SHAPES, llama_config, tiny_config, tiny_model, tokens

T = 24
FULL = torch.ones(T, T, dtype=torch.bool)
every_attention = pytest.mark.parametrize("attn", ATTENTIONS)


def idle(name, x):
    return x


PATHS = {"fused": {}, "tapped": {"tap": idle}, "masked": {"mask": FULL}}


@every_attention
def test_written_out_or_by_the_kernel(attn):
    gpt, idx = tiny_model(attn=attn), tokens(2, T)
    kernel, gpt.fused = gpt(idx)[0], False
    assert torch.allclose(gpt(idx)[0], kernel, atol=1e-5)


# ---------------------------------------------------------------- the formulas in numpy

def numpy_forward(gpt, idx, mask):
    """Logits (T, V) of one window in float64, one head at a time."""
    cfg, T, allowed = gpt.cfg, len(idx), np.tril(mask)
    H, K, D = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    parameters = gpt.named_parameters(remove_duplicate=False)
    w = {name: p.detach().double().numpy() for name, p in parameters}
    turns = np.exp(1j * np.outer(np.arange(T), rope_frequencies(cfg)))  # (T, D/2)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    def rms(x, name):
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + cfg.rms_norm_eps) * w[f"{name}.weight"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def rotated(x):  # pairs as complex numbers
        turned = (x[:, : D // 2] + 1j * x[:, D // 2:]) * turns
        return np.concatenate((turned.real, turned.imag), axis=1)

    def attention(x, layer):
        q, k, v = (linear(x, f"{layer}.{n}_proj").reshape(T, -1, D) for n in "qkv")
        heads = []
        for h in range(H):
            g = h * K // H  # the key/value head that serves query head h
            scores = rotated(q[:, h]) @ rotated(k[:, g]).T / math.sqrt(D)
            if cfg.attn == "sigmoid":
                a = allowed * sigmoid(scores - math.log(cfg.max_position_embeddings))
            else:
                a = allowed * np.exp(scores)
                a /= a.sum(1, keepdims=True)
            z = a @ v[:, g]
            if cfg.attn == "headnorm":
                z = rms(z, f"{layer}.z_norm")
            if cfg.attn == "gated":
                z *= sigmoid(linear(x, f"{layer}.z_gate"))[:, h, None]
            heads.append(z)
        return linear(np.concatenate(heads, axis=1), f"{layer}.o_proj")

    def mlp(x, layer):
        gate, up = linear(x, f"{layer}.gate_proj"), linear(x, f"{layer}.up_proj")
        return linear(gate * sigmoid(gate) * up, f"{layer}.down_proj")

    x = w["embed_tokens.weight"][idx]
    for i in range(cfg.num_hidden_layers):
        x = x + attention(rms(x, f"layers.{i}.input_layernorm"), f"layers.{i}.self_attn")
        x = x + mlp(rms(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp")
    return linear(rms(x, "norm"), "lm_head")


@pytest.mark.parametrize("shape", SHAPES)
@every_attention
def test_logits_and_loss_agree_with_numpy(attn, shape):
    """Without a mask, and with a random one, whose future stays unseen. The training length, which
    sigmoid attention knows, is not that of the window."""
    n, gpt = T - 4, tiny_model(attn, **SHAPES[shape])
    idx, draw = tokens(1, n), torch.rand(n, n, generator=torch.Generator().manual_seed(5))
    for mask in (None, (draw < 0.4) | torch.eye(n).bool()):
        logits, loss = gpt(idx, idx, mask=mask)
        wanted = numpy_forward(gpt, idx[0], np.ones((n, n)) if mask is None else mask)
        np.testing.assert_allclose(logits[0].detach(), wanted, rtol=0, atol=1e-4)
        p = np.exp(wanted) / np.exp(wanted).sum(1, keepdims=True)
        nats = -np.log(p[range(n), idx[0]])
        assert loss.item() == pytest.approx(nats.mean(), abs=1e-5)
    some = idx.clone()
    some[:, 5:] = -100  # these do not count
    assert gpt(idx, some, mask=mask)[1].item() == pytest.approx(nats[:5].mean(), abs=1e-5)


def test_rope_turns_by_powers_of_theta_and_llama3_stretches_long_wavelengths():
    """By hand: 250, 2.5 and 0.025 turns in the original context; below 1 is long, above 4 short."""
    scaling = {**LLAMA3, "original_max_position_embeddings": 500 * math.pi}
    shape = dict(hidden_size=12, num_attention_heads=2, rope_theta=1e6)
    plain, scaled = Config(9, **shape), Config(9, **shape, rope_scaling=scaling)
    assert rope_frequencies(plain).tolist() == pytest.approx([1, 0.01, 0.0001])
    stretched = [1, 0.01 * (0.5 + 0.5 / 8), 0.0001 / 8]
    assert rope_frequencies(scaled).tolist() == pytest.approx(stretched)


@pytest.mark.parametrize("mask", [FULL.float(), FULL[1:], FULL[None], FULL.triu(1)],
                         ids=["no booleans", "not square", "a batch", "a query without a key"])
def test_a_bad_mask_is_refused(mask):
    with pytest.raises(UserError, match="^mask"):
        tiny_model()(tokens(), mask=mask)


@pytest.mark.parametrize("scale", [1, 300])
@pytest.mark.parametrize("path", PATHS)
@every_attention
def test_the_future_is_never_seen(attn, path, scale):
    """With scores of 1e4, too, where a large negative number in place of -inf would lose."""
    gpt, idx = tiny_model(attn), tokens()
    for layer in gpt.layers:
        layer.self_attn.q_proj.weight.data *= scale
        layer.self_attn.k_proj.weight.data *= scale
    scores = record(gpt, idx, ["0.scores"])[1]["0.scores"]
    assert (scores.abs().max() > 1e4) == (scale == 300)
    before = gpt(idx, **PATHS[path])[0]
    for t in (1, 10, T - 1):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 7) % 50
        after = gpt(changed, **PATHS[path])[0]
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(-1).all()


@every_attention
def test_bf16_stays_close_and_its_rope_frequencies_stay_in_fp32(attn):
    gpt, idx = tiny_model(attn, initializer_range=0.1), tokens()
    exact, frequencies = gpt(idx)[0], gpt.rope_freq.clone()
    with torch.autocast("cpu", torch.bfloat16):
        auto = gpt(idx)[0]
    low = gpt.to(torch.bfloat16)(idx)[0]
    assert low.dtype == torch.bfloat16 and torch.equal(gpt.rope_freq, frequencies)
    for logits in (auto, low):
        assert (logits - exact).pow(2).mean().sqrt() < 0.05 * exact.std()


def test_a_norm_of_large_states_does_not_overflow_in_fp16():
    large = torch.full((4,), 3000.0, dtype=torch.float16)
    assert RMSNorm(4, 1e-5)(large).tolist() == pytest.approx([1, 1, 1, 1], rel=1e-3)


# ---------------------------------------------------------------- taps

@every_attention
def test_taps_are_called_as_listed_with_the_listed_shapes(attn):
    gpt, idx = tiny_model(attn, num_key_value_heads=2, head_dim=10), tokens()
    called = []
    gpt(idx, tap=lambda name, x: called.append(name) or x)
    assert called == tap_names(gpt.cfg)
    B, C, F, H, K, D = 2, 32, 40, 4, 2, 10
    shapes = {
        "q": (B, T, H, D), "z": (B, T, H, D), "z_raw": (B, T, H, D), "k": (B, T, K, D),
        "v": (B, T, K, D), "scores": (B, H, T, T), "pattern": (B, H, T, T),
        "mlp_pre": (B, T, F), "mlp_pre_linear": (B, T, F), "mlp_post": (B, T, F),
    }
    for name, x in record(gpt, idx, called)[1].items():
        assert x.shape == shapes.get(name.split(".")[-1], (B, T, C)), name


@every_attention
def test_every_tap_is_live(attn):
    """What a tap returns is what the model goes on with."""
    gpt, idx = tiny_model(attn, num_key_value_heads=2), tokens()
    before = gpt(idx)[0]
    for name in tap_names(gpt.cfg):
        def noisy(x):
            return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        after = gpt(idx, tap=make_tap(gpt.cfg, {name: noisy}))[0]
        assert (after - before).abs().max() > 1e-3, name


def test_taps_compose_from_left_to_right_and_are_recorded_as_left():
    gpt, idx = tiny_model(), tokens()
    double = make_tap(gpt.cfg, {"embed": lambda x: 2 * x})
    plus = make_tap(gpt.cfg, {"embed": lambda x: x + 1})
    tap = compose(double, plus)
    logits, seen = record(gpt, idx, ["embed"], tap)
    assert torch.equal(seen["embed"], 2 * gpt.embed_tokens(idx) + 1)
    assert torch.equal(logits, gpt(idx, tap=tap)[0]) and compose(None, plus) is plus


@pytest.mark.parametrize("name", ["resid_pre", "9.z", "0.z_raw"])
def test_an_unknown_tap_is_refused(name):
    with pytest.raises(UserError, match="no activation is called"):
        record(tiny_model(), tokens(), [name])


# ---------------------------------------------------------------- config and seed

@pytest.mark.parametrize("tie", [False, True])
def test_the_variants_share_their_initial_weights_which_the_seed_decides(tie):
    def weights(attn, seed=4):
        torch.rand(3)  # the global generator has no say
        return GPT(tiny_config(attn=attn, tie_word_embeddings=tie), seed).state_dict()
    plain, other = weights("softmax"), weights("softmax", seed=8)
    for attn, extra in (("sigmoid", None), ("headnorm", "z_norm"), ("gated", "z_gate")):
        own = weights(attn)
        for name, p in plain.items():
            assert torch.equal(own.pop(name), p)
            assert "norm" in name or not torch.equal(other[name], p)
        assert own.keys() == {f"layers.{i}.self_attn.{extra}.weight" for i in range(2) if extra}
    assert plain["embed_tokens.weight"].std() == pytest.approx(0.3, rel=0.1)


NUMBERS = (*HF_SIZES, "rope_theta", "initializer_range")
BAD_SIZES = (None, True, -1, 8.0, "8", 10**400, 2**24)
BAD_FLOATS = (None, True, -1, "1", math.nan, math.inf, 10**400, 1e-320)
BAD_CONFIGS = [  # (field, value, what the line names)
    *((name, 0, name) for name in NUMBERS),
    *(("vocab_size", value, "vocab_size") for value in BAD_SIZES),
    *(("rope_theta", value, "rope_theta") for value in BAD_FLOATS),
    *(("rope_scaling", {**LLAMA3, key: None}, key) for key in LLAMA3 if key != "rope_type"),
    ("rope_scaling", {**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "linear"),
    ("rope_scaling", [], "rope_scaling"), ("hidden_size", 30, "num_attention_heads"),
    ("num_key_value_heads", 3, "num_key_value_heads"), ("head_dim", 7, "head_dim"),
    ("head_dim", 2**23, "head_dim"), ("tie_word_embeddings", 1, "tie_word"),
    ("attn", "linear", "attn"),
]


@pytest.mark.parametrize("field, value, named", BAD_CONFIGS, ids=lambda value: str(value)[:20])
def test_a_bad_config_is_named_in_one_line(field, value, named):
    with pytest.raises(UserError, match=named) as error:
        tiny_config(**{field: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("key, value", [
    ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True), ("sliding_window", 4096),
    ("model_type", "mistral"), ("architectures", ["GPT2LMHeadModel"]), ("rope_interleaved", True),
    ("quantization_config", {"quant_method": "gptq"}), ("partial_rotary_factor", 0.5),
    ("rope_scaling", "llama3"), ("hidden_size", None), ("rms_norm_eps", None),
])
def test_a_config_json_of_another_model_is_refused(key, value):
    with pytest.raises(UserError, match=key):
        Config.from_hf({**llama_config(tiny_config()), key: value})


def test_a_config_json_has_two_spellings_of_rope_and_harmless_keys():
    cfg = tiny_config(rope_theta=5e5, rope_scaling=LLAMA3, initializer_range=0.02)
    old = {**llama_config(cfg), "attention_dropout": 0.1, "torch_dtype": "float16"}
    bare = {key: old[key] for key in old if not key.startswith("rope_")}
    new = {**bare, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    assert Config.from_hf(old) == Config.from_hf(new) == cfg
    plain = {**bare, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}
    assert Config.from_hf(plain).rope_theta == 2e4 and Config.from_hf(bare).rope_theta == 1e4


# ---------------------------------------------------------------- generate

def test_temperature_zero_is_greedy_and_goes_on_beyond_the_context():
    gpt, start = tiny_model(), tokens(1, T - 4)
    out = gpt.generate(start, 10, temperature=0)
    assert out.shape == (1, T + 6) and torch.equal(out[:, :T - 4], start)
    for t in range(T - 4, T + 6):
        seen = out[:, max(0, t - T):t]  # the last `max_position_embeddings` tokens
        assert out[0, t] == gpt(seen)[0][0, -1].argmax()


def test_a_seed_decides_the_sample_and_top_k_leaves_out_the_rest():
    gpt, start = tiny_model(initializer_range=0.02), tokens(1, 4)  # flat: nearly any token comes

    def sample(seed, top_k=None):
        generator = torch.Generator().manual_seed(seed)
        return gpt.generate(start, 1, top_k=top_k, generator=generator)[0, -1].item()

    best = set(gpt(start)[0][0, -1].topk(3).indices.tolist())
    assert {sample(seed, top_k=3) for seed in range(60)} == best
    assert len({sample(seed) for seed in range(60)}) > 10 and sample(1, top_k=1000) == sample(1)
