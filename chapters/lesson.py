"""What the chapters share. A chapter begins with

    from lesson import beside, check, english, models, plt, random_tokens, real
    from lesson import show, windows
    import probe

(a notebook or script in chapters/ finds this file by itself, and this file the rest).

    model, encoding = real()            SmolLM2-135M, its tokenizer; fetched if absent
    x, y = random_tokens()              (8, 64) random tokens, the paper's control
    x, y = english(batch=1)             (8, 64) held-out English; batches are disjoint
    small = models("softmax", "headnorm")    {name: GPT} of RUNS, trained if absent
    untrained("softmax"), log("softmax")     the same before training; its evaluations
    x, y = windows("bos")               (64, 64) for those: bos, text, copy or rest
    figure, axis = plt.subplots(...)    at most 8.8 inches wide: then points are points
    show(figure, "05_lock", "what a reader who cannot see it should know")
    beside(("quantity", "what the paper reports", 0.32))
    check("05.lock_gap", lock_gap)      the check of exercise lock_gap in checks/05.py

It comes before torch, whose waiting threads it tells not to spin: where a browser needs
a core as well, that made SmolLM2 fifteen times slower.

A check is a function of checks/NN.py with the name of its exercise: it takes the answer
and asserts, with a message that says what is missing. It may call
`written_without(answer, "sink_score")`. An answer is a function or a value; `...` is
none. A prediction is asked for in text, above `prediction = ...`, and checked below the
run.
"""

import contextlib
import dis
import functools
import importlib.util
import math
import os
import signal
import subprocess
import sys
import sysconfig
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import CodeType, FunctionType

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ROOT / "chapters" / "checks"
if str(ROOT) not in sys.path:  # so that a chapter in its own folder finds model.py
    sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import probe  # noqa: E402
import train  # noqa: E402
from chapters import figures  # noqa: E402
from data import smollm2  # noqa: E402
from data import windows as of_text  # noqa: E402
from data.common import UserError, bar, say  # noqa: E402
from data.common import show as shown  # noqa: E402
from model import GPT  # noqa: E402

torch.set_num_threads(min(torch.get_num_threads(), 4))
plt.rcParams.update(figures.STYLE)

# Each is trained once and kept in out/; the first by `python train.py`.
RUNS = {
    "softmax": train.Run(), "headnorm": train.Run(attn="headnorm"),
    "sigmoid": train.Run(attn="sigmoid"), "gated": train.Run(attn="gated"),
    "tiny-softmax": train.Run(size="tiny"),
    "tiny-headnorm": train.Run(size="tiny", attn="headnorm"),
    "tiny-sigmoid": train.Run(size="tiny", attn="sigmoid"),
    "tiny-gated": train.Run(size="tiny", attn="gated"),
}


# ---------------------------------------------------------------- models

class Stop(Exception):
    """Ends a cell in one line."""

    def _render_traceback_(self):  # what a notebook shows in place of a traceback
        return [str(self)]


def notebook():
    """Whether this runs in a Jupyter kernel, and not as a script."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return hasattr(shell, "kernel")


@contextlib.contextmanager
def in_one_line():
    """What a user can mend, and an interrupt, end the cell or script in one line."""
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
    """The Run of a name, in out/ of the repository, wherever the chapter runs."""
    run = train.resolve(RUNS[name])
    run.out = os.path.relpath(ROOT / run.out)
    return run


def models(*names):
    """{name: GPT} of these RUNS, on the CPU. What is missing is trained first, two at a
    time; what was interrupted goes on."""
    with in_one_line():
        runs = {name: placed(name) for name in names}
        trained(*runs.values())
        return {name: train.load_run(run.out)[0] for name, run in runs.items()}


def untrained(name):
    """The model of a RUN with the weights that its training starts from."""
    with in_one_line():
        run = placed(name)
        return GPT(train.model_config(run, train.load_corpus(run)), seed=run.seed).eval()


def log(name):
    """The evaluations of a RUN, as `figures.birth` draws them."""
    models(name)
    return train.read_log(placed(name).out)


def windows(kind, N=64, seed=0):
    """x, y (N, 64) held out, for the small models: text of the standard library after
    <|bos|> ("bos") or from any place ("text"), the copying task ("copy"), or random
    letters ("rest"), where nothing is copied."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("bos", "text"):
        corpus = data.load("stdlib", vocab_size=257, seq_len=64)
        return corpus.batch(N, 64, generator, "val", bos=float(kind == "bos"))
    corpus = data.load("copy")
    if kind == "copy":
        return corpus.batch(N, 64, generator, "val", bos=0.0)
    return corpus.rest(N, 64, generator)


# ---------------------------------------------------------------- several trainings

def trained(*runs, jobs=2):
    """Have these runs trained. What is missing starts, what was stopped goes on, `jobs`
    at a time, each by `python train.py` in a process of its own: models this small gain
    nothing from a second thread. Raises UserError."""
    missing = [run for run in map(train.resolve, runs) if not is_finished(run)]
    if not missing:
        return
    minutes = [train.MINUTES.get(run.size, math.nan) * run.steps
               / train.SIZES[run.size]["steps"] for run in missing]
    about = ""
    if not math.isnan(sum(minutes)):
        about = math.ceil(sum(minutes) / jobs)
        about = f", about {about} minute{'s' * (about > 1)}"
    say(f"training {', '.join(shown(run.out) for run in missing)}{about}")
    for run in missing:  # a text is built once, and not by two processes at a time
        train.load_corpus(run)
    with bar(bar_format="{desc}") as line, ThreadPoolExecutor(jobs) as pool:
        started, news = [], {}
        waiting = [pool.submit(train_one, run, started, news, line) for run in missing]
        try:
            for future in waiting:
                future.result()
        except BaseException as error:  # one has failed, or Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:  # they save and stop
                process.send_signal(signal.SIGINT)
            if not isinstance(error, KeyboardInterrupt):
                raise
            raise UserError("stopped; run it again to go on") from None


