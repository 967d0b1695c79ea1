"""The chapters as a book that is read without running anything.

    python -m chapters.book            run every chapter and write the book
    python -m chapters.book 03 05      only these; the other pages stay as they are
    python -m chapters.book --check    run nothing: is the book as the chapters are?

chapters/book/NN.md has the text, code, output and figures of a chapter. It is
committed, and GitHub shows it. The same numbers give the same bytes: a page has no
times and no counts, and only the standard output of a cell. Two chapters run at a time,
with one thread each. That is faster than one with two, and the last digits do not
depend on the number of cores.
"""

import argparse
import base64
import html
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from chapters import lesson
from data.common import UserError, program, write_atomically

HERE = Path(__file__).resolve().parent
BOOK = HERE / "book"
ALONE = {"OMP_NUM_THREADS": "1", "ATTENTION_SINK_BOOK": "1"}  # nobody predicts
OUTPUT = re.compile(r"\n```text\n.*?\n```\n|\n<img [^>]*>\n", re.DOTALL)


def chapters() -> list[Path]:
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


# ---------------------------------------------------------------- running

def prepare(paths):
    """Fetch and train the models of these chapters. Training says how long it takes: in
    a chapter, these words would stand in the book."""
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    if "real()" in text:
        lesson.smollm2.fetch()
    every = "models(*" in text  # a chapter that puts the names together
    lesson.models(*(name for name in lesson.RUNS if every or f'"{name}"' in text))


def execute(path, notebook):
    """Run the notebook of a chapter, first cell to last, in a kernel of its own that
    stands in chapters/. Prints what a failing cell says, and raises UserError."""
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"])
    try:
        client.execute(env=os.environ | ALONE)
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        raise UserError(f"{path.name} stops at the cell above") from None


# ---------------------------------------------------------------- one chapter, one page

def page(path, notebook):
    """The Markdown of a chapter, and its figures: name of a file -> bytes."""
    parts, figures = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(formulas(links(cell.source)))
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            parts += outputs(path, cell.get("outputs", ()), figures)
    return "\n\n".join([*parts, "---", neighbours(path)]) + "\n", figures


def links(text):
    """Links as seen from the folder of the book: other chapters are pages there."""
    text = re.sub(r"\]\((\d\d)_\w+\.py", r"](\1.md", text)
    return re.sub(r"\]\((?!\w+:|#|\d\d\.md)", "](../", text)


def formulas(text):
    """Displayed formulas in a fence of their own: in $$ GitHub reads _ as Markdown."""
    return re.sub(r"^\$\$(.+?)\$\$$", r"```math\n\1\n```", text, flags=re.M | re.S)


def outputs(path, found, figures):
    """The output of a cell: its text in one block, then its figures."""
    text, pictures = "", []
    for output in found:
        data = output.get("data", {})
        if output.output_type == "stream":
            text += output.text if output.name == "stdout" else ""
        elif "image/png" in data:
            pictures.append(picture(path, output, figures))
        else:
            text += data.get("text/plain", "") + "\n"
    shown = "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))
    return [f"```text\n{shown}\n```"] * bool(shown) + pictures


def picture(path, output, figures):
    """The <img> of a figure, whose bytes are added to `figures`."""
    name, of = output.metadata.get("name", ""), output.metadata.get("image/png", {})
    named = name.startswith(path.stem[:3]) and f"{name}.png" not in figures
    if not named or not of.get("alt"):
        raise UserError(f"{path.name}: a figure without a name and text of its own; "
                        f'use show(figure, "{path.stem[:2]}_name", "text")')
    figures[f"{name}.png"] = base64.b64decode(output.data["image/png"])
    alt = html.escape(" ".join(of["alt"].split()))
    return f'<img src="{name}.png" width="{of["width"]}" alt="{alt}">'


def neighbours(path):
    """The last line of a page: the page before, all pages, the chapter, the next."""
    paths = chapters()
    at = paths.index(path)
    row = ["[Contents](README.md)", f"[Source](../{path.name})"]
    if at > 0:
        row.insert(0, f"← {link(paths[at - 1])}")
    if path != paths[-1]:
        row.append(f"{link(paths[at + 1])} →")
    return " | ".join(row)


def opening(path):
    return jupytext.read(path).cells[0].source


def link(path):
    title = opening(path).splitlines()[0].removeprefix("# ")
    return f"[{title}]({path.stem[:2]}.md)"


def contents():
    """The page of all chapters: title and claim of each."""
    rows = []
    for path in chapters():
        claim = re.search(r"\*\*Claim\.\*\*(.*?)\n\n", opening(path), re.DOTALL)[1]
        rows.append(f"- {link(path)}. {links(' '.join(claim.split()))}\n")
    return "# The book: all chapters, with their output\n\n" + "".join(rows)


def stale():
    """Names of pages that do not show the chapters as they are. Output is left out of
    the comparison: only a run can tell."""
    pages = {path.stem[:2]: page(path, jupytext.read(path))[0] for path in chapters()}
    pages["README"] = contents()
    made = {path.stem: path.read_text(encoding="utf-8") for path in BOOK.glob("*.md")}
    return [name for name in sorted(pages.keys() | made.keys())
            if OUTPUT.sub("", made.get(name, "")) != pages.get(name)]


# ---------------------------------------------------------------- the program

def write(name, content):
    write_atomically(BOOK / name, lambda part: part.write_bytes(content))


def make_page(path):
    """Run a chapter and write its page, or nothing if it fails."""
    notebook = jupytext.read(path)
    execute(path, notebook)
    text, figures = page(path, notebook)
    number = path.stem[:2]
    write(f"{number}.md", text.encode())
    for name, content in figures.items():
        write(name, content)
    for old in BOOK.glob(f"{number}_*.png"):
        if old.name not in figures:
            old.unlink()
    print(f"{path.stem}: {len(figures)} figures", flush=True)


def make(paths):
    prepare(paths)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make_page, paths))  # raises the first failure
    write("README.md", contents().encode())


def main():
    parser = argparse.ArgumentParser(
        prog="python -m chapters.book", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", nargs="*", help="two digits; all, if none is given")
    parser.add_argument("--check", action="store_true", help="only compare")
    given = parser.parse_args()
    there = {path.stem[:2]: path for path in chapters()}
    for number in given.number:
        if number not in there:
            raise UserError(f"no chapter {number}; there are {', '.join(there)}")
    if given.check:
        wrong = stale()
        if wrong:
            raise UserError(f"the book is older than the chapters: {', '.join(wrong)}; "
                            "run python -m chapters.book with these numbers")
        print("the book shows the chapters as they are")
    else:
        make([there[number] for number in given.number or there])
    return 0


if __name__ == "__main__":
    sys.exit(program("chapters.book", main))
