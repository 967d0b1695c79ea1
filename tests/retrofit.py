"""A finished Llama gets a cure, or loses its super neurons: does its sink go, and does it stay away
while it heals?

    python -m tests.retrofit            # what is missing: 40 minutes of one core a model
    python -m tests.retrofit --render   # only the table and the figure, from the JSON

SmolLM2 gets another attention, and is trained on for STEPS steps of 4 x 128 tokens of Python's
standard library, all models with the same batches:

    softmax    nothing is changed
    gated      one gate a head; gates start half open and W_O doubled, so that nothing changes
    headnorm   z normed for each head and token, with gains that keep the usual size of each entry
    scaled     the control for headnorm: every head gets the same mean length, and the same gains,
               by constants, folded into W_O: what headnorm does to heads, but not to tokens
    scaled gated   both: the sink is lost at first, and has to come back beside gates

What counts is the share of all heads whose attention to token 0 passes SINK, in random tokens.
Written when headnorm had been seen for 60 steps (share 0.28 at step 40 and 0.03 at step 60, loss
4.5 and falling; at a learning rate of 0.001 it did not heal), and nothing of the others:

    the setting can tell, if softmax and scaled end with at least half of the heads, and the loss of
    each model ends within half a nat of softmax's
    a cure works, if it ends with at most a fifth of softmax's share, and it does not, if it ends
    with at least half

Scaled gated came when all of the others were known. Written before it: it is judged like that
beside scaled, whose sink had to come back too. Last, headnorm and its control with other batches,
judged like the first.

Link 3 by training: five neurons of each layer are drawn anew, gate, up and down,

    super redrawn    those that write most at token 0
    others redrawn   the control: of all others those that write most at later tokens

Written when the first had been seen for 200 steps (heads with a sink 0.00 at first, then 0.04; loss
5.4, then 3.1), and nothing of the control:

    the sink needs its super neurons, if the first ends with at most a fifth of softmax's share and
    the control with at least half; the model does not need its sink, if the first ends within a
    tenth of a nat of the control
"""
import argparse
import itertools
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import probe
import train
from chapters import figures
from data import Corpus, smollm2, text
from data.common import bar, environment, multiplies_bf16, read_json, write_json
from data.windows import random_windows
from model import ATTENTIONS, GPT, record
from tests.pages import fill_page, markdown, mean_std

CURES = ("softmax", "headnorm", "scaled", "gated", "scaled gated")
NEURONS = ("softmax", "super redrawn", "others redrawn")
OTHER = ", other batches"  # a model trained once more, with these
AGAIN = tuple(name + OTHER for name in ("headnorm", "scaled"))
MODELS = tuple(dict.fromkeys(CURES + AGAIN + NEURONS))
STEPS, B, T, END = 500, 4, 128, 0  # END: <|endoftext|>, which SmolLM2 knows between documents
LOOKS = (0, 5, 10, 20, 40, 60, 80, 120, 160, 200, 260, 320, 380, 440, STEPS)
SHOWN = {"norm_ratio": "length of token 0", "dominance": "DomRatio", "drain": "value drain"}
RESULTS = Path(__file__).parent / "results"
FILE, PAGE, FIGURE = (RESULTS / name for name in ("retrofit.json", "cures.md", "retrofit.png"))


def stdlib(encoding) -> Corpus:
    """The standard library in SmolLM2's tokens, whole documents held out."""
    root, files = text.stdlib_files()
    streams = []
    for docs in text.split(text.documents(root, files, skip_undecodable=True)):
        ids = ([END, *encoding.encode_ordinary(words)] for _, words in docs)
        ids = itertools.chain.from_iterable(ids)
        streams.append(torch.tensor(list(ids), dtype=torch.int32))
    return Corpus("stdlib", encoding.n_vocab, END, encoding, *streams)


