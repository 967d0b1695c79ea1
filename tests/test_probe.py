"""Every number on tensors with a known answer; every edit changes what it names and nothing else;
and LINKS is the one place: what is added there shows up everywhere."""

import math
from itertools import chain

import pytest
import torch
from torch.nn.functional import cosine_similarity

import probe
from data.common import UserError, read_json
from model import ATTENTIONS, Config
from tests.tiny import activation, near, tiny_llama_folder, tiny_model, tokens

T = 16
K = 5  # the token where sinks are forged
X = tokens(6, T)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(**changes):
    """Three layers and grouped heads."""
    settings = dict(num_hidden_layers=3, num_key_value_heads=2) | changes
    return tiny_model(**settings).eval()


# ---------------------------------------------------------------- numbers with a known answer

def test_variance_over_the_median():
    x = torch.tensor([[[1.0, 5.0], [2.0, 0.0]],
                      [[3.0, 5.0], [2.0, 4.0]]])
    assert near(probe.variance(x), [1, 4])  # (2 + 0) / 2, (0 + 8) / 2
    curve = torch.tensor([8.0, 2.0, 1.0, 4.0])
    assert probe.over_median(curve, 0) == 4


def test_averaging_law():
    v = randn(20000, 8, 1, 1) + randn(20000, 1, 1, 1, seed=1)  # two of them correlate by half
    pattern = torch.full((1, 1, 8, 8), 0.5).tril()  # sigmoid: rows that do not sum to 1
    z = 0.5 * v.cumsum(1)
    assert near(probe.averaging_law(pattern, v), probe.variance(z), 0.05)


@pytest.mark.parametrize("ranks, tau", [
    ("1324", 4 / 6),  # of six pairs five agree
    ("1122", 4 / 24**0.5),  # ties
    ("1111", 0)])
def test_kendall_tau(ranks, tau):
    other = torch.tensor(list(map(int, ranks)))
    assert near(probe.kendall_tau(torch.arange(4), other), tau)


def test_wo_alignment():
    wide = torch.linspace(1, 4, 8)
    z = randn(50, 10, 2, 4) * wide.view(2, 4)
    assert probe.wo_alignment(z, torch.diag(wide)) > 0.95
    assert probe.wo_alignment(z, torch.diag(wide).roll(3, 0)) > 0.95  # columns read, not rows
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
    score = 30.0
    for reads in (block.mlp.gate_proj, block.mlp.up_proj):
        score *= (reads.weight[7] * gain).norm()
    assert near(probe.weight_score(block)[7], score)


def test_similar():
    score = torch.tensor([5.0, 1, 2, 5.1, 9])
    taken = probe.similar(score, torch.tensor([0, 3]))
    assert taken.tolist() == [2, 4]  # none of them twice


def test_dominance():
    assert near(probe.dominance(torch.tensor([3.0, -1.0, 1.0, -1.0])), 2)
    noise = probe.dominance(randn(2000, 128)).mean()
    cfg = Config(vocab_size=9, hidden_size=128)
    assert near(noise, probe.noise_dominance(cfg, T, 0), 0.15)


def test_direction_cos():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert near(probe.direction_cos(x), 1 / 3)  # pairs: 1, 0, 0


def test_centred():
    shared = torch.tensor([9.0, 9.0])
    x = shared + torch.tensor([[[1.0, 0], [-1, 0]], [[0, 2], [0, -2]]])
    assert near(probe.direction_cos(x[:, 0]), 0.99, 0.01)
    assert near(probe.direction_cos(probe.centred(x)[:, 0]), 0)
    x[1] += 4  # windows stay as far apart as they are
    assert near(probe.centred(x)[1].mean(0), 2)


def test_share_of_heads_with_a_sink():
    """By the mean over windows: the first head has 0.9 and 0, the second 0.2 and 0.3."""
    model = small(num_hidden_layers=1)
    score = torch.tensor([[0.9, 0.2], [0.0, 0.3]]).mean(0)
    assert probe.has_sink(score).tolist() == [True, False]
    found = probe.layers(model, X)[0][0]
    assert near(found["sink_rate"], probe.has_sink(found["sink"]).float().mean(1))


