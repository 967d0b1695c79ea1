"""`GPT.from_llama` against Hugging Face's LlamaForCausalLM, and folders broken or hostile."""

import json
import os
import random
import struct
import sys
import time
from pathlib import Path

import pytest
import torch

from data.border import UserError
from model import ATTENTIONS, GPT, Config, record, rope_frequencies, tap_names
from tests.tiny import (LLAMA3, llama_names, tiny_config, tiny_llama_folder, tiny_model,
                        tokens)

safetensors = pytest.importorskip("safetensors.torch")


# ---------------------------------------------------------------- published configs

PUBLISHED = {  # parameters, heads, key/value heads, head width, layers
    "Llama-2-7B": (6_738_415_616, 32, 32, 128, 32),
    "Llama-3-8B": (8_030_261_248, 32, 8, 128, 32),
    "Llama-3.1-8B": (8_030_261_248, 32, 8, 128, 32),
    "Llama-3.2-1B": (1_235_814_400, 32, 8, 64, 16),
    "SmolLM2-135M": (134_515_008, 9, 3, 64, 30),
}


def published(name):
    return json.loads((Path(__file__).parent / "llama_configs" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_has_the_published_size(name):
    parameters, H, K, D, L = PUBLISHED[name]
    with torch.device("meta"):
        gpt = GPT(Config.from_hf(published(name)))
    attention, cfg = gpt.layers[-1].self_attn, gpt.cfg
    assert sum(p.numel() for p in gpt.parameters()) == parameters and len(gpt.layers) == L
    assert attention.q_proj.weight.shape == (H * D, cfg.hidden_size)
    assert attention.v_proj.weight.shape == (K * D, cfg.hidden_size)
    assert gpt.rope_freq.device.type == "cpu" and gpt.rope_freq.shape == (D // 2,)
    assert (gpt.lm_head.weight is gpt.embed_tokens.weight) == cfg.tie_word_embeddings


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_has_the_reference_angles(name):
    """Rope mistakes do not show at short context: compare at every position up to 131,072."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    reference = LlamaRotaryEmbedding(transformers.LlamaConfig(**published(name)))
    ours = rope_frequencies(Config.from_hf(published(name)))
    assert torch.equal(ours, reference.inv_freq)
    position = torch.arange(131_072)
    cos, sin = reference(torch.zeros(1), position[None])
    for chunk in position.split(16_384):
        angle = torch.outer(chunk.float(), ours)
        assert torch.equal(angle.cos(), cos[0, chunk, : len(ours)])
        assert torch.equal(angle.sin(), sin[0, chunk, : len(ours)])


# ---------------------------------------------------------------- config keys

RAW = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=61,
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
)


def test_both_rope_spellings_and_harmless_keys():
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    legacy = {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}, "unheard_of": 1,
              "attention_dropout": 0.1, "torch_dtype": "float16", "attn": "sigmoid"}
    configs = [Config.from_hf({**RAW, **change}) for change in (old, new, legacy)]
    assert torch.equal(*map(rope_frequencies, configs[:2])) and configs[0] == configs[1]
    assert torch.equal(*map(rope_frequencies, configs[1:])) and configs[2].attn == "softmax"
    plain = Config.from_hf({**RAW, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}})
    assert plain.rope_theta == 2e4 and Config.from_hf(RAW).rope_theta == 1e4


@pytest.mark.parametrize("key, value", [
    ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True), ("sliding_window", 4096),
    ("model_type", "mistral"), ("architectures", ["GPT2LMHeadModel"]), ("rope_interleaved", True),
    ("quantization_config", {"quant_method": "gptq"}), ("partial_rotary_factor", 0.5),
    ("rope_scaling", "llama3"), ("rope_scaling", {"factor": 4.0}), ("hidden_size", None),
    ("max_position_embeddings", None), ("rms_norm_eps", None), ("tie_word_embeddings", "no"),
])
def test_config_of_another_model_is_refused(key, value):
    with pytest.raises(UserError, match=key):
        Config.from_hf({**RAW, key: value})


# ---------------------------------------------------------------- parity

CASES = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2),
    "one key/value head": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "head_dim": dict(head_dim=12, num_key_value_heads=2),
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama3": dict(num_key_value_heads=2, rope_parameters={**LLAMA3, "rope_theta": 5e5}),
}


def reference_folder(folder, dtype=torch.float32, load=None, shard="10GB", **change):
    """A tiny random checkpoint as transformers writes it -> its model, in dtype `load`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    settings = {**RAW, "initializer_range": 0.3, "attn_implementation": "eager", **change}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    with torch.no_grad():  # gains that differ from one, or a norm left out would not show
        for p in reference.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
    reference.to(dtype).save_pretrained(folder, max_shard_size=shard)
    if dtype != torch.float32:  # .to(dtype) has rounded its rope frequencies as well
        reference = reference.from_pretrained(
            folder, dtype=load or dtype, attn_implementation="eager")
    return reference


def assert_parity(folder, reference, dtype=None, T=60):
    """Logits, patterns and states; T: for llama3 far beyond the original context of 16."""
    gpt = GPT.from_llama(folder, dtype)
    idx = tokens(2, T, vocab_size=61)
    with torch.no_grad():
        wanted = reference(idx, output_hidden_states=True, output_attentions=True)
        fast, _ = gpt(idx)
    logits, seen = record(gpt, idx, tap_names(gpt.cfg))
    assert wanted.logits.abs().max() > 0.5
    pairs = [(fast, wanted.logits), (logits, wanted.logits)]
    for i in range(gpt.cfg.num_hidden_layers):
        pairs.append((seen[f"{i}.resid_pre"], wanted.hidden_states[i]))
        pairs.append((seen[f"{i}.pattern"], wanted.attentions[i]))
    pairs.append((seen["final"], wanted.hidden_states[-1]))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    return gpt


@pytest.mark.parametrize("case", CASES)
def test_logits_patterns_and_hidden_states_agree(tmp_path, case):
    gpt = assert_parity(tmp_path, reference_folder(tmp_path, **CASES[case]))
    assert (gpt.lm_head.weight is gpt.embed_tokens.weight) == (case == "tied")
    assert not any(t.is_meta for t in (*gpt.parameters(), *gpt.buffers()))


def test_every_tap_agrees_with_the_module_that_computes_it(tmp_path):
    reference, theirs = reference_folder(tmp_path, **CASES["llama3"]), {}

    def keep(name, module, before):
        def hook(_, args, out=None):
            x = args if before else out
            theirs[name] = x[0] if isinstance(x, tuple) else x
        (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)

    for i, layer in enumerate(reference.model.layers):
        a, m = layer.self_attn, layer.mlp
        outputs = {"q": a.q_proj, "k": a.k_proj, "v": a.v_proj, "attn_out": a, "mlp_out": m,
                   "gate": m.gate_proj, "up": m.up_proj}
        inputs = {"z": a.o_proj, "mlp_post": m.down_proj,
                  "resid_mid": layer.post_attention_layernorm}
        for modules, before in ((outputs, False), (inputs, True)):
            for name, module in modules.items():
                keep(f"{i}.{name}", module, before)
    idx = tokens(2, 40, vocab_size=61)
    with torch.no_grad():
        reference(idx)
    gpt = GPT.from_llama(tmp_path)
    _, ours = record(gpt, idx, tap_names(gpt.cfg))
    for i in range(gpt.cfg.num_hidden_layers):
        ours[f"{i}.gate"], ours[f"{i}.up"] = ours[f"{i}.mlp_pre"]
    assert len(theirs) == 10 * gpt.cfg.num_hidden_layers
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name].flatten(2), x, rtol=0, atol=1e-4, msg=name)


def test_shards_and_other_precision(tmp_path):
    reference = reference_folder(tmp_path / "shards", shard="20KB", **CASES["gqa"])
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert_parity(tmp_path / "shards", reference)
    bf16, fp32 = torch.bfloat16, torch.float32
    reference = reference_folder(tmp_path / "wide", bf16, fp32, **CASES["llama3"])
    gpt = assert_parity(tmp_path / "wide", reference, dtype=fp32)
    assert gpt.embed_tokens.weight.dtype == fp32


@pytest.mark.parametrize("tie", [False, True])
def test_bf16_file_computed_in_bf16(tmp_path, tie):
    """RMSNorm and softmax in fp32, products in bf16. No farther from the truth than theirs is."""
    bf16 = torch.bfloat16
    reference = reference_folder(tmp_path, bf16, tie_word_embeddings=tie, **CASES["gqa"])
    gpt, idx = GPT.from_llama(tmp_path), tokens(2, 40, vocab_size=61)
    assert {p.dtype for p in gpt.parameters()} == {bf16} and gpt.rope_freq.dtype == torch.float32
    with torch.no_grad():
        theirs, ours = reference(idx).logits, gpt(idx)[0]
        exact = reference.float()(idx).logits
    error, their_error = ((x - exact).pow(2).mean().sqrt() for x in (ours, theirs))
    assert ours.dtype == bf16 and error < 1.2 * their_error and error < 0.03 * exact.std()


# ---------------------------------------------------------------- damage, one function a kind

HEAD, NORM, EMBED = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"
Q1, WEIGHTS = "model.layers.1.self_attn.q_proj.weight", "model.safetensors"
ALL = llama_names(tiny_model())
FIRST, REST = dict(list(ALL.items())[:1]), dict(list(ALL.items())[1:])


def config(**change):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return damage


def tensors(change):
    """Other tensors in the file; None takes one out."""
    left = {name: w.contiguous() for name, w in {**ALL, **change}.items() if w is not None}
    return lambda folder: safetensors.save_file(left, folder / WEIGHTS)


def content(change):
    return lambda f: (f / WEIGHTS).write_bytes(change((f / WEIGHTS).read_bytes()))


def put(name, make):
    """Something else by that name."""
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
    return damage


def shards(*parts):
    def damage(folder):
        (folder / WEIGHTS).unlink()
        for i, part in enumerate(parts):
            safetensors.save_file(part, folder / f"model-{i}.safetensors")
    return damage


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def text(words):
    return put("config.json", lambda path: path.write_text(words))


def endless(path):
    path.symlink_to("/dev/zero")


EMPTY = {f"model.layers.{i}.x": torch.zeros(0) for i in range(3000)}
NAN, INF = torch.full((32,), float("nan")), torch.tensor([float("-inf"), *[1.0] * 31])
WIDE = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 2**23)
BROKEN = [  # what is done to the folder, and what the line must name
    (put("config.json", lambda path: None), "config.json"),
    (put("config.json", os.mkfifo), "config.json: it is no ordinary file"),
    (put("config.json", endless), "config.json: it is no ordinary file"),
    (text("{vocab"), "config.json is not JSON"),
    (text("[1]"), "config.json is not a JSON object"),
    (text("[" * 10**5), "config.json is not JSON"),
    (text('{"vocab_size": %s}' % ("9" * 5000)), "config.json is not JSON"),
    (config(hidden_size=None), "config.json: hidden_size"),
    (config(hidden_act="relu"), "config.json: hidden_act must be 'silu' for this model, not 're"),
    (config(hidden_size=10**400), "config.json: hidden_size"),
    (config(rope_theta=10**400), "config.json: rope_theta"),
    (config(hidden_size=2**20, head_dim=8), "config.json asks for floats of shape (50, 1048576)"),
    (config(**WIDE, head_dim=2**20), "config.json asks for floats of shape (8388608, 8388608)"),
    (config(num_hidden_layers=20_000), "too few for 20000 layers"),
    (config(num_hidden_layers=1), "'layers.1."),
    (config(num_hidden_layers=3), "too few for 3 layers"),
    (config(num_key_value_heads=2), "k_proj.weight' is torch.float32 of shape (32, 32)"),
    (tensors(EMPTY), "'layers.0.x' has no place"),
    (both(tensors(EMPTY), config(num_hidden_layers=333)), "'layers.2."),
    (put(WEIGHTS, lambda path: None), "neither model.safetensors nor model-*.safetensors"),
    (put(WEIGHTS, os.mkdir), "model.safetensors: it is no ordinary file"),
    (put(WEIGHTS, os.mkfifo), "model.safetensors: it is no ordinary file"),
    (put(WEIGHTS, endless), "model.safetensors: it is no ordinary file"),
    (put(WEIGHTS, lambda path: torch.save({"a": 1}, path)), "model.safetensors: "),
    (both(shards(ALL), put("model-1.safetensors", os.mkfifo)), "model-1.safetensors: it is no"),
    (content(lambda b: b""), "model.safetensors: "),
    (content(lambda b: b[:-1]), "model.safetensors: "),
    (content(lambda b: b"\xff" * 8 + b[8:]), "model.safetensors: "),
    (tensors({Q1: None}), "q_proj.weight' is missing"),
    (tensors({EMBED: None, HEAD: None}), "'embed_tokens.weight' is missing"),
    (shards(REST), "'embed_tokens.weight' is missing"),
    (tensors({"q\nbias": torch.ones(32)}), r"tensor 'q\nbias' has no place"),
    (tensors({"norm.weight": torch.ones(32)}), "norm.weight' is there twice"),
    (shards(ALL, FIRST), "' is there twice"),
    (tensors({NORM: torch.ones(31)}), "shape (31,), config.json asks for floats of shape (32,)"),
    (tensors({EMBED: ALL[EMBED].T}), "'embed_tokens.weight' is torch.float32 of shape (32, 50)"),
    (tensors({Q1: ALL[Q1].to(torch.int8)}), "is torch.int8 of shape"),
    (tensors({Q1: ALL[Q1].to(torch.float8_e4m3fn)}), "is torch.float8"),
    (tensors({NORM: NAN}), "'norm.weight' holds numbers that are not finite"),
    (tensors({NORM: INF.half()}), "'norm.weight' holds numbers that are not finite"),
]


