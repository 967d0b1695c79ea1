"""A Llama-style decoder in one file, with five ways to attend.

    x = embed(tokens)
    for each layer:   x = x + attention(rms(x));   x = x + mlp(rms(x))
    logits = lm_head(rms(x))

In this file: `Config`, the shape of a model; rotary positions; the layers, of which
`Attention.mix` has the formulas of all `attn` (the bias comes from `GPT.mask_bias`); `GPT`, the
whole model, and how to open a saved one; and taps, to read and to edit activations. A *tap* is a
function that is called with every activation and its name, and may replace it: `tap_names` lists
all names and shapes.

Letters in shapes: B batch, T position, H query head, K key/value head, D head width, C model
width, F FFN width, V vocabulary. Modules and settings have the names of Hugging Face's Llama
(z_norm and z_gate are ours, `sinks` is gpt-oss's). A UserError says in one line what was wrong and
what to do.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.common import UserError, read_json, reason

ATTENTIONS = ("softmax", "sigmoid", "headnorm", "gated", "logit")
READOUTS = ("final", "attn_out")
Tap = Callable[[str, torch.Tensor], torch.Tensor]


# ---------------------------------------------------------------- config

POSITIVE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
HF_SIZES = (*POSITIVE, "head_dim")  # read from any config.json, besides rope and tied weights
HF_FAMILY = {  # model_type: the keys that it has besides, and what a missing key means
    "llama": dict(rms_norm_eps=1e-6, max_position_embeddings=2048, attention_bias=False,
                  mlp_bias=False),
    "mistral": dict(rms_norm_eps=1e-6, max_position_embeddings=131072, num_key_value_heads=8,
                    sliding_window=4096),
    "qwen2": dict(rms_norm_eps=1e-6, max_position_embeddings=32768, num_key_value_heads=32),
}
HF_NEVER_NULL = {  # these must not be null; elsewhere null stands as None
    "llama": ("hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    "mistral": ("hidden_act", "tie_word_embeddings", "num_key_value_heads"),
    "qwen2": ("hidden_act", "use_sliding_window", "head_dim"),
}
# Keys that change the forward pass, and the values of each that we compute. The other keys of a
# config.json (token ids, dtype, cache, dropout, versions) change nothing and are dropped.
HF_FIXED = {
    "model_type": tuple(HF_FAMILY), "hidden_act": ("silu", "swish"), "use_sliding_window": (False,),
    "architectures": (["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["LlamaModel"],
                      ["MistralForCausalLM"], ["Qwen2ForCausalLM"]),
    "partial_rotary_factor": (1.0,), "quantization_config": (),
}


@dataclass
class Config:
    """Shape of the decoder. Names are the keys of a Llama `config.json`, plus `attn`, `readout`
    and `qkv_bias`.

    `max_position_embeddings` is the training length: for sigmoid's bias, for llama3 positions whose
    file names no original length, and for train.py's choice of a kernel. Raises UserError naming
    the field, and KeyError for a rope_scaling that lacks a number of its type.
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
    attention_bias: bool = False  # of q, k, v and o
    qkv_bias: bool = False  # of q, k and v only, as in Qwen2
    mlp_bias: bool = False
    sliding_window: int | None = None  # a query sees so many tokens, with itself; None: all
    initializer_range: float = 0.02  # std of every initial weight matrix
    attn: str = "softmax"
    # attn_out: the logits read what the last layer's heads deliver, and nothing else. Then a head
    # that has nothing to say must be silent, because nothing behind it can ignore what it says.
    readout: str = "final"

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in (*POSITIVE, "rope_theta"):
            value = getattr(self, name)  # whatever a config.json holds; None if it is missing
            kind = (int, float) if name in ("rms_norm_eps", "rope_theta") else int
            if not isinstance(value, kind) or value <= 0:
                raise UserError(f"{name} must be a number above 0, not {value!r}")
        if self.attn not in ATTENTIONS:
            raise UserError(f"attn must be one of {', '.join(ATTENTIONS)}, not {self.attn!r}")
        if self.readout not in READOUTS:
            raise UserError(f"readout must be one of {', '.join(READOUTS)}, not {self.readout!r}")
        C, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if H % K != 0:
            raise UserError(f"num_key_value_heads must divide num_attention_heads {H}, not {K}")
        if self.head_dim is None:
            if C % H != 0:
                raise UserError(f"hidden_size must be a multiple of num_attention_heads {H}, not "
                                f"{C}")
            self.head_dim = C // H
        if self.head_dim % 2 != 0:
            raise UserError(f"head_dim must be even (rotation turns pairs), not {self.head_dim}")
        rope_frequencies(self)  # raises UserError for a rope_scaling that we do not have

    @classmethod
    def from_hf(cls, raw: dict) -> "Config":
        """The Config of a `config.json` of a Llama, Mistral or Qwen2, in the old spelling
        (`rope_theta`, `rope_scaling`) or the new one (`rope_parameters`). Raises UserError for a
        key that asks for another model.
        """
        rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
        for key, ours in HF_FIXED.items():
            found = rope.get(key, raw.get(key))
            if found is not None and found not in ours:
                wanted = " or ".join(map(str, ours)) or "absent"
                raise UserError(f"{key} must be {wanted}, not {found!r:.60}")
        family = raw.get("model_type") or "llama"
        for key in HF_NEVER_NULL[family]:
            if key in raw and raw[key] is None:
                raise UserError(f"{key} must not be null")
        usual = HF_FAMILY[family]
        sizes = {key: raw.get(key, usual.get(key)) for key in (*HF_SIZES, *usual)}
        theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        rope.pop("partial_rotary_factor", None)  # checked above
        original = "original_max_position_embeddings"
        if rope.get("rope_type", rope.get("type")) == "llama3":  # the top level wins
            rope[original] = raw.get(original, rope.get(original, sizes["max_position_embeddings"]))
        tie = raw.get("tie_word_embeddings", False)
        return cls(**sizes, rope_theta=theta, rope_scaling=rope or None, tie_word_embeddings=tie,
                   qkv_bias=family == "qwen2")


