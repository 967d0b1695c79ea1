"""Windows for a model that was not trained here: random tokens, and stretches of a text."""
import functools
from pathlib import Path

import torch

from .common import UserError, read_json, reason


def random_windows(N: int, T: int, vocab_size: int, seed: int = 0):
    """x, y (N, T) int64 of uniformly random tokens, y being the next one: nothing to predict."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (N, T + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def english() -> str:
    """A text of 4,400 words, written for this repository (CC0): no model was trained on it. SmolLM2
    reads it at 3.8 nats a token in windows of 64 tokens and 3.3 in windows of 512. Python's manual,
    which it may have been trained on, gives 2.6."""
    return (Path(__file__).parent / "english.txt").read_text(encoding="utf-8")


def text_windows(ids, batches: int, N: int, T: int):
    """Cut one text into windows: a list of (x, y), each (N, T) int64, one pair a batch.

    The windows are evenly spaced, and dealt out so that every batch has some of all parts of the
    text. y is the token that follows each of x; no two windows share a token of x. Raises UserError
    for a text that is too short.
    """
    ids = torch.as_tensor(ids)
    n = batches * N
    if len(ids) < n * T + 1:
        raise UserError(f"the text has {len(ids)} tokens, too few for {n} windows of {T}; "
                        "ask for fewer windows or batches")
    starts = torch.linspace(0, len(ids) - T - 1, n).long()
    rows = ids.unfold(0, T + 1, 1)[starts]
    rows = rows.view(N, batches, T + 1)
    x, y = rows[..., :-1], rows[..., 1:]
    return [(x[:, b], y[:, b]) for b in range(batches)]


def llama_tokenizer(folder: Path, vocab_size: int):
    """Of a Llama's folder: encode, text -> ids, and decode; both None without tokenizer.json.
    Raises UserError for a damaged one; encode raises it for an id that the model has not."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None, None
    from tokenizers import Tokenizer
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{path}: {reason(error)}") from None

    def encode(text):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= vocab_size:
            raise UserError(f"{path} is of another model: it gives the id {max(ids)}, and this "
                            f"model has {vocab_size}; fetch the folder again")
        return ids
    return encode, functools.partial(tokenizer.decode, skip_special_tokens=False)


def llama_bos(folder: Path, encode) -> tuple[int, str]:
    """The id and the text of the token that begins a document, as tokenizer_config.json names it.
    Raises UserError where there is none."""
    path, bos = folder / "tokenizer_config.json", None
    if encode and path.is_file():
        bos = read_json(path).get("bos_token")
    if isinstance(bos, dict):  # as older files have it
        bos = bos.get("content")
    ids = encode(bos) if bos else []
    if len(ids) != 1:
        raise UserError(f"{folder} has no BOS (tokenizer.json and the bos_token of "
                        "tokenizer_config.json); leave --bos out")
    return ids[0], bos


def put_first(bos: int, x, y):
    """x, y (N, T) -> the same windows, with bos before their first token and without their last."""
    first = torch.full_like(x[:, :1], bos)
    return torch.cat((first, x[:, :-1]), 1), x
