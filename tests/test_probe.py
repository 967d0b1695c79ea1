"""Every number on tensors with a known answer; every edit changes what it names and nothing else;
and LINKS is the one place: what is added there shows up everywhere."""

import json
import math
import re

import pytest
import torch

import probe
import train
from data.common import UserError
from model import GPT, Config, record
from tests.conftest import tiny_flags
from tests.tiny import tiny_llama_folder, tiny_model, tokens

T = 16


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(n=6, **how):
    return tokens(n, T, **how)


def near(a, b, tol=1e-4):
    a, b = torch.as_tensor(a, dtype=torch.float), torch.as_tensor(b, dtype=torch.float)
    return torch.allclose(a, b, atol=tol, rtol=tol)


def small(**changes):
    """Three layers and grouped heads."""
    return tiny_model(num_hidden_layers=3, num_key_value_heads=2, **changes).eval()


# ---------------------------------------------------------------- numbers with a known answer

def test_variance_and_its_ratio():
    x = torch.tensor([[[1.0, 5.0], [2.0, 0.0]], [[3.0, 5.0], [2.0, 4.0]]])  # (2, 2, 2)
    assert near(probe.variance(x), [1.0, 4.0])  # (2 + 0) / 2, (0 + 8) / 2
    z = randn(9, 5, 2, 3)
    assert near(probe.variance(z), z.var(0).flatten(1).mean(1))
    assert near(probe.variance(3 * z + 7), 9 * probe.variance(z), 1e-3)
    curve = torch.tensor([8.0, 2.0, 1.0, 4.0])
    assert probe.over_median(curve, 0) == 4 and probe.over_median(curve, 2) == 0.25


def test_averaging_law():
    uniform = (torch.ones(8, 8).tril() / torch.arange(1.0, 9)[:, None])[None, None]
    own, shared = randn(20000, 8, 1, 1), randn(20000, 1, 1, 1, seed=1)
    assert near(probe.averaging_law(uniform, own), 1 / torch.arange(1.0, 9), 0.05)
    v = 0.7**0.5 * own + 0.3**0.5 * shared
    gates = torch.full((1, 1, 8, 8), 0.5).tril()  # sigmoid: rows that do not sum to 1
    for pattern in (uniform, gates):
        z = torch.einsum("bhts,nshd->nthd", pattern, v)
        assert near(probe.averaging_law(pattern, v), probe.variance(z), 0.05)


def test_the_law_holds_in_an_untrained_model():
    cfg = Config(vocab_size=1000, hidden_size=64, num_hidden_layers=1, initializer_range=0.05)
    found = probe.chain(GPT(cfg), ids(400, vocab_size=1000))
    assert found["variance"] == pytest.approx(found["variance_law"], rel=0.15)
    assert 8 < found["variance"] < 16


def test_kendall_tau_and_wo_alignment():
    a = torch.tensor([1.0, 2, 3, 4])
    assert near(probe.kendall_tau(a, a.exp()), 1) and near(probe.kendall_tau(a, -a), -1)
    assert near(probe.kendall_tau(a, torch.tensor([1.0, 3, 2, 4])), 4 / 6)
    assert near(probe.kendall_tau(a, torch.tensor([1.0, 1, 2, 2])), 4 / (6 * 4) ** 0.5)
    assert probe.kendall_tau(a, torch.ones(4)) == 0
    wide = torch.linspace(1, 4, 8)
    z = randn(50, 10, 2, 4) * wide.view(2, 4)
    assert probe.wo_alignment(z, torch.diag(wide)) > 0.95
    assert probe.wo_alignment(z, torch.diag(1 / wide)) < -0.95


def test_neurons():
    down = torch.tensor([[3.0, 0.0, 9.0], [0.0, 1.0, 9.0]])
    e = probe.energy(torch.tensor([1.0, 2.0, 0.0]), down)
    assert near(e, [9.0, 4.0, 0.0])
    e = torch.ones(2, 4, 40)
    assert near(probe.contrast(e, 1), 1)
    e[:, 1, :probe.TOP] = 8
    assert near(probe.contrast(e, 1), 8) and near(probe.contrast(7 * e, 1), 8)
    block = small().layers[0]
    with torch.no_grad():
        block.mlp.gate_proj.weight[7] *= 9
        block.mlp.down_proj.weight[5, 7] = 30
    score = probe.weight_score(block)
    g = block.post_attention_layernorm.weight
    gate, up = (g * w.weight[7] for w in (block.mlp.gate_proj, block.mlp.up_proj))
    assert score.argmax() == 7 and near(score[7], 30 * gate.norm() * up.norm(), 1e-3)
    assert probe.similar(torch.tensor([5.0, 1, 2, 5.1, 9]), torch.tensor([0])).tolist() == [3]


