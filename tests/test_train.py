"""train.py: a run can be stopped, killed and resumed without a bit of difference, and leaves what it says it leaves."""
import errno
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import train
from model import ATTENTIONS
from train import Run

ROOT = Path(__file__).parent.parent
TINY = dict(data="copy", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            seq_len=16, batch_size=4, steps=12, evals=2, warmup=4, lr=1e-2, threads=1, bos=0.5)


DRAW_CURVE = train.draw_curve


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few tokens for an evaluation and an empty picture: half of the seconds of a short run."""
    monkeypatch.setattr(train, "EVAL_TOKENS", 256)
    monkeypatch.setattr(train, "PROBE_TOKENS", 128)
    monkeypatch.setattr(train, "draw_curve", lambda folder, *_: (folder / "curve.png").touch())


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A text of our own, whose tokens are kept in a folder that pytest removes."""
    folder = tmp_path_factory.mktemp("text")
    defaults, before = data.load.__kwdefaults__, dict(data.load.__kwdefaults__)
    defaults["cache"] = folder / "cache"
    path = folder / "book.txt"
    path.write_text("".join(f"Day {i}: the cat sat on the mat, and nothing happened.\n" for i in range(400)))
    yield str(path)
    defaults.update(before)


def run(out, **changes):
    """Train quietly in `out`; returns the result."""
    return train.train(Run(**{**TINY, "out": str(out), **changes}), say=lambda line: None)


def flags(**changes):
    """The same settings for `train.main`."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, **changes}.items()]


def saved(out, name="model.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def rows(out):
    """The log without its header and without what a clock said."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in train.read_log(out)]


