"""`GPT.from_llama` equals Hugging Face's models, inside too, and refuses what it cannot open. How a
folder may be spelled stands in test_parity.py."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import probe
from data.common import UserError
from data.llama import memory
from data.windows import llama_tokenizer
from model import GPT, Config, record, rope_turns, tap_names
from tests.tiny import (SHAPES, llama_names, tiny_llama_folder, tiny_model, tokens,
                        with_tokenizer)

# ---------------------------------------------------------------- the same numbers

PARAMETERS = {
    "Llama-2-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248, "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400, "SmolLM2-135M": 134_515_008,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_config_gives_the_published_size_and_angles(name):
    """Rope mistakes do not show at short context: compare far positions, too."""
    path = Path(__file__).parent / "llama_configs" / f"{name}.json"
    raw = json.loads(path.read_text())
    cfg = Config.from_hf(raw)
    with torch.device("meta"):
        gpt = GPT(cfg)
    assert sum(p.numel() for p in gpt.parameters()) == PARAMETERS[name]
    cos, sin = rope_turns(cfg, 131_072, "cpu")
    position = torch.arange(0, 131_072, 97)
    reference = LlamaRotaryEmbedding(transformers.LlamaConfig(**raw))
    cos_wanted, sin_wanted = reference(torch.zeros(1), position[None])
    half = cfg.head_dim // 2
    assert torch.equal(cos[position], cos_wanted[0])
    assert torch.equal(sin[position, half:], sin_wanted[0, :, half:])
    assert torch.equal(sin[position, :half], -sin_wanted[0, :, :half])


def open_reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


GIVES = {  # our activation: the module of a layer of transformers that gives it
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "mlp_pre": "mlp.gate_proj",
    "mlp_pre_linear": "mlp.up_proj", "mlp_out": "mlp.down_proj",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_activations_agree_with_transformers(tmp_path, shape):
    """In windows of 60 tokens; the original context of the llama3 rope is 16 here."""
    reference = open_reference(tiny_llama_folder(tmp_path, **SHAPES[shape]))
    gpt, idx, given = GPT.from_llama(tmp_path), tokens(2, 60), {}

    def keep(module, takes, gives):
        given[module] = gives
    for module in reference.modules():
        module.register_forward_hook(keep)
    found = reference(idx, output_hidden_states=True, output_attentions=True)
    logits, ours = record(gpt, idx, tap_names(gpt.cfg))
    theirs = {"final": found.hidden_states[-1]}
    for i, layer in enumerate(reference.model.layers):
        theirs[f"{i}.resid_pre"] = found.hidden_states[i]
        theirs[f"{i}.pattern"] = found.attentions[i]
        for name, module in GIVES.items():
            theirs[f"{i}.{name}"] = given[layer.get_submodule(module)]
    torch.testing.assert_close(logits, found.logits, rtol=0, atol=1e-4)
    for name, wanted in theirs.items():
        x = ours[name].reshape(wanted.shape)
        torch.testing.assert_close(x, wanted, rtol=0, atol=1e-4)


SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2)
MADE = {  # by transformers, to be opened by us: names of biases that only it decides on
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("name", MADE)
def test_what_transformers_makes_opens_in_shards_and_has_every_link(tmp_path, name):
    config = MADE[name]
    reference = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in reference.parameters():
            p.normal_(std=0.3)
    reference.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    gpt, idx = GPT.from_llama(tmp_path), tokens(4, 20)
    torch.testing.assert_close(gpt(idx)[0], reference(idx).logits, rtol=0, atol=1e-4)
    cut = probe.cuts(gpt, idx, idx, k=5)
    assert {row["link"] for row in cut} == {link.name for link in probe.LINKS if link.cut}


# ---------------------------------------------------------------- what opens

WEIGHTS = "model.safetensors"
def test_the_model_has_one_dtype_the_asked_one_or_that_of_the_head(tmp_path):
    weights = llama_names(tiny_model())
    weights["lm_head.weight"] = weights["lm_head.weight"].bfloat16()
    safetensors.torch.save_file(weights, tiny_llama_folder(tmp_path) / WEIGHTS)
    for asked in (None, torch.float32):
        gpt = GPT.from_llama(tmp_path, asked)
        assert {p.dtype for p in gpt.parameters()} == {asked or torch.bfloat16}


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("name", [WEIGHTS, "model-1.safetensors", "pytorch_model.bin"])
def test_nothing_is_unpickled(tmp_path, name):
    """A pickle that would write a file, wherever weights are looked for."""
    folder, trace = tiny_llama_folder(tmp_path / "llama"), tmp_path / "trace"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (trace,)
    (folder / WEIGHTS).unlink()
    torch.save(Bomb(), folder / name)
    with pytest.raises(UserError):
        GPT.from_llama(folder)
    assert not trace.exists()


# ---------------------------------------------------------------- the text it reads

WORDS = {"[UNK]": 0, "the": 1, "<s>": 2}


def opened(folder, *flags):
    look = probe.parse(["--llama", str(folder), *flags])
    model, = probe.open_llama(look).values()
    return model.kinds


@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>"}])
def test_bos_comes_first_where_it_is_asked_for(tmp_path, bos):
    folder = with_tokenizer(tiny_llama_folder(tmp_path), WORDS, bos)
    plain, with_bos = opened(folder), opened(folder, "--bos")
    assert list(plain) == ["random tokens", "English text"]
    assert list(with_bos) == ["random tokens after <s>", "English text after <s>"]
    for before, after in zip(plain.values(), with_bos.values()):
        (x, _), (x_bos, y_bos) = before[0], after[0]
        assert (x_bos[:, 0] == 2).all()
        assert torch.equal(x_bos[:, 1:], x[:, :-1])
        assert torch.equal(y_bos, x)


def test_special_tokens_are_shown(tmp_path):
    path = with_tokenizer(tmp_path, WORDS) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(path))
    _, decode = llama_tokenizer(tmp_path, 50)
    assert decode([2, 1]) == "<s> the"


@pytest.mark.parametrize("words, bos, told", [
    (WORDS, None, "leave --bos out"),
    (WORDS, "the the", "leave --bos out"),
    (WORDS | {"the": 50}, "<s>", "is of another model: it gives the id 50")])
def test_a_tokenizer_without_bos_or_of_another_model(tmp_path, words, bos, told):
    folder = with_tokenizer(tiny_llama_folder(tmp_path), words, bos)
    with pytest.raises(UserError, match=told):
        opened(folder, "--bos")


def test_the_memory_is_told_before_and_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    folder = tiny_llama_folder(tmp_path)
    assert "0.00 GB of memory" in memory(folder)
    monkeypatch.setattr(os, "sysconf", lambda name: 10, raising=False)
    with pytest.raises(UserError, match="this machine has 0.0: take a smaller model"):
        memory(folder)
