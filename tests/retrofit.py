"""A finished Llama gets a cure, or loses its super neurons: does its sink go, and does it stay away
while it heals?

    python -m tests.retrofit            # what is missing: 40 to 80 minutes of a core a model
    python -m tests.retrofit --render   # only the tables and the figure, from the JSON

SmolLM2 gets another attention, and is trained on for STEPS steps of 4 x 128 tokens of Python's
standard library, all models with the same batches:

    softmax    nothing is changed
    gated      one gate a head; gates start half open and W_O doubled, so that nothing changes
    headnorm   z normed for each head and token, with gains that keep the usual size of each entry
    scaled     the control for headnorm: every head gets the same mean length, and the same gains,
               by constants, folded into W_O: it changes heads as headnorm does, but not tokens
    scaled gated   both: the sink is lost at first, and has to come back beside gates

We look at the share of all pairs of a window and a head whose attention to token 0 passes SINK, in
random tokens. Written when headnorm had been seen for 60 steps (share 0.28 at step 40 and 0.03 at
step 60, loss 4.5 and falling; at a learning rate of 0.001 it did not heal), and nothing of the
others:

    the setting can tell, if softmax and scaled end with at least half of the heads, and the loss of
    each model ends within half a nat of softmax's
    a cure works, if it ends with at most a fifth of softmax's share, and it does not, if it ends
    with at least half

Scaled gated came when all of the others were known. Written before it: it is judged like that
beside scaled, whose sink had to come back too.

Headnorm and its control are trained again with batches in other orders, sigmoid and logit with two,
all judged like the first, where the control of the same order ends with at least half of the heads.
Orders 3 to 6, sigmoid and logit were added when the others were known, in which the sink of text
came back under headnorm in one of two orders:

    it comes back in text, if at least half of softmax's share does

Link 3 by training: five neurons of each layer are drawn anew, gate, up and down,

    super redrawn    those that write most at token 0
    others redrawn   the control: of all others those that write most at later tokens

Written when the first had been seen for 200 steps (heads with a sink 0.00 at first, then 0.04; loss
5.4, then 3.1), and nothing of the control:

    the sink needs its super neurons, if the first ends with at most a fifth of softmax's share and
    the control with at least half; the model does not need its sink, if the first ends within a
    tenth of a nat of the control
"""
from collections import Counter
from dataclasses import replace
from functools import partial
from statistics import fmean
from types import SimpleNamespace

import torch

import probe
import train
from chapters import figures
from data import Corpus, smollm2, text
from data.common import environment, multiplies_bf16
from data.windows import random_windows
from model import ATTENTIONS, GPT, record
from tests import runner
from tests.runner import RESULTS, mean_std_words

CURES = ("softmax", "headnorm", "scaled", "gated", "scaled gated")
NEURONS = ("softmax", "super redrawn", "others redrawn")
ORDERS = {"headnorm": range(2, 7), "scaled": range(2, 7), "logit": (1, 2), "sigmoid": (1, 2)}
MODELS = (*CURES, *NEURONS[1:],
          *(f"{name}, order {i}" for name, numbers in ORDERS.items() for i in numbers))
STEPS, B, T, END = 500, 4, 128, 0  # END: <|endoftext|>, which SmolLM2 knows between documents
LOOKS = (0, 5, 10, 20, 40, 60, 80, 120, 160, 200, 260, 320, 380, 440, STEPS)
FILE, PAGE, FIGURE = (RESULTS / name for name in ("retrofit.json", "cures.md", "retrofit.png"))
CPU = torch.device("cpu")


def model_and_order(name: str) -> tuple[str, int]:
    """("headnorm", 4) of "headnorm, order 4"; a name without a number has order 1."""
    model, _, number = name.partition(", order ")
    return model, int(number or 1)


# ---------------------------------------------------------------- rebuilding

