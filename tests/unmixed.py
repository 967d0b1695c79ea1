"""What carries the sink: a value's mean or its variance? And which neurons answer to it?

The first token averages only itself, so that its z is *unmixed*. That is two things at once, in
every layer:

    its mean      mu, the mean z of a token that sees only itself, over some thousand tokens, each
                  in a window of its own; against m, the mean of the other tokens' z
    its variance  z - mu, in which tokens differ from each other; against none

`shares` sets z of one token to each combination, `answers` asks what the first neurons make of it;
tests/claims.py has the margins and the verdicts (Q8 and Q9 in claims.csv). These margins were
written when a re-derivation on five other batches was known (cut, variance removed: 2 to 48 %;
forged by the mean alone: 35 to 49 %, by the deviation alone: 0 to 41 %), and nothing of `answers`.
"""
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import probe
from model import GPT, compose, record
from probe import TINY, Intervention, others, turned


class Alone(NamedTuple):
    """z of tokens that see only themselves, an entry a layer."""
    mean: list  # (H, D): mu
    own: list   # (N, H, D): of the token that is cut or forged, in each of N windows


@torch.no_grad()
def alone(model, tokens) -> list:
    """z of each layer, (n, H, D), of tokens (n,) that see only themselves: windows of length 1."""
    names = [f"{i}.z" for i in range(len(model.layers))]
    parts = []
    for some in tokens.split(512):
        kept = record(model, some[:, None], names)[1]
        parts.append([z[:, 0] for z in kept.values()])
    return [torch.cat(layer) for layer in zip(*parts)]


def mean_alone(model, tokens) -> list:
    """mu of each layer, (H, D). 4,096 tokens cost SmolLM2 half a minute."""
    return [z.mean(0) for z in alone(model, tokens)]


# ---------------------------------------------------------------- edits of z, as in probe.py

def mean_only(z, p, known, layer):
    """mu: no variance is left."""
    return known.mean[layer].expand_as(z[:, p])


def usual_mean(z, p, known, layer):
    """m, over windows and all other tokens: neither."""
    return others(z, p, 1).mean((0, 1)).expand_as(z[:, p])


def deviation_only(z, p, known, layer):
    return usual_mean(z, p, known, layer) + known.own[layer] - known.mean[layer]


def both(z, p, known, layer):
    return known.own[layer]


def shrunk(z, p, known, layer):
    """The deviation is made as small as the others' variance."""
    by_token = probe.variance(z)
    ratio = others(by_token, p, 0).mean() / by_token[p].clamp_min(TINY)
    factor = ratio.sqrt().clamp(max=1)
    return known.mean[layer] + factor * (known.own[layer] - known.mean[layer])


def of_another(z, p, known, layer):
    """That of another window's token: as unmixed, and another token's."""
    return known.own[layer].roll(1, 0)


def moved(y, to, layer):
    """y (N, H, D) moved as far as `to` is away, but in a random direction."""
    generator = torch.Generator().manual_seed(layer)
    noise = torch.randn(y.shape, generator=generator).to(y)
    return y + turned((to - y).flatten(1), noise.flatten(1)).view_as(y)


def random_cut(z, p, known, layer):
    return moved(z[:, p], probe.mean_of_others(z, p, None, layer), layer)


def random_forgery(z, p, known, layer):
    return moved(z[:, p], known.mean[layer], layer)


CUTS = {"mean only": mean_only, "shrunk": shrunk, "deviation only": deviation_only,
        "others' mean": probe.mean_of_others, "another first token": of_another,
        "random move": random_cut}
FORGERIES = {"mean only": mean_only, "deviation only": deviation_only, "both": both,
             "neither": usual_mean, "random move": random_forgery}
EARLY = ("mean only", "deviation only", "both")  # also in the first three layers alone


def interventions():
    """(name, Intervention): what LINKS cuts and forges at once, taken apart."""
    for kind, token, edits in (("cut", "first", CUTS), ("forge", "k", FORGERIES)):
        for name, change in edits.items():
            yield f"{kind}, every: {name}", Intervention(name, "z", token, change)
            if name in EARLY:
                yield f"{kind}, early: {name}", Intervention(name, "z", token, early(change))


def early(change):
    """The same change in the first DEPTH layers alone."""
    def apply(z, p, known, layer):
        return change(z, p, known, layer) if layer < DEPTH else z[:, p]
    return apply


# ---------------------------------------------------------------- what becomes of the sink

def no_logits(name, x):
    """A tap that saves a fifth of the time where nobody needs the logits."""
    return x[:, :1] if name == "final" else x


class Sinks:
    """The sink at tokens 0 and k in windows x (N, T), and what an intervention does to it."""

    def __init__(self, model, x, k, queries=None):
        self.model, self.x, self.k, self.queries = model, x, k, queries
        self.free = self.look(None)
        self.heads = probe.with_sink(self.free[0]["sink"])

    def look(self, tap):
        wanted = [probe.metric("sink")]
        return probe.layers(self.model, self.x, compose(tap, no_logits), (0, self.k), None, wanted,
                            self.queries)[0]

    def share(self, kind, tap) -> float:
        """By probe.RULE, of a "cut" or "forge"."""
        row = {"kind": kind}
        for when, seen in (("before", self.free), ("after", self.look(tap))):
            rests = [probe.later(found["sink"])[self.heads].mean().item() for found in seen]
            row[when] = [{"resting": attention} for attention in rests]
        if self.queries is not None:
            row["uniform"] = probe.uniform_weight(self.queries)
        return probe.share(row, self.x.shape[1])


