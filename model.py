"""A Llama-style decoder in one file, with three ways to attend.

    x = embed(tokens)
    for each layer:   x = x + attention(rms(x));   x = x + mlp(rms(x))
    logits = lm_head(rms(x))

Letters in shapes: B batch, T position, H head, D head width, C model width,
F FFN width, V vocabulary. Module names are those of Hugging Face's Llama, names
of activations those of TransformerLens (see `tap_names`). The only thing that
`attn` changes is `Attention.mix`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

ATTENTIONS = ("softmax", "sigmoid", "headnorm")
Tap = Callable[[str, torch.Tensor], torch.Tensor]


class ModelError(ValueError):
    """A config, checkpoint or tap that cannot be used. The message is one line for the user."""


@dataclass
class Config:
    """Shape of the decoder. Names are the keys of a Llama `config.json`, plus `attn`.

    `max_position_embeddings` is the training length; it sets nothing but the bias of
    sigmoid attention and the context that `generate` keeps. Raises ModelError.
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
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "max_position_embeddings"):
            _check_whole_number(name, getattr(self, name))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        _check_whole_number("num_key_value_heads", self.num_key_value_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ModelError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                                 f"{self.num_attention_heads}; change one of them or set head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        _check_whole_number("head_dim", self.head_dim)
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of dimensions, so it must be even")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(f"num_key_value_heads {self.num_key_value_heads} does not divide "
                             f"num_attention_heads {self.num_attention_heads}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not (0 < value < math.inf):
                raise ModelError(f"{name} must be a positive number, not {value!r}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ModelError(f"tie_word_embeddings must be true or false, not {self.tie_word_embeddings!r}")
        if self.attn not in ATTENTIONS:
            raise ModelError(f"attn must be one of {', '.join(ATTENTIONS)}, not {self.attn!r}")
        rope_frequencies(self)  # raises for a scaling that we do not have

    @classmethod
    def from_hf(cls, raw: dict) -> "Config":
        """The Config of a Llama `config.json`, in the old spelling (`rope_theta`, `rope_scaling`) or
        the new one (`rope_parameters`). Raises ModelError naming a key that asks for another model."""
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ModelError(f"rope_scaling must be an object, not {rope!r}")
        flat = {**raw, **rope}
        for key, ours in HF_FIXED.items():
            if flat.get(key) is not None and flat[key] != ours:
                raise ModelError(f"{key} is {flat[key]!r}; this model has only {ours!r}")
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        return cls(**{key: raw.get(key) for key in HF_SIZES}, rope_theta=flat.get("rope_theta", 10000.0),
                   rope_scaling=scaling or None, tie_word_embeddings=raw.get("tie_word_embeddings", False))


HF_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
# Keys that change the forward pass, and the one value of each that we compute. Whatever else a
# config.json holds (token ids, dtype, cache, dropout, versions) changes nothing and is dropped.
HF_FIXED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "sliding_window": None, "partial_rotary_factor": 1.0, "rope_interleaved": False,
            "quantization_config": None}


def _check_whole_number(name, value):
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**24:
        raise ModelError(f"{name} must be a whole number from 1 to {2**24}, not {value!r}")


# ---------------------------------------------------------------- positions

def rope_frequencies(cfg: Config) -> torch.Tensor:
    """(D/2,) fp32 angles per position: `theta^(-2i/D)` (Su et al. 2021, arXiv 2104.09864).

    With `rope_scaling` of type llama3, wavelengths longer than the original context are
    stretched by `factor`, short ones kept, those between blended (Llama 3.1 release).
    """
    # 1 / theta^x and not theta^-x: the last bit of a frequency is 0.01 rad at position 100,000, so keep the reference's
    freq = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu") / cfg.head_dim)
    if cfg.rope_scaling is None:
        return freq
    s = cfg.rope_scaling
    kind = s.get("rope_type", s.get("type")) if isinstance(s, dict) else s
    if kind == "default":
        return freq
    if kind != "llama3":
        raise ModelError(f"rope_scaling of type {kind!r} is not supported; only 'llama3' (or none) is")
    try:
        factor, low, high = (float(s[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = float(s["original_max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"rope_scaling of type llama3: {error} is missing or not a number") from None
    if not (0 < factor < math.inf and 0 < low < high < math.inf and 0 < context < math.inf):
        raise ModelError(f"rope_scaling of type llama3 needs positive numbers and low_freq_factor < high_freq_factor, not {s}")
    turns = context * freq / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretch, 1: keep
    return (1 - keep) * freq / factor + keep * freq


def rope_turns(freq, T):
    """cos and sin (T, D) of every position's angles, for `rotate`: (c, c) and (-s, s)."""
    angle = torch.outer(torch.arange(T, device=freq.device, dtype=torch.float32), freq)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (a, b) = (x_i, x_{i+D/2}) of x (B, H, T, D): (a cos - b sin, b cos + a sin)."""
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

    def forward(self, x, rope, bias, tap):
        B, T, _ = x.shape
        q = tap("q", self.q_proj(x).view(B, T, self.H, self.D))  # tapped before rotation
        k = tap("k", self.k_proj(x).view(B, T, self.K, self.D))
        v = tap("v", self.v_proj(x).view(B, T, self.K, self.D))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H or K, T, D)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if self.K < self.H:  # each key/value head serves H/K query heads
            k, v = (t.repeat_interleave(self.H // self.K, dim=1) for t in (k, v))
        z = self.mix(q, k, v, bias, tap)
        return self.o_proj(z.reshape(B, T, self.H * self.D))

    def mix(self, q, k, v, bias, tap):
        """Aggregate values (B, H, T, D) -> z (B, T, H, D). The one place where `attn` matters.

            softmax    z = softmax(q k' / sqrt(D) + bias) v                bias: 0 or -inf
            sigmoid    z = sigmoid(q k' / sqrt(D) + bias) v                bias: -log(training length) or -inf
            headnorm   z = RMSNorm(softmax(q k' / sqrt(D) + bias) v)       each head by itself, then W_O

        Sigmoid: Ramapuram et al. 2024, arXiv 2409.04431. Headnorm: arXiv 2605.06611.
        `bias` None means causal and nothing else, for the fused kernel.
        """
        if bias is None:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = tap("scores", q @ k.transpose(-2, -1) / math.sqrt(self.D)) + bias
            pattern = torch.sigmoid(scores) if self.attn == "sigmoid" else torch.softmax(scores, dim=-1, dtype=torch.float32)
            z = tap("pattern", pattern.type_as(v)) @ v
        z = z.transpose(1, 2)
        if self.attn == "headnorm":
            z = self.z_norm(tap("z_raw", z))
        return tap("z", z)


class MLP(nn.Module):
    """SwiGLU: `W_down (silu(W_gate x) * (W_up x))` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x, tap):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if tap is not untapped:
            gate, up = tap("mlp_pre", torch.stack((gate, up)))  # (2, B, T, F)
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
    """The decoder. `GPT(cfg, seed)` draws its weights from `seed` alone, the same for every `attn`."""

    def __init__(self, cfg: Config, seed: int = 0):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("rope_freq", rope_frequencies(cfg), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.dim() == 2 and not p.is_meta:
                nn.init.normal_(p, std=cfg.initializer_range, generator=generator)

    def _apply(self, fn, *args, **kwargs):
        """`.to(bfloat16)` converts the weights; the frequencies stay exact, or far positions would turn the wrong way."""
        super()._apply(fn, *args, **kwargs)
        self.rope_freq = rope_frequencies(self.cfg).to(self.rope_freq.device)
        return self

    def forward(self, idx, targets=None, tap: Tap | None = None, mask=None):
        """idx (B, T) -> logits (B, T, V), mean loss in nats over targets (B, T) that are not -100.

        `tap(name, x) -> x` is called with every activation (`tap_names`) and may replace it.
        `mask` (T, T) or (B, T, T), True where query t may look at key s; causality is always kept.
        """
        B, T = idx.shape
        if mask is not None and mask.dim() == 3 and mask.shape[0] not in (1, B):
            raise ModelError(f"mask is for a batch of {mask.shape[0]}, the tokens are a batch of {B}")
        rope = rope_turns(self.rope_freq, T)
        bias = None
        if self.cfg.attn == "sigmoid" or tap is not None or mask is not None:
            bias = self.attention_bias(T, mask, idx.device)
        call = untapped if tap is None else tap

        x = call("embed", self.embed_tokens(idx))
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, bias, untapped if tap is None else lambda name, y, i=i: tap(f"{i}.{name}", y))
        logits = self.lm_head(call("final", self.norm(x)))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def attention_bias(self, T, mask=None, device=None):
        """(T, T) or (B, 1, T, T) added to the scores: -inf where a query may not look, else 0
        (sigmoid: -log of the training length, so that T open gates start at a total weight near 1)."""
        allowed = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape[-2:] != (T, T) or mask.dim() not in (2, 3):
                raise ModelError(f"mask must be boolean of shape ({T}, {T}) or (B, {T}, {T}), "
                                 f"not {mask.dtype} {tuple(mask.shape)}")
            allowed = allowed & mask
            if not allowed.any(-1).all():
                raise ModelError("mask leaves a query without any key to attend to; allow at least itself")
        open_ = -math.log(self.cfg.max_position_embeddings) if self.cfg.attn == "sigmoid" else 0.0
        bias = torch.full(allowed.shape, -math.inf, device=device).masked_fill(allowed, open_)
        return bias.unsqueeze(1) if bias.dim() == 3 else bias

    @classmethod
    def from_llama(cls, folder, dtype: torch.dtype | None = None) -> "GPT":
        """Open a folder in the format of Hugging Face's `LlamaForCausalLM`: Llama 2, 3, 3.1, 3.2, SmolLM2, ...

        Reads config.json and model.safetensors, or the shards that model.safetensors.index.json names.
        Weights stay mapped to the file: they are read when first used, never copied, so do not
        change the file meanwhile. `dtype` other than the file's makes a converted copy instead.
        Raises ModelError naming file and tensor. Nothing is unpickled. Needs `pip install safetensors`.
        """
        folder = Path(folder)
        raw = _read_json(folder / "config.json")
        try:
            cfg = Config.from_hf(raw)
        except ModelError as error:
            raise ModelError(f"{folder / 'config.json'}: {error}") from None
        weights, home = _map_weights(folder)
        if cfg.num_hidden_layers > len(weights):  # before the time of building them is spent
            raise ModelError(f"{folder}: config.json has {cfg.num_hidden_layers} layers, the weights are {len(weights)} tensors")
        cfg.tie_word_embeddings = "lm_head.weight" not in weights  # the file knows best
        with torch.device("meta"):
            model = cls(cfg)
        wanted = dict(model.named_parameters())
        for name in wanted:
            if name not in weights:
                raise ModelError(f"{folder}: no file has tensor {name!r}")
        for name, weight in weights.items():
            if name not in wanted:
                raise ModelError(f"{home[name]}: tensor {name!r} has no place in this model")
            if weight.shape != wanted[name].shape:
                raise ModelError(f"{home[name]}: tensor {name!r} has shape {tuple(weight.shape)}, "
                                 f"config.json asks for {tuple(wanted[name].shape)}")
            if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ModelError(f"{home[name]}: tensor {name!r} is {weight.dtype}; only float32, float16 and bfloat16 are read")
        dtype = dtype or weights["embed_tokens.weight"].dtype  # one for all, where a file mixes them
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        model.load_state_dict(weights, assign=True, strict=False)  # strict would ask for a tied head
        if cfg.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model

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
                nxt = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
            idx = torch.cat((idx, nxt), dim=1)
        return idx


# ---------------------------------------------------------------- reading Llama checkpoints

def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object")
    return content


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint and the tensors that its index expects in each."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return {single: []}
    if not index.exists():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        raise ModelError(f"{folder} has neither {single.name} nor {index.name}" + (
            f"; {pickled[0]} is pickled and could run code, so it is not read: convert it to safetensors" if pickled else ""))
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map")
    files = {}
    for name, shard in weight_map.items():  # a Windows path splits at both slashes and knows drives
        if not isinstance(shard, str) or PureWindowsPath(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: tensor {name!r} is said to be in {shard!r}, which is no .safetensors file of this folder")
        files.setdefault(folder / shard, []).append(name)
    return files


def _map_weights(folder: Path):
    """({name: tensor}, {name: file}) of a checkpoint, by our names. The tensors are views of the mapped files."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ModelError("reading a Llama checkpoint needs the safetensors package: pip install safetensors") from None
    weights, home = {}, {}
    for path, expected in _weight_files(folder).items():
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{path}: {' '.join(str(error).split())}") from None
        for name in expected:
            if name not in found:
                raise ModelError(f"{path}: tensor {name!r} is missing, though the index lists it")
        for name, weight in found.items():
            if name.endswith("rotary_emb.inv_freq"):  # old checkpoints store what `rope_frequencies` computes
                continue
            ours = name.removeprefix("model.")
            if ours in weights:
                raise ModelError(f"{path}: tensor {name!r} is there twice")
            weights[ours], home[ours] = weight, path
    return weights, home


# ---------------------------------------------------------------- looking inside

def untapped(name, x):
    return x


def tap_names(cfg: Config) -> list[str]:
    """Every name that `forward` gives to a tap, in the order of the call.

        embed, i.resid_pre, i.attn_out, i.resid_mid, i.mlp_out, i.resid_post, final  (B, T, C)
        i.q  i.z (headnorm: and i.z_raw, before the norm)                            (B, T, H, D)
        i.k  i.v                                                                     (B, T, K, D)
        i.scores (q k' / sqrt(D), before bias and mask)  i.pattern                   (B, H, T, T)
        i.mlp_pre (gate, up: before silu)                                            (2, B, T, F)
        i.mlp_post (silu(gate) * up)                                                 (B, T, F)

    q and k are tapped before rotation. Rotation leaves position 0 as it is.
    """
    names = ["resid_pre", "q", "k", "v", "scores", "pattern", "z_raw", "z", "attn_out", "resid_mid",
             "mlp_pre", "mlp_post", "mlp_out", "resid_post"]
    if cfg.attn != "headnorm":
        names.remove("z_raw")
    return ["embed", *(f"{i}.{name}" for i in range(cfg.num_hidden_layers) for name in names), "final"]


def make_tap(cfg: Config, edits: dict[str, Callable]) -> Tap:
    """A tap that applies `edits[name]` to the activation of that name and leaves the rest alone.

    Raises ModelError for a name that this model never gives out, so that no edit is lost silently.
    """
    known = tap_names(cfg)
    for name in edits:
        if name not in known:
            raise ModelError(f"no activation is called {name!r} in this model; names are like {', '.join(known[:9])}")
    return lambda name, x: edits[name](x) if name in edits else x


def compose(*taps: Tap | None) -> Tap | None:
    """One tap that applies `taps` from left to right; None stands for no tap."""
    taps = [t for t in taps if t is not None]

    def tap(name, x):
        for t in taps:
            x = t(name, x)
        return x
    return tap if taps else None


@torch.no_grad()
def record(model: GPT, idx, names, tap: Tap | None = None, mask=None):
    """Run the model on idx (B, T) -> (logits, {name: activation}), as left by `tap` if there is one."""
    kept = {}
    keep = make_tap(model.cfg, {name: lambda x, name=name: kept.setdefault(name, x) for name in names})
    logits, _ = model(idx, tap=compose(tap, keep), mask=mask)
    return logits, kept