@torch.no_grad()
def rebuilt(source: GPT, name: str, x) -> GPT:
    """SmolLM2 as one of MODELS; the usual lengths are those in windows x."""
    attn = name.split()[-1]  # scaled gated
    model = GPT(replace(source.cfg, attn=attn if attn in ATTENTIONS else "softmax"))
    model.load_state_dict(source.state_dict(), strict=False)  # but for gates and gains
    names = [f"{i}.z" for i in range(len(model.layers))]
    for block, z in zip(model.layers, record(source, x, names)[1].values()):
        attention = block.self_attn
        gain = z.square().mean((0, 1, 2)).sqrt()  # (D,)
        if model.cfg.attn == "gated":
            attention.z_gate.weight.zero_()
            attention.o_proj.weight.mul_(2)
        if name == "headnorm":
            attention.z_norm.weight.copy_(gain)
        if name.startswith("scaled"):
            length = z.square().mean(-1).sqrt().mean((0, 1))  # (H,), mean over tokens
            factor = gain / length[:, None]  # (H, D)
            attention.o_proj.weight.mul_(factor.flatten())
    if name.endswith("redrawn"):
        redraw(model, name.startswith("super"))
    return model


def redraw(model, strongest: bool) -> None:
    """Draw TOP neurons of each layer anew, with the spread of their matrices: those that write most
    at token 0 of random tokens, or of all others those that write most later."""
    (x,), generator = noise(model, 1), torch.Generator().manual_seed(3)
    names = [f"{i}.mlp_post" for i in range(len(model.layers))]
    for block, post in zip(model.layers, record(model, x, names)[1].values()):
        mlp = block.mlp
        writes = probe.energy(post, mlp.down_proj.weight).mean(0)  # (T, F)
        chosen = writes[0].topk(probe.TOP).indices
        if not strongest:
            later = writes[1:].mean(0).index_fill(0, chosen, 0.0)
            chosen = later.topk(probe.TOP).indices
        for layer, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            W = layer.weight
            new = torch.randn(W.index_select(dim, chosen).shape, generator=generator) * W.std()
            W.index_copy_(dim, chosen, new)


def noise(model, batches):
    """Disjoint batches of random tokens."""
    return (random_windows(8, 64, model.cfg.vocab_size, seed)[0] for seed in range(batches))


@torch.no_grad()
def look(model, corpus, batches) -> dict:
    """The loss on held-out text, and the chain in random tokens and in that text."""
    fixed = torch.Generator().manual_seed(0)
    losses = [model(*corpus.batch(8, T, fixed, "val", 0.0))[1].item() for _ in range(4)]
    random = noise(model, batches)
    words = (corpus.batch(8, 64, fixed, "val", 0.0)[0] for _ in range(batches))
    return {"losses": losses, "random": [probe.chain(model, x) for x in random],
            "text": [probe.chain(model, x) for x in words]}


@torch.no_grad()
def resting(model, x) -> dict:
    """What the strongest head hands on where it gives token 0 more than half: its length over that
    of all that the heads of its layer hand on, and its cosine between two queries. 1: a constant,
    whatever is read."""
    names = [f"{i}.{name}" for i in range(len(model.layers)) for name in ("pattern", "z")]
    kept = record(model, x, names)[1]
    patterns = [p for name, p in kept.items() if name.endswith("pattern")]
    sinks = torch.stack([probe.sink_score(p, 0).mean(0) for p in patterns])  # (L, H)
    layer, head = probe.strongest(sinks)
    z = kept[f"{layer}.z"]  # (N, T, H, D)
    rests = z[:, 1:, head][kept[f"{layer}.pattern"][:, head, 1:, 0] > 0.5]
    length = rests.norm(dim=-1).mean() / z[:, 1:].norm(dim=-1).mean()
    return {"length": length.item(), "cos": probe.direction_cos(rests).item()}


def retrofit(name: str) -> dict:
    """Rebuild, train on, and look: {log: [...], end: {...}, ...}."""
    torch.set_num_threads(1)
    folder = smollm2.fetch()
    source, corpus = GPT.from_llama(folder), stdlib(smollm2.encoding(folder))
    x, _ = corpus.batch(8, T, torch.Generator().manual_seed(2), bos=0.0)
    base, again, _ = name.partition(OTHER)
    model, cpu = rebuilt(source, base, x), torch.device("cpu")
    run = SimpleNamespace(lr=3e-4, warmup=20, steps=STEPS, weight_decay=0.1, batch_size=B,
                          seq_len=T, bos=0.0, repeat=0.0)
    state = SimpleNamespace(run=run, model=model, corpus=corpus, device=cpu, step=0,
                            optimizer=train.make_optimizer(model, run, cpu),
                            batches=torch.Generator().manual_seed(10 if again else 1))
    # elsewhere the same would take a hundred times as long
    cast = torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(cpu))
    log = []
    while True:
        if state.step in LOOKS:
            log.append({"step": state.step} | look(model, corpus, 1))
        if state.step == STEPS:
            break
        train.train_step(state, cast)
    return {"log": log, "end": look(model, corpus, 4), "environment": environment(cpu, 1),
            "rest": [resting(model, x) for x in noise(model, 4)]}


