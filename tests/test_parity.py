"""Spellings of a tiny Llama's folder: each opens with the logits that transformers gives it, or is
refused in one line. None opens as another model."""

import json

import pytest
import safetensors.torch
import torch
import transformers

from data.common import UserError
from model import GPT
from tests.tiny import LLAMA3, SHAPES, llama_config, llama_names, tiny_model, tokens

GONE = object()  # a key that is taken out of config.json
CLASSES = {"mistral": transformers.MistralForCausalLM, "qwen2": transformers.Qwen2ForCausalLM}
WEIGHTS = "model.safetensors"
LENGTH = "original_max_position_embeddings"
SHORT = {key: value for key, value in LLAMA3.items() if key != LENGTH}


# ---------------------------------------------------------------- how weights are written
# write(folder, {name: tensor})

def save(folder, weights, file=WEIGHTS):
    safetensors.torch.save_file(weights, folder / file, metadata={"format": "pt"})


def as_type(dtype, only=""):
    """All tensors, or those whose names hold `only`, in another dtype."""
    def write(folder, weights):
        save(folder, {name: w.to(dtype) if only in name else w for name, w in weights.items()})
    return write


def sharded(*files, index=True, stale=False, absent=False):
    """Tensors dealt out to `files`. Stale: what an earlier save left lies beside them; absent: the
    last of them is not there."""
    def write(folder, weights):
        where = {name: files[i % len(files)] for i, name in enumerate(sorted(weights))}
        for file in files:
            save(folder, {name: weights[name] for name in weights if where[name] == file}, file)
        if index:
            text = json.dumps({"metadata": {}, "weight_map": where})
            (folder / f"{WEIGHTS}.index.json").write_text(text)
        if stale:
            zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
            save(folder, zeros, "model-00009-of-00009.safetensors")
        if absent:
            (folder / files[-1]).unlink()
    return write


def without(*names):
    def write(folder, weights):
        save(folder, {name: w for name, w in weights.items() if name not in names})
    return write


def besides(name, width):
    """One tensor more, in the attention of layer 0."""
    def write(folder, weights):
        save(folder, weights | {f"model.layers.0.self_attn.{name}": torch.ones(width)})
    return write


def bytes_of(content):
    return lambda folder, weights: (folder / WEIGHTS).write_bytes(content)


def unprefixed(folder, weights):
    save(folder, {name.removeprefix("model."): w for name, w in weights.items()})


TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rope(**keys):
    return dict(rope_theta=GONE, rope_scaling=GONE, rope_parameters=keys)


# ---------------------------------------------------------------- the table
# name: (settings of the model, what is changed in its config.json, how its weights are written)

