"""How every program of results works: what is missing in its JSON is measured, then its page made.

A program gives a plan, {path of keys into the JSON: (function, *arguments)}. What stands in the
JSON already is never measured again: delete an entry to have it measured anew. An empty path is the
whole file.

On every page ± is the 95 % interval of the mean over seeds where there are seeds, and the standard
deviation over batches of windows where there is one model; each page says which.
"""

import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import torch
from tqdm.auto import tqdm

import train
from data.common import Parser, program, read_json, write_atomically, write_json
from probe import mean_std

RESULTS = Path(__file__).parent / "results"
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
       10: 2.262}  # Student's t, by number of seeds


def parser(name: str, description: str, jobs: int = 2) -> Parser:
    """The flags of the program tests/<name>.py."""
    p = Parser(f"-m tests.{name}", description=description.split("\n")[0])
    p.add_argument("--render", action="store_true", help="measure nothing: only pages and figures")
    p.add_argument("--jobs", type=int, default=jobs, help=f"measurements at a time ({jobs})")
    return p


def main(name: str, description: str, file: Path, plan: dict, render, jobs: int = 2) -> None:
    """The program tests/<name>.py: its flags, then `run`."""
    def command():
        return run(file, plan, render, parser(name, description, jobs).parse_args())
    sys.exit(program(name, command))


def run(file: Path, plan: dict, render, args) -> int:
    """Measure what is missing in the JSON file, unless args.render; then render(what it holds)."""
    if not args.render:
        measure(file, plan, args.jobs)
    render(read_json(file))
    return 0


def measure(file: Path, plan: dict, jobs: int) -> None:
    """`jobs` processes at a time, of one thread each; the file is written after each result."""
    found = read_json(file) if file.exists() else {}
    missing = {path: job for path, job in plan.items() if not holds(found, path)}
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(*job): path for path, job in missing.items()}
        try:
            for done in tqdm(as_completed(waiting), file.name, len(waiting), disable=None):
                found = put(found, waiting[done], done.result())
                write_json(file, found)
        finally:  # after Ctrl-C or a failure no other is begun: what it finds would be lost
            pool.shutdown(cancel_futures=True)


def holds(found: dict, path: tuple) -> bool:
    """Whether there is something in the JSON at a path of keys."""
    for key in path:
        found = found.get(key, {})
    return bool(found)


def put(found: dict, path: tuple, value) -> dict:
    """The JSON with the value at a path of keys."""
    if not path:
        return value
    key, *rest = path
    return found | {key: put(found.get(key, {}), tuple(rest), value)}


def training(run, model, corpus, seed: int, device=torch.device("cpu")) -> SimpleNamespace:
    """The state that `train.train_step` needs, for a model of any kind."""
    return SimpleNamespace(run=run, model=model, corpus=corpus, device=device, step=0,
                           optimizer=train.make_optimizer(model, run, device),
                           batches=torch.Generator().manual_seed(seed))


def half_time(birth, key):
    """The first step at which a number has gone half of its way from the first to the last of the
    rows `birth`, {"step": .., key: ..}."""
    values = [row[key] for row in birth]
    middle = (values[0] + values[-1]) / 2
    for row, value in zip(birth, values):
        if (value - middle) * (values[-1] - middle) >= 0:
            return row["step"]


# ---------------------------------------------------------------- pages

def fill(text: str, blocks: dict) -> str:
    """The text with everything between `<!-- name -->` and `<!-- end -->` replaced by a block."""
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
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def grid(head, names, keys, cell) -> str:
    """A table of cell(name, key): a row for each name, a column for each key."""
    return markdown(head, [(name, *(cell(name, key) for key in keys)) for name in names])


def mean_std_words(values) -> str:
    """Mean ± standard deviation, over batches of windows that one model reads."""
    return with_spread(*mean_std(values))


def interval_words(values) -> str:
    """Mean ± half of the 95 % interval, over seeds; a single seed has none."""
    return with_spread(fmean(values), half_interval(values))


def half_interval(values) -> float | None:
    """Half of the 95 % interval of the mean over seeds (Student's t), None for one seed."""
    n = len(values)
    return T95[n] * stdev(values) / n ** 0.5 if n > 1 else None


def best_rate(rates, loss, without=None) -> str:
    """Of {learning rate: {seed: run}} the rate of the lowest mean loss(run) over all seeds; or all
    but one, so that it is told of a seed that had no say in the choice."""
    def mean(rate):
        return fmean(loss(run) for seed, run in rates[rate].items() if seed != without)
    return min(rates, key=mean)


def best_for_others(rates, loss) -> tuple[str, list[dict]]:
    """Every seed at the rate that is best for the others: these rates, and the runs."""
    chosen = {seed: best_rate(rates, loss, seed) for seed in sorted(next(iter(rates.values())))}
    runs = [rates[rate][seed] for seed, rate in chosen.items()]
    return ", ".join(sorted(set(chosen.values()))), runs


def with_spread(mean, spread) -> str:
    """Two decimals below 10, one below 100, none above."""
    size = max(abs(mean), spread or 0)
    decimals = 2 if size < 10 else 1 if size < 100 else 0
    mean = round(mean, decimals) + 0.0  # no -0.00
    return f"{mean:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")
