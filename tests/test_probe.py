"""Every number on tensors with a known answer; every edit changes what it names and nothing else;
and LINKS is the one place: what is added there shows up everywhere."""

import json
import math
from itertools import chain

import pytest
import torch
import torch.nn.functional as F

import probe
from data.common import UserError
from model import Config, record
from tests.tiny import tiny_llama_folder, tiny_model, tokens

T = 16
K = 5  # the token where sinks are forged


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(n=6):
    return tokens(n, T)


def near(a, b, tol=1e-4):
    a = torch.as_tensor(a, dtype=torch.float)
    b = torch.as_tensor(b, dtype=torch.float)
    return torch.allclose(a, b, atol=tol, rtol=tol)


def small(**changes):
    """Three layers and grouped heads."""
    return tiny_model(num_hidden_layers=3, num_key_value_heads=2, **changes).eval()


# ---------------------------------------------------------------- numbers with a known answer

def test_variance():
    x = torch.tensor([[[1.0, 5.0], [2.0, 0.0]],
                      [[3.0, 5.0], [2.0, 4.0]]])
    assert near(probe.variance(x), [1, 4])  # (2 + 0) / 2, (0 + 8) / 2


def test_over_median():
    curve = torch.tensor([8.0, 2.0, 1.0, 4.0])
    assert probe.over_median(curve, 0) == 4


def test_averaging_law():
    own, shared = randn(20000, 8, 1, 1), randn(20000, 1, 1, 1, seed=1)
    v = 0.7**0.5 * own + 0.3**0.5 * shared
    pattern = torch.full((1, 1, 8, 8), 0.5).tril()  # sigmoid: rows that do not sum to 1
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
    down = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert near(probe.energy(torch.tensor([1.0, 2.0]), down), [9, 4])
    written = torch.ones(2, 4, 40)
    written[:, 1, :probe.TOP] = 8
    assert near(probe.contrast(written, 1), 8)


@torch.no_grad()
def test_weight_score():
    block = small().layers[0]
    block.mlp.down_proj.weight[5, 7] = 30
    gain = block.post_attention_layernorm.weight
    gate = (block.mlp.gate_proj.weight[7] * gain).norm()
    up = (block.mlp.up_proj.weight[7] * gain).norm()
    assert near(probe.weight_score(block)[7], 30 * gate * up)


def test_similar():
    score = torch.tensor([5.0, 1, 2, 5.1, 9])
    taken = probe.similar(score, torch.tensor([0, 3]))
    assert taken.tolist() == [2, 4]  # none of them twice


def test_dominance():
    assert near(probe.dominance(torch.tensor([3.0, -1.0, 1.0, -1.0])), 2)
    cfg = Config(vocab_size=9, hidden_size=128)
    noise = probe.baseline(probe.metric("dominance"), cfg, T)
    assert near(probe.dominance(randn(2000, 128)).mean(), noise, 0.15)


def test_direction_cos():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert near(probe.direction_cos(x), 1 / 3)  # pairs: 1, 0, 0


def test_a_sink_is_told_of_the_queries_asked_for():
    pattern = torch.zeros(1, 1, 4, 4)
    pattern[0, 0, :, 0] = torch.tensor([1.0, 0.5, 0.25, 0.0])
    pattern[0, 0, :, 3] = 1 - pattern[0, 0, :, 0]
    asked = torch.tensor([[False, True, True, False]])
    assert near(probe.sink_score(pattern, 0, asked), 0.375)
    assert near(probe.uniform_weight(asked), (1 / 2 + 1 / 3) / 2)


def test_the_weight_behind_a_gate_counts_as_much_as_the_gate_is_open():
    model = tiny_model("gated")
    x, asked = tokens(3), torch.rand(3, 24) < 0.5
    kept = record(model, x, ["1.pattern", "1.resid_pre"])[1]
    gate = torch.sigmoid(model.layers[1].self_attn.z_gate(
        model.layers[1].input_layernorm(kept["1.resid_pre"])))  # (N, T, H)
    for head, found in enumerate(probe.resting_weight(model, x, asked)):
        weight = kept["1.pattern"][:, head, :, 0] * gate[..., head]
        assert near(weight[asked].mean(), found)