SAME = {  # shapes as we write them: test_llama.py
    # keys that are missing, null, or of no consequence
    **{f"no {key}": ({}, {key: GONE}, save) for key in (
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "model_type")},
    **{f"{key} null": ({}, {key: None}, save) for key in (
        "num_key_value_heads", "head_dim", "rope_scaling", "sliding_window")},
    "no rms_norm_eps": (dict(rms_norm_eps=1e-6), dict(rms_norm_eps=GONE), save),
    "mistral without kv heads": (dict(num_attention_heads=8, num_key_value_heads=8,
                                      sliding_window=99), dict(num_key_value_heads=GONE), save),
    "mistral without a window": (dict(sliding_window=99), dict(sliding_window=None), save),
    "mistral, window missing": (dict(sliding_window=99), dict(sliding_window=GONE), save),
    "mistral, a long window": (dict(sliding_window=99), {}, save),
    "mistral, window of the text": (dict(sliding_window=40), {}, save),
    "qwen2, a window unused": (SHAPES["qwen2"], dict(sliding_window=9, use_sliding_window=False),
                               save),
    "qwen2, qkv_bias": (SHAPES["qwen2"], dict(qkv_bias=None), save),  # no key of theirs
    "qwen2, untied": (dict(qkv_bias=True), {}, save),
    "qwen2, attention_bias": (SHAPES["qwen2"], dict(attention_bias=True), save),
    "llama, a window unused": ({}, dict(sliding_window=9), save),
    "dropout, dtype, tokens": ({}, dict(attention_dropout=0.5, torch_dtype="bfloat16",
                                        eos_token_id=[1, 2], pretraining_tp=1), save),
    "pretraining_tp": ({}, dict(pretraining_tp=2), save),
    # names
    "swish": ({}, dict(hidden_act="swish"), save),
    "an old architecture": ({}, dict(architectures=["LLaMAForCausalLM"]), save),
    "a bare model, tied": (SHAPES["tied"], dict(architectures=["LlamaModel"]), unprefixed),
    "a bare model with prefix, tied": (SHAPES["tied"], dict(architectures=["LlamaModel"]), save),
    "architecture mistral": (dict(sliding_window=99), dict(architectures=["MistralForCausalLM"]),
                             save),
    "architecture qwen2": (SHAPES["qwen2"], dict(architectures=["Qwen2ForCausalLM"]), save),
    # rope, old and new
    "theta 50": (dict(rope_theta=50.0), {}, save),
    "theta an integer": (dict(rope_theta=50.0), dict(rope_theta=50), save),
    "new rope": (dict(rope_theta=50.0), rope(rope_type="default", rope_theta=50.0), save),
    "new rope without theta": ({}, rope(rope_type="default"), save),
    "new rope, theta outside": (dict(rope_theta=50.0), dict(
        rope_scaling=GONE, rope_parameters={"rope_type": "default"}), save),
    "two thetas": (dict(rope_theta=50.0), dict(
        rope_theta=9.0, rope_scaling=GONE,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0}), save),
    "rope_scaling empty": ({}, dict(rope_scaling={}), save),
    "rope_scaling default": ({}, dict(rope_scaling={"type": "default"}), save),
    "both dicts": (dict(rope_theta=50.0), dict(
        rope_scaling={"rope_type": "linear", "factor": 1.0, "rope_theta": 50.0},
        rope_parameters={"rope_type": "default", "rope_theta": 7.0}), save),
    "linear, factor 1": ({}, dict(rope_scaling={"type": "linear", "factor": 1.0}), save),
    "linear, old": (SHAPES["linear rope"], dict(
        rope_scaling={"type": "linear", "factor": 4.0}), save),
    "linear, new": (SHAPES["linear rope"], rope(rope_type="linear", factor=4.0, rope_theta=1e4),
                    save),
    "llama3, old": (SHAPES["llama3 rope"], dict(rope_scaling={**LLAMA3, "type": "llama3"}), save),
    "llama3, new": (SHAPES["llama3 rope"], rope(**LLAMA3, rope_theta=50.0), save),
    "llama3, length outside": (SHAPES["llama3 rope"], dict(
        rope_scaling=SHORT, original_max_position_embeddings=16), save),
    "llama3, two lengths": (SHAPES["llama3 rope"], dict(original_max_position_embeddings=8), save),
    "llama3, no length": (SHAPES["llama3 rope"], dict(rope_scaling=SHORT), save),
    "llama3, no length at all": (SHAPES["llama3 rope"], dict(
        rope_scaling=SHORT, max_position_embeddings=GONE), save),
    "mistral, llama3, no length": (SHAPES["llama3 rope"] | dict(sliding_window=99), dict(
        rope_scaling=SHORT, max_position_embeddings=GONE), save),
    "rotary factor 1": ({}, dict(partial_rotary_factor=1.0), save),
    # weights
    "tied, and a head of its own": ({}, dict(tie_word_embeddings=True), save),
    "tied, and the same head": (SHAPES["tied"], {}, lambda folder, w: save(
        folder, w | {HEAD: w[EMBEDDING].clone()})),
    "bf16": ({}, {}, as_type(torch.bfloat16)),
    "fp16": ({}, {}, as_type(torch.float16)),
    "fp64": ({}, {}, as_type(torch.float64)),
    "mixed": ({}, {}, as_type(torch.bfloat16, "mlp")),
    "head in bf16": ({}, {}, as_type(torch.bfloat16, HEAD)),
    "rotary tables": ({}, {}, besides("rotary_emb.inv_freq", 4)),
    "shards": ({}, {}, sharded(*TWO)),
    "shards of other names": ({}, {}, sharded("a.safetensors", "b.safetensors")),
    "an index to one file": ({}, {}, sharded(WEIGHTS)),
    "stale shards": ({}, {}, sharded(*TWO, stale=True)),
    "stale shards beside one file": ({}, {}, sharded(WEIGHTS, index=False, stale=True)),
    "a tied model in shards": (SHAPES["tied"], {}, sharded(*TWO)),
}
REFUSED = {  # and words of the line
    "no weights": ({}, {}, lambda *_: None, "neither model.safetensors nor model-*"),
    "no safetensors": ({}, {}, bytes_of(b"\xff" * 9999), WEIGHTS),
    "a pointer": ({}, {}, bytes_of(b"version https://git-lfs.github.com/"), "run git lfs pull"),
    "a shard absent": ({}, {}, sharded(*TWO, absent=True), "is not there, but"),
    "stale shards, no index": ({}, {}, sharded(*TWO, index=False, stale=True), "there twice"),
    "no head": ({}, {}, without(HEAD), "no lm_head.weight"),
    "no embedding": ({}, {}, without(EMBEDDING), "embed_tokens.weight"),
    "nan": ({}, {}, lambda folder, w: save(folder, w | {HEAD: w[HEAD] * torch.nan}), "not finite"),
    "no norm": ({}, {}, without("model.norm.weight"), "norm.weight"),
    "a bare model, untied": ({}, dict(architectures=["LlamaModel"]), without(HEAD), "lm_head"),
    "QK-norm": ({}, {}, besides("q_norm.weight", 8), "q_norm"),
    "biases that config denies": ({}, {}, besides("q_proj.bias", 32), "q_proj.bias"),
    "biases that are missing": ({}, dict(attention_bias=True), save, "q_proj.bias"),
    "another width": ({}, dict(hidden_size=64, head_dim=8), save, "size mismatch"),
    "other heads": ({}, dict(num_key_value_heads=2), save, "size mismatch"),
    "qwen3": ({}, dict(model_type="qwen3"), save, "model_type must be"),
    "gemma": ({}, dict(model_type="gemma"), save, "model_type must be"),
    "GeGLU": ({}, dict(hidden_act="gelu"), save, "hidden_act must be"),
    "partial rotary": ({}, dict(partial_rotary_factor=0.5), save, "partial_rotary_factor must be"),
    "partial rotary, new": ({}, rope(rope_type="default", partial_rotary_factor=0.5), save,
                            "partial_rotary_factor must be"),
    "qwen2 with a window": (SHAPES["qwen2"], dict(use_sliding_window=True), save,
                            "use_sliding_window must be"),
    "looks both ways": ({}, dict(architectures=["LlamaBiModel"]), save, "architectures must be"),
    "quantised": ({}, dict(quantization_config={"quant_method": "gptq"}), save,
                  "quantization_config must be absent"),
    "yarn": ({}, dict(rope_scaling={"type": "yarn", "factor": 2.0}), save, "not 'yarn'"),
    "dynamic": ({}, dict(rope_scaling={"type": "dynamic", "factor": 2.0}), save, "not 'dynamic'"),
    "llama3 without a factor": ({}, dict(rope_scaling={"rope_type": "llama3"}), save, "factor"),
    "rope of no type": ({}, dict(rope_scaling={"factor": 2.0}), save, "not None"),
    "rope a word": ({}, dict(rope_scaling="linear"), save, "config.json"),
    "rope for each kind of layer": ({}, dict(rope_parameters={
        "full_attention": {"rope_type": "default"}}, rope_scaling=GONE), save, "not None"),
    "theta null": ({}, dict(rope_theta=None), save, "rope_theta"),
    "theta a word": ({}, dict(rope_theta="1e4"), save, "rope_theta"),
    "a width in words": ({}, dict(hidden_size="32"), save, "hidden_size"),
    "a width with a point": ({}, dict(hidden_size=32.0), save, "hidden_size"),
    **{f"{key} null": ({}, {key: None}, save, f"{key} must not be null") for key in (
        "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias")},
    **{f"mistral, {key} null": (dict(sliding_window=99), {key: None}, save, "must not be null")
       for key in ("hidden_act", "tie_word_embeddings", "num_key_value_heads")},
    **{f"qwen2, {key} null": (SHAPES["qwen2"], {key: None}, save, "must not be null")
       for key in ("hidden_act", "use_sliding_window", "head_dim")},
    "no width": ({}, dict(hidden_size=GONE), save, "hidden_size"),
    "no heads": ({}, dict(num_attention_heads=0), save, "num_attention_heads"),
    "a list": ({}, None, save, "config.json"),
}


def write_folder(folder, settings, changes, write):
    gpt = tiny_model(**settings)
    raw = llama_config(gpt.cfg) | (changes or {})
    raw = {key: value for key, value in raw.items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps([] if changes is None else raw))
    write(folder, llama_names(gpt))


@pytest.mark.parametrize("name", SAME)
def test_a_spelling_means_what_it_means_to_transformers(tmp_path, name):
    write_folder(tmp_path, *SAME[name])
    raw = json.loads((tmp_path / "config.json").read_text())
    kind = CLASSES.get(raw.get("model_type"), transformers.LlamaForCausalLM)
    reference = kind.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    idx = tokens(1, 40)
    with torch.no_grad():
        logits, wanted = GPT.from_llama(tmp_path, torch.float32)(idx)[0], reference(idx).logits
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_or_half_a_one_is_refused_in_one_line(tmp_path, name):
    *spelling, words = REFUSED[name]
    write_folder(tmp_path, *spelling)
    with pytest.raises(UserError) as error:
        GPT.from_llama(tmp_path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
