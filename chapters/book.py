"""The chapters as a book that is read without running anything.

    python -m chapters.book            run every chapter, write the book and the site
    python -m chapters.book 03 05      only these; of the others, what is there stays
    python -m chapters.book --check    run nothing: is the book as the chapters are?

chapters/book/NN.md has the text, code, output and figures of a chapter, and is
committed: the repository's page shows it. The same pages are a site in out/book/, with
formulas as MathML, which browsers draw by themselves, without a network. The same
numbers give the same bytes: no times, no counts, and of what a cell prints only its
standard output. Two chapters run at a time, with one thread each: that is faster than
one with two, and the last digits do not depend on how many cores there are.
"""

import argparse
import base64
import html
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from data.common import UserError, bar, program, read_bytes, say, write_atomically

HERE = Path(__file__).resolve().parent
BOOK, SITE = HERE / "book", HERE.parent / "out" / "book"
SLOWEST = 900  # seconds for one cell: by then something hangs
JOBS = 2  # chapters at a time
OUTPUT = re.compile(r"\n```text\n.*?\n```\n|\n<img [^>]*>\n", re.DOTALL)
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="style.css">
<main>
{body}</main>
</html>
"""
STYLE = """body { margin: 0; font: 17px/1.55 Georgia, serif; color: #111 }
main { max-width: 845px; margin: 2em auto; padding: 0 1em }
h1, h2, h3 { font-family: system-ui, sans-serif; line-height: 1.2; margin-top: 1.6em }
code, pre { font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace }
pre { overflow-x: auto; padding: .7em .9em; border-radius: 4px; background: #f6f6f6 }
pre.output { background: #fff; border: 1px solid #ddd }
img { max-width: 100%; height: auto; display: block; margin: 1em 0 }
math[display="block"] { margin: 1em 0; overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .2em .8em; text-align: left }
th { border-bottom: 2px solid #111 } td { border-bottom: 1px solid #ddd }
a { color: #b83200 }
"""


def chapters() -> list[Path]:
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


# ---------------------------------------------------------------- running

def prepare(paths):
    """Fetch and train what these chapters use. Training tells how long it takes: in a
    chapter, that would stand in the book."""
    from chapters import lesson
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    every = "models(*names)" in text  # of names that are put together there
    with ThreadPoolExecutor() as pool:
        fetched = pool.submit(lesson.smollm2.fetch) if "real()" in text else None
        lesson.models(*(name for name in lesson.RUNS if every or f'"{name}"' in text))
        if fetched:
            fetched.result()


def execute(path, notebook=None):
    """The notebook of a chapter, run from first cell to last in a kernel of its own
    that stands in chapters/. Raises UserError, below what the failing cell says."""
    notebook = notebook or jupytext.read(path)
    progress = bar(what=path.stem, total=len(notebook.cells), unit="cell")
    client = NotebookClient(
        notebook, timeout=SLOWEST, kernel_name="python3",
        on_cell_complete=lambda cell, cell_index: progress.update(),
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"])
    try:
        client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    except CellExecutionError as error:
        say(error, to=sys.stderr)
        raise UserError(f"{path.name} stops at the cell above") from None
    except (DeadKernelError, TimeoutError, AssertionError):  # nbclient's, after Ctrl-C
        raise UserError(f"{path.name}: its kernel was stopped, or a cell took longer "
                        f"than {SLOWEST} seconds") from None
    finally:
        progress.close()
    return notebook


# ---------------------------------------------------------------- one chapter, one page

def page(path, notebook):
    """The Markdown of a chapter, and its figures: name of a file -> bytes."""
    parts, figures = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(links(cell.source))
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            parts += outputs(path, cell.get("outputs", ()), figures)
    return "\n\n".join([*parts, "---", neighbours(path)]) + "\n", figures


def links(text):
    """Links as seen from the folder of the book: other chapters are pages there."""
    text = re.sub(r"\]\((\d\d)_\w+\.py", r"](\1.md", text)
    return re.sub(r"\]\((?!\w+:|#|\d\d\.md)", "](../", text)


def outputs(path, found, figures):
    """What stands below a cell: text in one block, figures by their names."""
    text, pictures = "", []
    for output in found:
        data = output.get("data", {})
        if output.output_type == "stream":
            text += output.text if output.name == "stdout" else ""
        elif "image/png" in data:
            pictures.append(picture(path, output, figures))
        else:
            text += data.get("text/plain", "") + "\n"
    if ADDRESS.search(text):
        raise UserError(f"{path.name} prints a memory address, which no two runs share")
    text = re.sub(r"[^\n]*\r", "", text)  # what a terminal writes over
    lines = text.strip("\n").split("\n")
    shown = "\n".join(line.rstrip() for line in lines)
    return [f"```text\n{shown}\n```"] * bool(shown) + pictures


def picture(path, output, figures):
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
        row.insert(0, f"← [{title(paths[at - 1])}]({paths[at - 1].stem[:2]}.md)")
    if at + 1 < len(paths):
        row.append(f"[{title(paths[at + 1])}]({paths[at + 1].stem[:2]}.md) →")
    return " | ".join(row)


def title(path):
    return jupytext.read(path).cells[0].source.splitlines()[0].removeprefix("# ")


def claim(path):
    first = jupytext.read(path).cells[0].source
    return " ".join(re.search(r"\*\*Claim\.\*\*(.*?)\n\n", first, re.DOTALL)[1].split())


def contents():
    """The page of all chapters."""
    rows = [f"- [{title(p)}]({p.stem[:2]}.md). {links(claim(p))}" for p in chapters()]
    return "# The chapters, run\n\n" + "\n".join(rows) + "\n"


def write(name, content):
    """A page or a figure of the book, if it is another one than before."""
    content = content.encode() if isinstance(content, str) else content
    path = BOOK / name
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, lambda part: part.write_bytes(content))


def stale():
    """Names of pages that do not show the chapters as they are. Output is left out of
    the comparison: only a run can tell."""
    pages = {path.stem[:2]: page(path, jupytext.read(path))[0] for path in chapters()}
    pages["README"] = contents()
    made = {path.stem: read_bytes(path).decode() for path in BOOK.glob("*.md")}
    return [name for name in sorted(pages.keys() | made.keys())
            if OUTPUT.sub("", made.get(name, "")) != pages.get(name)]


# ---------------------------------------------------------------- the site

def formula(latex, how):
    return convert(latex, display="block" if how["display_mode"] else "inline")


def fence(tokens, at, *_):
    """Code in colours; what it printed, framed."""
    if tokens[at].info == "python":
        return highlight(tokens[at].content, PythonLexer(), HtmlFormatter())
    return f'<pre class="output">{html.escape(tokens[at].content)}</pre>\n'


def site():
    """out/book/ from every page and figure of chapters/book."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    markdown.use(dollarmath_plugin, renderer=formula, double_inline=True)
    markdown.renderer.rules["fence"] = fence
    colours = HtmlFormatter().get_style_defs(".highlight")
    files = {"style.css": (STYLE + colours).encode()}
    for path in sorted(BOOK.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\]\((\d\d|README)\.md\)", r"](\1.html)", text)
        text = text.replace("](../", "](../../chapters/")
        text = text.replace("README.html", "index.html")
        heading = text.split("\n", 1)[0].removeprefix("# ")
        shown = PAGE.format(title=html.escape(heading), body=markdown.render(text))
        name = "index" if path.stem == "README" else path.stem
        files[f"{name}.html"] = shown.encode()
    for path in BOOK.glob("*.png"):
        files[path.name] = path.read_bytes()
    for name, content in files.items():
        write_atomically(SITE / name, lambda part, it=content: part.write_bytes(it))


# ---------------------------------------------------------------- the program

def make_page(path):
    """Run a chapter and write its page, or nothing if it fails."""
    start = time.monotonic()
    text, figures = page(path, execute(path))
    number = path.stem[:2]
    for name, content in {f"{number}.md": text, **figures}.items():
        write(name, content)
    for old in BOOK.glob(f"{number}_*.png"):
        if old.name not in figures:
            old.unlink()
    say(f"{path.stem}: {len(figures)} figures, {time.monotonic() - start:.0f} s")


def make(paths):
    prepare(paths)
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(make_page, paths))  # the first failure is raised here
    write("README.md", contents())
    site()
    say("chapters/book and out/book/index.html are written")


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
        say("the book shows the chapters as they are")
    else:
        make([there[number] for number in given.number or there])
    return 0


if __name__ == "__main__":
    sys.exit(program("chapters.book", main))