def test_leading_query_and_lock_cos():
    q = randn(4, 6, 2, 3) * 0.01
    q[:, :, 0, 1] += 2
    q[:, :, 1, 2] -= 5
    assert near(probe.leading_query(q), [[0, 1, 0], [0, 0, -1]], 0.02)
    key = torch.tensor([[0.0, 3, 4], [0, 0, 7]])
    assert near(probe.lock_cos(q, key.expand(4, 2, 3), 0), [0.6, -1], 0.02)


def test_lock_gap():
    scores = torch.full((4, 4), 99.0).triu(1)  # keys after the query do not count
    scores[1:, 0] = torch.tensor([1.0, 3.0, -1.0])
    scores[2, 1] = 2
    scores = scores[None, None]
    assert near(probe.lock_gap(scores, 0), (1 + (3 - 1) + -1) / 3)  # query 2: 3 above 1
    assert near(probe.lock_gap(scores, 1), (2 - (3 + 0) / 2 + 1 / 3) / 2)


@pytest.mark.parametrize("k, score", [(0, (1 + 1 / 2 + 1 / 3) / 3), (1, (1 / 2 + 1 / 3) / 2)])
def test_sink_score(k, score):
    alike = torch.ones(1, 1, 3, 3).tril()  # rows are made to sum to 1
    assert near(probe.sink_score(alike, k), score)
    assert near(probe.uniform_sink(3, k), score)


def test_value_drain():
    v = torch.ones(1, 4, 1, 2)
    v[:, 0] = 0.1
    assert near(probe.value_drain(v, 0), [0.1 / (3.1 / 4)])


# ---------------------------------------------------------------- the chain

@pytest.mark.parametrize("attn", ["softmax", "sigmoid", "headnorm", "gated"])
def test_chain_is_finite_and_draws_nothing(attn):
    model, x = small(attn=attn), ids()
    state = torch.get_rng_state()
    found = probe.chain(model, x, y=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found) == [n.key for n in probe.metrics()] + ["loss"]
    assert all(map(math.isfinite, found.values()))
    assert near(found["loss"], model(x, x)[1].item())


def test_variance_is_read_before_headnorm():
    model, x = small(attn="headnorm"), ids()
    raw = record(model, x, ["0.z_raw"])[1]["0.z_raw"]
    assert near(probe.chain(model, x)["variance"], probe.over_median(probe.variance(raw), 0))


def test_layers_agree_with_recorded_activations():
    model, x, k = small(), ids(), 2
    found = probe.layers(model, x, ks=(0, k))[0][1]
    names = ["0.v", "1.pattern", "1.resid_post", "2.resid_post"]
    v, pattern, state, end = record(model, x, names)[1].values()
    normed = model.layers[2].input_layernorm(state)  # as the next layer reads it
    assert near(found["dominance"][1], probe.dominance(normed[:, k]).mean())
    assert near(found["dominance"][2], probe.dominance(model.norm(end)[:, k]).mean())
    assert near(found["sink"][1], probe.sink_score(pattern, k).mean(0))
    assert near(found["drain"][0], probe.value_drain(v, k).repeat_interleave(2))


def test_layers_become_one_number():
    found = probe.layers(small(), ids())[0][0]
    one = probe.summary(found)
    head = found["sink"][1:].argmax()  # the strongest after layer 0
    assert near(one["variance"], found["variance"][0])
    assert near(one["wo_tau"], found["wo_tau"].mean())
    assert near(one["norm_ratio"], found["norm_ratio"].max())
    assert near(one["lock_gap"], found["lock_gap"][1:].flatten()[head])


def test_layers_as_a_plain_table():
    found = {"norm_ratio": torch.tensor([2.0]), "sink": torch.tensor([[3.0, 4]])}
    rows = [tuple(row.values()) for row in probe.as_rows(found)]
    assert rows == [(0, None, "norm_ratio", 2), (0, 0, "sink", 3), (0, 1, "sink", 4)]


def test_the_dot_of_a_portrait_is_the_number_of_the_table():
    model, x = small(), ids()
    one = probe.chain(model, x)
    panels = probe.portrait(model, x)["links"]
    for key, panel in zip(probe.headline_keys().values(), panels):
        if panel["dot"] is not None:
            assert near(panel["first"][panel["dot"]], one[key])


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
    for row, (link, kind, edit, control) in zip(rows, PLANNED, strict=True):
        assert (row["link"], row["kind"], row["says"]) == (link.name, kind, edit.says)
        assert row["control"] == control
        assert edit.controls, "no edit without a control"
    for row, following in zip(rows, rows[1:]):
        assert row["after"] != following["after"], "a control is another edit"
    lock = probe.cuts(small(), x, x, k=K, names=("cut lock",))
    assert [row in rows for row in lock] == [True, True]