def same(a, b):
    """Whether two nested structures are equal in every bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def interrupt_at(monkeypatch, call):
    """Press Ctrl-C while the batch number `call` is drawn."""
    draw, calls = data.Corpus.batch, []

    def batch(self, *args, split="train", **kw):
        if split == "train":
            calls.append(1)
            if len(calls) == call:
                signal.raise_signal(signal.SIGINT)
        return draw(self, *args, split=split, **kw)
    monkeypatch.setattr(data.Corpus, "batch", batch)


# --- resume ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("attn", ATTENTIONS)
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch, attn):
    run(tmp_path / "whole", attn=attn)
    with monkeypatch.context() as m:
        interrupt_at(m, 5)
        assert not run(tmp_path / "parts", attn=attn).finished
    assert saved(tmp_path / "parts")["step"] == 5
    assert run(tmp_path / "parts", attn=attn, resume=True).finished
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_resume_on_text_at_every_other_step(tmp_path, monkeypatch, book):
    settings = dict(data=book, vocab_size=300, attn="headnorm", tie_word_embeddings=True)
    run(tmp_path / "whole", **settings)
    for number in range(5):
        with monkeypatch.context() as m:
            interrupt_at(m, 2)
            assert not run(tmp_path / "parts", **settings, resume=number > 0).finished
    assert saved(tmp_path / "parts")["step"] == 10
    assert run(tmp_path / "parts", **settings, resume=True).finished
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run(tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    assert run(tmp_path, resume=True).finished
    assert (tmp_path / "model.pt").read_bytes() == before


def test_killed_before_the_first_save(tmp_path):
    """config.json is there and model.pt is not: resume starts at step 0, and so does overwrite."""
    run(tmp_path / "whole")
    for name, how in (("resumed", dict(resume=True)), ("anew", dict(overwrite=True))):
        run(tmp_path / name)
        for left in ("model.pt", "best.pt", "log.jsonl", "curve.png"):
            (tmp_path / name / left).unlink()
        (tmp_path / name / "best.pt.tmp").write_text("half a file")
        assert run(tmp_path / name, **how).finished
        assert same(saved(tmp_path / "whole"), saved(tmp_path / name))
        assert not list((tmp_path / name).glob("*.tmp"))


def test_killed_before_config_json(tmp_path):
    (tmp_path / "config.json.tmp").write_text("{")
    assert run(tmp_path).finished


def test_log_lines_after_the_last_save_are_written_again(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    with monkeypatch.context() as m:
        interrupt_at(m, 7)
        run(tmp_path / "parts")
    (tmp_path / "parts" / "log.jsonl").write_text((tmp_path / "whole" / "log.jsonl").read_text())
    run(tmp_path / "parts", resume=True)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    words, before = flags() + [f"--out={tmp_path / 'a run'}"], signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as m:
        interrupt_at(m, 3)
        assert train.main(words) == 130
    said = capsys.readouterr()
    assert said.err == "" and "saved" in said.out
    command = shlex.split(said.out.strip().splitlines()[-1].split("go on with: ")[1])
    assert command[:2] == ["python", "train.py"]
    assert train.main(command[2:]) == 0
    run(tmp_path / "whole")
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "a run"))
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_training(monkeypatch, capsys):
    def stopped(*args, **kw):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "load", stopped)
    assert train.main(["--out", "nowhere"]) == 130
    assert capsys.readouterr().err.count("\n") == 1 and not Path("nowhere").exists()


# --- what a run depends on -----------------------------------------------------------------------------

def test_evaluation_does_not_change_training(tmp_path):
    for evals in (1, 30):
        run(tmp_path / str(evals), evals=evals)
    few, many = saved(tmp_path / "1"), saved(tmp_path / "30")
    assert same(few["model"], many["model"]) and same(few["optimizer"], many["optimizer"])
    assert len(rows(tmp_path / "1")) < len(rows(tmp_path / "30"))
    common = {row["step"]: row["val_loss"] for row in rows(tmp_path / "1")}
    assert common.items() <= {row["step"]: row["val_loss"] for row in rows(tmp_path / "30")}.items()


def test_the_variants_share_initial_weights_and_batches(tmp_path, monkeypatch):
    """Whoever compares them compares nothing but the attention."""
    draw, batches, first = data.Corpus.batch, {}, {}

    def batch(self, *args, **kw):
        found = draw(self, *args, **kw)
        batches.setdefault(attn, []).append(found)
        return found
    monkeypatch.setattr(data.Corpus, "batch", batch)
    init = train.make_optimizer

    def make_optimizer(model, *args):
        first[attn] = {k: v.clone() for k, v in model.state_dict().items() if "z_norm" not in k}
        return init(model, *args)
    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    for attn in ATTENTIONS:
        run(tmp_path / attn, attn=attn)
        assert same(first[attn], first["softmax"]) and same(batches[attn], batches["softmax"])
    assert not same(saved(tmp_path / "softmax")["model"], saved(tmp_path / "sigmoid")["model"])


def test_seed_decides(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, seed=seed)
    assert same(saved(tmp_path / "a"), saved(tmp_path / "b"))
    assert not same(saved(tmp_path / "a")["model"], saved(tmp_path / "c")["model"])


def test_the_model_learns(tmp_path):
    """On a text of one repeated line almost nothing is left to guess."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh\n" * 2000)
    result = run(tmp_path / "out", data=str(text), vocab_size=257, steps=60)
    assert result.final["val_loss"] < 1.0 < math.log(257) < rows(tmp_path / "out")[0]["val_loss"] + 0.5


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    r = train.resolve(Run(steps=1000, warmup=100, lr=1.0))
    rates = [train.learning_rate(step, r) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(1, abs=0.03)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3) and train.learning_rate(1000, r) == pytest.approx(0.1)


def test_evaluations_include_the_first_and_last_step_and_the_birth():
    steps = train.evaluation_steps(5000, 24)
    assert steps[0] == 0 and steps[-1] == 5000 and 20 <= len(steps) <= 26
    assert sum(0 < step < 500 for step in steps) >= 5
    assert train.evaluation_steps(1, 1) == [0, 1]


@pytest.mark.parametrize("settings", [dict(attn="headnorm"), dict(attn="sigmoid", lr=2.5e-3), dict(size="small", attn="headnorm", seed=3),
                                      dict(data="copy", bos=0.0, num_hidden_layers=3, tie_word_embeddings=True, out="out/a b")])
def test_flags_that_are_printed_give_the_run_again(settings):
    wanted = train.resolve(Run(**settings))
    args = vars(train.parse(shlex.split(train.as_flags(wanted))))
    for name in ("sample", "prompt", "tokens", "temperature", "top_k"):
        args.pop(name)
    assert train.resolve(Run(**args)) == wanted


