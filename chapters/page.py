"""One HTML file to click through: every head of a model on one text, by page.html.

Numbers and words in, a file out; no model and no program is known here. The maps travel
as bytes, 255 for a weight of 1, so that a weight is right to 0.002, and the lengths as
floats; both are packed with zlib, which every browser unpacks by itself. The drawing is
plain JavaScript on a canvas: a grid, a map and a few lines need no library, and the
file must open from disk, without a network, for years.
"""

import base64
import json
import zlib
from pathlib import Path

import numpy as np

from data.common import write_atomically

TEMPLATE = Path(__file__).with_name("page.html")
MOST = 3_000_000  # bytes of the file, so that it can be mailed


def write(path, content) -> None:
    """`content` is `probe.page_of`: name, words (T of them), queries (T bools, those
    that count for the sink), threshold, layer and head to begin with, and states: a
    dict each of label, says, next [(word, probability)], pattern (L, H, T, T), length
    (L, T), and maybe `k` or `step`. Where the file would be too large, every second `k`
    is left out. Raises UserError where it cannot be written."""
    states = content["states"]
    text = html(content)
    while len(text.encode()) > MOST and any("k" in state for state in states):
        alone = [state["k"] for state in states if "k" in state]
        left_out = alone[1::2] or alone
        states = [state for state in states if state.get("k") not in left_out]
        text = html(content | {"states": states})
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def html(content) -> str:
    """The page as text."""
    states = content["states"]
    L, H, T, _ = np.shape(states[0]["pattern"])
    seen = np.tril(np.ones((T, T), bool))  # what a query can see, row by row
    shown = [np.asarray(state["pattern"])[..., seen] for state in states]
    maps = np.stack([(weights * 255).round().astype(np.uint8) for weights in shown])
    maps[1:] -= maps[0]  # modulo 256: most differences are small, and pack better
    lengths = np.stack([np.asarray(state["length"], "<f4") for state in states])
    arrays = ("pattern", "length")
    told = [{k: v for k, v in state.items() if k not in arrays} for state in states]
    numbers = content | {"states": told, "layers": L, "heads": H,
                         "maps": packed(maps), "lengths": packed(lengths)}
    page = TEMPLATE.read_text(encoding="utf-8")
    safe = json.dumps(numbers, allow_nan=False).replace("<", "\\u003c")  # no </script>
    return page.replace("/*NUMBERS*/", safe)


def packed(array) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()
