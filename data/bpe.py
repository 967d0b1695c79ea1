"""Byte-level byte-pair encoding: a short trainer whose result runs inside tiktoken.

The idea (Sennrich et al. 2016, arXiv 1508.07909; on bytes: GPT-2, Radford et al. 2019): start with
the 256 bytes, and again and again turn the most frequent pair of neighbouring tokens into a new
token. Because every byte is a token, any text at all can be encoded.

Text is first cut into words, and no merge crosses a word. So it is enough to count each *distinct*
word once and to merge inside those: minutes become seconds.
"""
import base64
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import regex
import tiktoken

from .common import UserError, bar

# A word is: letters, up to three digits, or punctuation, each with the blank before it; or white
# space, whose last blank is left to the word that follows. A line end and the indentation after it
# are one word, which suits code. GPT-2's pattern also splits off 's, 're, ...: wrong for 'self'.
# The look-ahead must try again for each blank that it gives back, so a run of blanks is cut at 128:
# without the limit, tiktoken dies of a few million of them.
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s{1,128}(?!\S)|\s+"
BOS = "<|bos|>"
LONGEST = 4096  # letters; what is longer is no word to learn from: it would take hours


def pieces(text: str, size: int = 2**20) -> Iterator[str]:
    """A long text in pieces of about `size` letters, cut between two words: before a blank or line
    end that follows neither. Only a word of more than `size` letters is cut itself."""
    start = 0
    while start < len(text):
        cut = start + size
        while cut < len(text) and (text[cut] not in " \n" or text[cut - 1].isspace()):
            cut += 1
            if cut > start + 2 * size:
                break
        yield text[start:cut]
        start = cut


def train(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """Learn the tokens of `texts`: a list of byte strings whose index is their rank and their id.

    The list has vocab_size - 1 entries (the last id is kept for <|bos|>): the 256 bytes, then the
    merges in the order in which they were learned. It is shorter when no pair is left that occurs
    twice. The result depends on the text only: of equally frequent pairs the one with the smaller
    ids wins. Raises UserError when vocab_size < 257, which has no room for the bytes and <|bos|>.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size is {vocab_size}, but 256 bytes and {BOS} need at least 257")
    counts, find = Counter(), regex.compile(PATTERN).findall
    with bar(what="data: words counted", unit=" letters", unit_scale=True) as progress:
        for text in texts if vocab_size > 257 else ():
            for piece in pieces(text):
                counts.update(word for word in find(piece) if len(word) <= LONGEST)
                progress.update(len(piece))
    words = [list(word.encode()) for word in counts]  # each distinct word as a list of token ids
    times = list(counts.values())  # and how often it occurs

    pairs = Counter()  # (left id, right id) -> occurrences in the whole text
    where = defaultdict(set)  # (left id, right id) -> the words that hold it, perhaps no longer
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += times[w]
            where[pair].add(w)

    tokens = [bytes([byte]) for byte in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    progress = bar(what="data: tokens learned", total=vocab_size - 1, initial=len(tokens))
    while len(tokens) < vocab_size - 1 and pairs:
        most = max(pairs.values())
        if most < 2:
            break
        best = min(pair for pair, count in pairs.items() if count == most)
        merged = tokens[best[0]] + tokens[best[1]]
        # Two pairs can spell the same bytes (a+bc, ab+c). tiktoken knows tokens by their bytes, so
        # they are one token.
        new = ids.setdefault(merged, len(tokens))
        if new == len(tokens):
            tokens.append(merged)
            progress.update()
        for w in where[best]:
            words[w], gone, born = _merge(words[w], best, new)
            for pair in gone:
                pairs[pair] -= times[w]
            for pair in born:
                pairs[pair] += times[w]
                where[pair].add(w)
        del pairs[best], where[best]  # not one is left
    progress.close()
    return tokens


def _merge(word: list[int], pair: tuple[int, int], new: int) -> tuple[list, list, list]:
    """Replace each `pair` in `word` by the token `new`, from left to right.

    Returns the new word and the pairs that this has taken from it and given to it, `pair` itself
    left out: only the neighbours of a merge change, so only they are counted again.
    """
    left, right = pair
    out, gone, born = [], [], []
    i, last = 0, len(word) - 1
    while i <= last:
        if word[i] == left and i < last and word[i + 1] == right:
            if out:
                gone.append((out[-1], left))
                born.append((out[-1], new))
            if i + 1 < last:
                gone.append((right, word[i + 2]))
                born.append((new, word[i + 2]))
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out, gone, born


def to_text(tokens: Sequence[bytes]) -> str:
    """tiktoken's text format: one token a line, its bytes in base64, a blank, its rank."""
    return "".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))


def from_text(text: str) -> list[bytes]:
    """Read `to_text` back. Raises ValueError when the text is not such a list.

    tiktoken's own reader caches files by their path and would serve a stale one.
    """
    tokens = []
    for i, line in enumerate(text.splitlines()):
        token, rank = line.split()
        if int(rank) != i:
            raise ValueError(f"line {i + 1} has rank {rank}")
        tokens.append(base64.b64decode(token, validate=True))
    if tokens[:256] != [bytes([byte]) for byte in range(256)] or len(set(tokens)) != len(tokens):
        raise ValueError("the first 256 tokens are not the bytes, or a token stands there twice")
    return tokens


def encoding(tokens: Sequence[bytes], name: str = "bpe") -> tiktoken.Encoding:
    """The tokens as a tiktoken.Encoding, with <|bos|> as the last id, len(tokens)."""
    return tiktoken.Encoding(name, pat_str=PATTERN, special_tokens={BOS: len(tokens)},
                             mergeable_ranks={token: i for i, token in enumerate(tokens)})