# ---------------------------------------------------------------- table and figure

def words(chains, key) -> str:
    """Mean and standard deviation over windows; "-" for what is not there in all of them."""
    values = [chain[key] for chain in chains]
    return "-" if None in values else mean_std(values)


def loss_of(looks) -> float:
    return statistics.fmean(looks["losses"])


def table(found, models) -> str:
    """Each model before and after the training: mean and standard deviation over windows."""
    rows, base = [], found["softmax"]["end"]
    for name in models:
        first, end = found[name]["log"][0], found[name]["end"]
        gap = "-" if name == "softmax" else f"{loss_of(end) - loss_of(base):+.2f}"
        rest = found[name]["rest"]
        rows.append((
            name, f"{first['random'][0]['sink_rate']:.2f}", words(end["random"], "sink_rate"),
            words(end["text"], "sink_rate"), *(words(end["random"], key) for key in SHOWN),
            words(rest, "length"), words(rest, "cos"),
            f"{loss_of(first):.2f}", f"{loss_of(end):.2f}", gap))
    return markdown(("", "heads with a sink, before", "after", "after, in text", *SHOWN.values(),
                     "length of what a resting head gives", "its cosine", "loss before", "after",
                     "minus softmax"), rows)


def share(found, name) -> float:
    """The heads with a sink after the training, of all."""
    return statistics.fmean(c["sink_rate"] for c in found[name]["end"]["random"])


def healed(found) -> str:
    """What the model without its super neurons ends with, and its control, in words."""
    (sink, loss), (whole, least) = ((share(found, name), loss_of(found[name]["end"]))
                                    for name in NEURONS[1:])
    return (f"a sink in {sink:.0%} of its heads and a loss of {loss:.2f}, with five others drawn "
            f"anew {whole:.0%} and {least:.2f}")


def shares(found) -> str:
    """The heads with a sink after the training, in words."""
    said = [f"{share(found, name):.0%} ({name})" for name in CURES]
    return f"{', '.join(said[:-1])} and {said[-1]}"


def tables(found) -> dict[str, str]:
    return {"retrofit": table(found, CURES + AGAIN), "redrawn": table(found, NEURONS)}


@figures.styled
def draw(found):
    """Share of the heads with a sink, length of the first state and loss, over the steps: cures
    above, redrawn neurons below."""
    figure, rows = figures.new(5.4, 2, 3)
    values = {"heads with a sink": lambda row: row["random"][0]["sink_rate"],
              "length of the first state": lambda row: row["random"][0]["norm_ratio"],
              "loss on held-out text, nats": loss_of}
    for axes, models in zip(rows, (CURES, NEURONS)):
        for axis, (title, value) in zip(axes, values.items()):
            for style, name in zip(figures.STYLES, models):
                figures.track(axis, found[name]["log"], value, label=name, **style | {"ms": 3})
            figures.dress(axis, title, xlabel="step")
            axis.set_ylim(0)
        axes[-1].legend()  # where no curve is
    return figure


def main():
    parser = argparse.ArgumentParser(description="cures built into SmolLM2")
    parser.add_argument("--render", action="store_true", help="only table and figure, of the JSON")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each (2)")
    args = parser.parse_args()
    found = read_json(FILE) if FILE.exists() else {}
    missing = [] if args.render else [name for name in MODELS if name not in found]
    with ProcessPoolExecutor(args.jobs) as pool:
        jobs = {name: pool.submit(retrofit, name) for name in missing}
        for name in bar(jobs, "models"):
            found[name] = jobs[name].result()
            write_json(FILE, found)
    found = read_json(FILE)  # where what is no number has become null
    fill_page(PAGE, tables(found))
    figures.save(FIGURE, draw(found))


if __name__ == "__main__":
    main()
