"""Shared by the chapters: models, windows, figures, exercises. A chapter begins with

    from lesson import beside, check, english, look, models, plt, random_tokens, real
    from lesson import show, windows
    import probe

A notebook or script in chapters/ finds this file, and this file finds the repository.

    model, encoding = real()            SmolLM2-135M, its tokenizer; fetched if absent
    x, y = random_tokens()              (8, 64) random tokens, the paper's control
    x, y = english(batch=1)             (8, 64) held-out English; batches are disjoint
    small = models("softmax", "headnorm")    {name: GPT} of RUNS, trained if absent
    untrained("softmax"), log("softmax")     before training; its evaluations
    x, y = windows("rest")              for them: rest, letters, copy, quiet, bos, text
    look("Dear students, ...", layer=24, head=3, silence={11: [1229, 1487]})
                                        your own words in SmolLM2, on the axes of a map
    figure, axis = plt.subplots(...)    at most 8.8 inches wide: then points are points
    show(figure, "05_lock", "a description for readers who cannot see it")
    beside(("quantity", "what the paper reports", 0.32))
    check("05.lock_gap", lock_gap)      the check of exercise lock_gap in checks/05.py

Import this file before torch: it tells torch's waiting threads not to spin. Beside a
browser, which needs a core as well, spinning threads made SmolLM2 fifteen times slower.

A check is a function of checks/NN.py with the name of its exercise. It takes the answer
and asserts, with a message that says what is missing. It may call
`written_without(answer, "sink_score")`. An answer is a function or a value; `...` means
that there is none yet. A chapter asks for a prediction in text, above
`prediction = ...`; `ask(prediction)` waits for it, and `check` follows below the run.
"""

import contextlib
import functools
import inspect
import math
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ROOT / "chapters" / "checks"
if str(ROOT) not in sys.path:  # so that a chapter in its own folder finds model.py
    sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
warnings.filterwarnings("ignore", "IProgress not found")  # no ipywidgets: no bar

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

import data  # noqa: E402
import probe  # noqa: E402
import train  # noqa: E402
from chapters import figures  # noqa: E402
from data import smollm2, windows as of_text  # noqa: E402
from data.common import OUT, UserError  # noqa: E402
from data.runs import load_checkpoint, read_config, read_log  # noqa: E402
from model import ATTENTIONS, GPT  # noqa: E402

torch.set_num_threads(min(torch.get_num_threads(), 4))
plt.rcParams.update(figures.STYLE)

# Each is trained once and kept in out/: heads that must rest, under every attention;
# copying; text after <|bos|>.
RUNS = {attn: train.Run(attn=attn, size="rest") for attn in ATTENTIONS}
RUNS |= {"copy": train.Run(size="micro"), "text": train.Run(size="tiny")}


TASK = data.TASKS["rest"]()  # TASK.resting(x): which queries have nothing to look for


# ---------------------------------------------------------------- models

class Stop(Exception):
    """Ends a cell in one line."""

    def _render_traceback_(self):  # a notebook shows this in place of a traceback
        return [str(self)]


def notebook():
    """True in a Jupyter kernel, False in a script."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return hasattr(shell, "kernel")


@contextlib.contextmanager
def in_one_line():
    """A UserError or an interrupt ends the cell or script in one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        line = str(error) or "stopped; run this cell again to go on"
        if notebook():
            raise Stop(line) from None
        sys.exit(line)


@functools.cache
def real():
    """SmolLM2-135M, a real Llama, and its tokenizer: (GPT, tiktoken.Encoding).
    The first call on a machine fetches it, 93 MB."""
    with in_one_line():
        folder = smollm2.fetch()
        return GPT.from_llama(folder).eval(), smollm2.encoding(folder)


def random_tokens(N=8, T=64, seed=0):
    """x, y (N, T): windows of random tokens for `real`, with nothing to predict."""
    return of_text.random_windows(N, T, real()[0].cfg.vocab_size, seed)