def test_sink_score_and_that_of_the_queries_asked_for():
    alike = torch.ones(1, 1, 4, 4).tril()  # rows are made to sum to 1
    late = (1 / 3 + 1 / 4) / 2
    assert near(probe.sink_score(alike, 2), late)
    assert near(probe.uniform_sink(4, 2), late)
    asked = torch.tensor([[False, True, True, False]])
    assert near(probe.sink_score(alike, 0, asked), (1 / 2 + 1 / 3) / 2)
    assert near(probe.uniform_weight(asked), (1 / 2 + 1 / 3) / 2)
    rest, asked = Config(vocab_size=9, readout="attn_out"), torch.arange(T)[None] >= T // 4
    assert near(probe.uniform_baseline(rest, T, 0), probe.uniform_weight(asked))


def test_the_weight_behind_a_gate_counts_as_much_as_the_gate_is_open():
    model, asked = tiny_model("gated"), tokens() < 25
    layer = model.layers[1]
    normed = layer.input_layernorm(activation(model, tokens(), "1.resid_pre"))
    gate = layer.self_attn.z_gate(normed).sigmoid()  # (N, T, H)
    weight = activation(model, tokens(), "1.pattern")[..., 0].transpose(1, 2) * gate
    found = probe.resting_weight(model, tokens(), asked)
    assert near(found, weight[asked].mean(0))


def test_leading_query_and_lock_cos():
    lead = torch.tensor([[0.0, 2, 0], [0, 0, -5]])  # of each head
    q = lead + 0.01 * randn(4, 6, 2, 3)
    assert near(probe.leading_query(q), lead.sign(), 0.02)
    key = torch.tensor([[0.0, 3, 4], [0, 0, 7]])
    assert near(probe.lock_cos(q, key.expand(4, 2, 3), 0), [0.6, -1], 0.02)


def test_lock_gap():
    scores = torch.full((4, 4), 99.0).triu(1)  # keys after the query do not count
    scores[1:, 0] = torch.tensor([1.0, 3.0, -1.0])
    scores[2, 1] = 2
    scores = scores[None, None]
    assert near(probe.lock_gap(scores, 0), (1 + (3 - 1) + -1) / 3)  # query 2: 3 above 1
    assert near(probe.lock_gap(scores, 1), (2 - (3 + 0) / 2 + 1 / 3) / 2)


def test_value_drain():
    v = torch.ones(1, 4, 1, 2)
    v[:, 0] = 0.1
    assert near(probe.value_drain(v, 0), [0.1 / (3.1 / 4)])


# ---------------------------------------------------------------- the chain

@pytest.mark.parametrize("attn", ATTENTIONS)
def test_chain_is_finite(attn):
    model = small(attn=attn)
    found = probe.chain(model, X, y=X)
    assert all(map(math.isfinite, found.values()))
    assert near(found["loss"], model(X, X)[1].item())


def test_variance_is_read_before_headnorm():
    model = small(attn="headnorm")
    variance = probe.variance(activation(model, X, "0.z_raw"))
    assert near(probe.chain(model, X)["variance"], probe.over_median(variance, 0))


def test_layers_agree_with_recorded_activations():
    model = small()
    found = probe.layers(model, X, ks=(0, K))[0][1]
    state = activation(model, X, "1.resid_post")
    read = model.layers[2].input_layernorm(state)[:, K]  # by the next layer
    assert near(found["dominance"][1], probe.dominance(read).mean())
    drain = probe.value_drain(activation(model, X, "0.v"), K)
    assert near(found["drain"][0], drain.repeat_interleave(2))  # two heads use one value


