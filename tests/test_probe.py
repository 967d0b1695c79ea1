"""Every number on tensors with a known answer; every edit changes what it names and nothing else;
and LINKS is the one place: what is added there shows up everywhere."""

import json
import math

import pytest
import torch

import probe
from data.common import UserError
from model import Config, record
from tests.tiny import tiny_llama_folder, tiny_model, tokens

T = 16
K = 5  # the token where sinks are forged


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(n=6, **how):
    return tokens(n, T, **how)


def near(a, b, tol=1e-4):
    a = torch.as_tensor(a, dtype=torch.float)
    b = torch.as_tensor(b, dtype=torch.float)
    return torch.allclose(a, b, atol=tol, rtol=tol)


def small(**changes):
    """Three layers and grouped heads."""
    return tiny_model(num_hidden_layers=3, num_key_value_heads=2, **changes).eval()


def uniform(n):
    """(1, 1, n, n): attention to all that a query sees alike."""
    return (torch.ones(n, n).tril() / torch.arange(1.0, n + 1)[:, None])[None, None]


# ---------------------------------------------------------------- numbers with a known answer

def test_variance():
    x = torch.tensor([[[1.0, 5.0], [2.0, 0.0]],
                      [[3.0, 5.0], [2.0, 4.0]]])
    assert near(probe.variance(x), [1, 4])  # (2 + 0) / 2, (0 + 8) / 2


def test_over_median():
    curve = torch.tensor([8.0, 2.0, 1.0, 4.0])
    assert probe.over_median(curve, 0) == 4
    assert probe.over_median(curve, 2) == 0.25


def test_averaging_law():
    own, shared = randn(20000, 8, 1, 1), randn(20000, 1, 1, 1, seed=1)
    v = 0.7**0.5 * own + 0.3**0.5 * shared
    gates = torch.full((1, 1, 8, 8), 0.5).tril()  # sigmoid: rows that do not sum to 1
    for pattern in (uniform(8), gates):
        z = torch.einsum("bhts,nshd->nthd", pattern, v)
        assert near(probe.averaging_law(pattern, v), probe.variance(z), 0.05)


@pytest.mark.parametrize("ranks, tau", [
    ("1579", 1),
    ("9731", -1),
    ("1324", 4 / 6),  # of six pairs five agree
    ("1122", 4 / 24**0.5),  # ties
    ("1111", 0)])
def test_kendall_tau(ranks, tau):
    b = torch.tensor([int(rank) for rank in ranks])
    assert near(probe.kendall_tau(torch.arange(4), b), tau)


def test_wo_alignment():
    wide = torch.linspace(1, 4, 8)
    z = randn(50, 10, 2, 4) * wide.view(2, 4)
    assert probe.wo_alignment(z, torch.diag(wide)) > 0.95
    assert probe.wo_alignment(z, torch.diag(1 / wide)) < -0.95


def test_energy_and_contrast():
    down = torch.tensor([[3.0, 0.0, 9.0], [0.0, 1.0, 9.0]])
    assert near(probe.energy(torch.tensor([1.0, 2.0, 0.0]), down), [9, 4, 0])
    e = torch.ones(2, 4, 40)
    assert near(probe.contrast(e, 1), 1)
    e[:, 1, :probe.TOP] = 8
    assert near(probe.contrast(7 * e, 1), 8)


@torch.no_grad()
def test_weight_score():
    block = small().layers[0]
    block.mlp.gate_proj.weight[7] *= 9
    block.mlp.down_proj.weight[5, 7] = 30
    score, gain = probe.weight_score(block), block.post_attention_layernorm.weight
    gate = (block.mlp.gate_proj.weight[7] * gain).norm()
    up = (block.mlp.up_proj.weight[7] * gain).norm()
    assert score.argmax() == 7
    assert near(score[7], 30 * gate * up, 1e-3)


def test_similar():
    score = torch.tensor([5.0, 1, 2, 5.1, 9])
    assert probe.similar(score, torch.tensor([0])).tolist() == [3]
    assert probe.similar(score, torch.tensor([0, 3])).tolist() == [2, 4]  # none of them twice


def test_dominance():
    x = torch.tensor([[3.0, -1.0, 1.0, -1.0],
                      [1.0, 1.0, 1.0, 1.0],
                      [0.0, 0.0, -2.0, 0.0]])
    assert near(probe.dominance(x), [2, 1, 4])  # from 1 (all equal) to C (one alone)
    cfg = Config(vocab_size=9, hidden_size=128)
    noise = probe.baseline(probe.metric("dominance"), cfg, T)
    assert near(probe.dominance(randn(2000, 128)).mean(), noise, 0.15)


