"""Models small enough to build in every test, and the folder of a tiny Llama."""

import json

import torch

from model import GPT, HF_SIZES, Config, record

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
SHAPES = {  # settings that each change another part of the forward pass
    "plain": {},
    "wide heads": dict(head_dim=12),
    "tied": dict(tie_word_embeddings=True),
    "grouped": dict(num_key_value_heads=2),
    "one key head": dict(num_key_value_heads=1),
    "llama3 rope": dict(num_key_value_heads=2, rope_theta=50.0, rope_scaling=LLAMA3),
    "linear rope": dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "biases": dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "qwen2": dict(num_key_value_heads=2, qkv_bias=True, tie_word_embeddings=True),
    "a window": dict(num_key_value_heads=2, sliding_window=10),
}


def tiny_config(**changes) -> Config:
    """2 layers, 4 heads, C 32, F 40, V 50, T 24; weights large enough for every part to count."""
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=24, initializer_range=0.3)
    return Config(**{**sizes, **changes})


def tiny_model(attn="softmax", seed=0, **changes) -> GPT:
    """Its norms have gains other than one, so that a forgotten gain shows."""
    gpt = GPT(tiny_config(attn=attn, **changes), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in gpt.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5, generator=generator)
    return gpt


def tokens(n=2, length=24, seed=0, vocab_size=50):
    """(n, length) random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (n, length), generator=generator)


def activation(model, x, name, tap=None):
    """One activation of a pass over windows x (N, T)."""
    return record(model, x, [name], tap)[1][name]


def near(a, b, tol=1e-4) -> bool:
    """Tensors, lists or numbers that are equal up to rounding."""
    a = torch.as_tensor(a, dtype=torch.float)
    b = torch.as_tensor(b, dtype=torch.float)
    return torch.allclose(a, b, atol=tol, rtol=tol)


def llama_config(cfg) -> dict:
    """A Config as the config.json of a Llama."""
    keys = (*HF_SIZES, "rope_theta", "rope_scaling", "tie_word_embeddings", "attention_bias",
            "mlp_bias", "sliding_window")
    raw = {key: getattr(cfg, key) for key in keys}
    kind = "qwen2" if cfg.qkv_bias else "mistral" if cfg.sliding_window else "llama"
    return {**raw, "model_type": kind}


def llama_names(gpt) -> dict:
    """{Hugging Face's name: weight}; a tied head is left out."""
    inner = {name: p.detach() for name, p in gpt.named_parameters()}
    return {name if name == "lm_head.weight" else f"model.{name}": p for name, p in inner.items()}


def tiny_llama_folder(folder, **changes):
    """`tiny_model(**changes)` in Hugging Face's format; returns the folder."""
    from safetensors.torch import save_file
    gpt = tiny_model(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(llama_config(gpt.cfg)))
    save_file(llama_names(gpt), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_tokenizer(folder, words, bos=None):
    """The folder with a tokenizer of these words, {word: id}; the first stands for all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
    return folder
