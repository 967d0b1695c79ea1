"""`pytest` runs the fast suite, `pytest -m slow` the rest."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import probe
import train
from chapters import figures
from probe import Intervention, Link, Metric

sys.path.append(str(Path(__file__).parent.parent / "chapters"))  # `import lesson`, as chapters do

draw_curve = train.draw_curve  # `tiny_run` leaves it out; who wants the figure puts it back
TINY = dict(data="copy", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, seq_len=16, batch_size=4, steps=12, evals=1, warmup=4, lr=1e-2,
            threads=1, bos=0.5)


def tiny_flags(out, **changes):
    """The settings of `tiny_run` for `train.main`."""
    settings = {**TINY, "out": out, **changes}
    return [f"{train.flag(name)}={value}" for name, value in settings.items()]


def same(a, b):
    """True if two nested structures are equal in every bit, but for what a clock said."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit:DeprecationWarning")  # of torch
    config.addinivalue_line("markers", "slow: minutes, not seconds; run with pytest -m slow")
    figures.STYLE["savefig.dpi"] = 40  # the files are looked at by nobody
    torch.set_num_threads(1)  # two are slower for models this small, most of all on a busy machine


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr and not config.option.keyword:
        config.hook.pytest_deselected(items=[i for i in items if "slow" in i.keywords])
        items[:] = [i for i in items if "slow" not in i.keywords]


@pytest.fixture(scope="module")
def tiny_run():
    """run(folder, **changes) trains two layers for twelve steps, in half a second: with few tokens
    for an evaluation, and without curve.png."""
    def run(out, resume=False, overwrite=False, say=lambda line: None, **changes):
        settings = train.Run(**{**TINY, "out": str(out), **changes})
        return train.train(settings, resume, overwrite, say)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "EVAL_TOKENS", 256)
        m.setattr(train, "PROBE_TOKENS", 128)
        m.setattr(train, "draw_curve", lambda *_: None)
        yield run


@pytest.fixture(scope="module")
def made_up():
    """LINKS with a Metric more in an old link, and a whole new Link."""
    number = Metric("made_up", "a number nobody else names", lambda a: a["z"].mean(), "mean", 0.5)
    headline = Metric("mirror", "a headline nobody else names",
                      lambda a: a["resid_post"][:, a.k].norm(dim=-1).mean(), "largest")
    edit = Intervention("it is mirrored", "resid_pre", "first",
                        lambda x, p, found, layer: -x[:, p])
    link = Link("mirrors", "a link nobody else names", [headline], cut=edit, forge=edit)
    first, *rest = probe.LINKS
    extended = replace(first, numbers=[*first.numbers, number])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(probe, "LINKS", [extended, *rest[:-1], link, rest[-1]])
        yield
