"""The decoder: it equals the formulas written in numpy, sees no future, and opens to taps."""

import math

import numpy as np
import pytest
import torch

from data.common import UserError
from model import ATTENTIONS, GPT, RMSNorm, make_tap, tap_names
from model import rope_frequencies
from tests.tiny import SHAPES, activation, tiny_config, tiny_model, tokens

T = 24
HERE = SHAPES | {"heads alone": dict(readout="attn_out")}
every_attention = pytest.mark.parametrize("attn", ATTENTIONS)


# ---------------------------------------------------------------- the formulas in numpy

def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Numpy:
    """The forward pass of one window in float64, one head at a time."""

    def __init__(self, gpt, mask):
        self.cfg, self.allowed = gpt.cfg, np.tril(mask)
        parameters = gpt.named_parameters(remove_duplicate=False)
        self.weights = {name: p.detach().double().numpy() for name, p in parameters}
        if gpt.cfg.sliding_window:
            self.allowed = np.triu(self.allowed, 1 - gpt.cfg.sliding_window)
        angles = np.outer(np.arange(len(mask)), rope_frequencies(gpt.cfg))
        self.turns = np.exp(1j * angles)  # (T, D/2)

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def rms(self, x, name):
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        gain = self.weights[f"{name}.weight"]
        return x / np.sqrt(mean_square + self.cfg.rms_norm_eps) * gain

    def rotated(self, x):
        """Pairs as complex numbers."""
        first, second = np.split(x, 2, axis=1)
        turned = (first + 1j * second) * self.turns
        return np.concatenate((turned.real, turned.imag), axis=1)

    def pattern(self, q, k, extra):
        """`extra`: the exponential of the learned logit, 0 where there is none."""
        q, k = self.rotated(q), self.rotated(k)
        scores = q @ k.T / math.sqrt(self.cfg.head_dim)
        if self.cfg.attn == "sigmoid":
            length = self.cfg.max_position_embeddings
            return self.allowed * sigmoid(scores - math.log(length))
        a = self.allowed * np.exp(scores)
        return a / (a.sum(1, keepdims=True) + extra)

    def attention(self, x, layer):
        H, K = self.cfg.num_attention_heads, self.cfg.num_key_value_heads
        q = np.split(self.linear(x, f"{layer}.q_proj"), H, axis=1)
        k = np.split(self.linear(x, f"{layer}.k_proj"), K, axis=1)
        v = np.split(self.linear(x, f"{layer}.v_proj"), K, axis=1)
        extra = np.exp(self.weights.get(f"{layer}.sinks", np.full(H, -np.inf)))
        heads = []
        for h in range(H):
            g = h * K // H  # the key/value head that serves query head h
            z = self.pattern(q[h], k[g], extra[h]) @ v[g]
            if self.cfg.attn == "headnorm":
                z = self.rms(z, f"{layer}.z_norm")
            if self.cfg.attn == "gated":
                z *= sigmoid(self.linear(x, f"{layer}.z_gate"))[:, h, None]
            heads.append(z)
        return self.linear(np.concatenate(heads, axis=1), f"{layer}.o_proj")

    def mlp(self, x, layer):
        gate = self.linear(x, f"{layer}.gate_proj")
        up = self.linear(x, f"{layer}.up_proj")
        return self.linear(gate * sigmoid(gate) * up, f"{layer}.down_proj")

    def logits(self, idx):
        x = self.weights["embed_tokens.weight"][idx]
        for i in range(self.cfg.num_hidden_layers):
            layer = f"layers.{i}"
            y = self.rms(x, f"{layer}.input_layernorm")
            delivered = self.attention(y, f"{layer}.self_attn")
            x = x + delivered
            y = self.rms(x, f"{layer}.post_attention_layernorm")
            x = x + self.mlp(y, f"{layer}.mlp")
        if self.cfg.readout == "attn_out":
            return self.linear(delivered, "lm_head")
        return self.linear(self.rms(x, "norm"), "lm_head")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", HERE)
@every_attention
def test_logits_and_loss_agree_with_numpy(attn, shape, masked):
    """The window is shorter than the training length, which sigmoid attention knows."""
    n, gpt = T - 4, tiny_model(attn, **HERE[shape])
    idx = tokens(1, n)
    mask = torch.ones(n, n).bool()
    if masked:  # at random; a part of it is in the future, which stays unseen
        mask = (tokens(n, n) < 20) | torch.eye(n).bool()
    targets = idx.clone()
    targets[:, 15:] = -100  # these do not count
    logits, loss = gpt(idx, targets, mask=mask if masked else None)
    wanted = Numpy(gpt, mask).logits(idx[0])
    np.testing.assert_allclose(logits[0].detach(), wanted, rtol=0, atol=1e-4)
    p = np.exp(wanted)
    p /= p.sum(1, keepdims=True)
    nats = -np.log(p[range(15), idx[0, :15]])
    assert loss.item() == pytest.approx(nats.mean(), abs=1e-5)