def english(N=8, T=64, batch=0):
    """x, y (N, T): windows of a text that no model was trained on, for `real`. They lie
    end to end, and each batch has some of all parts of the text."""
    ids = real()[1].encode_ordinary(of_text.english())
    batches = max(1, (len(ids) - 1) // (N * T))
    end_to_end = ids[:batches * N * T + 1]
    with in_one_line():
        return of_text.text_windows(end_to_end, batches, N, T)[batch]


def placed(name):
    """The Run of a name, in out/ of the repository (or `data.common.OUT`), wherever the
    chapter runs."""
    run = train.resolve(RUNS[name])
    run.out = os.path.relpath(ROOT / run.out)
    return run


def models(*names):
    """{name: GPT} of these RUNS, on the CPU. Those that are missing are trained first,
    two at a time; those that were interrupted go on."""
    with in_one_line():
        runs = {name: placed(name) for name in names}
        trained(*runs.values())
        return {name: train.load_run(run.out)[0] for name, run in runs.items()}


def untrained(name):
    """The model of a RUN with its initial weights."""
    with in_one_line():
        run = placed(name)
        cfg = train.model_config(run, train.load_corpus(run))
        return GPT(cfg, seed=run.seed).eval()


def log(name):
    """The evaluations of a RUN, one dict each, for `figures.birth`."""
    models(name)
    return read_log(placed(name).out)


def windows(kind, N=64, seed=0):
    """x, y held out, for the small models: of the task rest ("rest", (N, 16)), or its
    letters only, with nothing to look for ("letters"; y is None); of copying ("copy",
    (N, 64)), or random letters, where nothing is copied ("quiet"); text of the standard
    library after <|bos|> ("bos"), or from any place ("text")."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "rest":
        return TASK.batch(N, 16, generator)
    if kind == "letters":
        return TASK.rest(N, 16, generator), None
    if kind == "quiet":
        return data.load("copy").rest(N, 64, generator)
    corpus = data.load("copy" if kind == "copy" else "stdlib", vocab_size=257)
    return corpus.batch(N, 64, generator, "val", bos=float(kind == "bos"))


# ---------------------------------------------------------------- several trainings

def trained(*runs, jobs=2):
    """Have these runs, of size rest, micro or tiny, trained `jobs` at a time, each by
    `python train.py` in a process of its own: models this small gain nothing from a
    second thread. A missing run starts, a stopped one goes on. After Ctrl-C all save
    what they have. Raises UserError."""
    waiting = [run for run in map(train.resolve, runs) if not is_finished(run)]
    if not waiting:
        return
    names = ", ".join(run.out for run in waiting)
    minutes = [train.MINUTES[run.size] * run.steps / train.SIZES[run.size]["steps"]
               for run in waiting]
    least = math.ceil(max(sum(minutes) / jobs, *minutes))  # on a busy machine 3 times
    print(f"training {names}: {least} to {3 * least} minutes", flush=True)
    bar = tqdm(total=len(waiting), unit="training", disable=None, leave=False)
    running = {}  # process -> (its run, the file of its stderr)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run, errors = waiting.pop(0), tempfile.TemporaryFile("w+")
                running[start(run, errors)] = run, errors
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                run, errors = running.pop(process)
                if process.returncode:
                    errors.seek(0)
                    lines = errors.read().splitlines() or ["its training was stopped"]
                    raise UserError(f"{run.out}: {lines[-1]}")
                bar.update()
    finally:
        bar.close()
        for process in running:  # after Ctrl-C or a failure
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()


def is_finished(run):
    """True if the folder of a run holds it, trained to its last step. Raises UserError
    where the folder holds a run of other settings."""
    folder = Path(run.out)
    if not (folder / "config.json").exists():
        return False
    there = read_config(folder)["run"]
    for name in train.changed(run, there):
        raise UserError(f"{folder} holds a run with {train.flag(name)} "
                        f"{there.get(name)}, not {getattr(run, name)}; move it out "
                        "of the way")
    path = folder / "model.pt"
    return path.exists() and load_checkpoint(path)["step"] == run.steps


def start(run, errors):
    """A process of train.py that starts a run, or goes on with it."""
    given = asdict(run) | {"compile": None}  # models this small are not compiled
    words = [f"{train.flag(name)}={value}" for name, value in given.items()
             if value is not None]
    if (Path(run.out) / "config.json").exists():
        words = [f"--resume={run.out}"]
    return subprocess.Popen([sys.executable, ROOT / "train.py", *words],
                            stdout=subprocess.DEVNULL, stderr=errors)


# ---------------------------------------------------------------- what a reader sees

def show(figure, name, alt):
    """Show a figure below its cell; from a script, write out/chapters/<name>.png, or
    with --format svg or pdf behind its name such a file. `alt` is for readers who do
    not see the figure."""
    if not notebook():
        words = sys.argv[1:]
        kind = words[-1] if words[-2:-1] == ["--format"] else "png"
        path = ROOT / OUT / "chapters" / f"{name}.{kind}"
        try:
            figures.save(path, figure)
            print(f"figure {os.path.relpath(path)}: {alt}")
        except UserError as error:  # a clone that nobody may write to
            print(f"no figure: {error}; set ATTENTION_SINK_OUT to a folder of your own")
        return
    from IPython.display import display
    width = round(96 * figure.get_figwidth())  # CSS pixels: points of type are points
    picture = {"image/png": figures.drawn(figure), "text/plain": f"figure: {alt}"}
    display(picture, metadata={"image/png": {"alt": alt, "width": width}, "name": name},
            raw=True)


def look(text, layer=None, head=None, silence=None, name="words"):
    """Your own words in SmolLM2: which heads rest on the first one, and the map of one
    head (the strongest, unless told) with the words on its axes, as it is and with
    neurons silent: those of `silence`, {layer: ids}, at every token, or else the five
    of every layer that write most at the first token, there. `name` is the figure's."""
    with in_one_line():
        model, encoding = real()
        ids = encoding.encode_ordinary(text)
        prompt = probe.fitting(probe.Prompt("SmolLM2", model, ids, encoding.decode))
        shown, drawn, _ = probe.examine(prompt, layer, head, silence)
    usual, quiet = shown["states"].values()
    show(figures.words(*drawn), name,
         f"Two maps of one head with words on the axes. {usual['gives']:.0%} of its "
         f"attention is in column 0; with the neurons silent {quiet['gives']:.0%}.")
    probe.print_words(prompt, shown)


def beside(*rows):
    """Print a table of (quantity, what the paper reports, what this run shows)."""
    lines = [("", "the paper", "this run")]
    for row in rows:
        lines.append([probe.digits(c) if isinstance(c, float) else str(c) for c in row])
    probe.table(lines, left=3)


# ---------------------------------------------------------------- exercises

def check(name, answer):
    """Try your answer to an exercise, say "05.lock_gap", and say what is missing."""
    chapter, _, exercise = name.partition(".")
    if unsolved(answer):
        print(f"{exercise}: not yet. Put your answer in place of `...`")
        return
    checks = runpy.run_path(str(CHECKS / f"{chapter}.py"))
    try:
        checks[exercise](answer)
    except Exception as error:  # whatever an answer raises
        said = "".join(traceback.format_exception_only(error)).strip()
        lines = own_lines(error, answer)
        if lines:
            print(f"{exercise}: a mistake in your code\n{''.join(lines)}{said}")
        else:
            print(f"{exercise}: not right. {said.removeprefix('AssertionError: ')}")
    else:
        print(f"{exercise}: solved")


def ask(prediction):
    """In a notebook *Run all* waits for a prediction; a script and the book go on."""
    if notebook() and unsolved(prediction) and "ATTENTION_SINK_BOOK" not in os.environ:
        raise Stop("Your prediction first, in this cell; then run it, and the rest.")


def own_lines(error, answer):
    """The lines of a traceback that lie in the notebook or script of an answer."""
    own = getattr(inspect.unwrap(answer), "__globals__", None)
    walked = traceback.walk_tb(error.__traceback__)
    frames = [(frame, line) for frame, line in walked if frame.f_globals is own]
    return traceback.StackSummary.extract(frames).format()


def stub():
    ...


def unsolved(answer):
    """True while an answer is `...`: a value, part of a list, or a function's body."""
    code = getattr(answer, "__code__", None)
    if code:
        empty = stub.__code__
        return (code.co_code, code.co_consts) == (empty.co_code, empty.co_consts)
    if isinstance(answer, dict):
        answer = list(answer.values())
    parts = answer if isinstance(answer, list) else [answer]
    return any(part is ... or part is None for part in parts)


def written_without(answer, *names):
    """For checks: refuse a function that calls one of these names."""
    found = sorted(set(answer.__code__.co_names) & set(names))
    assert not found, f"Write it yourself: your answer calls {', '.join(found)}."