def test_dominance_and_direction():
    x = torch.tensor([[3.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, -2.0, 0.0]])
    assert near(probe.dominance(x), [2.0, 1.0, 4.0])  # from 1 (all equal) to C (one alone)
    number = probe.metric("dominance")
    null = probe.baseline(number, Config(vocab_size=9, hidden_size=128), T)
    assert abs(probe.dominance(randn(2000, 128)).mean() / null - 1) < 0.15
    y = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert near(probe.direction_cos(y), 1 / 3)  # pairs: 1, 0, 0
    assert abs(probe.direction_cos(randn(200, 64))) < 0.01


def test_leading_query_and_lock_cos():
    q = randn(4, 6, 2, 3) * 0.01
    q[:, :, 0, 1] += 2
    q[:, :, 1, 2] -= 5
    assert near(probe.leading_query(q), [[0, 1, 0], [0, 0, -1]], 0.02)
    key = torch.tensor([[0.0, 3, 4], [0, 0, 7]]).expand(4, 2, 3)
    assert near(probe.lock_cos(q, key, 0), [0.6, -1], 0.02)


def test_lock_gap():
    scores = torch.zeros(1, 1, 4, 4)
    scores[0, 0, 1:, 0] = torch.tensor([1.0, 3.0, -1.0])
    scores[0, 0, 2, 1] = 2
    assert near(probe.lock_gap(scores, 0), [(1 + (3 - 1) + -1) / 3])  # query 2: keys 1, 2, mean 1
    future = scores.clone()
    future[0, 0, 0, 3] = future[0, 0, 1, 2] = 99  # keys after the query do not count
    assert near(probe.lock_gap(future, 0), probe.lock_gap(scores, 0))
    assert near(probe.lock_gap(scores + 5, 0), probe.lock_gap(scores, 0))
    assert near(probe.lock_gap(scores, 1), [(2 - (3 + 0) / 2 + 1 / 3) / 2])


def test_sink_score_and_drain():
    pattern = torch.zeros(1, 2, 3, 3)
    pattern[0, 0, :, 0] = 1
    pattern[0, 1] = torch.ones(3, 3).tril() / torch.arange(1.0, 4)[:, None]
    assert near(probe.sink_score(pattern, 0), [[1, (1 + 1 / 2 + 1 / 3) / 3]])
    assert near(probe.sink_score(pattern, 1), [[0, (1 / 2 + 1 / 3) / 2]])
    assert near(probe.sink_score(0.1 * pattern, 1), probe.sink_score(pattern, 1))
    assert near(probe.uniform_sink(3), probe.sink_score(pattern, 0)[0, 1])
    v = torch.ones(1, 4, 1, 2)
    v[:, 0] = 0.1
    assert near(probe.value_drain(v, 0), [0.1 / (3.1 / 4)])


# ---------------------------------------------------------------- the chain

@pytest.mark.parametrize("attn", ["softmax", "sigmoid", "headnorm", "gated"])
def test_chain_is_flat_finite_and_draws_nothing(attn):
    model, x = small(attn=attn), ids()
    state = torch.get_rng_state()
    found = probe.chain(model, x, y=x)
    assert list(found) == [n.key for n in probe.metrics()] + ["loss"]
    assert all(isinstance(v, float) and math.isfinite(v) for v in found.values())
    assert found == probe.chain(model, x, y=x) and torch.equal(torch.get_rng_state(), state)
    assert near(found["loss"], model(x, x)[1].item())
    if attn == "headnorm":  # its variance is that before its norm
        raw = record(model, x, ["0.z_raw"])[1]["0.z_raw"]
        assert near(found["variance"], probe.over_median(probe.variance(raw), 0))


