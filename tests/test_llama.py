"""`GPT.from_llama` equals Hugging Face's LlamaForCausalLM, and refuses what it cannot open."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from data.common import UserError
from model import GPT, Config, record, tap_names
from tests.tiny import SHAPES, llama_names, tiny_llama_folder, tiny_model, tokens

# ---------------------------------------------------------------- the same numbers

PARAMETERS = {
    "Llama-2-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248, "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400, "SmolLM2-135M": 134_515_008,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_config_gives_the_published_size_and_angles(name):
    """Rope mistakes do not show at short context: compare far positions, too."""
    raw = json.loads((Path(__file__).parent / "llama_configs" / f"{name}.json").read_text())
    with torch.device("meta"):
        gpt = GPT(Config.from_hf(raw))
    assert sum(p.numel() for p in gpt.parameters()) == PARAMETERS[name]
    reference = LlamaRotaryEmbedding(transformers.LlamaConfig(**raw))
    position = torch.arange(0, 131_072, 97)
    cos, sin = reference(torch.zeros(1), position[None])
    angle = torch.outer(position.float(), gpt.rope_freq)
    assert torch.equal(angle.cos(), cos[0].chunk(2, -1)[0])
    assert torch.equal(angle.sin(), sin[0].chunk(2, -1)[0])


def open_reference(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")


SAME = {  # our activation: the module of a layer of transformers that takes it or gives it
    "resid_pre": ("input_layernorm", "takes"), "q": ("self_attn.q_proj", "gives"),
    "k": ("self_attn.k_proj", "gives"), "v": ("self_attn.v_proj", "gives"),
    "z": ("self_attn.o_proj", "takes"), "attn_out": ("self_attn.o_proj", "gives"),
    "resid_mid": ("post_attention_layernorm", "takes"), "gate": ("mlp.gate_proj", "gives"),
    "up": ("mlp.up_proj", "gives"), "mlp_post": ("mlp.down_proj", "takes"),
    "mlp_out": ("mlp.down_proj", "gives"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_activations_agree_with_transformers(tmp_path, shape):
    """In windows of 60 tokens; the original context of the llama3 rope is 16 here."""
    reference, theirs = open_reference(tiny_llama_folder(tmp_path, **SHAPES[shape])), {}
    for name, module in reference.named_modules():
        def keep(module, takes, gives, name=name):
            theirs[name] = {"takes": takes[0] if takes else None, "gives": gives}
        module.register_forward_hook(keep)
    gpt, idx = GPT.from_llama(tmp_path), tokens(2, 60)
    with torch.no_grad():
        pairs = [(gpt(idx)[0], reference(idx).logits)]
    _, ours = record(gpt, idx, tap_names(gpt.cfg))
    pairs.append((ours["final"], theirs["model.norm"]["gives"]))
    for i in range(2):
        ours[f"{i}.gate"], ours[f"{i}.up"] = ours[f"{i}.mlp_pre"], ours[f"{i}.mlp_pre_linear"]
        pairs.append((ours[f"{i}.pattern"], theirs[f"model.layers.{i}.self_attn"]["gives"][1]))
        for name, (module, side) in SAME.items():
            pairs.append((ours[f"{i}.{name}"], theirs[f"model.layers.{i}.{module}"][side]))
    for x, wanted in pairs:
        torch.testing.assert_close(x.reshape(wanted.shape), wanted, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- what opens

HEAD, NORM, EMBED = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"
Q, WEIGHTS = "model.layers.1.self_attn.q_proj.weight", "model.safetensors"
ALL = llama_names(tiny_model())


def logits(gpt):
    return gpt(tokens(1, 10))[0]


def config(**change):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return damage


def tensors(change):
    """Some other weights; None takes one out."""
    changed = {**ALL, **change}
    left = {name: changed[name] for name in changed if changed[name] is not None}
    return lambda folder: safetensors.torch.save_file(left, folder / WEIGHTS)


def put(name, make):
    """Something else by that name."""
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)
    return damage


def test_what_transformers_saves_in_shards_opens(tmp_path):
    """Its config.json has the new spelling of rope."""
    one, many = tiny_llama_folder(tmp_path / "one", **SHAPES["llama3 rope"]), tmp_path / "many"
    open_reference(one).save_pretrained(many, max_shard_size="10KB")
    assert len(list(many.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(GPT.from_llama(many)), logits(GPT.from_llama(one)))


def test_rotary_tables_of_old_files_are_left_out(tmp_path):
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors(tables)(tiny_llama_folder(tmp_path))
    assert torch.equal(logits(GPT.from_llama(tmp_path)), logits(tiny_model()))


@pytest.mark.parametrize("tie", [False, True])
def test_the_head_is_tied_when_the_file_has_none_whatever_config_says(tmp_path, tie):
    config(tie_word_embeddings=not tie)(tiny_llama_folder(tmp_path, tie_word_embeddings=tie))
    gpt = GPT.from_llama(tmp_path)
    assert gpt.cfg.tie_word_embeddings == tie == (gpt.lm_head.weight is gpt.embed_tokens.weight)
    assert torch.equal(logits(gpt), logits(tiny_model(tie_word_embeddings=tie)))


def test_the_model_has_one_dtype_the_asked_one_or_that_of_the_head(tmp_path):
    tensors({HEAD: ALL[HEAD].bfloat16()})(tiny_llama_folder(tmp_path))
    for asked, wanted in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        gpt = GPT.from_llama(tmp_path, asked)
        assert {p.dtype for p in gpt.parameters()} == {wanted}


# ---------------------------------------------------------------- what is refused

BROKEN = {  # what is done to the folder, and what the line must name
    "no config": (put("config.json", lambda path: None), "config.json"),
    "a pipe": (put("config.json", os.mkfifo), "config.json: it is no ordinary file"),
    "no JSON": (put("config.json", lambda path: path.write_text("{v")), "config.json is not JSON"),
    "another model": (config(hidden_act="relu"), "config.json: hidden_act must be 'silu'"),
    "too wide": (config(hidden_size=2**20, head_dim=8), "floats of shape (50, 1048576)"),
    "too deep": (config(num_hidden_layers=20_000), "too few for 20000 layers"),
    "too shallow": (config(num_hidden_layers=1), "'layers.1."),
    "no weights": (put(WEIGHTS, lambda path: None), "neither model.safetensors nor model-*"),
    "endless weights": (put(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), "no ordinary"),
    "cut weights": (lambda folder: os.truncate(folder / WEIGHTS, 9999), "model.safetensors: "),
    "missing": (tensors({Q: None}), "q_proj.weight' is missing"),
    "twice": (tensors({"norm.weight": torch.ones(32)}), "norm.weight' is there twice"),
    "transposed": (tensors({EMBED: ALL[EMBED].T.contiguous()}), "of shape (32, 50), config.json"),
    "wrong dtype": (tensors({Q: ALL[Q].to(torch.int8)}), "is torch.int8 of shape"),
    "not finite": (tensors({NORM: torch.full((32,), float("nan"))}), "not finite"),
}


@pytest.mark.parametrize("damage, named", BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_told_in_one_line_at_once(tmp_path, damage, named):
    damage(tiny_llama_folder(tmp_path))
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        GPT.from_llama(tmp_path)
    line = str(error.value)
    assert time.perf_counter() - start < 10 and "\n" not in line and len(line) < 600
    assert str(tmp_path) in line and named in line


def test_a_missing_package_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        GPT.from_llama(tiny_llama_folder(tmp_path))


def test_nothing_is_unpickled(tmp_path):
    """A pickle that would write a file is put in every place where weights are looked for."""
    folder, trace = tiny_llama_folder(tmp_path / "llama"), tmp_path / "trace"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (trace,)

    for name in (WEIGHTS, "model-1.safetensors", "pytorch_model.bin"):
        (folder / WEIGHTS).unlink(missing_ok=True)
        torch.save(Bomb(), folder / name)
        with pytest.raises(UserError):
            GPT.from_llama(folder)
    assert not trace.exists()