def test_what_counts_is_the_heads_that_have_a_sink(monkeypatch):
    monkeypatch.setattr(probe, "SINK", 0.2)
    model, x = small(), ids()
    row = probe.cuts(model, x, x, k=K, names=("cut lock",))[0]
    both, _ = probe.layers(model, x, ks=(0, K))
    resting = both[0]["sink"][1:] > 0.2
    assert resting.sum() == 4
    for numbers, found in zip(row["before"], both):
        assert near(numbers["resting"], found["sink"][1:][resting].mean())


@pytest.mark.parametrize("case", PLANNED, ids=lambda c: f"{c[1]} {c[2].says}")
def test_an_edit_changes_its_token_and_nothing_else(case):
    """Recorded in the first layer where it acts."""
    edit, model, x = case[2], small(), ids()
    tap = probe.intervene(model, edit, *probe.targets(model, x), K, T)
    name = f"{int(edit.layers == 'deep')}.{edit.tap}"
    before = record(model, x, [name])[1][name]
    after = record(model, x, [name], tap=tap)[1][name]
    axis = 2 if edit.tap == "scores" else 1
    moved = (before != after).movedim(axis, 0).flatten(1).any(1)
    token = {"middle": T // 2, "first": 0, "k": K}[edit.token]
    assert moved.nonzero().tolist() == [[token]]


@pytest.fixture(scope="module")
def seen():
    """Activations of 64 windows by name, and what `targets` finds there."""
    model, x = small(), ids(64)
    names = ["0.scores", "0.z", "0.mlp_post", "1.resid_pre", "1.k"]
    kept = {name[2:]: value for name, value in record(model, x, names)[1].items()}
    target, matched = probe.targets(model, x)
    return kept | {"target": target, "matched": matched}


def edited(name, seen, layer=0):
    """What "cut W_O" makes of token 0, or "forge W_O" of token K."""
    _, kind, edit, _ = next(probe.planned(name))
    token = 0 if kind == "cut" else K
    return edit.change(seen[edit.tap], token, seen["target"], layer)


def test_edits_of_attention(seen):
    z = seen["z"]
    assert near(edited("cut variance", seen), z[:, 1:].mean(1))
    alone = edited("forge variance", seen).softmax(-1)
    assert near(alone.mean((0, 1)), torch.arange(T) == K)
    same_length = edited("cut W_O", seen)
    assert near(same_length.norm(dim=-1), z.norm(dim=-1)[:, 1:].mean(1))
    half = probe.see_every_other(seen["scores"], K, None, 0).isfinite()
    assert half.all((0, 1)).tolist()[:K + 1] == [False, True] * 3


def test_edits_of_variance(seen):
    z, plain = seen["z"], seen["z"][:, K]
    amplified = edited("forge W_O", seen)
    assert near(amplified.var(0), 25 * plain.var(0))
    assert near(amplified.mean(0), plain.mean(0))
    assert near(probe.scale(z, K, None, 0), 5 * plain)
    shifted = probe.shift(z, K, None, 0)
    assert near(shifted.var(0), plain.var(0))
    assert near(shifted.square().mean((0, -1)), amplified.square().mean((0, -1)))


def test_edits_of_neurons(seen):
    few = seen["target"].neurons[0]
    assert (edited("cut neurons", seen)[:, few] == 0).all()
    assert near(edited("forge neurons", seen)[:, few], seen["mlp_post"][:, 0, few])


def test_edits_of_dimensions(seen):
    dims = seen["target"].dims[1]
    large = seen["resid_pre"][..., dims]
    clipped = edited("cut disparity", seen, 1)[:, dims].abs()
    assert (clipped <= large[:, 1:].abs().mean((0, 1)) + 1e-6).all()
    assert near(edited("forge disparity", seen, 1)[:, dims], large[:, 0].mean(0))


@pytest.mark.parametrize("kind, token", [("cut", 0), ("forge", K)])
def test_edits_of_the_direction(seen, kind, token):
    state, turned = seen["resid_pre"], edited(f"{kind} direction", seen, 1)
    taken = {"cut": state[:, T // 4], "forge": state[:, 0].mean(0)}[kind]
    assert near(turned.norm(dim=-1), state[:, token].norm(dim=-1))
    assert near(F.cosine_similarity(turned, taken, dim=-1), torch.ones(64))


def test_edits_of_the_key(seen):
    query = seen["target"].query[1]
    assert near((edited("cut lock", seen, 1) * query).sum(-1), 0)
    assert near(edited("forge lock", seen, 1), seen["k"][:, 0].mean(0).expand(64, -1, -1))


def test_a_control_has_others_of_the_same_size(seen):
    target, matched = seen["target"], seen["matched"]
    for ours, theirs in zip(chain(*target), chain(*matched)):
        assert ours.shape == theirs.shape
        if ours.is_floating_point():
            assert near(ours.norm(dim=-1), theirs.norm(dim=-1))
            assert not near(ours, theirs)
        else:
            assert not set(ours.tolist()) & set(theirs.tolist())


# ---------------------------------------------------------------- verdicts

def row(kind, first, k=(0, 0), control=False, sink=0.9):
    """Of `cuts`: attention to token 0 and to token k, each (before, after), above chance."""
    chance = probe.uniform_sink(T)
    before, after = ([{"resting": chance + a, "sink": sink}, {"resting": b}]
                     for a, b in zip(first, k))
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


# ---------------------------------------------------------------- the command

@pytest.fixture
def llama(tmp_path):
    """Words that probe a Llama, and where its results go."""
    folder, out = tiny_llama_folder(tmp_path / "tiny", num_hidden_layers=3), tmp_path / "out"
    return ["--llama", str(folder), "--windows=4", "--threads=1", f"--out={out}"], out


def saved(folder, what="chain"):
    """What the program wrote."""
    return json.loads((folder / f"{what}.json").read_text())


def test_what_is_added_to_links_is_measured(made_up, llama, capsys):
    words, out = llama
    assert probe.main(words) == 0
    assert "a number nobody else names" in capsys.readouterr().out
    mean = saved(out)["chain"]["random tokens"]["tiny"]["mean"]
    assert {"made_up", "mirror"} <= mean.keys()
    assert (out / "chain.png").exists()


def test_what_is_added_to_links_is_cut(made_up, llama):
    words, out = llama
    assert probe.main([*words, "--cut"]) == 0
    found = saved(out, "cut")["cut"]["tiny"]
    assert "mirrors" in [verdict["link"] for verdict in found["verdicts"]]
    assert "mirror" in found["batches"][0][0]["after"][0]
    assert (out / "cut.png").exists()


def test_every_number_is_kept_by_layer(llama):
    words, out = llama
    probe.main([*words, "--batches=2"])
    kept = saved(out)["by layer"]["tiny"]["random tokens"]
    assert list(kept) == ["token 0", "token 32"]
    assert torch.tensor(kept["token 32"]["sink"]).shape == (3, 4)
    mean = saved(out)["chain"]["random tokens"]["tiny"]["mean"]
    assert near(kept["token 0"]["variance"][0], mean["variance"])


def test_a_figure_that_cannot_be_drawn_costs_one_line(llama, capsys, monkeypatch):
    words, out = llama
    monkeypatch.setattr("chapters.figures.png", lambda figure: 1 / 0)
    assert probe.main(words) == 0
    assert "no chain.png (division by zero)" in capsys.readouterr().out
    assert saved(out)["chain"]


def test_runs_with_and_without_bos_stand_in_no_common_table(tmp_path, tiny_run):
    for bos in (0.0, 0.5):
        tiny_run(tmp_path / str(bos), bos=bos)
    with pytest.raises(UserError, match="probe them one by one"):
        probe.main([str(tmp_path / "0.5"), str(tmp_path / "0.0")])


def test_a_run_beside_itself_untrained(tmp_path, tiny_run):
    tiny_run(tmp_path / "run")
    probe.main([str(tmp_path / "run"), "--windows=4", "--batches=2"])
    found = saved(tmp_path / "run")["chain"]
    assert list(found) == ["nothing to copy", "ordinary first token"]
    for columns in found.values():
        assert list(columns) == ["run", "run, token 8", "run, untrained"]


@pytest.mark.parametrize("words, message", [
    ("", "give smollm2"),
    ("smollm2 out/softmax --file x", "give smollm2"),
    ("a --llama b", "give smollm2"),
    ("smollm2 --windows 1", "--windows must be at least 2"),
    ("nowhere", "nowhere")])
def test_bad_command(words, message):
    with pytest.raises(UserError, match=message):
        probe.main(words.split())