def test_layers_agree_with_recorded_activations():
    model, x = small(), ids()
    found = probe.layers(model, x, ks=(0, 2))[0][1]
    names = ["0.v", "1.scores", "1.pattern", "1.z", "1.resid_post", "2.resid_post"]
    v, scores, pattern, z, state, end = record(model, x, names)[1].values()
    assert near(found["variance"][1], probe.over_median(probe.variance(z), 2))
    assert near(found["norm_ratio"][1], probe.over_median(state.norm(dim=-1), 2).mean())
    normed = model.layers[2].input_layernorm(state)[:, 2]  # as the next layer reads it
    assert near(found["dominance"][1], probe.dominance(normed).mean())
    assert near(found["dominance"][2], probe.dominance(model.norm(end)[:, 2]).mean())
    assert near(found["lock_gap"][1], probe.lock_gap(scores, 2))
    assert near(found["sink"][1], probe.sink_score(pattern, 2).mean(0))
    assert near(found["sink_rate"][1], (probe.sink_score(pattern, 2) > probe.SINK).float().mean())
    assert near(found["drain"][0], probe.value_drain(v, 2).repeat_interleave(2))


def test_layers_become_one_number():
    found = probe.layers(small(), ids())[0][0]
    one, head = probe.summary(found), found["sink"][1:].argmax()  # the strongest after layer 0
    assert near(one["variance"], found["variance"][0])
    assert near(one["wo_tau"], found["wo_tau"].mean())
    assert near(one["norm_ratio"], found["norm_ratio"].max())
    for key in ("lock_gap", "lock_cos", "sink", "drain"):
        assert near(one[key], found[key][1:].flatten()[head])