# ---------------------------------------------------------------- positions

def rope_frequencies(cfg: Config) -> torch.Tensor:
    """(D/2,) fp32 angles per position: `theta^(-2i/D)` (Su et al. 2021, arXiv 2104.09864).

    With `rope_scaling` of type linear, all wavelengths are stretched by `factor`; of type llama3,
    those longer than the original context are, short ones are kept, and those between are blended
    (Llama 3.1 release). Raises UserError for another type.
    """
    # 1 / theta^x, not theta^-x, to get the reference's last bit: 0.01 rad at position 100,000
    pairs = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu")
    freq = 1.0 / cfg.rope_theta ** (pairs / cfg.head_dim)
    scaling = cfg.rope_scaling or {"rope_type": "default"}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return freq
    if kind == "linear":
        return freq / scaling["factor"]
    if kind != "llama3":
        raise UserError(f"rope_scaling must be of type llama3 or linear, not {kind!r}")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretch, 1: keep
    return (1 - keep) * freq / scaling["factor"] + keep * freq


def rope_turns(cfg: Config, T, device):
    """cos and sin (T, D) of every position's angles, for `rotate`: (c, c) and (-s, s).

    Computed anew in each forward pass, in fp32, because half precision would turn far positions by
    wrong angles: the frequencies on a CPU, the angles on `device`.
    """
    positions = torch.arange(T, device=device, dtype=torch.float32)
    freq = rope_frequencies(cfg).to(device, non_blocking=positions.is_cuda)  # no wait for a GPU
    angle = torch.outer(positions, freq)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """x (B, H, T, D) with its pairs (a, b) = (x_i, x_{i+D/2}) turned: (a c - b s, b c + a s)."""
    y = x.float()
    half = y.shape[-1] // 2
    partner = y.roll(half, dims=-1)
    return (y * cos + partner * sin).type_as(x)


# ---------------------------------------------------------------- layers

class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in fp32."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        mean_square = y.pow(2).mean(-1, keepdim=True)
        y = y * torch.rsqrt(mean_square + self.eps)
        return self.weight * y.type_as(x)