def test_layers_become_one_number():
    found = probe.layers(small(), X)[0][0]
    one = probe.summary(found)
    head = found["sink"][1:].argmax()  # the strongest after layer 0
    assert near(one["variance"], found["variance"][0])
    assert near(one["wo_tau"], found["wo_tau"].mean())
    assert near(one["norm_ratio"], found["norm_ratio"].max())
    assert near(one["lock_gap"], found["lock_gap"][1:].flatten()[head])
    drain = found["drain"][range(3), found["sink"].argmax(1)]
    assert near(probe.by_layer(probe.metric("drain"), found), drain)


@pytest.mark.parametrize("measure, n, k, message", [
    (probe.chain, 1, 0, "2 or more windows"),
    (probe.cuts, 6, T // 2, "a sink can be forged")])
def test_what_cannot_be_measured(measure, n, k, message):
    with pytest.raises(UserError, match=message):
        measure(small(), X[:n], y=X[:n], k=k)


# ---------------------------------------------------------------- cut and forge

PLANNED = list(probe.planned())


def test_rows_follow_the_plan_and_every_edit_has_a_control():
    rows = probe.cuts(small(), X, X, k=K)
    for row, (link, kind, edit, control) in zip(rows, PLANNED, strict=True):
        assert (row["link"], row["kind"]) == (link.name, kind)
        assert (row["says"], row["control"]) == (edit.says, control)
        assert edit.controls
    for row, following in zip(rows, rows[1:]):
        assert row["after"] != following["after"], "a control is another edit"
    *_, (_, _, _, after) = probe.matrix([rows])
    assert near(after["sink"], rows[-1]["after"][1]["sink"])  # of the token that is forged


def test_what_counts_is_the_heads_that_have_a_sink(monkeypatch):
    monkeypatch.setattr(probe, "SINK", 0.2)
    model = small()
    before, _ = probe.cuts(model, X, X, k=K, names=("cut lock",))[0]["before"]
    sink = probe.layers(model, X)[0][0]["sink"][1:]
    assert (sink > 0.2).sum() == 4
    assert near(before["resting"], sink[sink > 0.2].mean())


@pytest.mark.parametrize("case", PLANNED, ids=lambda c: f"{c[1]} {c[2].says}")
def test_an_edit_changes_its_token_and_nothing_else(case):
    """In every layer where it acts."""
    edit, model = case[2], small()
    tap = probe.intervene(model, edit, *probe.targets(model, X), K, T)
    axis = 2 if edit.tap == "scores" else 1
    token = {"middle": T // 2, "first": 0, "k": K}[edit.token]
    for layer in range(3):
        name = f"{layer}.{edit.tap}"
        before = activation(model, X, name)
        moved = (before != tap(name, before)).transpose(0, axis)
        acts = layer > 0 or edit.layers == "every"
        wanted = [acts and t == token for t in range(T)]
        assert moved.flatten(1).any(1).tolist() == wanted, name


def test_only_the_queries_that_are_asked_for_count():
    model, asked = small(), X < 25
    pattern = activation(model, X, "1.pattern")
    found = probe.layers(model, X, queries=asked)[0][0]
    assert near(found["sink"][1], probe.sink_score(pattern, 0, asked).mean(0))
    row, *_ = probe.cuts(model, X, X, k=K, names=("cut lock",), queries=asked)
    heads = probe.with_sink(found["sink"])
    assert near(row["before"][0]["resting"], probe.later(found["sink"])[heads].mean())
    assert near(row["uniform"], probe.uniform_weight(asked))


@pytest.fixture(scope="module")
def seen():
    """Activations of 64 windows by name, and what `targets` finds there."""
    model, x = small(), tokens(64, T)
    found = {}
    for name in ("0.scores", "0.z", "0.mlp_post", "1.resid_pre", "1.k", "1.q"):
        found[name[2:]] = activation(model, x, name)
    found["target"], found["matched"] = probe.targets(model, x)
    return found


def edited(name, seen, layer=0):
    """What "cut W_O" makes of token 0, or "forge W_O" of token K."""
    _, kind, edit, _ = next(probe.planned(name))
    token = 0 if kind == "cut" else K
    return edit.change(seen[edit.tap], token, seen["target"], layer)


def test_edits_of_attention(seen):
    attention = edited("forge variance", seen).softmax(-1)
    assert near(attention.mean((0, 1)), torch.arange(T) == K)
    half = probe.see_every_other(seen["scores"], K, None, 0).isfinite()
    assert half.all((0, 1)).tolist()[:K + 1] == [False, True] * 3
    usual = seen["z"][:, 1:]
    assert near(edited("cut variance", seen), usual.mean(1))
    length = edited("cut W_O", seen).norm(dim=-1)
    assert near(length, usual.norm(dim=-1).mean(1))


def test_edits_of_variance(seen):
    z, plain = seen["z"], seen["z"][:, K]
    amplified = edited("forge W_O", seen)
    assert near(amplified.var(0), 25 * plain.var(0))
    assert near(amplified.mean(0), plain.mean(0))
    shifted = probe.shift(z, K, None, 0)
    assert near(shifted.var(0), plain.var(0))
    energy = shifted.square().mean((0, -1))
    assert near(energy, amplified.square().mean((0, -1)))


def test_edits_of_neurons_and_dimensions(seen):
    few, dims = seen["target"].neurons[0], seen["target"].dims[1]
    assert (edited("cut neurons", seen)[:, few] == 0).all()
    assert near(edited("forge neurons", seen)[:, few], seen["mlp_post"][:, 0, few])
    large = seen["resid_pre"][..., dims]
    limit = large[:, 1:].abs().mean((0, 1))
    clipped = edited("cut disparity", seen, 1)[:, dims]
    assert (clipped.abs() <= limit + 1e-6).all()
    assert near(edited("forge disparity", seen, 1)[:, dims], large[:, 0].mean(0))


def test_edits_of_the_direction(seen):
    x = seen["resid_pre"]
    cut = edited("cut direction", seen, 1)
    forged = edited("forge direction", seen, 1)
    assert near(cut.norm(dim=-1), x[:, 0].norm(dim=-1))
    assert near(cosine_similarity(cut, x[:, T // 4]), 1.0)
    assert near(forged.norm(dim=-1), x[:, K].norm(dim=-1))
    assert near(cosine_similarity(forged, x[:, 0].mean(0)), 1.0)


def test_edits_of_the_key(seen):
    query = seen["target"].query[1]
    of_heads = seen["q"][:, 1:, 2:].flatten(1, 2)[:, :, None]  # 2 and 3, which use key 1
    assert near(query[1], probe.leading_query(of_heads)[0], 1e-3)
    along = edited("cut lock", seen, 1) * query
    assert near(along.sum(-1), 0)
    assert near(edited("forge lock", seen, 1), seen["k"][:, 0].mean(0))


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

def row(kind, first, first_after, k=0, k_after=0, control=False, sink=0.9):
    """Of `cuts`: attention to token 0 and to token k, before and after, above chance."""
    chance = probe.uniform_sink(T)
    return {"link": "l", "kind": kind, "says": "s", "control": control,
            "before": [{"resting": chance + first, "sink": sink}, {"resting": k}],
            "after": [{"resting": chance + first_after}, {"resting": k_after}]}


def judged(*rows):
    """What `verdicts` finds in one batch of these rows."""
    return probe.verdicts([rows], T)[0]


@pytest.mark.parametrize("kind, attention, share, word", [
    ("cut", (0.4, 0.1), 0.75, "holds"),  # of one sink it takes 75 %
    ("cut", (1, 0.6), 0.4, "partly"),
    ("cut", (1, 0.8), 0.2, "no"),
    ("forge", (0.4, 0.2, 0.1, 0.3), 0.5, "holds"),  # it has 50 % of two sinks
    ("forge", (1, 0.8, 0, 0.2), 0.2, "partly"),
    ("forge", (0.4, 0.4, 0.1, 0.05), 0, "no")])
def test_share_and_verdict_by_the_rule(kind, attention, share, word):
    idle = row(kind, 1, 1, control=True)
    found = judged(row(kind, *attention), idle)
    assert near(found["share"], share)
    assert found["word"] == word


def test_a_control_that_does_half_as_much_refutes():
    """Also beside one that does nothing."""
    idle = row("cut", 1, 1, control=True)
    found = judged(row("cut", 1, 0.4), row("cut", 1, 0.7, control=True), idle)
    assert found["said"] == "no: control 30 %"


def test_without_a_sink_nothing_is_explained(capsys):
    found = judged(row("cut", 1, 0, sink=0.2), row("cut", 1, 1, control=True))
    assert found["word"] == "absent"
    probe.print_cuts([found])
    assert capsys.readouterr().out.split()[-3:] == ["absent", "-", "-"]  # no share of no sink


def test_chance_is_that_of_the_queries_that_count():
    chance = probe.uniform_sink(T)
    asked = row("cut", 0.4, 0.1) | {"uniform": chance - 0.1}
    assert near(probe.share(asked, T), 0.3 / 0.5)


def test_spread_is_over_batches():
    tables = [[row("cut", 1, after)] for after in (0.2, 0.4)]
    found = probe.verdicts(tables, T)[0]
    assert near(found["share"], 0.7)
    assert near(found["spread"], 0.02**0.5)


# ---------------------------------------------------------------- the command

@pytest.fixture
def llama(tmp_path):
    """Words that probe a Llama, and where its results go."""
    folder, out = tiny_llama_folder(tmp_path / "tiny", num_hidden_layers=3), tmp_path / "out"
    return ["--llama", str(folder), "--windows=4", "--threads=1", f"--out={out}"], out


def test_what_is_added_to_links_is_cut(made_up, llama):
    words, out = llama
    assert probe.main([*words, "--cut", "--batches=1"]) == 0
    found = read_json(out / "cut.json")["cut"]["tiny"]
    assert "mirrors" in [verdict["link"] for verdict in found["verdicts"]]
    assert "mirror" in found["batches"][0][0]["after"][0]
    assert (out / "cut.png").exists()


def test_what_is_added_to_links_is_measured_and_kept_when_a_figure_fails(
        made_up, llama, capsys, monkeypatch):
    words, out = llama
    monkeypatch.setattr("chapters.figures.drawn", lambda *_: 1 / 0)
    assert probe.main(words) == 0
    printed = capsys.readouterr().out
    assert "a number nobody else names" in printed
    assert "no chain.png (division by zero)" in printed
    found = read_json(out / "chain.json")
    mean = found["chain"]["random tokens"]["tiny"]["mean"]
    assert {"made_up", "mirror"} <= mean.keys()
    kept = found["by layer"]["tiny"]["random tokens"]
    assert torch.tensor(kept["token 32"]["sink"]).shape == (3, 4)


@pytest.mark.parametrize("more, file", [([], "chain.json"), (["--cut"], "cut.json")])
def test_the_numbers_are_written_before_the_figure(llama, monkeypatch, more, file):
    def stopped(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("chapters.figures.drawn", stopped)
    words, out = llama
    with pytest.raises(KeyboardInterrupt):
        probe.main([*words, "--batches=1", *more])
    assert (out / file).exists()


@pytest.mark.parametrize("bos, first", [(0.5, "after <|bos|>"), (0.0, "nothing to copy")])
def test_a_run_beside_itself_untrained(tmp_path, tiny_run, monkeypatch, bos, first):
    """In the windows that train.py speaks of, and in those of an ordinary first token."""
    monkeypatch.setattr("chapters.figures.drawn", lambda *_: b"")
    tiny_run(tmp_path / "run", bos=bos)
    probe.main([str(tmp_path / "run"), "--windows=4", "--batches=2"])
    assert (tmp_path / "run/chain.png").exists()
    found = read_json(tmp_path / "run/chain.json")["chain"]
    assert list(found) == [first, "ordinary first token"]
    for columns in found.values():
        assert list(columns) == ["run", "run, token 8", "run, untrained"]
        assert len({column["mean"]["sink"] for column in columns.values()}) == 3