@torch.no_grad()
def rebuilt(source: GPT, name: str, x) -> GPT:
    """SmolLM2 as one of MODELS; the usual lengths are those in windows x."""
    attn = name.split()[-1]  # scaled gated
    cfg = replace(source.cfg, attn=attn if attn in ATTENTIONS else "softmax")
    model = GPT(replace(cfg, max_position_embeddings=T))  # sigmoid starts from 1 / T a key
    model.load_state_dict(source.state_dict(), strict=False)  # but for gates and gains
    names = [f"{i}.z" for i in range(len(model.layers))]
    for block, z in zip(model.layers, record(source, x, names)[1].values()):
        attention = block.self_attn
        gain = z.square().mean((0, 1, 2)).sqrt()  # (D,)
        if attn == "gated":
            attention.z_gate.weight.zero_()
            attention.o_proj.weight.mul_(2)
        if attn == "headnorm":
            attention.z_norm.weight.copy_(gain)
        if name.startswith("scaled"):
            length = z.square().mean(-1).sqrt().mean((0, 1))  # (H,), mean over tokens
            factor = gain / length[:, None]  # (H, D)
            attention.o_proj.weight.mul_(factor.flatten())
    if attn == "redrawn":
        redraw(model, name.startswith("super"))
    return model


def redraw(model, strongest: bool) -> None:
    """Draw TOP neurons of each layer anew, with the spread of their matrices: those that write most
    at token 0 of random tokens, or of all others those that write most later."""
    x, generator = noise(model, 0), torch.Generator().manual_seed(3)
    names = [f"{i}.mlp_post" for i in range(len(model.layers))]
    for block, post in zip(model.layers, record(model, x, names)[1].values()):
        mlp = block.mlp
        writes = probe.energy(post, mlp.down_proj.weight).mean(0)  # (T, F)
        chosen = writes[0].topk(probe.TOP).indices
        if not strongest:
            later = writes[1:].mean(0)
            later[chosen] = 0
            chosen = later.topk(probe.TOP).indices
        for layer, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            W = layer.weight
            shape = W.index_select(dim, chosen).shape
            new = torch.randn(shape, generator=generator) * W.std()
            W.index_copy_(dim, chosen, new)


def noise(model, batch: int):
    """(8, 64): a batch of random tokens, disjoint from the others."""
    return random_windows(8, 64, model.cfg.vocab_size, batch)[0]


# ---------------------------------------------------------------- training on

def stdlib(encoding) -> Corpus:
    """The standard library in SmolLM2's tokens, whole documents held out."""
    root, files = text.stdlib_files()
    streams = []
    for docs in text.split(text.documents(root, files, skip_undecodable=True)):
        ids = []
        for _, words in docs:
            ids += [END, *encoding.encode_ordinary(words)]
        streams.append(torch.tensor(ids, dtype=torch.int32))
    return Corpus("stdlib", encoding.n_vocab, END, encoding, *streams)


@torch.no_grad()
def look(model, corpus, batches) -> dict:
    """The loss on held-out text, and the chain in random tokens and in that text."""
    fixed = torch.Generator().manual_seed(0)
    losses = [model(*corpus.batch(8, T, fixed, "val", 0.0))[1].item() for _ in range(4)]
    found = {"losses": losses, "random": [], "text": []}
    for b in range(batches):
        x, _ = corpus.batch(8, 64, fixed, "val", 0.0)
        for kind, windows in (("random", noise(model, b)), ("text", x)):
            chain = probe.chain(model, windows)
            found[kind].append(chain | {"share": pairs(model, windows)})
    return found


def pairs(model, x) -> float:
    """The share of all pairs of a window of x (N, T) and a head that have a sink on token 0."""
    names = [f"{i}.pattern" for i in range(len(model.layers))]
    patterns = record(model, x, names)[1].values()
    return fmean(probe.has_sink(probe.sink_score(p, 0)).float().mean().item() for p in patterns)


def retrofit(name: str) -> dict:
    """Rebuild, train on, and look: {log: [...], end: {...}, environment: {...}}."""
    folder = smollm2.fetch()
    source, corpus = GPT.from_llama(folder), stdlib(smollm2.encoding(folder))
    x, _ = corpus.batch(8, T, torch.Generator().manual_seed(2), bos=0.0)
    looks = LOOKS if name in (*CURES, *NEURONS) else LOOKS[:1]  # those that the figure shows
    name, order = model_and_order(name)
    model = rebuilt(source, name, x)
    run = SimpleNamespace(lr=3e-4, warmup=20, steps=STEPS, weight_decay=0.1, batch_size=B,
                          seq_len=T, bos=0.0, repeat=0.0)
    state = runner.training(run, model, corpus, seed=1 if order == 1 else 8 + order)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(CPU))
    log = []
    for step in range(STEPS + 1):
        if step in looks:
            log.append({"step": step} | look(model, corpus, 1))
        if step < STEPS:
            train.train_step(state, cast)
    return {"log": log, "end": look(model, corpus, 4), "environment": environment(CPU, 1)}


# ---------------------------------------------------------------- table and figure

