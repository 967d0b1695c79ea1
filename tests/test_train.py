"""train.py: a run can be stopped, killed and resumed without a bit of difference, and leaves what
it says it leaves. What it refuses stands in test_errors.py."""
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
from tqdm import tqdm

import data
import probe
import train
from model import ATTENTIONS, GPT
from tests.conftest import TINY, same, tiny_flags
from train import Run

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A text of our own, whose tokens are kept in a folder that pytest removes."""
    folder = tmp_path_factory.mktemp("text")
    path = folder / "book.txt"
    lines = [f"Day {i}: the cat sat on the mat, and nothing happened.\n" for i in range(400)]
    path.write_text("".join(lines))
    with pytest.MonkeyPatch.context() as m:
        m.setitem(data.load.__kwdefaults__, "cache", folder / "cache")
        yield str(path)


def saved(out):
    return torch.load(Path(out) / "model.pt", weights_only=True)


def same_runs(a, b):
    return same(saved(a), saved(b)) and same(train.read_log(a), train.read_log(b))


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


# ---------------------------------------------------------------- resume

@pytest.mark.parametrize("attn", ATTENTIONS)
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch, tiny_run, attn):
    tiny_run(tmp_path / "whole", attn=attn)
    with monkeypatch.context() as m:
        interrupt_at(m, 5)
        assert not tiny_run(tmp_path / "parts", attn=attn).finished
    assert saved(tmp_path / "parts")["step"] == 5
    assert tiny_run(tmp_path / "parts", attn=attn, resume=True).finished
    assert same_runs(tmp_path / "whole", tmp_path / "parts")


def test_resume_on_text_at_every_other_step(tmp_path, monkeypatch, tiny_run, book, capsys):
    """--resume takes every setting from the folder."""
    settings = dict(data=book, vocab_size=300, attn="headnorm", tie_word_embeddings=True)
    tiny_run(tmp_path / "whole", **settings)
    for number in range(5):
        with monkeypatch.context() as m:
            interrupt_at(m, 2)
            if number == 0:
                tiny_run(tmp_path / "parts", **settings)
            else:
                assert train.main(["--resume", str(tmp_path / "parts")]) == 130
    assert saved(tmp_path / "parts")["step"] == 10
    assert train.main(["--resume", str(tmp_path / "parts")]) == 0
    assert same_runs(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_finished_run_changes_nothing(tmp_path, tiny_run):
    tiny_run(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"}
    assert tiny_run(tmp_path, resume=True).finished
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"} == before


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_killed_before_the_first_save(tmp_path, tiny_run, how):
    """config.json is there and model.pt is not. Of what a kill leaves only our own files go."""
    tiny_run(tmp_path / "whole")
    tiny_run(tmp_path / "killed")
    for left in ("model.pt", "log.jsonl", "curve.png"):
        (tmp_path / "killed" / left).unlink()
    mine, ours = ("notes.tmp", "film.part"), ("model.pt.a1b2c3d4.part", "config.json.abcdefgh.part")
    for name in (*mine, *ours):
        (tmp_path / "killed" / name).write_text("half a file")
    assert tiny_run(tmp_path / "killed", **{how: True}).finished
    assert same_runs(tmp_path / "whole", tmp_path / "killed")
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names >= set(mine) and not names & set(ours)


def test_killed_before_config_json(tmp_path, tiny_run):
    (tmp_path / "config.json.abcdefgh.part").write_text("{")
    assert tiny_run(tmp_path).finished


def test_log_lines_after_the_last_save_are_written_again(tmp_path, monkeypatch, tiny_run):
    tiny_run(tmp_path / "whole")
    with monkeypatch.context() as m:
        interrupt_at(m, 7)
        tiny_run(tmp_path / "parts")
    (tmp_path / "parts/log.jsonl").write_text((tmp_path / "whole/log.jsonl").read_text())
    tiny_run(tmp_path / "parts", resume=True)
    assert same_runs(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts/log.jsonl").unlink()  # and it goes on without a log
    assert tiny_run(tmp_path / "parts", resume=True).finished


def test_another_machine_is_told_and_kept(tmp_path, tiny_run, capsys):
    tiny_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "model.pt").unlink()
    config["environment"].update(torch="1.0", threads=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train.main(["--resume", str(tmp_path), "--threads", "1"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("resuming"))
    assert "torch was '1.0'" in line and "threads was 2 and is 1" in line and "may differ" in line
    now = json.loads((tmp_path / "config.json").read_text())
    assert [e["torch"] for e in now["earlier"]] == ["1.0"]
    assert now["environment"]["torch"] == torch.__version__


# ---------------------------------------------------------------- Ctrl-C, other readers and writers

def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, monkeypatch, tiny_run, capsys):
    out, before = tmp_path / "a run", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as m:
        interrupt_at(m, 3)
        assert train.main(tiny_flags(out)) == 130
    said = capsys.readouterr()
    assert said.err == "" and "saved" in said.out.splitlines()[-1]
    command = shlex.split(said.out.splitlines()[-1].split("go on with: ")[1])
    assert command[:2] == ["python", "train.py"] and train.main(command[2:]) == 0
    tiny_run(tmp_path / "whole")
    assert same_runs(tmp_path / "whole", out)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda *_, **kw: signal.raise_signal(signal.SIGINT))
    assert train.main(tiny_flags(tmp_path / "new")) == 130
    assert capsys.readouterr().err == "train.py: stopped\n" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("module", ["argparse", "numpy", "torch._C", "torch.nn"])
@pytest.mark.parametrize("program", ["train.py", "probe.py"])
def test_ctrl_c_during_the_imports(tmp_path, program, module):
    """Python tells on stderr what it has imported: Ctrl-C comes right after one of these."""
    process = subprocess.Popen([sys.executable, "-X", "importtime", ROOT / program, "smollm2"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.split("|")[-1].strip() == module:
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1].splitlines()
    said = [line for line in rest if not line.startswith("import time:")]
    assert process.returncode == 130 and len(said) == 1 and said[0].endswith(f"{program}: stopped")


def test_a_folder_has_one_writer(tmp_path, monkeypatch, tiny_run, capsys):
    tiny_run(tmp_path)
    draw, answers = train.State.save, []

    def save(self, header):
        monkeypatch.setattr(train.State, "save", draw)
        for words in (["--resume", str(tmp_path)], [*tiny_flags(tmp_path), "--overwrite"]):
            answers.append((train.main(words), capsys.readouterr().err))
        draw(self, header)
    monkeypatch.setattr(train.State, "save", save)
    assert tiny_run(tmp_path, overwrite=True, seed=1).finished
    for code, line in answers:
        assert code == 2 and line.count("\n") == 1 and f"(process {os.getpid()})" in line
    assert json.loads((tmp_path / "config.json").read_text())["run"]["seed"] == 1
    assert tiny_run(tmp_path, overwrite=True).finished


def test_training_outlives_its_reader(tmp_path):
    """Closed after its first line; nothing is said about that, not even at the very end."""
    words = [sys.executable, "train.py", *tiny_flags(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    assert saved(tmp_path)["step"] == 12


@pytest.mark.parametrize("how", ["full", "closed", "none", "ascii"])
def test_no_place_for_its_words(tmp_path, monkeypatch, how):
    stream = None if how == "none" else open(tmp_path / "said" if how == "ascii" else "/dev/full",
                                             "w", encoding="ascii")
    if how == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    assert train.main(tiny_flags(tmp_path / "ä")) == 0
    assert saved(tmp_path / "ä")["step"] == 12
    assert how != "ascii" or "\\xe4" in (tmp_path / "said").read_text()


# ---------------------------------------------------------------- what a run depends on

def test_evaluation_does_not_change_training(tmp_path, tiny_run):
    for evals in (1, 30):
        tiny_run(tmp_path / str(evals), evals=evals)
    few, many = saved(tmp_path / "1"), saved(tmp_path / "30")
    assert same(few["model"], many["model"]) and same(few["optimizer"], many["optimizer"])
    losses = [{r["step"]: r["val_loss"] for r in train.read_log(tmp_path / n)} for n in ("1", "30")]
    assert len(losses[0]) < len(losses[1]) and losses[0].items() <= losses[1].items()


def test_the_variants_share_initial_weights_and_batches(tmp_path, monkeypatch, tiny_run):
    """Whoever compares them compares nothing but the attention."""
    draw, init, batches, first = data.Corpus.batch, train.make_optimizer, {}, {}

    def batch(self, *args, **kw):
        found = draw(self, *args, **kw)
        batches.setdefault(attn, []).append(found)
        return found

    def make_optimizer(model, *args):
        first[attn] = {k: v.clone() for k, v in model.state_dict().items() if "z_" not in k}
        return init(model, *args)
    monkeypatch.setattr(data.Corpus, "batch", batch)
    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    for attn in ATTENTIONS:
        tiny_run(tmp_path / attn, attn=attn)
        assert same(first[attn], first["softmax"]) and same(batches[attn], batches["softmax"])
    assert not same(saved(tmp_path / "softmax")["model"], saved(tmp_path / "sigmoid")["model"])


def test_seed_decides(tmp_path, tiny_run):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny_run(tmp_path / name, seed=seed)
    assert same_runs(tmp_path / "a", tmp_path / "b")
    assert not same(saved(tmp_path / "a")["model"], saved(tmp_path / "c")["model"])


def test_the_model_learns(tmp_path, tiny_run):
    """On a text of one repeated line almost nothing is left to guess."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh\n" * 2000)
    log = tiny_run(tmp_path / "out", data=str(text), vocab_size=257, steps=60).log
    assert log[-1]["val_loss"] < 1.0 < math.log(257) < log[0]["val_loss"] + 0.5


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    r = train.resolve(Run(steps=1000, warmup=100, lr=1.0))
    rates = [train.learning_rate(step, r) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(1, abs=0.03)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_evaluations_include_the_first_and_last_step_and_the_birth():
    steps = train.evaluation_steps(5000, 24)
    assert steps[0] == 0 and steps[-1] == 5000 and 20 <= len(steps) <= 26
    assert sum(0 < step < 500 for step in steps) >= 5
    assert train.evaluation_steps(1, 1) == [0, 1]


@pytest.mark.parametrize("changes, out", [
    ({}, "out/softmax"), (dict(size="tiny", attn="gated"), "out/tiny-gated"),
    (dict(seed=1, threads=2, lr=5e-3), "out/softmax-seed1"),
    (dict(data="my notes/war & peace.txt"), "out/softmax-datawar___peace"),
    (dict(attn="headnorm", num_attention_heads=2, tie_word_embeddings=True),
     "out/headnorm-num_attention_heads2-tie_word_embeddings")])
def test_the_folder_follows_what_was_changed(changes, out):
    assert train.resolve(Run(**changes)).out == out
    assert len(train.resolve(Run(**changes | dict(data="x" * 300))).out) < 120


# ---------------------------------------------------------------- what a run leaves and says

def test_files_of_a_run(tmp_path, tiny_run, book):
    result = tiny_run(tmp_path, data=book, vocab_size=300)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [".lock", "config.json", "curve.png", "log.jsonl", "model.pt"]

    def strict(constant):
        raise ValueError(f"{constant} is not JSON")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    header, first, *_, last = [json.loads(line, parse_constant=strict) for line in lines]
    assert header == json.loads((tmp_path / "config.json").read_text())
    settings = {**TINY, "data": book, "vocab_size": 300, "out": str(tmp_path)}
    assert header["run"] == vars(train.resolve(Run(**settings)))
    assert header["parameters"] == sum(p.numel() for p in result.model.parameters())
    wanted = {"torch", "python", "cores", "threads", "device", "git"}
    assert wanted <= header["environment"].keys() and header["optimal_loss"] is None
    assert header["model"]["vocab_size"] == header["corpus"]["vocab_size"]
    assert (first["step"], last["step"]) == (0, 12) and last["tokens"] == 12 * 4 * 16
    bits = last["val_loss"] / math.log(2) / result.corpus.bytes_per_token
    assert last["bpb"] == pytest.approx(bits) and last == result.log[-1]
    assert last["links"].keys() == last["links_bos"].keys() >= {n.key for n in probe.numbers()}
    assert same(saved(tmp_path)["model"], result.model.state_dict())

    model, corpus, settings = train.load_run(tmp_path)
    assert same(model.state_dict(), result.model.state_dict()) and settings == header["run"]
    start = GPT(model.cfg, seed=settings["seed"])
    assert probe.chain(start, train.Evaluation(corpus, 16, 0.5, "cpu").windows["links"]) == {
        k: v if v is not None else pytest.approx(math.nan, nan_ok=True)
        for k, v in first["links"].items()}


def test_the_end_says_what_was_shown(tmp_path, capsys):
    assert train.main(tiny_flags(tmp_path / "a b", bos=0.0, evals=4)) == 0
    said = capsys.readouterr().out
    optimum = data.load("copy").optimal_loss(16, 0.0)
    assert f"would reach a loss of {optimum:.4f}" in said and "no test of a cure" not in said
    following, seen = said.splitlines()[-2:]
    assert following == f"next: python probe.py '{tmp_path / 'a b'}'"
    assert seen == "softmax has no sink (no head passes 0.3)"
    assert "nothing to copy: 0." in said and "before training 0." in said
    assert train.main(tiny_flags(tmp_path / "b", bos=1.0)) == 0
    assert "no test of a cure (chapter 07)\n" in capsys.readouterr().out


def test_time_to_go_counts_evaluations(tmp_path, monkeypatch):
    slow, said, shown = train.Evaluation.__call__, [], []

    def call(self, model):
        time.sleep(0.5)
        return slow(self, model)

    class Bar(tqdm):
        def set_description_str(self, text, refresh):
            shown.append((time.monotonic(), text))
    monkeypatch.setattr(train.Evaluation, "__call__", call)
    monkeypatch.setattr(train, "bar", Bar)
    begin = time.monotonic()
    train.train(Run(**{**TINY, "steps": 40, "evals": 12, "out": str(tmp_path)}), say=said.append)
    end = time.monotonic()
    assert "tok/s" not in next(line for line in said if line.startswith("step      0"))
    when, text = next(line for line in shown if "to go" in line[1])
    told = int(text.split(" to go")[0].rpartition(":")[2])
    assert 0.5 * (end - when) - 1 < told < 2 * (end - when) + 1 and end - begin > 3


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, tiny_run, capsys):
    with monkeypatch.context() as m:
        interrupt_at(m, 3)
        tiny_run(tmp_path)
    before = (tmp_path / "model.pt").read_bytes()

    def half(state, path):
        Path(path).write_bytes(b"the first half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/7\n at somewhere")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for place, name, broken in ((torch, "save", half), (os, "fsync", full), (os, "replace", full)):
        with monkeypatch.context() as m:
            m.setattr(place, name, broken)
            assert train.main(["--resume", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "could not write" in message
        assert (tmp_path / "model.pt").read_bytes() == before and not list(tmp_path.glob("*.part"))
    assert tiny_run(tmp_path, resume=True).finished


@pytest.mark.parametrize("how", ["lr", "loss", "weights"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, how):
    changes = dict(evals=12)
    if how == "lr":
        changes["lr"] = 1e20
    elif how == "loss":
        forward = train.GPT.forward

        def broken(self, x, y=None, **kw):
            logits, loss = forward(self, x, y, **kw)
            return logits, loss * math.nan if torch.is_grad_enabled() else loss
        monkeypatch.setattr(train.GPT, "forward", broken)
    else:  # the loss of the step was fine, its gradient was not; then the user presses Ctrl-C
        changes["evals"] = 1
        interrupt_at(monkeypatch, 4)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                            lambda p, n: next(iter(p)).grad.fill_(math.nan))
    assert train.main(tiny_flags(tmp_path, **changes)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "no longer finite" in message and "--lr" in message
    assert all(p.isfinite().all() for p in saved(tmp_path)["model"].values())


def test_numbers_of_the_chain_may_be_missing(tmp_path, monkeypatch, capsys):
    chain = probe.chain
    monkeypatch.setattr(probe, "chain", lambda *a, **kw: dict.fromkeys(chain(*a, **kw), math.nan))
    assert train.main(tiny_flags(tmp_path)) == 0
    assert set(train.read_log(tmp_path)[-1]["links"].values()) == {None}


# ---------------------------------------------------------------- sampling

def test_sampling(tmp_path, tiny_run, book, capsys):
    tiny_run(tmp_path, data=book, vocab_size=300)
    model, corpus, _ = train.load_run(tmp_path)
    greedy = {train.write_text(model, corpus, "Day 1", 20, 0, seed) for seed in (0, 1)}
    assert len(greedy) == 1 and greedy.pop().startswith("Day 1")
    hot = {train.write_text(model, corpus, "Day 1", 20, 1.0, seed) for seed in (0, 0, 1)}
    assert len(hot) == 2, "a seed decides"
    for prompt in ("", "🙂 née", "a\0b", "\udcff", "Day 1: " * 50, "<|bos|>"):
        assert train.main(["--sample", str(tmp_path), "--prompt", prompt, "--tokens", "3"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(prompt) or prompt == "\udcff"


# ---------------------------------------------------------------- killed, again and again

SERVER = """
import os, sys, types, train
train.EVAL_TOKENS = train.PROBE_TOKENS = 128
sys.modules["chapters.figures"] = types.SimpleNamespace(curve=lambda *_: None)
train.torch.set_num_threads(1)
for line in sys.stdin:  # a process for each line: the imports are done once
    pid = os.fork()
    if not pid:
        os._exit(train.main(line.split()))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_sigkill_loses_nothing(tmp_path):
    """SIGKILL, 60 times, half of them while a file is being written; the end is the same bits."""
    out, whole, dice, step, midway = tmp_path / "killed", tmp_path / "whole", random.Random(0), 0, 0
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr)

    def start(words):
        print(" ".join(words), file=server.stdin, flush=True)
        for line in server.stdout:
            if line.strip().isdigit():
                return int(line)

    def end():
        for line in server.stdout:
            if line.strip().lstrip("-").isdigit():
                return int(line)

    def model():
        return (out / "model.pt").stat().st_mtime_ns if (out / "model.pt").exists() else None

    words = tiny_flags(out, steps=900, evals=900)
    for number in range(60):
        since = model()
        pid = start(["--resume", str(out)] if (out / "config.json").exists() else words)
        deadline = time.monotonic() + 20
        if number % 4:  # from the first save on; else whenever
            while model() == since and time.monotonic() < deadline:
                time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.05))
        while number % 2 and not list(out.glob("*.part")) and time.monotonic() < deadline:
            pass  # aim at a write
        os.kill(pid, signal.SIGKILL)
        assert end() == -signal.SIGKILL
        midway += any(out.glob("*.part"))
        if (out / "model.pt").exists():
            now = train.load_checkpoint(out / "model.pt")["step"]
            assert now >= step, "a save that had succeeded is gone"
            step = now
    assert 60 < step < 900 and midway > 10
    for line in (["--resume", str(out)], tiny_flags(whole, steps=900, evals=900)):
        start(line)
        assert end() == 0
    server.stdin.close()
    assert server.wait() == 0 and same_runs(whole, out) and not list(out.glob("*.part"))