@pytest.mark.parametrize("damage, named", BROKEN)
def test_broken_folder_is_one_line_at_once(tmp_path, damage, named):
    damage(tiny_llama_folder(tmp_path))
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        GPT.from_llama(tmp_path)
    line = str(error.value)
    assert time.perf_counter() - start < 10 and "\n" not in line and len(line) < 600
    assert str(tmp_path) in line and named in line


def test_no_folder_and_no_package(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="config.json"):
        GPT.from_llama(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        GPT.from_llama(tiny_llama_folder(tmp_path))


def test_nothing_is_unpickled(tmp_path):
    """A pickle that would write a file is put in every place where weights are looked for."""
    folder, trace = tiny_llama_folder(tmp_path / "llama"), tmp_path / "trace"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (trace,)

    for name in ("model.safetensors", "model-1.safetensors", "pytorch_model.bin"):
        (folder / WEIGHTS).unlink(missing_ok=True)
        torch.save(Bomb(), folder / name)
        with pytest.raises(UserError):
            GPT.from_llama(folder)
    assert not trace.exists()


# ---------------------------------------------------------------- what opens

def logits(gpt):
    return gpt(torch.arange(10)[None])[0]


TABLE = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


@pytest.mark.parametrize("change", [shards(FIRST, REST), tensors(TABLE)], ids=["shards", "old"])
def test_shards_without_an_index_and_rotary_tables_of_old_files(tmp_path, change):
    change(tiny_llama_folder(tmp_path))
    assert torch.equal(logits(GPT.from_llama(tmp_path)), logits(tiny_model()))


@pytest.mark.parametrize("tie", [False, True])
def test_head_is_tied_when_the_file_has_none_whatever_config_says(tmp_path, tie):
    config(tie_word_embeddings=not tie)(tiny_llama_folder(tmp_path, tie_word_embeddings=tie))
    gpt = GPT.from_llama(tmp_path)
    assert gpt.cfg.tie_word_embeddings == tie == (gpt.lm_head.weight is gpt.embed_tokens.weight)
    assert torch.equal(logits(gpt), logits(tiny_model(tie_word_embeddings=tie)))


def test_mixed_dtypes_become_one(tmp_path):
    tensors({HEAD: ALL[HEAD].bfloat16()})(tiny_llama_folder(tmp_path))
    assert {p.dtype for p in GPT.from_llama(tmp_path).parameters()} == {torch.bfloat16}


def test_weights_are_mapped_and_training_leaves_the_file_alone(tmp_path):
    path = tiny_llama_folder(tmp_path) / WEIGHTS
    gpt, before = GPT.from_llama(tmp_path), path.read_bytes()
    if Path("/proc/self/maps").exists():
        maps = Path("/proc/self/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in maps if str(path) in line]
        for p in gpt.parameters():
            assert any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in spans)
    logits(gpt).sum().backward()
    torch.optim.SGD(gpt.parameters(), lr=1.0).step()
    assert path.read_bytes() == before


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_from_weights_is_the_door_for_runs_too(attn):
    """The tensors themselves become the parameters, and a tied head stays tied."""
    gpt = tiny_model(attn, tie_word_embeddings=True)
    again = GPT.from_weights(gpt.cfg, gpt.state_dict(), "here")
    assert again.lm_head.weight is again.embed_tokens.weight
    assert again.embed_tokens.weight.data_ptr() == gpt.embed_tokens.weight.data_ptr()
    assert all(p.requires_grad for p in again.parameters())
    assert torch.equal(logits(again), logits(gpt))
    other = tiny_config(attn="softmax" if attn in ("headnorm", "gated") else "gated")
    with pytest.raises(UserError, match="^here: tensor .* (is missing|has no place)"):
        GPT.from_weights(other, gpt.state_dict(), "here")


@pytest.mark.parametrize("kind", ["meta", "sparse", "one number 32 times", "text"])
def test_from_weights_takes_ordinary_tensors_only(kind):
    """A crafted file can hold the others, even where nothing is unpickled."""
    ones = torch.ones(32)
    odd = {"meta": ones.to("meta"), "sparse": ones.to_sparse(), "text": "ones"}
    gpt = tiny_model()
    weights = {**gpt.state_dict(), "norm.weight": odd.get(kind, torch.ones(1).expand(32))}
    with pytest.raises(UserError, match="^here: tensor 'norm.weight' is missing or no ordinary"):
        GPT.from_weights(gpt.cfg, weights, "here")


# ---------------------------------------------------------------- fuzz

ODD = [0, 1, -1, 7, 2**31, 2**62, 2**64, 10**400, 1e300, 8.0, "8", None, True, [], {}]
ODD_SHAPES = [[], [0], [0, 2**62], [2**40, 2**40], [1] * 99, [32, 32, 1], "32", None, {}]
DTYPES = ["F64", "F16", "BF16", "BOOL", "I8", "F8_E5M2", "F8_E8M0", "F4", "C64", "X", "", 3]


def damaged(text: bytes, rng: random.Random) -> bytes:
    """A safetensors header with one thing changed: a byte, a number, a name, a dtype, an entry."""
    kind, header = rng.randrange(8), json.loads(text)
    name, other = rng.sample(list(header), 2)
    entry = header[name]
    if kind == 0:
        at = rng.randrange(len(text))
        byte = rng.choice([b"", b"{", b"9", b"\xff", bytes([text[at] ^ 1 << rng.randrange(8)])])
        return text[:at] + byte + text[at + 1:]
    if kind == 1:
        entry["shape"][-1] = rng.choice(ODD)
    elif kind == 2:
        entry["shape"] = rng.choice([*ODD_SHAPES, entry["shape"][::-1]])
    elif kind == 3:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(ODD)
    elif kind == 4:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 5:  # two tensors from one place, or nonsense
        header[name] = rng.choice([header[other], *ODD])
    elif kind == 6:
        odd = [other, "x" * 10**6, "", "\n\0\u2028", "__metadata__"]
        header[rng.choice(odd)] = header.pop(name)
    else:
        header[name], header[other] = header[other], header[name]  # each other's place
    return json.dumps(header).encode()


def test_two_hundred_damaged_headers(tmp_path):
    """Each opens to a finite model of the right shapes, or ends in one line, soon and in little
    memory. (Tensors of one shape that have changed places are not damage that a reader can see.)"""
    resource = pytest.importorskip("resource")
    path = tiny_llama_folder(tmp_path) / "model.safetensors"
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    text, data = good[8:8 + length], good[8 + length:]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refused = 0
    for seed in range(200):
        header = damaged(text, random.Random(seed))
        header += b" " * (-len(header) % 8)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data)
        try:
            assert torch.isfinite(logits(GPT.from_llama(tmp_path))).all(), seed
        except UserError as error:
            line = str(error)
            assert str(tmp_path) in line and "\n" not in line and len(line) < 600, seed
            refused += 1
    assert 150 < refused < 200
    assert time.perf_counter() - start < 60
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # kB