@pytest.mark.parametrize("measure, n, k, message", [
    (probe.chain, 1, 0, "2 or more windows"), (probe.chain, 6, T - 1, "token from 0 to 14"),
    (probe.cuts, 6, 0, "a sink can be forged"), (probe.cuts, 6, T // 2, "a sink can be forged")])
def test_what_cannot_be_measured(measure, n, k, message):
    with pytest.raises(UserError, match=message):
        measure(small(), ids(n), y=ids(n), k=k)


# ---------------------------------------------------------------- cut and forge

PLANNED = list(probe.planned())


def test_rows_follow_the_plan_and_hold_the_numbers_before_and_after(monkeypatch):
    monkeypatch.setattr(probe, "SINK", 0.2)  # four heads of this model pass it
    model, x = small(), ids()
    rows, known = probe.cuts(model, x, x, k=5), probe.targets(model, x)
    resting = probe.layers(model, x)[0][0]["sink"][1:] > 0.2
    assert len(rows) == len(PLANNED) > 20 and resting.sum() == 4
    for row, (link, kind, edit, control) in zip(rows, PLANNED):
        assert (row["link"], row["kind"], row["says"]) == (link.name, kind, edit.says)
        assert (row["control"], row["token"]) == (control, 0 if kind == "cut" else 5)
        assert edit.controls, "no edit without a control"
        for when in ("before", "after"):
            tap = probe.intervene(model, edit, *known, 5, T) if when == "after" else None
            both, loss = probe.layers(model, x, tap, (0, 5), y=x)
            for found, seen in zip(row[when], both):
                right = probe.summary(seen) | {"loss": loss}
                right["resting"] = seen["sink"][1:][resting].mean().item()
                right = {key: right[key] for key in found}
                assert found == pytest.approx(right, rel=1e-4, nan_ok=True)
    named = [row["says"] for row in probe.cuts(model, x, x, k=5, names=("cut lock",))]
    assert named == [row["says"] for row in rows if (row["kind"], row["link"]) == ("cut", "lock")]
    for row, before in zip(rows[1:], rows):
        assert not row["control"] or row["after"] != before["after"], "a control is another edit"


@pytest.mark.parametrize("case", PLANNED, ids=lambda c: f"{c[1]} {c[2].says}")
def test_an_edit_changes_its_token_and_nothing_else(case):
    """Recorded where it acts, in the first of its layers."""
    edit, model, x, k = case[2], small(), ids(), 5
    tap = probe.intervene(model, edit, *probe.targets(model, x), k, T)
    p = {"middle": T // 2, "first": 0, "k": k}[edit.token]
    axis = 2 if edit.tap == "scores" else 1
    names = [f"{i}.{edit.tap}" for i in range(3)]
    free, cut = (record(model, x, names, tap=tap)[1] for tap in (None, tap))
    first = 1 if edit.layers == "deep" else 0
    moved = cut[names[first]] != free[names[first]]
    assert moved.select(axis, p).any(), "nothing was changed"
    assert not moved.index_select(axis, torch.tensor([t for t in range(T) if t != p])).any()
    assert first == 0 or torch.equal(cut[names[0]], free[names[0]])


def test_edits_do_what_they_say():
    model, x = small(), ids(64)
    story, other = probe.targets(model, x)
    cut, forge = ({link.name: getattr(link, kind) for link in probe.LINKS}
                  for kind in ("cut", "forge"))
    names = ["0.scores", "0.z", "0.mlp_post", "1.resid_pre", "1.k"]
    scores, z, post, state, key = record(model, x, names)[1].values()
    assert near(cut["variance"].change(z, 0, story, 0), z[:, 1:].mean(1))
    alone = forge["variance"].change(scores, 5, story, 0)
    assert near(alone.softmax(-1).mean((0, 1)), torch.arange(T) == 5)
    rms = z.square().mean(-1).sqrt()
    same_length = cut["W_O"].change(z, 0, story, 0)
    assert near(same_length.square().mean(-1).sqrt(), rms[:, 1:].mean(1))
    big, scaled, moved = (f(z, 5, story, 0) for f in (probe.amplify, probe.scale, probe.shift))
    plain, length = z[:, 5].var(0), big.square().sum(-1).mean(0)
    assert near(big.var(0), 25 * plain) and near(big.mean(0), z[:, 5].mean(0))
    assert near(scaled, 5 * z[:, 5]) and near(moved.var(0), plain)
    assert near(moved.square().sum(-1).mean(0), length)
    few = story.neurons[0]
    assert (cut["neurons"].change(post, 0, story, 0)[:, few] == 0).all()
    assert near(forge["neurons"].change(post, 5, story, 0)[:, few], post[:, 0, few])
    dims, clipped = story.dims[1], cut["disparity"].change(state, 0, story, 1)
    assert (clipped[:, dims].abs() <= state[:, 1:, dims].abs().mean((0, 1)) + 1e-6).all()
    large = forge["disparity"].change(state, 5, story, 1)
    assert near(large[:, dims], state[:, 0, dims].mean(0))
    turned = forge["direction"].change(state, 5, story, 1)
    assert near(turned.norm(dim=-1), state[:, 5].norm(dim=-1))
    assert near(torch.cosine_similarity(turned, story.state[1], dim=-1), torch.ones(64))
    there = cut["direction"].change(state, 0, story, 1)
    assert near(torch.cosine_similarity(there, state[:, T // 4], dim=-1), torch.ones(64))
    assert near((cut["lock"].change(key, 0, story, 1) * story.query[1]).sum(-1), 0)
    assert near(forge["lock"].change(key, 5, story, 1), key[:, 0].mean(0).expand(64, -1, -1))
    for i in range(3):  # a control has others, of the same size
        assert not set(story.neurons[i].tolist()) & set(other.neurons[i].tolist())
        assert not set(story.dims[i].tolist()) & set(other.dims[i].tolist())
        assert near(other.state[i].norm(), story.state[i].norm())


def row(kind, first, k, control=False, sink=0.9):
    """Of `cuts`: attention to token 0 and to token k, each (before, after), above chance."""
    numbers = [[{"resting": probe.uniform_sink(T) + first[at], "sink": sink}, {"resting": k[at]}]
               for at in (0, 1)]
    return {"link": "l", "kind": kind, "says": "s", "control": control,
            "before": numbers[0], "after": numbers[1]}


@pytest.mark.parametrize("kind, first, k, control, sink, share, word", [
    ("cut", (0.4, 0.1), (0, 0), 1, 0.9, 0.75, "holds"),         # of one sink it takes 75 %
    ("cut", (1, 0.6), (0, 0), 1, 0.9, 0.4, "partly"),
    ("cut", (1, 0.8), (0, 0), 1, 0.9, 0.2, "no"),
    ("cut", (1, 0.4), (0, 0), 0.6, 0.9, 0.6, "no"),             # and so does half of a control
    ("cut", (1, 0), (0, 0), 1, 0.2, 1, "absent"),               # there was no sink
    ("forge", (0.4, 0.2), (0.1, 0.3), 1, 0.9, 0.5, "holds"),    # it has 50 % of two sinks
    ("forge", (1, 0.8), (0, 0.2), 1, 0.9, 0.2, "partly"),
    ("forge", (1, 0.9), (0, 0.1), 1, 0.9, 0.1, "no"),
    ("forge", (0.4, 0.4), (0.1, 0.05), 1, 0.9, 0, "no")])
def test_share_and_verdict_by_the_rule(kind, first, k, control, sink, share, word):
    unmoved = (first[0], control * first[0])
    rows = [row(kind, first, k, sink=sink), row(kind, unmoved, (0, 0), control=True)]
    found = probe.verdicts([rows, rows], T)[0]
    assert near(found["share"], share) and found["spread"] == 0 and found["word"] == word
    assert f"from {probe.WHOLE[kind] * 100:.0f} %" in probe.RULE


def test_a_spread_may_not_exist():
    assert probe.spread([2.0]) == (2, 0) and probe.spread([1.0, 3.0]) == (2, 2**0.5)
    assert probe.with_spread(*probe.spread([1.0, math.nan])).startswith("-")


def test_runs_with_and_without_bos_stand_in_no_common_table(tmp_path, tiny_run):
    for bos in (0.0, 0.5):
        tiny_run(tmp_path / str(bos), bos=bos)
    with pytest.raises(UserError, match="probe them one by one"):
        probe.main([str(tmp_path / "0.5"), str(tmp_path / "0.0")])


def test_spread_is_over_batches():
    found = probe.verdicts([[row("cut", (1, after), (0, 0))] for after in (0.2, 0.4)], T)[0]
    assert near(found["share"], 0.7) and near(found["spread"], 0.02**0.5)


# ---------------------------------------------------------------- LINKS is the one place

def test_what_is_added_to_links_is_found_everywhere(made_up, capsys, tmp_path):
    """The figures are read off LINKS too: tests/test_figures.py."""
    folder, out = tiny_llama_folder(tmp_path / "llama", num_hidden_layers=3), tmp_path / "out"
    words = ["--llama", str(folder), "--windows=4", "--threads=1", f"--out={out}"]
    assert probe.main(words) == 0
    text = capsys.readouterr().out
    assert "a number nobody else names" in text and "a headline nobody else names" in text
    saved = json.loads((out / "chain.json").read_text())["chain"]["random tokens"]
    assert {"made_up", "mirror"} <= saved["llama"]["mean"].keys()

    assert probe.main([*words, "--cut", "--batches=2"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ +variance .* mirrors +sink +loss$", text, flags=re.M)
    cells = len(probe.LINKS) + 1  # and the loss
    assert re.search(rf"^mirrors: it is mirrored( +\S+){{{cells}}}$", text, flags=re.M)
    assert re.search(r"mirrors.* it is mirrored +(holds|partly|no|absent) .*control", text)
    saved = json.loads((out / "cut.json").read_text())["cut"]["llama"]
    assert "mirrors" in [v["link"] for v in saved["verdicts"]]
    assert "mirror" in saved["batches"][0][0]["after"][0]

    with pytest.raises(SystemExit):
        probe.main(["--help"])
    assert "a number nobody else names" in capsys.readouterr().out
    assert train.main(tiny_flags(tmp_path / "run")) == 0
    assert "mirrors" in capsys.readouterr().out
    assert {"made_up", "mirror"} <= train.read_log(tmp_path / "run")[-1]["links"].keys()


# ---------------------------------------------------------------- the command

@pytest.mark.parametrize("words, message", [
    ("", "give smollm2"), ("smollm2 out/softmax --file x", "give smollm2"),
    ("a --llama b", "give smollm2"), ("smollm2 --windows 1", "--windows must be from 2"),
    ("smollm2 --position 0", "--position must be from 1"), ("nowhere", "nowhere holds no run")])
def test_bad_command(words, message):
    with pytest.raises(UserError, match=message):
        probe.main(words.split())