def test_direction_cos():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert near(probe.direction_cos(x), 1 / 3)  # pairs: 1, 0, 0
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
    scores[0, 0, 0, 3] = scores[0, 0, 1, 2] = 99  # keys after the query do not count
    assert near(probe.lock_gap(scores, 0), [(1 + (3 - 1) + -1) / 3])  # query 2: keys 1, 2, mean 1
    assert near(probe.lock_gap(scores + 5, 0), probe.lock_gap(scores, 0))
    assert near(probe.lock_gap(scores, 1), [(2 - (3 + 0) / 2 + 1 / 3) / 2])


def test_sink_score():
    first = torch.zeros(1, 1, 3, 3)
    first[..., 0] = 1
    pattern = torch.cat([first, uniform(3)], 1)
    for k, right in ((0, [1, 11 / 18]), (1, [0, 5 / 12])):  # (1 + 1/2 + 1/3) / 3, (1/2 + 1/3) / 2
        assert near(probe.sink_score(pattern, k), [right])
        assert near(probe.sink_score(0.1 * pattern, k), [right])  # sigmoid
        assert near(probe.uniform_sink(3, k), right[1])


def test_value_drain():
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
    assert all(math.isfinite(v) for v in found.values())
    assert found == probe.chain(model, x, y=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert near(found["loss"], model(x, x)[1].item())


def test_variance_is_read_before_headnorm():
    model, x = small(attn="headnorm"), ids()
    raw = record(model, x, ["0.z_raw"])[1]["0.z_raw"]
    assert near(probe.chain(model, x)["variance"], probe.over_median(probe.variance(raw), 0))


def test_layers_agree_with_recorded_activations():
    model, x, k = small(), ids(), 2
    found = probe.layers(model, x, ks=(0, k))[0][1]
    names = ["0.v", "1.scores", "1.pattern", "1.z", "1.resid_post", "2.resid_post"]
    v, scores, pattern, z, state, end = record(model, x, names)[1].values()
    assert near(found["variance"][1], probe.over_median(probe.variance(z), k))
    normed = model.layers[2].input_layernorm(state)[:, k]  # as the next layer reads it
    assert near(found["dominance"][1], probe.dominance(normed).mean())
    assert near(found["dominance"][2], probe.dominance(model.norm(end)[:, k]).mean())
    assert near(found["lock_gap"][1], probe.lock_gap(scores, k))
    assert near(found["sink"][1], probe.sink_score(pattern, k).mean(0))
    assert near(found["drain"][0], probe.value_drain(v, k).repeat_interleave(2))


def test_layers_become_one_number():
    found = probe.layers(small(), ids())[0][0]
    one = probe.summary(found)
    head = found["sink"][1:].argmax()  # the strongest after layer 0
    assert near(one["variance"], found["variance"][0])
    assert near(one["wo_tau"], found["wo_tau"].mean())
    assert near(one["norm_ratio"], found["norm_ratio"].max())
    for key in ("lock_gap", "lock_cos", "sink", "drain"):
        assert near(one[key], found[key][1:].flatten()[head])


def test_layers_as_a_plain_table():
    found = probe.layers(small(), ids())[0][0]
    rows = probe.as_rows(found)
    assert len(rows) == sum(values.numel() for values in found.values())
    for row in rows:
        value = found[row["number"]][row["layer"]]
        if row["head"] is not None:
            value = value[row["head"]]
        assert row["value"] == value.item()


def test_the_dot_of_a_portrait_lies_on_its_line_and_is_the_number_of_the_table():
    model, x = small(), ids()
    one = probe.chain(model, x)
    for link, panel in zip(probe.LINKS, probe.portrait(model, x)["links"]):
        number = link.numbers[0]
        assert (panel["dot"] is None) == (number.read == "mean")
        if panel["dot"] is not None:
            assert near(panel["first"][panel["dot"]], one[number.key])


@pytest.mark.parametrize("measure, n, k, message", [
    (probe.chain, 1, 0, "2 or more windows"),
    (probe.chain, 6, T - 1, "token from 0 to 14"),
    (probe.cuts, 6, 0, "a sink can be forged"),
    (probe.cuts, 6, T // 2, "a sink can be forged")])
def test_what_cannot_be_measured(measure, n, k, message):
    with pytest.raises(UserError, match=message):
        measure(small(), ids(n), y=ids(n), k=k)


# ---------------------------------------------------------------- cut and forge

PLANNED = list(probe.planned())


def test_rows_follow_the_plan():
    x = ids()
    rows = probe.cuts(small(), x, x, k=K)
    assert len(rows) == len(PLANNED) > 20
    for i, (link, kind, edit, control) in enumerate(PLANNED):
        row = rows[i]
        assert (row["link"], row["kind"], row["says"]) == (link.name, kind, edit.says)
        assert (row["control"], row["token"]) == (control, 0 if kind == "cut" else K)
        assert edit.controls, "no edit without a control"
        if control:
            assert row["after"] != rows[i - 1]["after"], "a control is another edit"
    lock = probe.cuts(small(), x, x, k=K, names=("cut lock",))
    assert lock == [row for row in rows if (row["kind"], row["link"]) == ("cut", "lock")]


def test_rows_hold_the_numbers_before_and_after(monkeypatch):
    monkeypatch.setattr(probe, "SINK", 0.2)  # four heads of this model pass it
    model, x = small(), ids()
    target, matched = probe.targets(model, x)
    resting = probe.layers(model, x)[0][0]["sink"][1:] > 0.2
    assert resting.sum() == 4
    for row, (_, _, edit, _) in zip(probe.cuts(model, x, x, k=K), PLANNED):
        tap = probe.intervene(model, edit, target, matched, K, T)
        for when, done in (("before", None), ("after", tap)):
            both, loss = probe.layers(model, x, done, (0, K), y=x)
            for numbers, found in zip(row[when], both):
                right = probe.summary(found) | {"loss": loss}
                right["resting"] = found["sink"][1:][resting].mean().item()
                right = {key: right[key] for key in numbers}
                assert numbers == pytest.approx(right, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("case", PLANNED, ids=lambda c: f"{c[1]} {c[2].says}")
def test_an_edit_changes_its_token_and_nothing_else(case):
    """Recorded where it acts, in the first of its layers."""
    edit, model, x = case[2], small(), ids()
    tap = probe.intervene(model, edit, *probe.targets(model, x), K, T)
    names = [f"0.{edit.tap}", f"1.{edit.tap}"]
    before = record(model, x, names)[1]
    after = record(model, x, names, tap=tap)[1]
    acts = names[0]
    if edit.layers == "deep":
        assert torch.equal(before[names[0]], after[names[0]])
        acts = names[1]
    axis = 2 if edit.tap == "scores" else 1
    moved = (before[acts] != after[acts]).movedim(axis, 0).flatten(1).any(1)
    token = {"middle": T // 2, "first": 0, "k": K}[edit.token]
    assert moved.nonzero().flatten().tolist() == [token]


@pytest.fixture(scope="module")
def seen():
    """Activations of 64 windows, the edits of each link, and what `targets` finds."""
    model, x = small(), ids(64)
    names = ["0.scores", "0.z", "0.mlp_post", "1.resid_pre", "1.k"]
    scores, z, post, state, key = record(model, x, names)[1].values()
    target, matched = probe.targets(model, x)
    return {"scores": scores, "z": z, "post": post, "state": state, "key": key,
            "target": target, "matched": matched}


BY_NAME = {link.name: link for link in probe.LINKS}


def cut(name, x, seen, layer):
    return BY_NAME[name].cut.change(x, 0, seen["target"], layer)


def forge(name, x, seen, layer):
    return BY_NAME[name].forge.change(x, K, seen["target"], layer)


def rms(z):
    return z.square().mean(-1).sqrt()


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=-1)


def test_edits_of_attention(seen):
    z = seen["z"]
    assert near(cut("variance", z, seen, 0), z[:, 1:].mean(1))
    alone = forge("variance", seen["scores"], seen, 0).softmax(-1)
    assert near(alone.mean((0, 1)), torch.arange(T) == K)
    assert near(rms(cut("W_O", z, seen, 0)), rms(z)[:, 1:].mean(1))
    half = probe.see_every_other(seen["scores"], K, None, 0).isfinite()
    assert half.all((0, 1)).tolist()[:K + 1] == [False, True] * 3


def test_edits_of_variance(seen):
    z, plain = seen["z"], seen["z"][:, K].var(0)
    amplified = probe.amplify(z, K, None, 0)
    assert near(amplified.var(0), 25 * plain)
    assert near(amplified.mean(0), z[:, K].mean(0))
    assert near(probe.scale(z, K, None, 0), 5 * z[:, K])
    shifted = probe.shift(z, K, None, 0)
    assert near(shifted.var(0), plain)
    assert near(rms(shifted).square().mean(0), rms(amplified).square().mean(0))


def test_edits_of_neurons(seen):
    post, few = seen["post"], seen["target"].neurons[0]
    assert (cut("neurons", post, seen, 0)[:, few] == 0).all()
    assert near(forge("neurons", post, seen, 0)[:, few], post[:, 0, few])


def test_edits_of_the_state(seen):
    state, dims = seen["state"], seen["target"].dims[1]
    clipped = cut("disparity", state, seen, 1)[:, dims].abs()
    assert (clipped <= state[:, 1:, dims].abs().mean((0, 1)) + 1e-6).all()
    large = forge("disparity", state, seen, 1)[:, dims]
    assert near(large, state[:, 0, dims].mean(0))
    turned = forge("direction", state, seen, 1)
    assert near(turned.norm(dim=-1), state[:, K].norm(dim=-1))
    assert near(cosine(turned, state[:, 0].mean(0)), torch.ones(64))
    turned = cut("direction", state, seen, 1)
    assert near(cosine(turned, state[:, T // 4]), torch.ones(64))


def test_edits_of_the_key(seen):
    key, query = seen["key"], seen["target"].query[1]
    assert near((cut("lock", key, seen, 1) * query).sum(-1), 0)
    assert near(forge("lock", key, seen, 1), key[:, 0].mean(0).expand(64, -1, -1))


def test_a_control_has_others_of_the_same_size(seen):
    target, matched = seen["target"], seen["matched"]
    for ours, theirs in zip((*target.neurons, *target.dims), (*matched.neurons, *matched.dims)):
        assert len(ours) == len(theirs)
        assert not set(ours.tolist()) & set(theirs.tolist())
    for name in ("state", "key", "query"):
        for ours, theirs in zip(getattr(target, name), getattr(matched, name)):
            assert near(ours.norm(dim=-1), theirs.norm(dim=-1))
            assert not near(ours, theirs)


# ---------------------------------------------------------------- verdicts

def row(kind, first, k=(0, 0), control=False, sink=0.9):
    """Of `cuts`: attention to token 0 and to token k, each (before, after), above chance."""
    chance = probe.uniform_sink(T)
    before = [{"resting": chance + first[0], "sink": sink}, {"resting": k[0]}]
    after = [{"resting": chance + first[1], "sink": sink}, {"resting": k[1]}]
    return {"link": "l", "kind": kind, "says": "s", "control": control,
            "before": before, "after": after}


@pytest.mark.parametrize("kind, first, k, share, word", [
    ("cut", (0.4, 0.1), (0, 0), 0.75, "holds"),  # of one sink it takes 75 %
    ("cut", (1, 0.6), (0, 0), 0.4, "partly"),
    ("cut", (1, 0.8), (0, 0), 0.2, "no"),
    ("forge", (0.4, 0.2), (0.1, 0.3), 0.5, "holds"),  # it has 50 % of two sinks
    ("forge", (1, 0.8), (0, 0.2), 0.2, "partly"),
    ("forge", (0.4, 0.4), (0.1, 0.05), 0, "no")])
def test_share_and_verdict_by_the_rule(kind, first, k, share, word):
    idle = row(kind, (first[0], first[0]), control=True)
    found = probe.verdicts([[row(kind, first, k), idle]], T)[0]
    assert near(found["share"], share)
    assert (found["word"], found["why"]) == (word, "")
    assert f"from {probe.WHOLE[kind] * 100:.0f} %" in probe.RULE


def test_a_control_that_does_half_as_much_refutes():
    control = row("cut", (1, 0.7), control=True)
    found = probe.verdicts([[row("cut", (1, 0.4)), control]], T)[0]
    assert (found["word"], found["why"]) == ("no", "control 30 %")


def test_without_a_sink_nothing_is_explained():
    found = probe.verdicts([[row("cut", (1, 0), sink=0.2)]], T)[0]
    assert found["word"] == "absent"


def test_spread_is_over_batches():
    found = probe.verdicts([[row("cut", (1, after))] for after in (0.2, 0.4)], T)[0]
    assert near(found["share"], 0.7)
    assert near(found["spread"], 0.02**0.5)
    assert probe.mean_std([2.0]) == (2, 0)
    assert probe.with_spread(*probe.mean_std([1.0, math.nan])).startswith("-")


# ---------------------------------------------------------------- the command

@pytest.fixture
def llama(tmp_path):
    """Words that probe a Llama in a folder with a difficult name, and where its results go."""
    folder = tiny_llama_folder(tmp_path / "a $1 llama_2 $", num_hidden_layers=3)
    out = tmp_path / "out"
    return ["--llama", str(folder), "--windows=4", "--threads=1", f"--out={out}"], out


def test_what_is_added_to_links_is_measured(made_up, llama, capsys):
    words, out = llama
    assert probe.main(words) == 0
    printed = capsys.readouterr().out
    assert "a number nobody else names" in printed
    assert "a headline nobody else names" in printed
    (name, one), _ = json.loads((out / "chain.json").read_text())["chain"]["random tokens"].items()
    assert name == "a $1 llama_2 $"
    assert {"made_up", "mirror"} <= one["mean"].keys()
    assert (out / "chain.png").exists()


def test_what_is_added_to_links_is_cut(made_up, llama, capsys):
    words, out = llama
    assert probe.main([*words, "--cut"]) == 0
    printed = capsys.readouterr().out
    columns = next(line.split() for line in printed.splitlines() if " mirrors " in line)
    assert columns == [*probe.headline_keys()]
    saved = json.loads((out / "cut.json").read_text())["cut"]["a $1 llama_2 $"]
    assert "mirrors" in [verdict["link"] for verdict in saved["verdicts"]]
    assert "mirror" in saved["batches"][0][0]["after"][0]
    assert (out / "cut.png").exists()


def test_what_is_added_to_links_is_explained_and_told(made_up, capsys):
    with pytest.raises(SystemExit):
        probe.main(["--help"])
    assert "a number nobody else names" in capsys.readouterr().out
    assert "mirrors 2" in probe.headlines({"mirror": 2.0})


def test_every_number_is_kept_by_layer(llama):
    words, out = llama
    probe.main([*words, "--batches=2"])
    saved = json.loads((out / "chain.json").read_text())
    kept = saved["by layer"]["a $1 llama_2 $"]["random tokens"]
    assert list(kept) == ["token 0", "token 32"]
    mean = saved["chain"]["random tokens"]["a $1 llama_2 $"]["mean"]
    assert near(kept["token 0"]["variance"][0], mean["variance"])
    assert [len(kept["token 32"]["sink"]), len(kept["token 32"]["sink"][0])] == [3, 4]


def test_a_figure_that_cannot_be_drawn_costs_one_line(llama, capsys, monkeypatch):
    words, out = llama
    monkeypatch.setattr("chapters.figures.png", lambda figure: 1 / 0)
    assert probe.main(words) == 0
    assert "no chain.png (division by zero)" in capsys.readouterr().out
    assert json.loads((out / "chain.json").read_text())["chain"]
    assert not (out / "chain.png").exists()


def test_runs_with_and_without_bos_stand_in_no_common_table(tmp_path, tiny_run):
    for bos in (0.0, 0.5):
        tiny_run(tmp_path / str(bos), bos=bos)
    with pytest.raises(UserError, match="probe them one by one"):
        probe.main([str(tmp_path / "0.5"), str(tmp_path / "0.0")])


def test_a_run_beside_itself_untrained(tmp_path, tiny_run):
    tiny_run(tmp_path / "run")
    assert probe.main([str(tmp_path / "run"), "--windows=4", "--batches=2"]) == 0
    saved = json.loads((tmp_path / "run" / "chain.json").read_text())["chain"]
    assert list(saved) == ["nothing to copy", "ordinary first token"]
    for kind in saved:
        assert list(saved[kind]) == ["run", "run, token 8", "run, untrained"]


@pytest.mark.parametrize("words, message", [
    ("", "give smollm2"),
    ("smollm2 out/softmax --file x", "give smollm2"),
    ("a --llama b", "give smollm2"),
    ("smollm2 --windows 1", "--windows must be at least 2"),
    ("nowhere", "nowhere")])
def test_bad_command(words, message):
    with pytest.raises(UserError, match=message):
        probe.main(words.split())