def loss_of(looks) -> float:
    return fmean(looks["losses"])


def table(found) -> str:
    """Each model before and after the training: mean and standard deviation over windows."""
    rows = []
    for name in filter(found.__contains__, MODELS):
        first, end = found[name]["log"][0], found[name]["end"]
        row = [name, f"{first['random'][0]['share']:.2f}"]
        for kind, key in (("random", "share"), ("text", "share"),
                          ("random", "norm_ratio"), ("random", "drain")):
            row.append(mean_std_words([chain[key] for chain in end[kind]]))
        rows.append([*row, f"{loss_of(first):.2f}", f"{loss_of(end):.2f}",
                     f"{extra_loss(found, name):+.2f}"])
    return runner.markdown(("SmolLM2 as (± sd of batches)", "heads with a sink, before", "after",
                            "after, in text",
                            "length of token 0", "length of its value", "loss before", "after",
                            "minus softmax"), rows)


def sink_share(found, name, kind="random") -> float:
    """The share of all `pairs` that have a sink after the training."""
    return fmean(chain["share"] for chain in found[name]["end"][kind])


def extra_loss(found, name) -> float:
    """The loss after the training, less softmax's; two digits."""
    ends = [loss_of(found[each]["end"]) for each in (name, "softmax")]
    return round(ends[0] - ends[1], 2) + 0.0  # no -0.00


def in_orders(found, name) -> list[str]:
    """A model by name, in each order of batches in which it was trained."""
    return [each for each in found if model_and_order(each)[0] == name]


def least_to_most(form, values) -> str:
    """The range of some numbers, in words."""
    return " to ".join(dict.fromkeys(map(form.format, (min(values), max(values)))))


def shares(found, name, kind="random") -> str:
    """`sink_share` over all orders of batches."""
    return least_to_most("{:.0%}", [sink_share(found, each, kind)
                                    for each in in_orders(found, name)])


def prices(found, name) -> str:
    """`extra_loss` over all orders of batches."""
    return least_to_most("{:+.2f}", [extra_loss(found, each) for each in in_orders(found, name)])


def verdict(found, name, kind) -> str:
    """What the criteria say of a cure in one order of batches, on random tokens or in text."""
    _, order = model_and_order(name)
    control = "scaled" if order == 1 else f"scaled, order {order}"
    left = sink_share(found, name, kind) / sink_share(found, "softmax", kind)
    if extra_loss(found, name) > 0.5:
        return "has not healed"
    if sink_share(found, control, kind) < 0.5:
        return "cannot be told"
    return "works" if left <= 0.2 else "fails" if left >= 0.5 else "is undecided"


def orders(found) -> str:
    """How the models end that were trained in several orders of batches."""
    def ends(name, kind):
        verdicts = Counter(verdict(found, each, kind) for each in in_orders(found, name))
        said = ", ".join(f"{word} in {n}" for word, n in verdicts.most_common())
        return f"{shares(found, name, kind)}: {said}"

    rows = [(name, str(len(in_orders(found, name))), ends(name, "random"), ends(name, "text"),
             prices(found, name))
            for name in filter(partial(in_orders, found), ORDERS)]
    head = ("", "orders", "heads with a sink, random tokens", "in text", "loss minus softmax's")
    return runner.markdown(head, rows)


@figures.styled
def draw(found):
    """Share of the heads with a sink, length of the first state and loss, over the steps: cures
    above, redrawn neurons below."""
    figure, rows = figures.new(5.4, 2, 3)
    values = {"heads with a sink": lambda row: row["random"][0]["share"],
              "length of the first state": lambda row: row["random"][0]["norm_ratio"],
              "loss on held-out text, nats": loss_of}
    for axes, models in zip(rows, (CURES, NEURONS)):
        for axis, (title, value) in zip(axes, values.items()):
            for style, name in zip(figures.STYLES, models):
                figures.track(axis, found[name]["log"], value, label=name, **style | {"ms": 3})
            figures.dress(axis, title, xlabel="step")
            axis.set_ylim(0)
        axes[-1].legend()  # the loss leaves room for it
    return figure


def tables(found) -> dict[str, str]:
    return {"retrofit": table(found), "orders": orders(found)}


def render(found) -> None:
    runner.fill_page(PAGE, tables(found))
    figures.save(FIGURE, draw(found))


if __name__ == "__main__":
    runner.main("retrofit", __doc__, FILE, {(name,): (retrofit, name) for name in MODELS}, render)
