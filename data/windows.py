"""Windows for a model that was not trained here: random tokens, and stretches of a text."""
from pathlib import Path

import torch

from .common import UserError, read_bytes, reason, say


def random_windows(N: int, T: int, vocab_size: int, seed: int = 0):
    """x, y (N, T) int64 of uniformly random tokens, y being the next one: nothing to predict."""
    tokens = torch.randint(vocab_size, (N, T + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def english() -> str:
    """A text of 6,000 words, written for this repository (CC0): no model was trained on it. SmolLM2
    reads it at 3.8 nats a token in windows of 64 tokens and 3.3 in windows of 512, where Python's
    manual, of which it may have read much, gives 2.6."""
    return (Path(__file__).parent / "english.txt").read_text(encoding="utf-8")


def text_windows(ids, batches: int, N: int, T: int):
    """[(x, y)] of each batch, (N, T) int64: windows of one text, evenly spaced, and dealt out so
    that every batch has some of all its parts. y is the token that follows each of x, and no two
    windows share a token of x. UserError for a text that is too short."""
    ids, n = torch.as_tensor(ids), batches * N
    if len(ids) < n * T + 1:
        raise UserError(f"the text has {len(ids)} tokens, too few for {n} windows of {T}; "
                        "ask for fewer windows or batches")
    starts = torch.linspace(0, len(ids) - T - 1, n).long()
    rows = ids[starts[:, None] + torch.arange(T + 1)].view(N, batches, T + 1)
    return [(rows[:, b, :-1], rows[:, b, 1:]) for b in range(batches)]


def llama_encoder(folder: Path):
    """Text -> ids by the tokenizer.json of a Llama folder; None, with the reason printed, where
    there is none or no package to read it. Raises UserError for a damaged one."""
    if not (folder / "tokenizer.json").is_file():
        say(f"{folder} has no tokenizer.json: random tokens only")
        return None
    try:
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_str(read_bytes(folder / "tokenizer.json").decode())
    except ImportError:
        say("text needs the package tokenizers (pip install tokenizers): random tokens only")
        return None
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{folder / 'tokenizer.json'}: {reason(error)}") from None
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
