"""Pages of results: tables in Markdown, and pages that commands fill with them."""

from pathlib import Path

import probe
from data.common import write_atomically


def fill(text: str, blocks: dict) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- end -->` replaced by a block."""
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        if start in text:
            head, rest = text.split(start, 1)
            text = f"{head}{start}{block}\n{end}{rest.split(end, 1)[1]}"
    return text


def fill_page(path, blocks: dict) -> None:
    """`fill`, for the text in a file."""
    text = fill(Path(path).read_text(encoding="utf-8"), blocks)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def markdown(head, rows) -> str:
    """A table in Markdown, from cells of text."""
    def line(cells):
        return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])


def mean_std(values) -> str:
    """Mean ± standard deviation, 0 for a single value."""
    mean, std = probe.spread(values)
    return f"{mean:.2f} ± {std:.2f}"