def test_a_mask_that_leaves_a_query_without_a_key_is_refused():
    mask = torch.ones(T, T).bool().triu(1)
    with pytest.raises(UserError, match="without any key"):
        tiny_model()(tokens(), mask=mask)


@pytest.mark.parametrize("fused", [True, False])
@every_attention
def test_the_future_is_never_seen(attn, fused):
    """With scores above 1e4, where a large negative number in place of -inf would lose."""
    gpt, idx = tiny_model(attn), tokens()
    gpt.fused = fused
    for layer in gpt.layers:
        layer.self_attn.q_proj.weight.data *= 300
        layer.self_attn.k_proj.weight.data *= 300
    scores = activation(gpt, idx, "0.scores")
    assert scores.abs().max() > 1e4
    before = gpt(idx)[0]
    for t in (1, 10, T - 1):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 7) % 50
        after = gpt(changed)[0]
        moved = (before != after).any(-1)  # (B, T)
        assert not moved[:, :t].any()
        assert moved[:, t:].all()


@every_attention
def test_bf16_stays_close_and_its_angles_stay_in_fp32(attn):
    """Angles made in bf16 would be wrong by a radian at far positions."""
    gpt, idx = tiny_model(attn, initializer_range=0.1), tokens()
    turns = []

    def keep(layer, inputs):
        turns.append(inputs[1][0])
    gpt.layers[0].register_forward_pre_hook(keep)
    exact = gpt(idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        auto = gpt(idx)[0]
    low = gpt.to(torch.bfloat16)(idx)[0]
    for logits, cosines in zip((auto, low), turns[1:]):
        assert (logits - exact).std() < 0.02 * exact.std()
        assert torch.equal(cosines, turns[0])


def test_a_norm_of_large_states_does_not_overflow_in_fp16():
    large = torch.full((4,), 3000.0, dtype=torch.float16)
    normed = RMSNorm(4, 1e-5)(large)
    assert normed.tolist() == pytest.approx([1, 1, 1, 1], rel=1e-3)


# ---------------------------------------------------------------- taps

@every_attention
def test_taps_are_called_as_listed_with_the_listed_shapes(attn):
    gpt, idx = tiny_model(attn, num_key_value_heads=2, head_dim=10), tokens()
    shapes = {
        "q": (2, T, 4, 10), "z": (2, T, 4, 10), "z_raw": (2, T, 4, 10),
        "k": (2, T, 2, 10), "v": (2, T, 2, 10),
        "scores": (2, 4, T, T), "pattern": (2, 4, T, T),
        "mlp_pre": (2, T, 40), "mlp_pre_linear": (2, T, 40), "mlp_post": (2, T, 40)}
    called = []

    def look(name, x):
        called.append(name)
        kind = name.split(".")[-1]
        assert x.shape == shapes.get(kind, (2, T, 32)), name
        return x
    gpt(idx, tap=look)
    assert called == tap_names(gpt.cfg)


@every_attention
def test_every_tap_is_live(attn):
    """The model goes on with the tensor that a tap returns."""
    gpt, idx = tiny_model(attn, num_key_value_heads=2), tokens()
    before = gpt(idx)[0]

    def noisy(x):
        generator = torch.Generator().manual_seed(3)
        return x + torch.randn(x.shape, generator=generator)
    for name in tap_names(gpt.cfg):
        tap = make_tap(gpt.cfg, {name: noisy})
        after = gpt(idx, tap=tap)[0]
        assert (after - before).abs().max() > 1e-3, name


@pytest.mark.parametrize("name", ["resid_pre", "9.z", "0.z_raw"])
def test_an_unknown_tap_is_refused(name):
    with pytest.raises(UserError, match="no activation is called"):
        make_tap(tiny_config(), {name: abs})


# ---------------------------------------------------------------- config and seed

def initial(attn="softmax", seed=4):
    torch.rand(3)  # the global generator has no say
    return GPT(tiny_config(attn=attn), seed).state_dict()


@every_attention
def test_the_variants_share_their_initial_weights(attn):
    own = initial(attn)
    for name, p in initial().items():
        assert torch.equal(own.pop(name), p), name
    extra = {"headnorm": "z_norm", "gated": "z_gate", "logit": "sinks"}.get(attn)
    assert all(extra in name for name in own)
    assert bool(own) == bool(extra)


def test_the_seed_decides_the_initial_weights():
    plain, other = initial(), initial(seed=8)
    for name in plain:
        assert torch.equal(plain[name], other[name]) == ("norm" in name)