class Attention(nn.Module):
    """Causal attention over (B, T, C) with rotary positions and grouped key/value heads."""

    def __init__(self, cfg: Config):
        super().__init__()
        C, D = cfg.hidden_size, cfg.head_dim
        H, K = cfg.num_attention_heads, cfg.num_key_value_heads
        self.H, self.K, self.D = H, K, D
        self.attn = cfg.attn
        qkv_bias = cfg.qkv_bias or cfg.attention_bias
        self.q_proj = nn.Linear(C, H * D, bias=qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=cfg.attention_bias)
        if cfg.attn == "headnorm":  # one gain of width D, shared by the heads of the layer
            self.z_norm = RMSNorm(D, cfg.rms_norm_eps)
        if cfg.attn == "gated":  # one gate a head
            self.z_gate = nn.Linear(C, H, bias=False)
        if cfg.attn == "logit":  # one logit a head, of a key that is not there
            self.sinks = nn.Parameter(torch.zeros(H))

    def forward(self, x, rope, bias, tap):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.D)
        k = self.k_proj(x).view(B, T, self.K, self.D)
        v = self.v_proj(x).view(B, T, self.K, self.D)
        q, k, v = tap("q", q), tap("k", k), tap("v", v)
        q = rotate(q.transpose(1, 2), *rope)  # (B, H, T, D)
        k = rotate(k.transpose(1, 2), *rope)  # (B, K, T, D)
        v = v.transpose(1, 2)
        if self.K < self.H:  # each key/value head serves H/K query heads
            k = k.repeat_interleave(self.H // self.K, dim=1)
            v = v.repeat_interleave(self.H // self.K, dim=1)
        z = self.mix(q, k, v, x, bias, tap)
        return self.o_proj(z.flatten(2))

    def mix(self, q, k, v, x, bias, tap):
        """Aggregate values (B, H, T, D) -> z (B, T, H, D), by the formula of `attn`.

            softmax    z = softmax(q k' / sqrt(D) + bias) v            bias: 0 or -inf
            sigmoid    z = sigmoid(q k' / sqrt(D) + bias) v            bias: -log(length) or -inf
            headnorm   z = RMSNorm(softmax(q k' / sqrt(D) + bias) v)   each head by itself
            gated      z = sigmoid(x W_g) softmax(q k' / sqrt(D) + bias) v   one gate a head
            logit      z = softmax([q k' / sqrt(D) + bias, b]) [v, 0]        one logit b a head

        x (B, T, C) is the input of the layer, normed. `bias` None means causal and nothing else,
        for the fused kernel. Sigmoid: Ramapuram et al. 2024, arXiv 2409.04431; length is that of
        training. Headnorm: arXiv 2605.06611. Gated: Qiu et al. 2025, arXiv 2505.06708, head-wise.
        Logit: that of gpt-oss (OpenAI 2025, arXiv 2508.10925): the weights may sum to less than 1.
        """
        if bias is None:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = tap("scores", q @ k.transpose(-2, -1) / math.sqrt(self.D)) + bias
            if self.attn == "sigmoid":
                pattern = torch.sigmoid(scores)
            elif self.attn == "logit":
                nowhere = self.sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)
                both = torch.cat((scores, nowhere), dim=-1)
                pattern = torch.softmax(both, dim=-1, dtype=torch.float32)[..., :-1]
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
        C, width, bias = cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias
        self.gate_proj = nn.Linear(C, width, bias=bias)
        self.up_proj = nn.Linear(C, width, bias=bias)
        self.down_proj = nn.Linear(width, C, bias=bias)

    def forward(self, x, tap):
        gate = tap("mlp_pre", self.gate_proj(x))
        up = tap("mlp_pre_linear", self.up_proj(x))
        hidden = tap("mlp_post", F.silu(gate) * up)
        return self.down_proj(hidden)


class Block(nn.Module):
    """One layer: x (B, T, C) -> x after it, and its attn_out, both (B, T, C)."""

    def __init__(self, cfg: Config):
        super().__init__()
        C, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(C, eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(C, eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, bias, tap):
        x = tap("resid_pre", x)
        out = self.self_attn(self.input_layernorm(x), rope, bias, tap)
        attn_out = tap("attn_out", out)
        x = tap("resid_mid", x + attn_out)
        out = self.mlp(self.post_attention_layernorm(x), tap)
        return tap("resid_post", x + tap("mlp_out", out)), attn_out


class GPT(nn.Module):
    """The decoder. Its weights are drawn from `seed` alone, the same for every `attn`."""

    def __init__(self, cfg: Config, seed: int = 0):
        super().__init__()
        self.cfg = cfg
        self.fused = True  # use torch's kernel for attention where there is no tap and no mask
        V, C = cfg.vocab_size, cfg.hidden_size
        # empty, as it is drawn below: torch's own draw takes a second on the meta device
        self.embed_tokens = nn.Embedding(V, C, _weight=torch.empty(V, C))
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(C, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(C, V, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if cfg.readout == "attn_out":  # then nothing reads what comes after the last attention
            last = self.layers[-1]
            for module in (last.post_attention_layernorm, last.mlp, self.norm):
                module.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        # draw z_gate last, so that all variants share the other initial weights
        for name, p in sorted(self.named_parameters(), key=lambda named: "z_gate" in named[0]):
            if p.dim() == 2 and not p.is_meta:
                nn.init.normal_(p, std=cfg.initializer_range, generator=generator)
            if name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, tap: Tap | None = None, mask=None):
        """idx (B, T) -> logits (B, T, V), mean loss in nats over targets (B, T) that are not -100.

        `tap(name, x) -> x` is called with every activation (`tap_names`) and may replace it.
        `mask` (T, T), True where query t may look at key s; causality is always kept. The loss is
        None without targets. Raises UserError for a mask that leaves a query without any key.
        """
        T = idx.shape[1]
        rope = rope_turns(self.cfg, T, idx.device)
        kernel = self.cfg.attn not in ("sigmoid", "logit")  # torch has one for the others
        sees_all = T <= (self.cfg.sliding_window or T)
        plain = kernel and tap is None and mask is None and sees_all
        bias = None if plain and self.fused else self.mask_bias(T, mask, idx.device)

        def tap_layer(name, activation):  # called while layer i runs
            return tap(f"{i}.{name}", activation)

        call = tap or untapped
        x = call("embed", self.embed_tokens(idx))
        for i, layer in enumerate(self.layers):
            x, attn_out = layer(x, rope, bias, tap_layer if tap else untapped)
        if self.cfg.readout == "attn_out":
            x = attn_out
        return self.unembed(x, targets, call)

    def unembed(self, x, targets, tap):
        """x (B, T, C), the states after the last layer, or with readout attn_out what its heads
        deliver -> logits (B, T, V) and loss, or None."""
        if self.cfg.readout == "final":
            x = self.norm(x)
        logits = self.lm_head(tap("final", x))
        if targets is None:
            return logits, None
        flat = logits.flatten(0, 1).float()
        loss = F.cross_entropy(flat, targets.flatten(), ignore_index=-100)
        return logits, loss

    def mask_bias(self, T, mask, device):
        """(T, T) to add to the scores: -inf where attention is not allowed, 0 where it is.

        In sigmoid attention -log(training length) in place of 0, so that T open gates start at a
        total weight near 1. Raises UserError for a mask that leaves a query without any key.
        """
        window = self.cfg.sliding_window or T
        allowed = torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - window)
        if mask is not None:
            allowed = allowed & mask
            if not allowed.any(-1).all():
                raise UserError("mask leaves a query without any key; allow at least itself")
        length = self.cfg.max_position_embeddings
        open_ = -math.log(length) if self.cfg.attn == "sigmoid" else 0.0
        bias = torch.full((T, T), -math.inf, device=device)
        return bias.masked_fill(allowed, open_)

    @classmethod
    def from_weights(cls, cfg: Config, weights: dict, where) -> "GPT":
        """The model whose state_dict is `weights`: these very tensors, not copies. Raises UserError
        naming `where` for tensors that do not fit `cfg`, or that hold nan or inf.
        """
        with torch.device("meta"):  # shapes without memory
            model = cls(cfg)
        try:
            model.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            raise UserError(f"{where} does not fit its config.json: {reason(error)}") from None
        if cfg.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        for name, weight in weights.items():
            low, high = weight.aminmax()  # both are nan if one number is; makes no copy
            if not (low.isfinite() and high.isfinite()):
                raise UserError(f"{where}: tensor {name!r} holds numbers that are not finite")
        return model

    @classmethod
    def from_run(cls, folder) -> "GPT":
        """Open the folder of a training of train.py: config.json and model.pt. Raises UserError
        naming the file."""
        from data.runs import load_checkpoint, read_config
        path = Path(folder) / "model.pt"
        cfg = Config(**read_config(folder)["model"])
        return cls.from_weights(cfg, load_checkpoint(path)["model"], path)

    @classmethod
    def from_llama(cls, folder, dtype: torch.dtype | None = None) -> "GPT":
        """Open a folder in Hugging Face's format (Llama 2 and 3, SmolLM2, Mistral, Qwen2 ...):
        config.json and model.safetensors, or its shards model-*.safetensors. Or a model of the hub,
        "org/name" or "org/name@revision", which is fetched.

        Nothing is unpickled. Weights stay mapped to the file: do not change it while the model is
        in use. A `dtype` other than the file's makes a converted copy. Raises UserError naming the
        file.
        """
        from data.llama import find, map_weights
        folder = find(folder)
        path = folder / "config.json"
        raw = read_json(path)
        try:
            cfg = Config.from_hf(raw)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path}: {reason(error)}") from None
        weights = map_weights(folder)
        tied = "lm_head.weight" not in weights  # or both are there, and may differ
        if tied and not cfg.tie_word_embeddings:
            raise UserError(f"{folder} has no lm_head.weight, and its config.json does not tie it "
                            "to the embedding: fetch it again")
        cfg.tie_word_embeddings = tied
        if tied:
            weights["lm_head.weight"] = weights.get("embed_tokens.weight")
        model = cls.from_weights(cfg, weights, folder)
        return model.to(dtype or model.lm_head.weight.dtype)  # one dtype where a file mixes them


# ---------------------------------------------------------------- looking inside

def tap_names(cfg: Config) -> list[str]:
    """Every name that `forward` gives to a tap, in the order of the calls (i is the layer).

        embed, i.resid_pre, i.attn_out, i.resid_mid, i.mlp_out, i.resid_post, final  (B, T, C)
        i.q  i.z (headnorm, gated: and i.z_raw, before norm or gate)                 (B, T, H, D)
        i.k  i.v                                                                     (B, T, K, D)
        i.scores (q k' / sqrt(D), before bias and mask)  i.pattern                   (B, H, T, T)
        i.mlp_pre (gate, before silu)  i.mlp_pre_linear (up)  i.mlp_post             (B, T, F)

    q and k are tapped before rotation. Rotation leaves position 0 as it is.

    The names follow TransformerLens with shorter paths: `i.q` is `blocks.i.attn.hook_q` there,
    `i.mlp_pre` is `blocks.i.mlp.hook_pre`, `i.resid_pre` is `blocks.i.hook_resid_pre`. Three
    names differ. `scores` are taken before bias and mask, `hook_attn_scores` after them. `final`
    (which `lm_head` reads: the last norm's output, gain included) and `z_raw` are ours;
    TransformerLens has no such hooks.
    """
    raw = ["z_raw"] if cfg.attn in ("headnorm", "gated") else []
    names = ["resid_pre", "q", "k", "v", "scores", "pattern", *raw, "z", "attn_out", "resid_mid",
             "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "resid_post"]
    inner = [f"{i}.{name}" for i in range(cfg.num_hidden_layers) for name in names]
    return ["embed", *inner, "final"]


def check_names(cfg: Config, names):
    """Raise UserError for a name that this model never gives out: no edit is lost silently."""
    known = tap_names(cfg)
    for name in names:
        if name not in known:
            raise UserError(f"no activation is called {name!r} in this model; "
                            f"names are like {', '.join(known[:9])}")


def untapped(name, x):
    """The tap that changes nothing."""
    return x


def make_tap(cfg: Config, edits: dict[str, Callable]) -> Tap:
    """A tap that applies `edits[name]` to the activation of that name and leaves the rest alone.
    Raises UserError for a name that this model does not have.
    """
    check_names(cfg, edits)
    return lambda name, x: edits[name](x) if name in edits else x


def compose(first: Tap | None, then: Tap) -> Tap:
    """One tap that applies `first`, if there is one, and then `then`."""
    return lambda name, x: then(name, first(name, x) if first else x)


def as_windows(idx) -> torch.Tensor:
    """Ids (B, T); one window of them may be a list or (T,). Raises UserError for anything else."""
    try:
        ids = torch.as_tensor(idx)
    except (TypeError, ValueError, RuntimeError):  # a text, or windows of several lengths
        ids = torch.empty(0)
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() not in (1, 2):
        raise UserError("ids of tokens are wanted, (B, T) or one window as a list, such as "
                        f"encoding.encode_ordinary(text), not {idx!r:.60}")
    return ids if ids.dim() == 2 else ids[None]


@torch.no_grad()
def record(model: GPT, idx, names, tap: Tap | None = None, mask=None):
    """Run the model on idx (B, T), or on one window, a list or (T,) of ids -> (logits, {name:
    activation}), as left by `tap`, if any. Raises UserError for a name that this model does not
    have, and for an idx that holds no ids.
    """
    idx = as_windows(idx)
    check_names(model.cfg, names)
    kept = {}

    def keep(name, x):
        if name in names:
            kept[name] = x
        return x
    logits, _ = model(idx, tap=compose(tap, keep), mask=mask)
    return logits, kept
