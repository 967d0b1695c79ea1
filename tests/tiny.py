"""Models small enough to build in every test, and the folder of a tiny Llama."""

import json

import torch

from model import GPT, HF_SIZES, Config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


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


def tiny_llama_folder(tmp_path, **changes):
    """`tiny_model(**changes)` in Hugging Face's format: config.json and model.safetensors in
    tmp_path, which is returned. Needs the safetensors package."""
    from safetensors.torch import save_file
    gpt = tiny_model(**changes)
    tmp_path.mkdir(parents=True, exist_ok=True)
    raw = {key: getattr(gpt.cfg, key) for key in (*HF_SIZES, "rope_theta", "rope_scaling")}
    raw.update(model_type="llama", tie_word_embeddings=gpt.cfg.tie_word_embeddings)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(llama_names(gpt), tmp_path / "model.safetensors")
    return tmp_path


def llama_names(gpt) -> dict:
    """{Hugging Face's name: weight}; a tied head is left out."""
    inner = {name: p.detach() for name, p in gpt.named_parameters()}
    return {name if name == "lm_head.weight" else f"model.{name}": p for name, p in inner.items()}
