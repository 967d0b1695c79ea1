"""`GPT.from_llama` equals Hugging Face's LlamaForCausalLM, and refuses what it cannot open."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from data.common import UserError
from model import GPT, Config, record, rope_turns, tap_names
from tests.tiny import SHAPES, llama_names, tiny_llama_folder, tiny_model, tokens

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
    return transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")


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


# ---------------------------------------------------------------- what opens

WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
ALL = llama_names(tiny_model())


def logits(gpt):
    return gpt(tokens(1, 10))[0]


def write_weights(folder, **change):
    safetensors.torch.save_file({**ALL, **change}, folder / WEIGHTS)


LENGTH = "original_max_position_embeddings"


@pytest.mark.parametrize("gone, added", [
    ("rms_norm_eps", {}), ("max_position_embeddings", {}), (LENGTH, {}), (None, {LENGTH: 8})])
def test_a_config_means_what_it_means_to_transformers(tmp_path, gone, added):
    """Where a key is missing, and where the original length stands beside the rope, too."""
    folder = tiny_llama_folder(tmp_path, **SHAPES["llama3 rope"])
    raw = json.loads((folder / "config.json").read_text()) | added
    for keys in (raw, raw["rope_scaling"]):
        keys.pop(gone, None)
    (folder / "config.json").write_text(json.dumps(raw))
    wanted = open_reference(folder)(tokens(1, 10)).logits
    assert (logits(GPT.from_llama(folder)) - wanted).abs().max() < 1e-4


def test_what_transformers_saves_in_shards_opens(tmp_path):
    """Its config.json has the new spelling of rope."""
    shape, many = SHAPES["llama3 rope"], tmp_path / "many"
    reference = open_reference(tiny_llama_folder(tmp_path / "one", **shape))
    reference.save_pretrained(many, max_shard_size="10KB")
    assert len(list(many.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(GPT.from_llama(many)), logits(tiny_model(**shape)))


def test_rotary_tables_of_old_files_are_left_out(tmp_path):
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_weights(tiny_llama_folder(tmp_path), **tables)
    assert torch.equal(logits(GPT.from_llama(tmp_path)), logits(tiny_model()))


@pytest.mark.parametrize("tie", [False, True])
def test_the_head_is_tied_when_the_file_has_none_whatever_config_says(tmp_path, tie):
    folder = tiny_llama_folder(tmp_path, tie_word_embeddings=tie)
    raw = json.loads((folder / "config.json").read_text())
    raw["tie_word_embeddings"] = not tie
    (folder / "config.json").write_text(json.dumps(raw))
    gpt = GPT.from_llama(folder)
    assert (gpt.lm_head.weight is gpt.embed_tokens.weight) == tie
    assert torch.equal(logits(gpt), logits(tiny_model(tie_word_embeddings=tie)))


def test_the_model_has_one_dtype_the_asked_one_or_that_of_the_head(tmp_path):
    write_weights(tiny_llama_folder(tmp_path), **{HEAD: ALL[HEAD].bfloat16()})
    for asked in (None, torch.float32):
        gpt = GPT.from_llama(tmp_path, asked)
        assert {p.dtype for p in gpt.parameters()} == {asked or torch.bfloat16}


# ---------------------------------------------------------------- what is refused

def no_weights(folder):
    (folder / WEIGHTS).unlink()


def cut_short(folder):
    os.truncate(folder / WEIGHTS, 9999)


def pointer(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")


@pytest.mark.parametrize("damage, named", [
    (no_weights, "neither model.safetensors nor model-*"),
    (cut_short, WEIGHTS),
    (pointer, "run git lfs pull"),
])
def test_a_broken_folder_is_told_in_one_line(tmp_path, damage, named):
    damage(tiny_llama_folder(tmp_path))
    with pytest.raises(UserError) as error:
        GPT.from_llama(tmp_path)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def in_shards(folder):
    """The folder with its weights in two shards of odd names and an index."""
    rest, weight_map = dict(ALL), {}
    head = {HEAD: rest.pop(HEAD)}
    for part, file in ((rest, "weights-a.safetensors"), (head, "weights-b.safetensors")):
        safetensors.torch.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_says_which_files_are_read(tmp_path):
    """Whatever their names, and whatever else an earlier save has left."""
    in_shards(tiny_llama_folder(tmp_path))
    stale = {HEAD: torch.zeros_like(ALL[HEAD])}
    safetensors.torch.save_file(stale, tmp_path / "model-00009-of-00009.safetensors")
    assert torch.equal(logits(GPT.from_llama(tmp_path)), logits(tiny_model()))


def test_an_absent_shard_is_named(tmp_path):
    """And the head, which it holds, is not taken for a tied one."""
    in_shards(tiny_llama_folder(tmp_path))
    (tmp_path / "weights-b.safetensors").unlink()
    with pytest.raises(UserError, match="weights-b.safetensors is not there, but"):
        GPT.from_llama(tmp_path)


def test_without_an_index_no_tensor_may_stand_twice(tmp_path):
    folder = tiny_llama_folder(tmp_path)
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    safetensors.torch.save_file({HEAD: ALL[HEAD]}, folder / "model-2.safetensors")
    with pytest.raises(UserError, match="there twice"):
        GPT.from_llama(folder)


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
