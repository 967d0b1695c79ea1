"""A Llama-style decoder in one file, with four ways to attend.

    x = embed(tokens)
    for each layer:   x = x + attention(rms(x));   x = x + mlp(rms(x))
    logits = lm_head(rms(x))

Letters in shapes: B batch, T position, H query head, K key/value head, D head width, C model
width, F FFN width, V vocabulary. Modules and settings have the names of Hugging Face's Llama
(z_norm and z_gate are ours). A *tap* is a function that is called with every activation, by name,
and may replace it; the names are TransformerLens's (`tap_names`, with all shapes). The one thing
that `attn` changes is `Attention.mix`. A UserError is one line on what the user can mend.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.common import UserError, read_json
from data.llama import map_weights

ATTENTIONS = ("softmax", "sigmoid", "headnorm", "gated")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what weights may be
Tap = Callable[[str, torch.Tensor], torch.Tensor]


def untapped(name, x):
    return x


# ---------------------------------------------------------------- config

HF_WHOLE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
HF_SIZES = (*HF_WHOLE, "head_dim", "rms_norm_eps")
# Keys that change the forward pass, and the one value of each that we compute. Whatever else a
# config.json holds (token ids, dtype, cache, dropout, versions) changes nothing and is dropped.
HF_FIXED = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "sliding_window": None,
    "partial_rotary_factor": 1.0, "rope_interleaved": False, "quantization_config": None,
}


def require(right: bool, name: str, value, wanted: str):
    if not right:
        raise UserError(f"{name} must be {wanted}, not {value!r:.60}")


def require_whole(name, value):
    right = type(value) is int and 0 < value < 2**24  # isinstance would take True for a number
    require(right, name, value, "a whole number from 1 to 2**24 - 1")


def require_positive(name, value):
    right = type(value) in (int, float) and 1e-30 < value < 1e30  # fp32 can compute with it
    require(right, name, value, "a positive number")


@dataclass
class Config:
    """Shape of the decoder. Names are the keys of a Llama `config.json`, plus `attn`.

    `max_position_embeddings` is the training length; it sets nothing but the bias of
    sigmoid attention and the context that `generate` keeps. Raises UserError naming the field.
    """

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 344
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02  # std of every initial weight matrix
    attn: str = "softmax"

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in HF_WHOLE:
            require_whole(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            require_positive(name, getattr(self, name))
        tie, known = self.tie_word_embeddings, ", ".join(ATTENTIONS)
        require(type(tie) is bool, "tie_word_embeddings", tie, "true or false")
        require(self.attn in ATTENTIONS, "attn", self.attn, f"one of {known}")
        C, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        require(H % K == 0, "num_key_value_heads", K, f"a divisor of num_attention_heads {H}")
        if self.head_dim is None:
            wanted = f"a multiple of num_attention_heads {H} (or set head_dim)"
            require(C % H == 0, "hidden_size", C, wanted)
            self.head_dim = C // H
        require_whole("head_dim", self.head_dim)
        require_whole("num_attention_heads * head_dim", H * self.head_dim)
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even: rotation turns pairs")
        rope_frequencies(self)  # raises for a scaling that we do not have

    @classmethod
    def from_hf(cls, raw: dict) -> "Config":
        """The Config of a Llama `config.json`, in the old spelling (`rope_theta`, `rope_scaling`)
        or the new one (`rope_parameters`). Raises UserError for a key that asks for another model.
        """
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        require(isinstance(rope, dict), "rope_scaling", rope, "an object")
        flat = {**raw, **rope}
        for key, ours in HF_FIXED.items():
            require(flat.get(key) in (None, ours), key, flat.get(key), f"{ours!r} for this model")
        sizes = {key: raw.get(key) for key in HF_SIZES}
        theta, tie = flat.get("rope_theta", 10000.0), raw.get("tie_word_embeddings", False)
        plain = ("rope_theta", "partial_rotary_factor")  # in rope_parameters, but no scaling
        scaling = {key: rope[key] for key in rope if key not in plain} or None
        return cls(**sizes, rope_theta=theta, rope_scaling=scaling, tie_word_embeddings=tie)


# ---------------------------------------------------------------- positions

def rope_frequencies(cfg: Config) -> torch.Tensor:
    """(D/2,) fp32 angles per position: `theta^(-2i/D)` (Su et al. 2021, arXiv 2104.09864).

    With `rope_scaling` of type llama3, wavelengths longer than the original context are stretched
    by `factor`, short ones kept, those between blended (Llama 3.1 release). Raises UserError.
    """
    # 1 / theta^x and not theta^-x: keep the reference's last bit, 0.01 rad at position 100,000
    pairs = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu")
    freq = 1.0 / cfg.rope_theta ** (pairs / cfg.head_dim)
    scaling = cfg.rope_scaling
    if scaling is None:
        return freq
    require(isinstance(scaling, dict), "rope_scaling", scaling, "an object")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return freq
    require(kind == "llama3", "rope_scaling's type", kind, "'llama3'")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for key in keys:
        require_positive(f"rope_scaling's {key}", scaling.get(key))
    factor, low, high, context = (scaling[key] for key in keys)
    require(low < high, "rope_scaling's low_freq_factor", low, "below high_freq_factor")
    turns = context * freq / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretch, 1: keep
    return (1 - keep) * freq / factor + keep * freq


def rope_turns(freq, T):
    """cos and sin (T, D) of every position's angles, for `rotate`: (c, c) and (-s, s)."""
    angle = torch.outer(torch.arange(T, device=freq.device, dtype=torch.float32), freq)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """x (B, H, T, D) with its pairs (a, b) = (x_i, x_{i+D/2}) turned: (a c - b s, b c + a s)."""
    y = x.float()  # rolled by half its width, every element meets its partner
    return (y * cos + y.roll(y.shape[-1] // 2, dims=-1) * sin).type_as(x)


# ---------------------------------------------------------------- layers

class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.type_as(x)


class Attention(nn.Module):
    """Causal attention over (B, T, C) with rotary positions and grouped key/value heads."""

    def __init__(self, cfg: Config):
        super().__init__()
        H, K, D, C = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.hidden_size
        self.attn, self.H, self.K, self.D = cfg.attn, H, K, D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        if cfg.attn == "headnorm":  # one gain of width D, shared by the heads of the layer
            self.z_norm = RMSNorm(D, cfg.rms_norm_eps)
        if cfg.attn == "gated":  # one gate a head
            self.z_gate = nn.Linear(C, H, bias=False)

    def forward(self, x, rope, bias, tap):
        B, T, _ = x.shape
        q = tap("q", self.q_proj(x).view(B, T, self.H, self.D))  # tapped before rotation
        k = tap("k", self.k_proj(x).view(B, T, self.K, self.D))
        v = tap("v", self.v_proj(x).view(B, T, self.K, self.D))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H or K, T, D)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if self.K < self.H:  # each key/value head serves H/K query heads
            k, v = (t.repeat_interleave(self.H // self.K, dim=1) for t in (k, v))
        z = self.mix(q, k, v, x, bias, tap)
        return self.o_proj(z.reshape(B, T, self.H * self.D))

    def mix(self, q, k, v, x, bias, tap):
        """Aggregate values (B, H, T, D) -> z (B, T, H, D). The one place where `attn` matters.

            softmax    z = softmax(q k' / sqrt(D) + bias) v            bias: 0 or -inf
            sigmoid    z = sigmoid(q k' / sqrt(D) + bias) v            bias: -log(length) or -inf
            headnorm   z = RMSNorm(softmax(q k' / sqrt(D) + bias) v)   each head by itself
            gated      z = sigmoid(x W_g) softmax(q k' / sqrt(D) + bias) v   one gate a head

        x (B, T, C) is the input of the layer, normed. `bias` None means causal and nothing else,
        for the fused kernel. Sigmoid: Ramapuram et al. 2024, arXiv 2409.04431; length is that of
        training. Headnorm: arXiv 2605.06611. Gated: Qiu et al. 2025, arXiv 2505.06708, head-wise.
        """
        if bias is None:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = tap("scores", q @ k.transpose(-2, -1) / math.sqrt(self.D)) + bias
            if self.attn == "sigmoid":
                pattern = torch.sigmoid(scores)
            else:
                pattern = torch.softmax(scores, dim=-1, dtype=torch.float32)
            z = tap("pattern", pattern.type_as(v)) @ v
        z = z.transpose(1, 2)
        if self.attn == "headnorm":
            z = self.z_norm(tap("z_raw", z))
        if self.attn == "gated":
            z = torch.sigmoid(self.z_gate(x)).unsqueeze(-1) * tap("z_raw", z)
        return tap("z", z)


class MLP(nn.Module):
    """SwiGLU: `W_down (silu(W_gate x) * (W_up x))` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x, tap):
        gate = tap("mlp_pre", self.gate_proj(x))
        up = tap("mlp_pre_linear", self.up_proj(x))
        return self.down_proj(tap("mlp_post", F.silu(gate) * up))


class Block(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, bias, tap):
        x = tap("resid_pre", x)
        x = x + tap("attn_out", self.self_attn(self.input_layernorm(x), rope, bias, tap))
        x = tap("resid_mid", x)
        x = x + tap("mlp_out", self.mlp(self.post_attention_layernorm(x), tap))
        return tap("resid_post", x)


class GPT(nn.Module):
    """The decoder. Its weights are drawn from `seed` alone, the same for every `attn`."""

    def __init__(self, cfg: Config, seed: int = 0):
        super().__init__()
        self.cfg = cfg
        self.fused = True  # use torch's kernel for attention where nothing in it is looked at
        # empty, as it is drawn below: torch's own draw would take a second on the meta device
        empty = torch.empty(cfg.vocab_size, cfg.hidden_size)
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size, _weight=empty)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("rope_freq", rope_frequencies(cfg), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        # gates are drawn like the other matrices, as published, but last: those keep their draws
        for _, p in sorted(self.named_parameters(), key=lambda named: "z_gate" in named[0]):
            if p.dim() == 2 and not p.is_meta:
                nn.init.normal_(p, std=cfg.initializer_range, generator=generator)

    def _apply(self, fn, *args, **kwargs):
        """`.to(bfloat16)` converts all but the frequencies: far positions would turn wrong."""
        super()._apply(fn, *args, **kwargs)
        self.rope_freq = rope_frequencies(self.cfg).to(self.rope_freq.device)
        return self

    def forward(self, idx, targets=None, tap: Tap | None = None, mask=None):
        """idx (B, T) -> logits (B, T, V), mean loss in nats over targets (B, T) that are not -100.

        `tap(name, x) -> x` is called with every activation (`tap_names`) and may replace it.
        `mask` (T, T), True where query t may look at key s; causality is always kept.
        """
        T = idx.shape[1]
        rope = rope_turns(self.rope_freq, T)
        fused = self.fused and tap is None and mask is None and self.cfg.attn != "sigmoid"
        bias = None if fused else self.attention_bias(T, mask, idx.device)

        call = tap or untapped
        x = call("embed", self.embed_tokens(idx))
        for i, layer in enumerate(self.layers):
            inner = (lambda name, y, i=i: tap(f"{i}.{name}", y)) if tap else untapped
            x = layer(x, rope, bias, inner)
        return self.unembed(x, targets, call)

    def unembed(self, x, targets, tap):
        """The states after the last layer (B, T, C) -> logits and loss."""
        logits = self.lm_head(tap("final", self.norm(x)))
        if targets is None:
            return logits, None
        flat = logits.flatten(0, 1).float()
        return logits, F.cross_entropy(flat, targets.flatten(), ignore_index=-100)

    def attention_bias(self, T, mask=None, device=None):
        """(T, T) to add to the scores: -inf where attention is not allowed, 0 where it is (sigmoid:
        -log of the training length, so that T open gates start at a total weight near 1)."""
        allowed = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        if mask is not None:
            given = (mask.dtype, *mask.shape)
            require(given == (torch.bool, T, T), "mask", given, f"boolean of shape ({T}, {T})")
            allowed = allowed & mask
            if not allowed.any(-1).all():
                raise UserError("mask leaves a query without any key; allow at least itself")
        length = self.cfg.max_position_embeddings
        open_ = -math.log(length) if self.cfg.attn == "sigmoid" else 0.0
        return torch.full((T, T), -math.inf, device=device).masked_fill(allowed, open_)

    @torch.no_grad()
    def generate(self, idx, new_tokens: int, temperature=1.0, top_k=None, generator=None):
        """Continue idx (1, T) by sampling; temperature 0 takes the likeliest token each time."""
        for _ in range(new_tokens):
            logits, _ = self(idx[:, -self.cfg.max_position_embeddings:])
            logits = logits[:, -1].float()
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            if temperature == 0:
                nxt = logits.argmax(-1, keepdim=True)
            else:
                p = torch.softmax(logits / temperature, -1)
                nxt = torch.multinomial(p, 1, generator=generator)
            idx = torch.cat((idx, nxt), dim=1)
        return idx

    @classmethod
    def from_weights(cls, cfg: Config, weights: dict, where) -> "GPT":
        """The model whose state_dict is `weights`: these very tensors, each read once to be sure
        that it is finite. What cfg asks for costs nothing until the weights are known to fit it.
        Raises UserError naming `where` and the tensor.
        """
        L = cfg.num_hidden_layers
        if 9 * L > len(weights):  # a layer has nine tensors or ten
            raise UserError(f"{where}: {len(weights)} tensors are too few for {L} layers")
        with torch.device("meta"):  # shapes without memory
            model = cls(cfg)
        wanted = model.state_dict()
        for name in {**wanted, **weights}:
            ours, found = wanted.get(name), weights.get(name)
            tensor = f"{where}: tensor {name!r:.99}"
            if ours is None:
                raise UserError(f"{tensor} has no place in this model")
            plain = isinstance(found, torch.Tensor) and found.layout == torch.strided
            if not plain or found.is_meta or not found.is_contiguous():
                raise UserError(f"{tensor} is missing or no ordinary tensor")
            if found.shape != ours.shape or found.dtype not in FLOATS:
                raise UserError(f"{tensor} is {found.dtype} of shape {tuple(found.shape)}, "
                                f"config.json asks for floats of shape {tuple(ours.shape)}")
        for name, found in weights.items():
            if not all(map(math.isfinite, found.aminmax())):  # nan comes through; no copy is made
                raise UserError(f"{where}: tensor {name!r} holds numbers that are not finite")
        model.load_state_dict(weights, assign=True)
        if cfg.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model

    @classmethod
    def from_llama(cls, folder, dtype: torch.dtype | None = None) -> "GPT":
        """Open a folder in the format of Hugging Face's `LlamaForCausalLM` (Llama 2 and 3, SmolLM2
        ...): config.json and model.safetensors, or its shards model-*.safetensors.

        Nothing is unpickled. Weights stay mapped to the file, so do not change it meanwhile; a
        `dtype` other than the file's makes a converted copy. Raises UserError naming the file.
        """
        folder = Path(folder)
        raw = read_json(folder / "config.json")
        try:
            cfg = Config.from_hf(raw)
        except UserError as error:
            raise UserError(f"{folder / 'config.json'}: {error}") from None
        weights = map_weights(folder)
        cfg.tie_word_embeddings = "lm_head.weight" not in weights  # the file knows best
        if cfg.tie_word_embeddings:
            weights["lm_head.weight"] = weights.get("embed_tokens.weight")
        model = cls.from_weights(cfg, weights, folder)
        return model.to(dtype or model.lm_head.weight.dtype)  # one for all, where a file mixes them


# ---------------------------------------------------------------- looking inside

def tap_names(cfg: Config) -> list[str]:
    """Every name that `forward` gives to a tap, in the order of the call.

        embed, i.resid_pre, i.attn_out, i.resid_mid, i.mlp_out, i.resid_post, final  (B, T, C)
        i.q  i.z (headnorm, gated: and i.z_raw, before norm or gate)                 (B, T, H, D)
        i.k  i.v                                                                     (B, T, K, D)
        i.scores (q k' / sqrt(D), before bias and mask)  i.pattern                   (B, H, T, T)
        i.mlp_pre (gate, before silu)  i.mlp_pre_linear (up)  i.mlp_post             (B, T, F)

    q and k are tapped before rotation. Rotation leaves position 0 as it is.
    """
    raw = ["z_raw"] if cfg.attn in ("headnorm", "gated") else []
    names = ["resid_pre", "q", "k", "v", "scores", "pattern", *raw, "z", "attn_out", "resid_mid",
             "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "resid_post"]
    inner = [f"{i}.{name}" for i in range(cfg.num_hidden_layers) for name in names]
    return ["embed", *inner, "final"]


def make_tap(cfg: Config, edits: dict[str, Callable]) -> Tap:
    """A tap that applies `edits[name]` to the activation of that name and leaves the rest alone.

    Raises UserError for a name that this model never gives out, so that no edit is lost silently.
    """
    known = tap_names(cfg)
    for name in edits:
        if name not in known:
            raise UserError(f"no activation is called {name!r} in this model; "
                            f"names are like {', '.join(known[:9])}")
    return lambda name, x: edits[name](x) if name in edits else x


def compose(first: Tap | None, then: Tap) -> Tap:
    """One tap that applies `first`, if there is one, and then `then`."""
    return then if first is None else lambda name, x: then(name, first(name, x))


@torch.no_grad()
def record(model: GPT, idx, names, tap: Tap | None = None, mask=None):
    """Run the model on idx (B, T) -> (logits, {name: activation}), as left by `tap`, if any."""
    kept = {}
    keepers = {name: lambda x, name=name: kept.setdefault(name, x) for name in names}
    keep = make_tap(model.cfg, keepers)
    logits, _ = model(idx, tap=compose(tap, keep), mask=mask)
    return logits, kept
