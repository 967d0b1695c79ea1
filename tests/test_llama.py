"""`GPT.from_llama` against Hugging Face's LlamaForCausalLM, published configs, and folders that are broken or hostile."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch

import model as model_module
from model import GPT, Config, ModelError, record, tap_names

CONFIGS = Path(__file__).parent / "llama_configs"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


# ---------------------------------------------------------------- published configs

PUBLISHED = {  # parameters, heads, key/value heads, head width, layers
    "Llama-2-7B": (6_738_415_616, 32, 32, 128, 32),
    "Llama-3-8B": (8_030_261_248, 32, 8, 128, 32),
    "Llama-3.1-8B": (8_030_261_248, 32, 8, 128, 32),
    "Llama-3.2-1B": (1_235_814_400, 32, 8, 64, 16),
    "SmolLM2-135M": (134_515_008, 9, 3, 64, 30),
}


def published(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_has_the_published_size(name):
    parameters, H, K, D, L = PUBLISHED[name]
    cfg = Config.from_hf(published(name))
    assert (cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.num_hidden_layers) == (H, K, D, L)
    with torch.device("meta"):
        gpt = GPT(cfg)
    assert sum(p.numel() for p in gpt.parameters()) == parameters
    assert gpt.layers[0].self_attn.q_proj.weight.shape == (H * D, cfg.hidden_size)
    assert gpt.layers[-1].self_attn.v_proj.weight.shape == (K * D, cfg.hidden_size)
    assert gpt.layers[0].mlp.down_proj.weight.shape == (cfg.hidden_size, cfg.intermediate_size)
    assert gpt.rope_freq.device.type == "cpu" and gpt.rope_freq.shape == (D // 2,)
    assert (gpt.lm_head.weight is gpt.embed_tokens.weight) == cfg.tie_word_embeddings


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_has_the_reference_angles(name):
    """Rope mistakes do not show at short context, so the angles are compared at every position up to 131,072."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    ours = model_module.rope_frequencies(Config.from_hf(published(name)))
    config = transformers.LlamaConfig(**published(name))
    reference = LlamaRotaryEmbedding(config)
    assert torch.equal(ours, reference.inv_freq)
    if published(name)["rope_scaling"]:
        assert torch.equal(ours, ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")[0])
        assert not torch.equal(ours, reference.compute_default_rope_parameters(config)[0])
    position = torch.arange(131_072)
    cos, sin = reference(torch.zeros(1), position[None])
    for chunk in position.split(16_384):
        angle = torch.outer(chunk.float(), ours)
        assert torch.equal(angle.cos(), cos[0, chunk, : len(ours)]) and torch.equal(angle.sin(), sin[0, chunk, : len(ours)])


def test_llama3_scaling_by_hand():
    """theta 10,000, D 4: wavelengths 6.3 (kept, much below 64/4) and 628 (stretched, above 64/1)."""
    cfg = Config(9, hidden_size=8, num_attention_heads=2, rope_scaling={**LLAMA3, "original_max_position_embeddings": 64})
    assert model_module.rope_frequencies(cfg).tolist() == pytest.approx([1.0, 0.01 / 8])


# ---------------------------------------------------------------- config keys

BASE = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=61, hidden_size=32,
            intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
            rms_norm_eps=1e-5, tie_word_embeddings=False)


def test_both_rope_spellings_and_harmless_keys():
    scaling = {**LLAMA3, "original_max_position_embeddings": 16}
    old = Config.from_hf({**BASE, "rope_theta": 5e5, "rope_scaling": scaling})
    new = Config.from_hf({**BASE, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    legacy = Config.from_hf({**BASE, "rope_theta": 5e5, "rope_scaling": {**scaling, "type": "llama3"}, "pretraining_tp": 2,
                             "attention_dropout": 0.1, "torch_dtype": "float16", "unheard_of": 1, "attn": "sigmoid"})
    freq = [model_module.rope_frequencies(cfg) for cfg in (old, new, legacy)]
    assert torch.equal(freq[0], freq[1]) and torch.equal(freq[0], freq[2])
    assert old.rope_theta == new.rope_theta == 5e5 and legacy.attn == "softmax"
    plain = Config.from_hf({**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}})
    assert plain.rope_theta == 2e4 and Config.from_hf(BASE).rope_theta == 1e4


@pytest.mark.parametrize("change, named", [
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"model_type": "mistral"}, "model_type"),
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"factor": 4.0}}, "rope_scaling"),
    ({"rope_scaling": LLAMA3}, "original_max_position_embeddings"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16, "factor": 0}}, "rope_scaling"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16, "low_freq_factor": 4.0}}, "low_freq_factor"),
    ({"rope_scaling": "llama3"}, "rope_scaling"),
    ({"rope_theta": "big"}, "rope_theta"),
    ({"vocab_size": None}, "vocab_size"),
    ({"hidden_size": 32.0}, "hidden_size"),
    ({"head_dim": 10**12}, "head_dim"),
    ({"rms_norm_eps": None}, "rms_norm_eps"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
])
def test_config_of_another_model_is_refused(change, named):
    with pytest.raises(ModelError, match=named) as error:
        Config.from_hf({**BASE, **change})
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- parity