@torch.no_grad()
def shares(model, x, mean, k, queries=None) -> dict:
    """{name of an intervention: its share, by probe.RULE} for windows x (N, T), `mean` being
    `mean_alone`; and the strongest head's attention to token 0, untouched."""
    sinks = Sinks(model, x, k, queries)
    known = {"first": Alone(mean, alone(model, x[:, 0])), "k": Alone(mean, alone(model, x[:, k]))}
    found = {"sink": probe.summary(sinks.free[0])["sink"]}
    for name, edit in interventions():
        tap = probe.intervene(model, edit, known[edit.token], None, k, x.shape[1])
        found[name] = sinks.share(name.split(",")[0], tap)
    return found


# ---------------------------------------------------------------- controls at token 0

def neurons_at_0(model, x, k) -> dict:
    """Q2. Share of the sink taken at token 0 without the TOP neurons of each layer that write most
    there, and by its controls at the same token; `like carries` is the part that the control of
    LINKS, neurons of like weight, has of the squared length that the TOP write."""
    target, like = probe.targets(model, x)
    next_five, rest, written = [], [], torch.zeros(2)
    names = [f"{i}.mlp_post" for i in range(len(model.layers))]
    posts = record(model, x, names, no_logits)[1].values()
    for block, post, top, matched in zip(model.layers, posts, target.neurons, like.neurons):
        energy = probe.energy(post[:, 0], block.mlp.down_proj.weight).mean(0)
        order = energy.argsort(descending=True)
        next_five.append(order[probe.TOP:2 * probe.TOP])
        rest.append(order[probe.TOP:])
        written += torch.stack([energy[top].sum(), energy[matched].sum()])
    silence = next(probe.planned("cut neurons"))[2]
    sinks, found = Sinks(model, x, k), {"like carries": (written[1] / written[0]).item()}
    for name, ids in {"6 to 10": next_five, "all others": rest}.items():
        these = target._replace(neurons=ids)
        tap = probe.intervene(model, silence, these, None, k, x.shape[1])
        found[name] = sinks.share("cut", tap)
    found["turned"] = sinks.share("cut", turn_write(model, target.neurons))
    return found


def turn_write(model, neurons):
    """A tap: what these neurons of each layer write at token 0 keeps its length, and points in a
    random direction, the same in all windows."""
    written = {}

    def tap(name, x):
        i, _, what = name.rpartition(".")
        if what == "mlp_post":
            top = neurons[int(i)]
            down = model.layers[int(i)].mlp.down_proj.weight
            written[i] = x[:, 0, top] @ down[:, top].T  # (N, C)
        if what == "mlp_out":
            noise = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(int(i)))
            x = x.clone()
            x[:, 0] += turned(written[i], noise.to(x)) - written[i]
        return x
    return tap


# ---------------------------------------------------------------- which neurons answer to it

def along(z, p, known, layer):
    """The part of mu that points as the usual mean m of each head does."""
    mu, m = known.mean[layer], usual_mean(z, p, known, layer)
    unit = F.normalize(m, dim=-1)
    return (mu * unit).sum(-1, keepdim=True) * unit


def across(z, p, known, layer):
    """m with the part of mu that points elsewhere."""
    m = usual_mean(z, p, known, layer)
    return m + known.mean[layer] - along(z, p, known, layer)


QUESTIONS = FORGERIES | {"along": along, "across": across}
DEPTH = 3  # layers, the last of which ends the first wave of SmolLM2


@torch.no_grad()
def answers(model, x, mean, k) -> dict:
    """Q9. z of token k is forged in the first three layers, as in `shares`. What do the neurons
    write there that write most at token 0, the TOP of each layer? Part of what they write at token
    0, along that write: 1 is the same, 0 nothing."""
    short = GPT(replace(model.cfg, num_hidden_layers=DEPTH))
    short.load_state_dict(model.state_dict(), strict=False)
    known, few = Alone(mean, alone(short, x[:, k])), probe.targets(short, x)[0].neurons
    names = [f"{i}.mlp_post" for i in range(DEPTH)]

    def written(tap, p):
        """(C,): the write of the few neurons of all three layers at token p, mean over windows."""
        posts = record(short, x, names, tap)[1].values()
        total = 0
        for block, post, top in zip(short.layers, posts, few):
            total = total + post[:, p, top].mean(0) @ block.mlp.down_proj.weight[:, top].T
        return total

    at_0, found = written(None, 0), {}
    for name, change in QUESTIONS.items():
        edit = Intervention(name, "z", "k", change)
        at_k = written(probe.intervene(short, edit, known, None, k, x.shape[1]), k)
        found[name] = (at_k @ at_0 / at_0.square().sum()).item()
    return found