def is_finished(run):
    """Whether the folder of a run holds it, trained to its last step. Raises UserError
    where it holds a run of other settings."""
    folder = Path(run.out)
    if not (folder / "config.json").exists():
        return False
    there = train.read_config(folder)[0]
    for name, value in asdict(run).items():
        old = getattr(there, name)
        if name not in (*train.MACHINE, "out") and old != value:
            raise UserError(f"{shown(folder)} holds a run with {train.flag(name)} "
                            f"{old}, not {value}; move that folder out of the way")
    path = folder / "model.pt"
    return path.exists() and train.load_checkpoint(path)["step"] == run.steps


def train_one(run, started, news, line):
    """`python train.py`; what its bar shows goes into `news`, all news on one line."""
    words = [f"--resume={run.out}"]
    if not (Path(run.out) / "config.json").exists():
        given = {train.flag(name): value for name, value in asdict(run).items()
                 if value is not None and value is not False}
        words = [name if value is True else f"{name}={value}"
                 for name, value in given.items()]
    with subprocess.Popen(
            [sys.executable, ROOT / "train.py", *words], text=True, errors="replace",
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | {"SHOW_PROGRESS": "1"}) as process:
        started.append(process)
        last = ""
        for text in process.stderr:  # what a bar writes anew counts as another line
            last = text.strip() or last
            start, _, rest = last.partition(" | ")
            news[run.out] = f"{Path(run.out).name} {start} {rest.rpartition(', ')[2]}"
            line.set_description_str("   ".join(news.values()))
    news.pop(run.out, None)
    if process.returncode:
        error = last if last.startswith("train.py") else "its training was stopped"
        raise UserError(f"{shown(run.out)}: {error}")


# ---------------------------------------------------------------- what a reader sees

def show(figure, name, alt):
    """A figure in the notebook, below its cell; from a script, out/chapters/<name>.png.
    `alt` is for readers who do not see it."""
    if not notebook():
        path = ROOT / "out" / "chapters" / f"{name}.png"
        figures.save(path, figure)
        print(f"figure {os.path.relpath(path)}: {alt}")
        return
    from IPython.display import display
    width = round(96 * figure.get_figwidth())  # CSS pixels: points of type are points
    picture = {"image/png": figures.png(figure), "text/plain": f"figure: {alt}"}
    display(picture, metadata={"image/png": {"alt": alt, "width": width}, "name": name},
            raw=True)


def beside(*rows):
    """Print a table of (quantity, what the paper reports, what this run shows)."""
    def digits(cell):
        return probe.digits(cell) if isinstance(cell, float) else str(cell)

    cells = [list(map(digits, row)) for row in rows]
    probe.table([("", "the paper", "this run"), *cells], left=3)


# ---------------------------------------------------------------- exercises

def check(name, answer):
    """Try your answer to an exercise, say "05.lock_gap", and say what is missing."""
    chapter, _, exercise = name.partition(".")
    if unsolved(answer):
        return print(f"{exercise}: not yet. Put your answer in place of `...`")
    path = CHECKS / f"{chapter}.py"
    spec = importlib.util.spec_from_file_location(f"checks_{chapter}", path)
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    try:
        getattr(checks, exercise)(answer)
    except Exception as error:  # whatever an answer raises
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if not of_a_library(Path(f.filename))]
        if not theirs:  # the check itself says what is wrong
            said = traceback.format_exception_only(error)[-1].strip()
            said = said.removeprefix("AssertionError: ")
            return print(f"{exercise}: not right. {said}")
        print(f"{exercise}: a mistake in your code\n", *traceback.format_list(theirs),
              *traceback.format_exception_only(error), sep="", end="")
    else:
        print(f"{exercise}: solved")


def of_a_library(file):
    """Whether code is Python's, a package's or the repository's, and no student's."""
    places = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")]
    ours = file == Path(__file__) or file.parent in (ROOT, ROOT / "data", CHECKS)
    return ours or str(file).startswith(tuple(places))


def unsolved(answer):
    """Whether an answer is still `...`: a value, in a list, or a function's body."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, (list, tuple, set)):
        return any(unsolved(a) for a in answer)
    if not isinstance(answer, FunctionType):
        return answer is ... or answer is None
    steps = dis.get_instructions(answer)
    steps = [s for s in steps if s.opname not in ("RESUME", "NOP")]
    return len(steps) <= 2 and steps[0].argval is None


def written_without(answer, *names):
    """For checks: refuse a function that calls one of these, also through a helper."""
    used, waiting = set(), [answer]
    while waiting:
        function = waiting.pop()
        codes = [function.__code__]
        for code in codes:  # grows: functions inside functions
            codes += [c for c in code.co_consts if isinstance(c, CodeType)]
            for name in set(code.co_names) - used:
                used.add(name)
                value = function.__globals__.get(name)
                if isinstance(value, FunctionType):
                    used.add(value.__name__)
                    if value.__globals__ is function.__globals__:
                        waiting.append(value)
    found = sorted(used & set(names))
    assert not found, f"Write it yourself: your answer calls {', '.join(found)}."