CASES = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2),
    "one key/value head": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "head_dim": dict(head_dim=12, num_key_value_heads=2),
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama3": dict(num_key_value_heads=2, rope_parameters={**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 5e5}),
}


def reference_folder(folder, dtype=torch.float32, load=None, shard="10GB", **change):
    """A tiny random checkpoint as transformers writes it -> its model. Weights are large enough for every part to count."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    torch.manual_seed(1)
    settings = {**BASE, "initializer_range": 0.3, "attn_implementation": "eager", **change}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval().to(dtype)
    with torch.no_grad():  # gains that differ from one, or a norm left out would not show
        for name, p in reference.named_parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
    reference.save_pretrained(folder, max_shard_size=shard)
    if dtype != torch.float32:  # .to(dtype) above has rounded its rope frequencies as well
        reference = reference.from_pretrained(folder, dtype=load or dtype, attn_implementation="eager")
    return reference


def assert_parity(folder, reference, dtype=None, T=60):
    gpt = GPT.from_llama(folder, dtype)
    idx = torch.randint(61, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference(idx, output_hidden_states=True, output_attentions=True)
        fast, _ = gpt(idx)
    logits, seen = record(gpt, idx, tap_names(gpt.cfg))
    assert wanted.logits.abs().max() > 0.5
    torch.testing.assert_close(fast, wanted.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits, wanted.logits, rtol=0, atol=1e-4)
    L = gpt.cfg.num_hidden_layers
    for i in range(L):
        torch.testing.assert_close(seen[f"{i}.resid_pre"], wanted.hidden_states[i], rtol=0, atol=1e-4)
        torch.testing.assert_close(seen[f"{i}.pattern"], wanted.attentions[i], rtol=0, atol=1e-4)
        if i + 1 < L:
            torch.testing.assert_close(seen[f"{i}.resid_post"], wanted.hidden_states[i + 1], rtol=0, atol=1e-4)
    torch.testing.assert_close(seen["final"], wanted.hidden_states[L], rtol=0, atol=1e-4)
    return gpt


@pytest.mark.parametrize("case", CASES)
def test_logits_patterns_and_hidden_states_agree(tmp_path, case):
    reference = reference_folder(tmp_path, **CASES[case])
    gpt = assert_parity(tmp_path, reference)  # 60 positions: for llama3 far beyond the original 16
    assert (gpt.lm_head.weight is gpt.embed_tokens.weight) == (case == "tied")
    assert not any(t.is_meta for t in (*gpt.parameters(), *gpt.buffers()))


def test_every_tap_agrees_with_the_module_that_computes_it(tmp_path):
    reference = reference_folder(tmp_path, **CASES["llama3"])
    gpt = GPT.from_llama(tmp_path)
    seen, kept = {}, lambda name: lambda module, args, out: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out)
    for i, layer in enumerate(reference.model.layers):
        a, m = layer.self_attn, layer.mlp
        for name, module in {"q": a.q_proj, "k": a.k_proj, "v": a.v_proj, "attn_out": a, "gate": m.gate_proj, "up": m.up_proj,
                             "mlp_out": m}.items():
            module.register_forward_hook(kept(f"{i}.{name}"))
        for name, module in {"z": a.o_proj, "mlp_post": m.down_proj, "resid_mid": layer.post_attention_layernorm}.items():
            module.register_forward_pre_hook(lambda module, args, name=f"{i}.{name}": seen.__setitem__(name, args[0]))
    idx = torch.randint(61, (2, 40))
    with torch.no_grad():
        reference(idx)
    _, ours = record(gpt, idx, tap_names(gpt.cfg))
    for i in range(gpt.cfg.num_hidden_layers):
        for name in ("q", "k", "v", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out"):
            x = ours[f"{i}.{name}"]
            torch.testing.assert_close(x.flatten(2), seen[f"{i}.{name}"], rtol=0, atol=1e-4, msg=lambda m: f"{i}.{name}: {m}")
        torch.testing.assert_close(ours[f"{i}.mlp_pre"], torch.stack((seen[f"{i}.gate"], seen[f"{i}.up"])), rtol=0, atol=1e-4)


def test_shards(tmp_path):
    reference = reference_folder(tmp_path, shard="20KB", **CASES["gqa"])
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_parity(tmp_path, reference)


def test_bf16_file_read_as_fp32(tmp_path):
    reference = reference_folder(tmp_path, dtype=torch.bfloat16, load=torch.float32, **CASES["llama3"])
    gpt = assert_parity(tmp_path, reference, dtype=torch.float32)
    assert gpt.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("tie", [False, True])
def test_bf16_file_computed_in_bf16(tmp_path, tie):
    """Rounded the same way: RMSNorm and softmax in fp32, products in bf16. No nearer to the truth than the reference is."""
    reference = reference_folder(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=tie, **CASES["gqa"])
    gpt = GPT.from_llama(tmp_path)
    assert {p.dtype for p in gpt.parameters()} == {torch.bfloat16} and gpt.rope_freq.dtype == torch.float32
    idx = torch.randint(61, (2, 40))
    with torch.no_grad():
        theirs, ours, exact = reference(idx).logits, gpt(idx)[0], reference.float()(idx).logits
    assert ours.dtype == torch.bfloat16
    error = (ours - exact).pow(2).mean().sqrt()
    assert error < 1.2 * (theirs - exact).pow(2).mean().sqrt() and error < 0.03 * exact.std()


def test_head_is_tied_when_the_file_has_none_and_free_when_it_has_one(tmp_path):
    """Whatever config.json says: reading a head that is there is right in both cases."""
    reference = reference_folder(tmp_path, tie_word_embeddings=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    gpt = assert_parity(tmp_path, reference)
    assert gpt.cfg.tie_word_embeddings and gpt.lm_head.weight is gpt.embed_tokens.weight

    reference = reference_folder(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert not assert_parity(tmp_path / "own", reference).cfg.tie_word_embeddings


def test_old_checkpoints_may_hold_rotary_tables(tmp_path):
    reference = reference_folder(tmp_path)
    from safetensors.torch import load_file, save_file
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    assert_parity(tmp_path, reference)


def test_mixed_dtypes_become_one(tmp_path):
    reference_folder(tmp_path)
    from safetensors.torch import load_file, save_file
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: w if w.dim() == 1 else w.bfloat16() for k, w in weights.items()}, tmp_path / "model.safetensors")
    gpt = GPT.from_llama(tmp_path)
    assert {p.dtype for p in gpt.parameters()} == {torch.bfloat16}
    gpt(torch.zeros(1, 5, dtype=torch.long))


def test_weights_are_mapped_and_training_leaves_the_file_alone(tmp_path):
    reference_folder(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    gpt = GPT.from_llama(tmp_path)
    if Path("/proc/self/maps").exists():
        mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        spans = [tuple(int(x, 16) for x in line[0].split("-")) for line in mapped]
        assert all(any(a <= p.data_ptr() < b for a, b in spans) for p in gpt.parameters())
    _, loss = gpt(torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.long))
    loss.backward()
    torch.optim.SGD(gpt.parameters(), lr=1.0).step()
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------- broken and hostile folders

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A valid folder written by this file's own safetensors writer, so that it can be broken at will."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("good")
    cfg = Config.from_hf(BASE)
    gpt = GPT(cfg, seed=3)
    write(folder, {name if name == "lm_head.weight" else f"model.{name}": p.detach() for name, p in gpt.named_parameters()})
    (folder / "config.json").write_text(json.dumps(BASE))
    idx = torch.arange(10)[None]
    assert torch.equal(GPT.from_llama(folder)(idx)[0], gpt(idx)[0])
    return folder


def header_of(weights):
    offset, header = 0, {}
    for name, w in weights.items():
        size = w.numel() * w.element_size()
        kind = {torch.float32: "F32", torch.int8: "I8"}[w.dtype]
        header[name] = {"dtype": kind, "shape": list(w.shape), "data_offsets": [offset, offset + size]}
        offset += size
    return header


def write(folder, weights, header=None, file="model.safetensors"):
    text = json.dumps(header_of(weights) if header is None else header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(w.contiguous().numpy().tobytes() for w in weights.values())
    (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data)


def read(folder):
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


def index(folder, weight_map):
    """Turn the single file into two shards, and let `weight_map` change where the index says that tensors are."""
    weights = read(folder)
    half = len(weights) // 2
    parts = {"a.safetensors": dict(list(weights.items())[:half]), "b.safetensors": dict(list(weights.items())[half:])}
    for file, part in parts.items():
        write(folder, part, file=file)
    (folder / "model.safetensors").unlink()
    truth = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map(truth)}))


NORM, EMBED, Q1 = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


def change_header(folder, change):
    weights = read(folder)
    header = header_of(weights)
    change(header)
    write(folder, weights, header)


def change_weights(folder, change):
    weights = read(folder)
    change(weights)
    write(folder, weights)


def change_config(folder, **change):
    (folder / "config.json").write_text(json.dumps({**BASE, **change}))


def clobber(folder, edit, file="model.safetensors"):
    (folder / file).write_bytes(edit((folder / file).read_bytes()))


BROKEN = {  # what is done to the folder, and what the message must name
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{vocab"), ["config.json", "not JSON"]),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ["config.json", "not JSON"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), ["config.json", "object"]),
    "config is nested too deep": (lambda f: (f / "config.json").write_text("[" * 10**5), ["config.json"]),
    "config lacks a size": (lambda f: change_config(f, hidden_size=None), ["config.json", "hidden_size"]),
    "config of another activation": (lambda f: change_config(f, hidden_act="relu"), ["config.json", "hidden_act", "relu"]),
    "config with biases": (lambda f: change_config(f, attention_bias=True), ["config.json", "attention_bias"]),
    "config of another rope": (lambda f: change_config(f, rope_scaling={"type": "dynamic", "factor": 2}), ["config.json", "dynamic"]),
    "config of ten million layers": (lambda f: change_config(f, num_hidden_layers=10**7), ["layers"]),
    "config of one layer less": (lambda f: change_config(f, num_hidden_layers=2), ["model.safetensors", "layers.2."]),
    "config of one layer more": (lambda f: change_config(f, num_hidden_layers=4), ["layers.3."]),
    "config of another width": (lambda f: change_config(f, hidden_size=64), ["model.safetensors", "shape", "(61, 64)"]),
    "config of enormous widths": (lambda f: change_config(f, hidden_size=2**24, intermediate_size=2**24), ["shape"]),
    "config of fewer key heads": (lambda f: change_config(f, num_key_value_heads=2), ["k_proj", "shape"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["neither model.safetensors"]),
    "pickled only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["pytorch_model.bin", "pickled"]),
    "folder in place of the file": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
                                    ["model.safetensors"]),
    "empty file": (lambda f: clobber(f, lambda b: b""), ["model.safetensors"]),
    "seven bytes": (lambda f: clobber(f, lambda b: b[:7]), ["model.safetensors"]),
    "truncated": (lambda f: clobber(f, lambda b: b[:-1]), ["model.safetensors"]),
    "cut in the header": (lambda f: clobber(f, lambda b: b[:50]), ["model.safetensors"]),
    "trailing bytes": (lambda f: clobber(f, lambda b: b + b"\0" * 64), ["model.safetensors"]),
    "header longer than the file": (lambda f: clobber(f, lambda b: struct.pack("<Q", len(b)) + b[8:]), ["model.safetensors"]),
    "header of 16 exabytes": (lambda f: clobber(f, lambda b: b"\xff" * 8 + b[8:]), ["model.safetensors"]),
    "header is not JSON": (lambda f: clobber(f, lambda b: b[:8] + b"(" + b[9:]), ["model.safetensors"]),
    "pickle called safetensors": (lambda f: torch.save({"a": 1}, f / "model.safetensors"), ["model.safetensors"]),
    "overlapping offsets": (lambda f: change_header(f, lambda h: h[Q1].update(data_offsets=[0, 4096])), ["model.safetensors", "tensor"]),
    "offsets behind the end": (lambda f: change_header(f, lambda h: h[Q1].update(data_offsets=[2**40, 2**40 + 4096])),
                               ["model.safetensors"]),
    "shape and size disagree": (lambda f: change_header(f, lambda h: h[Q1].update(shape=[32, 31])), ["model.safetensors"]),
    "shape that overflows": (lambda f: change_header(f, lambda h: h[Q1].update(shape=[2**62, 2**62])), ["model.safetensors"]),
    "unknown dtype": (lambda f: change_header(f, lambda h: h[Q1].update(dtype="F99")), ["model.safetensors"]),
    "missing tensor": (lambda f: change_weights(f, lambda w: w.pop(Q1)), ["layers.1.self_attn.q_proj.weight"]),
    "leftover tensor": (lambda f: change_weights(f, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
                        ["model.safetensors", "layers.0.self_attn.q_proj.bias"]),
    "same tensor by two names": (lambda f: change_weights(f, lambda w: w.update({"norm.weight": torch.ones(32)})),
                                 ["model.safetensors", "norm.weight", "twice"]),
    "wrong shape": (lambda f: change_weights(f, lambda w: w.update({NORM: torch.ones(31)})), ["norm.weight", "(31,)", "(32,)"]),
    "transposed": (lambda f: change_weights(f, lambda w: w.update({EMBED: w[EMBED].T})), ["embed_tokens.weight", "shape"]),
    "integer weights": (lambda f: change_weights(f, lambda w: w.update({Q1: torch.ones(32, 32, dtype=torch.int8)})),
                        ["q_proj.weight", "int8"]),
    "index is not JSON": (lambda f: (index(f, dict), (f / "model.safetensors.index.json").write_text("no")), ["index.json", "not JSON"]),
    "index without a map": (lambda f: index(f, lambda m: []), ["index.json", "weight_map"]),
    "missing shard": (lambda f: (index(f, dict), (f / "b.safetensors").unlink()), ["b.safetensors"]),
    "shard above the folder": (lambda f: index(f, lambda m: {**m, NORM: "../b.safetensors"}), ["index.json", NORM, ".."]),
    "shard elsewhere": (lambda f: index(f, lambda m: {**m, NORM: "/b.safetensors"}), ["index.json", NORM]),
    "shard elsewhere on Windows": (lambda f: index(f, lambda m: {**m, NORM: "..\\b.safetensors"}), ["index.json", NORM]),
    "shard on a drive": (lambda f: index(f, lambda m: {**m, NORM: "C:b.safetensors"}), ["index.json", NORM]),
    "shard is pickled": (lambda f: index(f, lambda m: {**m, NORM: "pytorch_model.bin"}), ["index.json", NORM, "pytorch_model.bin"]),
    "shard is a number": (lambda f: index(f, lambda m: {**m, NORM: 7}), ["index.json", NORM]),
    "shard with a zero byte": (lambda f: index(f, lambda m: {**m, NORM: "\0.safetensors"}), ["safetensors"]),
    "index names the wrong shard": (lambda f: index(f, lambda m: {**m, EMBED: "b.safetensors", NORM: "a.safetensors"}),
                                    ["safetensors", "index"]),
    "tensor in two shards": (lambda f: (index(f, dict), write(f, {EMBED: torch.ones(61, 32)}, file="c.safetensors"),
                                        (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
                                            "x": "a.safetensors", EMBED: "c.safetensors"}}))), ["safetensors"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folder_is_one_line(tmp_path, good, what):
    folder = tmp_path / "llama"
    shutil.copytree(good, folder)
    damage, named = BROKEN[what]
    damage(folder)
    with pytest.raises(ModelError) as error:
        GPT.from_llama(folder)
    message = str(error.value)
    assert str(folder) in message and message.count("config.json:") <= 1 and "\n" not in message and len(message) < 600
    for word in named:
        assert word in message


def test_two_good_shards_of_our_own(tmp_path, good):
    folder = tmp_path / "llama"
    shutil.copytree(good, folder)
    index(folder, dict)
    idx = torch.arange(10)[None]
    assert torch.equal(GPT.from_llama(folder)(idx)[0], GPT.from_llama(good)(idx)[0])


def test_no_such_folder(tmp_path):
    with pytest.raises(ModelError, match="config.json"):
        GPT.from_llama(tmp_path / "nowhere")


def test_missing_safetensors_says_what_to_install(tmp_path, good, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ModelError, match="pip install safetensors"):
        GPT.from_llama(good)


def test_nothing_is_unpickled(tmp_path, good):
    """A pickle that would write a file is put in every place where weights are looked for."""
    folder, trace = tmp_path / "llama", tmp_path / "trace"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (trace,)

    shutil.copytree(good, folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        torch.save(Bomb(), folder / name)
    with pytest.raises(ModelError):
        GPT.from_llama(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        GPT.from_llama(folder)
    assert not trace.exists()