def test_trained_trains_what_is_missing_and_nothing_else(tmp_path):
    runs = [Run(**{**TINY, "attn": attn, "out": str(tmp_path / attn)}) for attn in ("softmax", "headnorm")]
    lines = []
    assert not train.is_finished(runs[0])
    assert train.trained(*runs, say=lines.append) == [tmp_path / "softmax", tmp_path / "headnorm"]
    assert train.is_finished(runs[0]) and {line.split(":")[0] for line in lines} == {r.out for r in runs}
    before, lines = (tmp_path / "softmax" / "model.pt").stat().st_mtime_ns, []
    train.trained(*runs, say=lines.append)
    assert lines == [] and (tmp_path / "softmax" / "model.pt").stat().st_mtime_ns == before
    with pytest.raises(train.TrainError, match="was trained with --steps 12, not 13"):
        train.trained(train.replace(runs[0], steps=13))
    with pytest.raises(train.TrainError, match="nowhere.txt does not exist"):  # what the process says reaches the caller
        train.trained(train.replace(runs[0], data="nowhere.txt", out=str(tmp_path / "new")))


# --- what a run leaves ---------------------------------------------------------------------------------

def test_files_of_a_run(tmp_path, monkeypatch, book):
    monkeypatch.setattr(train, "draw_curve", DRAW_CURVE)
    result = run(tmp_path, data=book, vocab_size=300)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "config.json", "curve.png", "log.jsonl", "model.pt"]

    def strict(constant):
        raise ValueError(f"{constant} is not JSON")
    lines = [json.loads(line, parse_constant=strict) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    header, first, last = lines[0], lines[1], lines[-1]
    assert header == json.loads((tmp_path / "config.json").read_text())
    assert header["run"] == json.loads(json.dumps(vars(train.resolve(Run(**{**TINY, "data": book, "vocab_size": 300, "out": str(tmp_path)})))))
    assert header["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert {"torch", "python", "cores", "threads", "device", "git"} <= header["environment"].keys()
    assert header["model"]["vocab_size"] == header["corpus"]["vocab_size"] and header["optimal_loss"] is None
    assert (first["step"], last["step"]) == (0, 12) and last["tokens"] == 12 * 4 * 16
    assert last["bpb"] == pytest.approx(last["val_loss"] / math.log(2) / result.corpus.bytes_per_token)
    assert {"sink_alpha_max", "norm_ratio"} <= last["links"].keys() == last["links_bos"].keys()
    assert last == {**result.final, "seconds": last["seconds"]}

    assert same(saved(tmp_path)["model"], result.model.state_dict())
    best = min(lines[1:], key=lambda row: row["val_loss"])
    assert saved(tmp_path, "best.pt")["step"] == best["step"] and saved(tmp_path)["best"] == best["val_loss"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_tells_what_a_perfect_predictor_reaches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "draw_curve", DRAW_CURVE)
    train.main(flags() + [f"--out={tmp_path}"])
    optimum = data.load("copy").optimal_loss(16, 0.5)
    said = capsys.readouterr().out
    assert said.count("perfect predictor") == 2 and said.count(f"{optimum:.4f}") == 2
    assert json.loads((tmp_path / "config.json").read_text())["optimal_loss"] == optimum
    assert f"next: python probe.py {tmp_path}" in said


def test_overwrite_removes_the_old_run(tmp_path):
    run(tmp_path, seed=1)
    run(tmp_path, seed=2, overwrite=True)
    run(tmp_path / "sub", seed=2)
    assert same(saved(tmp_path), saved(tmp_path / "sub"))


@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, capsys, where):
    with monkeypatch.context() as m:
        interrupt_at(m, 3)
        run(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix == ".pt"}

    def full(*args, **kw):
        if where == "save":
            Path(args[1]).write_bytes(b"the first half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/7: file write failed\n at somewhere")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(*{"save": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[where], full)
    words = flags()
    capsys.readouterr()
    assert train.main([*words, f"--out={tmp_path}", "--resume"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "could not write" in message
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix == ".pt"} == before
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    assert run(tmp_path, resume=True).finished


@pytest.mark.parametrize("how", ["lr", "loss", "weights"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, how):
    words = flags() + [f"--out={tmp_path}", "--evals=12"]
    if how == "lr":
        words.append("--lr=1e38")
    elif how == "loss":
        forward = train.GPT.forward

        def broken(self, x, y=None, **kw):
            logits, loss = forward(self, x, y, **kw)
            return logits, loss * math.nan if torch.is_grad_enabled() else loss
        monkeypatch.setattr(train.GPT, "forward", broken)
    else:  # the loss of the step was fine and its gradient was not; the user then presses Ctrl-C
        words[words.index("--evals=12")] = "--evals=1"
        interrupt_at(monkeypatch, 4)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, n: next(iter(p)).grad.fill_(math.nan))
    assert train.main(words) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "no longer finite" in message and "--lr" in message
    assert all(p.isfinite().all() for p in saved(tmp_path)["model"].values())


# --- sampling ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reader(tmp_path_factory, book):
    """A trained run on text."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "EVAL_TOKENS", 256)
        m.setattr(train, "PROBE_TOKENS", 128)
        m.setattr(train, "draw_curve", lambda *_: None)
        run(out, data=book, vocab_size=300)
    return out


def test_sampling(reader):
    texts = {train.sample(reader, "Day 1", tokens=20, temperature=0, seed=seed) for seed in (0, 1)}
    assert len(texts) == 1 and texts.pop().startswith("Day 1")
    hot = {train.sample(reader, "Day 1", tokens=20, temperature=1.0, seed=seed) for seed in (0, 0, 1)}
    assert len(hot) == 2, "a seed decides"
    greedy = train.sample(reader, "Day 1", tokens=20, temperature=0)
    assert train.sample(reader, "Day 1", tokens=20, temperature=100, top_k=1, seed=3) == greedy
    assert train.sample(reader, "Day 1", tokens=20, temperature=0.01, top_k=None) == greedy


@pytest.mark.parametrize("prompt", ["", "🙂 née", "a\0b", "\udcff", "Day 1: " * 50, "<|bos|>"])
def test_any_text_is_a_prompt(reader, capsys, prompt):
    assert train.main(["--sample", str(reader), "--prompt", prompt, "--tokens", "3"]) == 0
    assert prompt == "\udcff" or capsys.readouterr().out.startswith(prompt)


# --- killed, again and again -----------------------------------------------------------------------------

KILLED = """
import sys, train
train.EVAL_TOKENS = train.PROBE_TOKENS = 128
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_sigkill_loses_nothing(tmp_path):
    """SIGKILL, 20 times, most of them while a checkpoint is being written; the end is the same to the bit."""
    words = flags(steps=400, evals=400)
    out, dice, step, midway = tmp_path / "killed", random.Random(0), 0, 0

    def start(out, *more):
        return subprocess.Popen([sys.executable, "-c", KILLED, *words, f"--out={out}", *more], cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def checkpoint_changes(process, since):
        """Wait until the run has saved since; the wait is too short for it to end."""
        while process.poll() is None:
            if (out / "model.pt").exists() and (out / "model.pt").stat().st_mtime_ns != since:
                return
            time.sleep(0.001)

    for number in range(20):
        since = (out / "model.pt").stat().st_mtime_ns if (out / "model.pt").exists() else None
        process = start(out, *(["--resume"] if (out / "config.json").exists() else []))
        if number == 0:  # the very first moment: config.json and perhaps nothing else
            while not (out / "config.json").exists():
                time.sleep(0.0005)
        else:
            checkpoint_changes(process, since)
            time.sleep(dice.uniform(0, 0.05))
            if number % 2:  # aim at a write
                name = dice.choice(["model.pt.tmp", "log.jsonl.tmp"])
                while process.poll() is None and not (out / name).exists():
                    pass
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.communicate()[1]
        process.communicate()
        midway += any(out.glob("*.tmp"))
        if (out / "model.pt").exists():
            state = saved(out)
            assert state["step"] >= step, "a save that had succeeded is gone"
            step = state["step"]
    assert step > 10 and midway > 3
    process = start(out, "--resume")
    assert f"resuming at step {step:,}" in process.communicate()[0] and process.returncode == 0
    whole = start(tmp_path / "whole")
    assert whole.communicate()[1] == "" and whole.returncode == 0
    assert same(saved(tmp_path / "whole"), saved(out)) and rows(tmp_path / "whole") == rows(out)
