"""Every number on tensors with a known answer, every intervention on the tensor it names and no other."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch

import data
import probe
from model import GPT, Config, compose, record, tap_names
from probe import ProbeError

T, BOS = 16, 24  # BOS: that of the copying task


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=gen(seed))


def tiny(seed=0, **changes):
    return GPT(Config(**(dict(vocab_size=25, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
                              num_key_value_heads=2, max_position_embeddings=T, initializer_range=0.25) | changes)), seed).eval()


def ids(n=6, length=T, seed=0):
    return torch.randint(24, (n, length), generator=gen(seed))


def near(a, b, tol=1e-4):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float), torch.as_tensor(b, dtype=torch.float), atol=tol, rtol=tol)


# ---------------------------------------------------------------- 1 variance

def test_variance_by_position_known_and_scale():
    x = torch.tensor([[[1.0, 5.0], [2.0, 0.0]], [[3.0, 5.0], [2.0, 4.0]]])  # (2, 2, 2)
    assert near(probe.variance_by_position(x), [1.0, 4.0])  # (2 + 0) / 2, (0 + 8) / 2
    z = randn(9, 5, 2, 3)
    assert near(probe.variance_by_position(z), z.var(0).flatten(1).mean(1))
    assert near(probe.variance_by_position(3 * z + 7), 9 * probe.variance_by_position(z), 1e-3)


def test_spread_by_position():
    x = torch.zeros(2, 3, 2, 4)
    x[:, 1] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert near(probe.spread_by_position(x), torch.tensor([[0, 4 / 3, 0]] * 2))
    assert probe.spread_by_position(randn(2, 3, 8)).shape == (2, 3)


def test_discrepancy():
    assert probe.discrepancy(torch.tensor([8.0, 2.0, 1.0, 4.0])) == 4
    assert probe.discrepancy(torch.tensor([8.0, 2.0, 1.0, 4.0]), 2) == 0.25


def test_prediction_is_one_over_t_for_uniform_attention():
    uniform = torch.ones(8, 8).tril() / torch.arange(1.0, 9)[:, None]
    assert near(probe.predicted_variance(uniform), 1 / torch.arange(1.0, 9))
    assert near(probe.predicted_variance(uniform, rho=1.0), torch.ones(8))
    v = randn(20000, 8, 1)
    measured = probe.variance_by_position(uniform @ v)
    assert near(measured, probe.predicted_variance(uniform), 0.05)
    gates = torch.full((8, 8), 0.5).tril()  # sigmoid: rows that do not sum to 1
    assert near(probe.predicted_variance(gates, 0.3), probe.variance_by_position(gates @ (0.7**0.5 * v + 0.3**0.5 * randn(20000, 1, 1, seed=1))), 0.05)


def test_value_correlation():
    own, shared = randn(5000, 6, 4), randn(5000, 1, 4, seed=1)
    assert abs(probe.value_correlation(own)) < 0.02
    assert abs(probe.value_correlation(own * 0.5**0.5 + shared * 0.5**0.5) - 0.5) < 0.03
    assert near(probe.value_correlation(shared.expand(-1, 6, -1)), 1)


def test_measured_variance_meets_the_prediction_at_initialisation():
    model = tiny(vocab_size=1000, hidden_size=64, num_key_value_heads=4, initializer_range=0.05)
    x = torch.randint(1000, (400, T), generator=gen())
    found = probe.links(model, x)
    measured, predicted = found["variance"][0, 0], found["variance_predicted"][0, 0]
    assert (measured / predicted - 1).abs().max() < 0.15
    assert 8 < probe.discrepancy(measured) < 16


# ---------------------------------------------------------------- 2 W_O

def test_kendall_tau():
    a = torch.tensor([1.0, 2, 3, 4])
    assert near(probe.kendall_tau(a, a.exp()), 1) and near(probe.kendall_tau(a, -a), -1)
    assert near(probe.kendall_tau(a, torch.tensor([1.0, 3, 2, 4])), 4 / 6)
    assert near(probe.kendall_tau(a, torch.tensor([1.0, 1, 2, 2])), 4 / (6 * 4) ** 0.5)
    assert probe.kendall_tau(a, torch.ones(4)) == 0


def test_wo_alignment_sees_a_projection_that_prefers_wide_dimensions():
    wide = torch.linspace(1, 4, 8)
    z = randn(50, 10, 2, 4) * wide.view(2, 4)
    matched, opposed = torch.diag(wide), torch.diag(1 / wide)
    assert probe.wo_tau(z, matched) > 0.95 and probe.wo_tau(z, opposed) < -0.95
    assert near(probe.wo_gain(z, matched), 16 / wide.square().mean(), 0.05)
    assert probe.wo_gain(z, opposed) < 0.3
    assert near(probe.wo_gain(z, torch.eye(8)), 1) and near(probe.wo_gain(5 * z, 3 * matched), probe.wo_gain(z, matched))
    assert near(probe.wo_gain(randn(3, 4, 8, 8) * 2, torch.eye(64)), 1)  # fewer tokens than dimensions


def test_top_singular():
    assert near(probe.top_singular(torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0]))), 3 / 3**0.5)
    w = randn(20, 30)
    s = torch.linalg.svdvals(w)
    assert near(probe.top_singular(w, 200), s[0] / s.square().mean().sqrt(), 1e-3)


# ---------------------------------------------------------------- 3 neurons

def test_neuron_scores_find_a_planted_super_neuron():
    gate, up, down, gamma = randn(24, 8), randn(24, 8, seed=1), randn(8, 24, seed=2), torch.ones(8)
    gate[7] *= 9
    up[7] *= 9
    down[5, 7] = 30
    score, dim = probe.neuron_scores(gate, up, down, gamma)
    assert score.argmax() == 7 and dim[7] == 5
    assert near(score[7], 30 * gate[7].norm() * up[7].norm())
    assert near(probe.neuron_scores(gate, up, down, 2 * gamma)[0], 4 * score)
    assert probe.z_scores(score).argmax() == 7 and near(probe.z_scores(score).mean(), 0)


def test_neuron_share_and_overlap():
    energy = probe.neuron_energy(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([[3.0, 0.0, 9.0], [0.0, 1.0, 9.0]]))
    assert near(energy, [9.0, 4.0, 0.0]) and near(probe.neuron_share(energy, 1), 9 / 13)
    x = randn(4, 40).square()
    assert ((probe.neuron_share(x) > 5 / 40) & (probe.neuron_share(x) <= 1)).all()
    assert near(probe.neuron_share(x[:, torch.randperm(40, generator=gen())]), probe.neuron_share(7 * x))
    order = torch.arange(40.0)
    assert probe.neuron_overlap(order, order) == 1 and probe.neuron_overlap(order, -order) == 0
    assert near(probe.neuron_overlap(order, order.roll(2)), 3 / 5)


# ---------------------------------------------------------------- 4 disparity

def test_disparity_of_known_vectors():
    x = torch.tensor([[3.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, -2.0, 0.0]])
    assert near(probe.dominance(x), [2.0, 1.0, 4.0])  # from 1 (all equal) to C (one alone)
    assert near(probe.max_over_median(x[:1]), [3.0])
    assert near(probe.kurtosis(x), [84 / 4 / 9, 1.0, 4.0])
    assert near(probe.energy_dimensions(x), [3, 4, 1])
    y, mix = randn(5, 32), torch.randperm(32, generator=gen())
    for f in (probe.dominance, probe.max_over_median, probe.kurtosis, probe.energy_dimensions):
        assert near(f(y), f(-4 * y[:, mix]))


def test_gaussian_null_of_dominance():
    assert abs(probe.gaussian_dominance(128) - 3.9) < 0.02
    assert abs(probe.dominance(randn(2000, 128)).mean() / probe.gaussian_dominance(128) - 1) < 0.15


def test_effective_rank():
    assert near(probe.effective_rank(torch.eye(6)), 6) and near(probe.effective_rank(torch.ones(9, 4)), 1)
    s = torch.tensor([2.0, 1.0, 1.0])
    p = s / 4
    expected = math.exp(-(p * p.log()).sum())
    q = torch.linalg.qr(randn(10, 3))[0]
    assert near(probe.effective_rank(q * s), expected) and near(probe.effective_rank((q * s).T * 8), expected)
    x = randn(30, 12)
    assert near(probe.effective_rank(x), probe.effective_rank(x[torch.randperm(30, generator=gen())]))
    assert 1 <= probe.effective_rank(x) <= 12
    massive = x.clone()
    massive[0, 3] = 1e4  # one massive token hides the rest
    assert probe.effective_rank(massive) < 2 and probe.effective_rank(massive[1:]) > 10


# ---------------------------------------------------------------- 5 direction, 6 lock, 7 sink

def test_direction_cos():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert near(probe.direction_cos(x), 1 / 3)  # pairs: 1, 0, 0
    assert near(probe.direction_cos(x[:2] * torch.tensor([[-1.0], [1.0]])), -1)
    assert abs(probe.direction_cos(randn(200, 64))) < 0.01


def test_leading_query_and_lock_cos():
    q = randn(4, 6, 2, 3) * 0.01
    q[:, :, 0, 1] += 2
    q[:, :, 1, 2] -= 5
    u = probe.leading_query(q)
    assert near(u, [[0, 1, 0], [0, 0, -1]], 0.02) and near(u.norm(dim=-1), [1, 1])
    key = torch.tensor([[[0.0, 4, 0], [0, 0, 1]]])
    assert near(probe.lock_cos(u, key), [[1, -1]], 0.02) and near(probe.lock_cos(u, 9 * key), probe.lock_cos(u, key))


def test_lock_positive_and_gap():
    scores = torch.zeros(1, 1, 4, 4)
    scores[0, 0, 1:, 0] = torch.tensor([1.0, 3.0, -1.0])
    scores[0, 0, 2, 1] = 2
    assert near(probe.lock_positive(scores), [[2 / 3]])
    assert near(probe.lock_gap(scores), [[(1 + (3 - 1) + -1) / 3]])  # query 2 sees keys 1 and 2: mean 1
    future = scores.clone()
    future[0, 0, 0, 3] = future[0, 0, 1, 2] = 99  # keys after the query do not count
    assert near(probe.lock_gap(future), probe.lock_gap(scores))
    assert near(probe.lock_gap(scores + 5), probe.lock_gap(scores))
    assert near(probe.lock_gap(scores, 1), [[(2 - (3 + 0) / 2 + 1 / 3) / 2]])


def test_lock_predisposition_by_weights():
    wq, wk = randn(8, 6) * 0.01, randn(4, 6, seed=1)  # 2 heads of width 4, one key head
    wq[2, 4], wq[4 + 1, 0] = 5, 5  # queries point to dimension 2 in head 0, to 1 in head 1
    wk[:, 3] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert near(probe.lock_predisposition(wq, wk, torch.ones(6), 3, 2), [1, 0], 0.02)


def test_sink_scores():
    pattern = torch.zeros(1, 2, 3, 3)
    pattern[0, 0, :, 0] = 1
    pattern[0, 1] = torch.ones(3, 3).tril() / torch.arange(1.0, 4)[:, None]
    assert near(probe.sink_scores(pattern), [[1, (1 + 1 / 2 + 1 / 3) / 3]])
    assert near(probe.sink_scores(pattern, 1), [[0, (1 / 2 + 1 / 3) / 2]])
    assert near(probe.normalise_rows(pattern * 0.1).sum(-1), torch.ones(1, 2, 3))
    p = torch.softmax(randn(3, 2, 5, 5), -1)
    assert ((probe.sink_scores(p) >= 0) & (probe.sink_scores(p) <= 1)).all()


def test_value_drain():
    v = torch.ones(1, 4, 1, 2)
    v[:, 0] = 0.1
    assert near(probe.value_drain(v), [[0.1 / (3.1 / 4)]]) and near(probe.value_drain(6 * v), probe.value_drain(v))


# ---------------------------------------------------------------- links and chain

@pytest.mark.parametrize("attn", ["softmax", "sigmoid", "headnorm"])
def test_chain_is_flat_finite_and_json(attn):
    numbers = probe.chain(tiny(attn=attn), ids())
    assert all(isinstance(v, float) and math.isfinite(v) for v in numbers.values())
    assert json.loads(json.dumps(numbers)) == numbers and len(numbers) > 30
    assert list(numbers) == list(probe.chain(tiny(seed=1), ids(4)))
    assert {key for _, key, _ in probe.TABLE} - {"loss"} <= set(numbers)
    assert set(probe.chance(tiny().cfg, T, 0)) <= set(numbers)
    assert set(probe.COLUMNS) - {"loss"} <= set(numbers) and set(probe.BIRTH) <= set(numbers)
    if attn == "softmax":
        assert near(numbers["sink_alpha_raw"], numbers["sink_alpha_mean"])
        assert numbers["variance_ratio"] == numbers["variance_ratio_raw"]
    if attn == "sigmoid":
        assert numbers["sink_alpha_raw"] != numbers["sink_alpha_mean"]
    if attn == "headnorm":  # the norm is what takes the first token's variance away
        assert numbers["variance_ratio"] < numbers["variance_ratio_raw"] / 2


def test_chain_draws_nothing_at_random_and_changes_nothing():
    model = tiny()
    before, state = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    assert probe.chain(model, ids()) == probe.chain(model, ids())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_links_agree_with_recorded_activations():
    model, x = tiny(), ids()
    found = probe.links(model, x, k=2)
    _, kept = record(model, x, ["1.pattern", "1.z", "1.attn_out", "2.resid_pre", "0.v", "1.scores", "final"])
    assert near(found["alpha"][0, 1], probe.sink_scores(kept["1.pattern"], 2).mean(0))
    assert near(found["variance"][0, 1], probe.variance_by_position(kept["1.z"]))
    assert near(found["variance_out"][0, 1], probe.variance_by_position(kept["1.attn_out"]))
    assert near(found["lock_gap"][0, 1], probe.lock_gap(kept["1.scores"], 2).mean(0))
    normed = model.layers[2].input_layernorm(kept["2.resid_pre"])
    assert near(found["dom_first"][0, 2], probe.dominance(normed[:, 2]).mean())
    assert near(found["dom_first"][0, 3], probe.dominance(kept["final"][:, 2]).mean())
    assert near(found["drain"][0, 0], probe.value_drain(kept["0.v"], 2).mean(0).repeat_interleave(2))
    assert found["alpha"].shape == (1, 3, 4) and found["norm_ratio"].shape == (1, 4)


def test_bootstrap_rows_are_what_the_chosen_windows_give():
    model, x = tiny(), ids()
    rows = probe.resamples(6, 3)
    assert rows.shape == (4, 6) and torch.equal(rows[0], torch.arange(6)) and torch.equal(rows, probe.resamples(6, 3))
    several, alone = probe.links(model, x, targets=x, rows=rows), probe.links(model, x[rows[2]], targets=x[rows[2]])
    for name, value in alone.items():
        if name not in ("predisposition", "variance_predicted"):  # weights; a prediction for all windows
            assert near(several[name][2], value[0], 1e-3), name


def test_fixed_first_token_has_no_variance_but_spread():
    x = ids()
    x[:, 0] = BOS
    numbers = probe.chain(tiny(), x)
    assert numbers["variance_ratio"] < 1e-6 and numbers["spread_ratio"] > 0.1
    assert near(numbers["norm_direction_cos"], 1)


def test_loss_is_the_models_loss():
    model, x = tiny(), ids()
    y = x.roll(-1, 1)
    y[:, -1] = -100
    assert near(probe.links(model, x, targets=y)["loss"], model(x, y)[1])


def forged(sink=1.2):
    """A model whose head 0 of layer 1 rests on <bos>: its embedding alone fills dimension 0, and key and query agree."""
    model = tiny(num_key_value_heads=4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers" in name and p.dim() == 2:
                p.mul_(0.2)
        model.layers[0].self_attn.o_proj.weight.zero_()  # layer 1 reads the embeddings themselves
        model.layers[0].mlp.down_proj.weight.zero_()
        model.embed_tokens.weight[:, 0] = 0
        model.embed_tokens.weight[:, 1] = 1  # every token has this: the query's handle
        model.embed_tokens.weight[BOS] = 0
        model.embed_tokens.weight[BOS, 0] = 20
        a = model.layers[1].self_attn
        for w, dim in ((a.q_proj.weight, 1), (a.k_proj.weight, 0)):
            w[:4] = 0
            w[3, dim] = sink  # slow rotation: the last pair of a head of width 4
        a.v_proj.weight[:4] = 0
        a.v_proj.weight[:4, 2] = 1
    x = ids()
    x[:, 0] = BOS
    return model, x


def test_forged_sink_is_seen_and_every_cut_of_its_lock_removes_it():
    model, x = forged()
    cfg, numbers = model.cfg, probe.chain(*forged())
    assert numbers["sink_alpha_later"] > 0.8 and numbers["lock_gap"] > 2 and numbers["lock_positive"] > 0.9
    assert numbers["dom_ratio_max"] > 10 and numbers["norm_ratio"] > 3 and numbers["lock_cos"] > 0.9
    assert numbers["value_drain"] < 0.3
    seen = probe.observe(model, x)
    assert all(dims[0] == 0 for dims in seen["dims"])
    alpha = lambda tap: probe.links(model, x, tap)["alpha"][0, 1, 0]
    assert alpha(probe.remove_key_direction(cfg, 1, seen["query"][1])) < 0.22  # uniform: 0.21
    assert alpha(probe.spread_dimension(cfg, 1, 0)) < alpha(None) - 0.2
    assert alpha(probe.clip_dimensions(cfg, 1, seen["dims"][1], 0.0)) < 0.3
    assert alpha(probe.replace_direction(cfg, 1, seen["other"][1])) < 0.3
    assert alpha(probe.random_direction(cfg, 1, 5)) > 0.7  # another token: nothing happens
    assert probe.chain(model, x, probe.replace_state(cfg, 1, seen["state"][1], 5), k=5)["sink_alpha_later"] > 0.3


# ---------------------------------------------------------------- interventions

def before_and_after(model, x, build, watch):
    """Activations of `watch` without and with the intervention."""
    return record(model, x, watch)[1], record(model, x, watch, tap=build)[1]


LOCAL = {  # intervention on layer 1, position 3 -> the tensor it names
    "amplify": (lambda c: probe.amplify_variance(c, 1, 3, 4.0), "1.z"),
    "scale": (lambda c: probe.scale_norm(c, 1, 3, 4.0), "1.z"),
    "matched": (lambda c: probe.scale_norm_matched(c, 1, 3, 4.0), "1.z"),
    "shift": (lambda c: probe.shift_norm(c, 1, 3, 4.0), "1.z"),
    "parity": (lambda c: probe.normalise_position(c, 1, 3), "1.z"),
    "ablate": (lambda c: probe.ablate_neurons(c, 1, torch.tensor([2, 5]), k=3), "1.mlp_post"),
    "copy": (lambda c: probe.copy_neurons(c, 1, torch.tensor([2, 5]), 3), "1.mlp_post"),
    "clip": (lambda c: probe.clip_dimensions(c, 1, torch.tensor([2, 5]), 0.01, 3), "1.resid_pre"),
    "spread": (lambda c: probe.spread_dimension(c, 1, 2, 3), "1.resid_pre"),
    "direction": (lambda c: probe.replace_direction(c, 1, randn(c.hidden_size), 3), "1.resid_pre"),
    "random": (lambda c: probe.random_direction(c, 1, 3), "1.resid_pre"),
    "state": (lambda c: probe.replace_state(c, 1, randn(c.hidden_size), 3), "1.resid_pre"),
    "key": (lambda c: probe.remove_key_direction(c, 1, randn(2, 4), 3), "1.k"),
}


@pytest.mark.parametrize("name", LOCAL)
def test_interventions_touch_one_position_of_one_tensor(name):
    model, x = tiny(), ids()
    build, target = LOCAL[name]
    names = [n for n in tap_names(model.cfg) if n not in ("1.scores", "1.pattern")]
    untouched, touched = before_and_after(model, x, build(model.cfg), names)
    for n in names[: names.index(target)]:
        if n == "1.q" and target == "1.k":
            continue
        assert torch.equal(untouched[n], touched[n]), n
    changed = (untouched[target] != touched[target]).flatten(2).any(-1).any(0)
    assert changed.tolist() == [t == 3 for t in range(T)]
    final = (untouched["final"] != touched["final"]).any(-1).any(0)
    assert not final[:3].any() and final[3]  # causal, and not in vain


def test_what_interventions_do_to_z():
    model, x = tiny(), ids()
    change = lambda tap: [a["1.z"][:, 3] for a in before_and_after(model, x, tap, ["1.z"])]
    z, amplified = change(probe.amplify_variance(model.cfg, 1, 3, 4.0))
    assert near(amplified.mean(0), z.mean(0)) and near(amplified.var(0), 16 * z.var(0))
    assert near(change(probe.scale_norm(model.cfg, 1, 3, 4.0))[1], 4 * z)
    matched = change(probe.scale_norm_matched(model.cfg, 1, 3, 4.0))[1]
    assert near(matched.norm(dim=-1), amplified.norm(dim=-1))
    assert near(torch.cosine_similarity(matched, z, dim=-1), torch.ones(6, 4))
    shifted = change(probe.shift_norm(model.cfg, 1, 3, 4.0))[1]
    assert near(shifted.var(0), z.var(0)) and near(shifted.square().sum(-1).mean(0), amplified.square().sum(-1).mean(0), 1e-3)
    untouched, touched = before_and_after(model, x, probe.normalise_position(model.cfg, 1, 0), ["1.z"])
    rms = touched["1.z"].square().mean(-1).sqrt()
    assert near(rms[:, 0], rms[:, 1:].mean(1))
    assert near(torch.cosine_similarity(untouched["1.z"][:, 0], touched["1.z"][:, 0], dim=-1), torch.ones(6, 4))


def test_same_variance_changes_neither_mean_nor_variance_of_a_head():
    model, x = tiny(), ids()
    free, *others = (record(model, x, ["0.z"], tap)[1]["0.z"][:, 3] for tap in probe.same_variance(model, x, 3).values())
    _, kept = record(model, x, ["0.z"], mask=probe.block_aggregation(x.shape[1], 3))
    own = kept["0.z"][:, 3]
    for z in others:
        assert near(z.mean(0), free.mean(0), 1e-5)
        assert near((z - z.mean(0)).square().mean((0, 2)), (own - own.mean(0)).square().mean((0, 2)), 1e-5)
    assert near(others[0] - others[0].mean(0), own - own.mean(0), 1e-5)
    assert not near(others[1], others[0]) and not near(others[2], others[1])


def test_what_interventions_do_to_states_neurons_and_keys():
    model, x = tiny(), ids()
    cfg = model.cfg
    change = lambda tap, name, k=3: [a[name][:, k] for a in before_and_after(model, x, tap, [name])]
    h, new = change(probe.replace_direction(cfg, 1, randn(16), 3), "1.resid_pre")
    assert near(new.norm(dim=-1), h.norm(dim=-1)) and near(probe.direction_cos(new), 1)
    _, other = change(probe.random_direction(cfg, 1, 3, seed=4), "1.resid_pre")
    assert near(other.norm(dim=-1), h.norm(dim=-1)) and abs(probe.direction_cos(other) - 1) < 1e-4
    new = change(probe.replace_state(cfg, 1, torch.arange(16.0), 3), "1.resid_pre")[1]
    assert near(new, torch.arange(16.0).expand(6, -1))
    new = change(probe.clip_dimensions(cfg, 1, torch.tensor([2, 5]), torch.tensor([0.01, 0.02]), 3), "1.resid_pre")[1]
    assert (new[:, 2].abs() <= 0.01).all() and (new[:, 5].abs() <= 0.02).all() and torch.equal(new[:, 6:], h[:, 6:])
    e2 = torch.eye(16)[2]
    mirrored = probe.edit(cfg, 1, "resid_pre", probe.at(3, lambda y: e2.expand_as(y[:, 3])))
    new = change(compose(mirrored, probe.spread_dimension(cfg, 1, 2, 3)), "1.resid_pre")[1]
    assert near(new, torch.full((6, 16), 0.25)) and near(probe.dominance(new), torch.ones(6))
    new = change(probe.spread_dimension(cfg, 1, 2, 3), "1.resid_pre")[1]
    assert near(new.norm(dim=-1), h.norm(dim=-1))
    a, new = change(probe.ablate_neurons(cfg, 1, torch.tensor([2, 5])), "1.mlp_post", slice(None))
    assert (new[..., [2, 5]] == 0).all() and torch.equal(new[..., 6:], a[..., 6:])
    new = change(probe.ablate_neurons(cfg, 1, torch.tensor([2, 5]), torch.tensor([1.0, -1.0])), "1.mlp_post", slice(None))[1]
    assert (new[..., 2] == 1).all() and (new[..., 5] == -1).all()
    new = change(probe.copy_neurons(cfg, 1, torch.tensor([2, 5]), 3), "1.mlp_post")[1]
    assert torch.equal(new[:, [2, 5]], a[:, 0][:, [2, 5]]) and torch.equal(new[:, 6:], a[:, 3, 6:])
    u = torch.nn.functional.normalize(randn(2, 4), dim=-1)
    old, new = change(probe.remove_key_direction(cfg, 1, 7 * u, 3), "1.k")
    assert near((new * u).sum(-1), torch.zeros(6, 2)) and near(new + (old * u).sum(-1, keepdim=True) * u, old)


@pytest.mark.parametrize("attn", ["softmax", "headnorm", "sigmoid"])
def test_block_aggregation(attn):
    model, x = tiny(attn=attn), ids()
    mask = probe.block_aggregation(T, 5)
    names = [f"{i}.pattern" for i in range(3)]
    _, free = record(model, x, names)
    _, blocked = record(model, x, names, mask=mask)
    for n in names:
        assert (blocked[n][:, :, 5, :5] == 0).all() and (blocked[n][:, :, 5, 5] > 0).all()
    others = [t for t in range(T) if t != 5]
    assert torch.equal(free["0.pattern"][:, :, others], blocked["0.pattern"][:, :, others])


def test_block_aggregation_gives_the_token_the_variance_of_a_first_one():
    model, x = tiny(vocab_size=1000, num_key_value_heads=4, initializer_range=0.05), torch.randint(1000, (300, T), generator=gen())
    curve = probe.links(model, x, mask=probe.block_aggregation(T, 9), k=9)["variance"][0, 0]
    assert abs(curve[9] / curve[0] - 1) < 0.2 and probe.discrepancy(curve, 9) > 5


def test_composition_and_several_layers():
    model, x = tiny(), ids()
    both = compose(probe.scale_norm(model.cfg, [0, 2], 3, 2.0), probe.ablate_neurons(model.cfg, 1, torch.tensor([4])))
    _, kept = record(model, x, ["0.z", "1.mlp_post"], tap=both)
    _, plain = record(model, x, ["0.z"])
    assert near(kept["0.z"][:, 3], 2 * plain["0.z"][:, 3]) and (kept["1.mlp_post"][..., 4] == 0).all()


def test_similar_neurons_are_others_of_like_weight():
    score = torch.tensor([1.0, 9.0, 8.0, 5.0, 5.1, 2.0])
    assert probe.similar_neurons(score, torch.tensor([1, 3])).tolist() == [2, 4]


@pytest.mark.parametrize("build, words", [
    (lambda m: probe.scale_norm(m.cfg, 3, 0, 2.0), "layer 3 does not exist: this model has layers 0 to 2"),
    (lambda m: probe.ablate_neurons(m.cfg, -1, torch.tensor([0])), "layer -1 does not exist"),
    (lambda m: probe.block_aggregation(T, T - 1), "position 15 is out of range: windows have 16 tokens, so use 0 to 14"),
    (lambda m: probe.block_aggregation(T, -1), "position -1 is out of range"),
    (lambda m: m(ids(), tap=probe.scale_norm(m.cfg, 0, 40, 2.0)), "position 40 is out of range"),
    (lambda m: m(ids(1), tap=probe.amplify_variance(m.cfg, 0, 1, 2.0)), "at least 2 windows"),
    (lambda m: probe.chain(m, ids(), k=99), "position 99 is out of range"),
    (lambda m: probe.chain(m, ids(1)), "at least 2 windows"),
])
def test_impossible_interventions_say_so(build, words):
    with pytest.raises(ProbeError, match=re.escape(words)):
        build(tiny())


# ---------------------------------------------------------------- verdicts

def test_verdict():
    assert probe.verdict(0.6, 0.1, 0.1) == "holds" and probe.verdict(0.3, 0.1, 0.1) == "partly"
    assert probe.verdict(0.1, 0.0, 0.0) == "no" and probe.verdict(0.6, 0.7, 0.0) == "no" and probe.verdict(0.6, 0.1, 0.3) == "no"
    assert probe.verdict(0.6, None, 0.0) == "holds"


def test_cut_matrix_of_a_forged_sink():
    model, x = forged()
    table = probe.cut_matrix(model, x, x.roll(-1, 1), 5, 4.0, draws=5)
    found = {s: v for s, v, *_ in probe.verdicts(table, model.cfg, T)}
    assert found["the locked key makes the sink"] == "holds" and found["the direction of x_0 makes the sink"] == "holds"
    assert found["variance of z_0 feeds the sink"] == "no"  # it was forged in the embedding
    assert found["the state of x_0 forges a sink at k"] in ("holds", "partly")  # two first tokens share the attention
    two = probe.average([table, table])
    assert near(two[3]["numbers"]["loss"]["after"], table[3]["numbers"]["loss"]["after"]) and two[3]["numbers"]["loss"]["half"] == 0
    absent = probe.verdicts(probe.cut_matrix(tiny(), x, x, 5, 4.0, draws=0), tiny().cfg, T)
    assert {v for s, v, *_ in absent if s.endswith("the sink")} == {"absent"}


# ---------------------------------------------------------------- command line

@pytest.fixture
def run(tmp_path):
    def make(name="softmax", seed=0, seq_len=T, save=True, **changes):
        folder = tmp_path / name
        folder.mkdir()
        model = tiny(seed, **({"attn": name} if name in ("sigmoid", "headnorm") else {}) | changes)
        settings = dict(data="copy", seq_len=seq_len, bos=1.0, seed=seed, vocab_size=1024, encoding=None)
        (folder / "config.json").write_text(json.dumps({"run": settings, "model": asdict(model.cfg)}))
        if save:
            torch.save({"model": model.state_dict()}, folder / "model.pt")
        return str(folder)
    return make


def test_load_run(run):
    folder = run()
    model, corpus, settings = probe.load_run(folder)
    assert corpus.bos == BOS and settings["seed"] == 0
    assert torch.equal(model.embed_tokens.weight, tiny().embed_tokens.weight)
    assert torch.equal(probe.load_run(folder, untrained=True)[0].lm_head.weight, tiny().lm_head.weight)


@pytest.mark.parametrize("vocab_size, refused", [(280, True), (257, False)])
def test_a_run_on_another_text(tmp_path, monkeypatch, vocab_size, refused):
    """Tokens learned from another text mean other pieces; bytes are bytes."""
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 200)
    settings = dict(data=str(text), seq_len=T, bos=1.0, seed=0, vocab_size=vocab_size, encoding=None)
    monkeypatch.setitem(data.load.__kwdefaults__, "cache", tmp_path / "cache")
    corpus = data.load(str(text), seq_len=T, vocab_size=vocab_size)
    model = tiny(vocab_size=corpus.vocab_size)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"run": settings, "model": asdict(model.cfg), "corpus": corpus.fingerprint()}))
    torch.save({"model": model.state_dict()}, folder / "model.pt")
    assert probe.load_run(folder)[1].vocab_size == corpus.vocab_size
    text.write_text("the cow lay on the hay and the bird lay in the nest\n" * 200)
    if refused:
        with pytest.raises(probe.ProbeError, match="trained on another text"):
            probe.load_run(folder)
    else:
        probe.load_run(folder)


def test_table_of_three_runs_json_and_figure(run, capsys):
    folders = [run(a) for a in ("softmax", "headnorm", "sigmoid")]
    log = [{"run": {}}] + [{"step": s, "links": probe.chain(tiny(seed=s), ids())} for s in range(4)]
    (probe.Path(folders[0]) / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    assert probe.main([*folders, "--windows", "8", "--draws", "3"]) == 0
    out = capsys.readouterr().out
    for word in ("softmax", "headnorm", "sigmoid", "1 variance", "7 sink", "first token ordinary", "first token <bos>", "±", "|"):
        assert word in out
    folder = probe.Path(folders[0])
    saved = json.loads((folder / "chain.json").read_text())
    runs = saved["chain"]["copy, first token ordinary"]
    assert list(runs) == ["softmax", "headnorm", "sigmoid"] and runs["softmax"]["numbers"]["sink_rate"]["half"] is not None
    assert "untrained" in runs["softmax"]
    for picture in ("chain.png", "birth_softmax.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_cut_of_two_runs(run, capsys):
    folders = [run("a"), run("b", seed=1)]
    assert probe.main([*folders, "--cut", "--windows", "6", "--draws", "3", "--position", "5"]) == 0
    out = capsys.readouterr().out
    for word in ("standard deviation between runs", "Which links hold?", "What do the super neurons carry?", "Is it variance or norm?",
                 "token 5 sees only itself", "trained with <bos> in 100% of the windows", "untouched"):
        assert word in out
    saved = json.loads((probe.Path(folders[0]) / "cut.json").read_text())
    assert list(saved["runs"]) == ["a", "b"] and len(saved["mean"]) == len(saved["runs"]["a"])
    row = saved["mean"][0]["numbers"]["sink_alpha_later"]
    assert set(row) == {"before", "after", "change", "half"} and near(row["after"] - row["before"], row["change"])
    assert (probe.Path(folders[0]) / "cut.png").read_bytes().startswith(b"\x89PNG")


def test_untrained_random_tokens_and_files(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "draw_chain", lambda *a: None)  # drawn elsewhere
    folder = run(save=False)
    out = tmp_path / "here"
    assert probe.main([folder, "--untrained", "--tokens", "random", "--no-bos", "--windows", "4", "--draws", "0", "--out", str(out)]) == 0
    assert "±" not in capsys.readouterr().out.split("\n", 3)[3] and (out / "chain.json").exists()
    tokens = tmp_path / "ids.txt"
    tokens.write_text(" ".join(str(i % 24) for i in range(200)))
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 20)
    for source in (tokens, text):
        assert probe.main([folder, "--untrained", "--tokens", str(source), "--windows", "4", "--draws", "0", "--out", str(out)]) == 0


def test_windows():
    x, y = probe.draw_windows(50, 8, 25, 3, False)
    assert x.shape == y.shape == (50, 8) and torch.equal(x[:, 1:], y[:, :-1]) and not (x == 3).any() and x.unique().numel() == 24
    x, y = probe.draw_windows(5, 8, 25, 3, True)
    assert (x[:, 0] == 3).all() and torch.equal(x[:, 1:], y[:, :-1])
    x, _ = probe.draw_windows(3, 4, 25, None, False, stream=torch.arange(20))
    assert torch.equal(x[0], torch.arange(4)) and torch.equal(x[-1], torch.arange(15, 19))


def test_llama_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "draw_chain", lambda *a: None)
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    model = tiny()
    weights = {n if n.startswith("lm_head") else f"model.{n}": p.contiguous() for n, p in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    cfg = {k: v for k, v in asdict(model.cfg).items() if k != "attn"}
    (folder / "config.json").write_text(json.dumps(cfg | {"model_type": "llama", "bos_token_id": 1}))
    out = ["--out", str(tmp_path / "out"), "--seq-len", "12", "--windows", "4"]
    assert probe.main(["--llama", str(folder), *out]) == 0
    assert "random tokens, first token <bos>" in capsys.readouterr().out
    assert probe.main(["--llama", str(folder), "--cut", "--position", "4", *out]) == 0
    assert "untouched" in capsys.readouterr().out
    assert probe.main(["--llama", str(folder), "--tokens", "text", *out]) == 2
    assert "tokenizer" in capsys.readouterr().err
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate("abcdefghijklmnopqrstuvwx?")}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 3)
    assert probe.main(["--llama", str(folder), "--tokens", str(tmp_path / "text.txt"), "--no-bos", *out]) == 0


BAD = {
    "missing": (lambda r, t: [str(t / "no")], "is not a folder; train one with: python train.py --out"),
    "wrong folder": (lambda r, t: [str(t)], "holds no run (config.json is missing)"),
    "not json": (lambda r, t: [broken(r, "config.json", "{")], "config.json is not that of a run"),
    "other json": (lambda r, t: [broken(r, "config.json", "[1]")], "config.json is not that of a run"),
    "bad shape": (lambda r, t: [broken(r, "config.json", None)], "num_attention_heads"),
    "no weights": (lambda r, t: [r(save=False)], "has no model.pt"),
    "broken weights": (lambda r, t: [broken(r, "model.pt", "zip")], "model.pt is no checkpoint"),
    "other weights": (lambda r, t: [swapped(r)], "does not fit the shape"),
    "position": (lambda r, t: [r(), "--position", "16"], "position 16 is out of range: windows have 16 tokens"),
    "layer": (lambda r, t: [r(), "--cut", "--layer", "7"], "layer 7 does not exist: this model has layers 0 to 2"),
    "position 0 cut": (lambda r, t: [r(), "--cut", "--position", "0"], "forge at another"),
    "incompatible": (lambda r, t: [r("a"), r("b", seq_len=32)], "has seq_len 32, but"),
    "same name": (lambda r, t: [r("a"), str(t / "a")], "two runs are called a"),
    "empty text": (lambda r, t: [r(), "--tokens", written(t, " \n")], "the file is empty"),
    "short text": (lambda r, t: [r(), "--tokens", written(t, "1 2 3")], "too few for windows of 16"),
    "foreign ids": (lambda r, t: [r(), "--tokens", written(t, "99 " * 40)], "this model has 0 to 24"),
    "foreign text": (lambda r, t: [r(), "--tokens", written(t, "ABC" * 40)], "is not a symbol"),
    "no tokens file": (lambda r, t: [r(), "--tokens", "nowhere.txt"], "cannot be read"),
    "one window": (lambda r, t: [r(), "--windows", "1"], "at least 2 windows"),
    "no window": (lambda r, t: [r(), "--windows", "0"], "at least 2 windows"),
    "no tokens": (lambda r, t: [r(), "--seq-len", "0"], "at least 2 windows of 3 tokens"),
    "out is a file": (lambda r, t: [r(), "--out", written(t, "x")], "choose another --out"),
    "nothing": (lambda r, t: [], "give the folders of one or more runs"),
    "both": (lambda r, t: [r(), "--llama", str(t)], "not both"),
    "no llama": (lambda r, t: ["--llama", str(t / "no")], "config.json"),
}


def broken(run, file, text):
    folder = probe.Path(run())
    if text is None:
        config = json.loads((folder / file).read_text())
        config["model"]["num_attention_heads"] = 5
        text = json.dumps(config)
    (folder / file).write_text(text)
    return str(folder)


def swapped(run):
    a, b = run("a"), run("b", hidden_size=32)
    (probe.Path(a) / "model.pt").write_bytes((probe.Path(b) / "model.pt").read_bytes())
    return a


def written(folder, text):
    (folder / "tokens.txt").write_text(text)
    return str(folder / "tokens.txt")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(case, run, tmp_path, capsys):
    build, words = BAD[case]
    assert probe.main(build(run, tmp_path)) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
