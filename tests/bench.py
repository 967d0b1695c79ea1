"""How fast is a training step, against what, and what makes it faster?

    python -m tests.bench               # widths 64, 128, 256 on one thread: about 15 minutes
    python -m tests.bench --threads 2   # the same on two, beside what is there
    python -m tests.bench --render      # only the tables of tests/results/speed.md, from the JSON

Every case is trained by `train.train_step` on the same random tokens; only the model differs. The
cases take turns, a quarter of a second each, and a ratio compares neighbours in time: medians over
rounds stand in the tables, with quartiles. On one thread the clock is that of the processor, which
other programs do not move. It tests nothing.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from data import Corpus
from data.common import bar, environment, multiplies_bf16, read_json, write_json
from model import ATTENTIONS, GPT, RMSNorm
from tests.pages import fill_page, markdown

RESULTS = Path(__file__).parent / "results" / "bench.json"
PAGE = RESULTS.with_name("speed.md")
CPU, SLICE, N = torch.device("cpu"), 0.25, 1024  # seconds; of the matrices that set the peak
SHAPES = {
    64: {"size": "tiny"},
    128: {"size": "tiny", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
          "vocab_size": 1024, "seq_len": 128},
    256: {"size": "tiny", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
          "num_attention_heads": 4, "vocab_size": 1024, "seq_len": 128},
}


# ---------------------------------------------------------------- what others write

class Rival(nn.Module):
    """The frame of the two plain models; `positions` are learned where a block does not rotate."""

    def __init__(self, cfg, block, norm, positions):
        super().__init__()
        self.cfg = cfg
        C, V = cfg.hidden_size, cfg.vocab_size
        self.tokens = nn.Embedding(V, C)
        self.positions = nn.Embedding(cfg.max_position_embeddings, C) if positions else None
        self.layers = nn.ModuleList(block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm, self.lm_head = norm(C), nn.Linear(C, V, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets):
        x = self.tokens(idx)
        if self.positions:
            x = x + self.positions(torch.arange(idx.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.unembed(x, targets)

    def unembed(self, x, targets):
        logits = self.lm_head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainBlock(nn.Module):
    """Llama as most people write it: rotation of even and odd halves, four small products each."""

    def __init__(self, cfg):
        super().__init__()
        C, F_, self.H = cfg.hidden_size, cfg.intermediate_size, cfg.num_attention_heads
        self.norm_1, self.norm_2 = RMSNorm(C, 1e-5), RMSNorm(C, 1e-5)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.w1, self.w3 = nn.Linear(C, F_, bias=False), nn.Linear(C, F_, bias=False)
        self.w2 = nn.Linear(F_, C, bias=False)
        D = C // self.H
        frequency = 10000.0 ** (-torch.arange(0, D, 2) / D)
        angle = torch.outer(torch.arange(cfg.max_position_embeddings), frequency)[:, None]
        self.register_buffer("cos", angle.cos())  # (T, 1, D/2)
        self.register_buffer("sin", angle.sin())

    def rotate(self, x):
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = even * self.cos - odd * self.sin, even * self.sin + odd * self.cos
        return torch.stack(turned, dim=-1).flatten(-2).type_as(x)

    def forward(self, x):
        h = self.norm_1(x)
        q, k, v = (w(h).unflatten(-1, (self.H, -1)) for w in (self.wq, self.wk, self.wv))
        q, k, v = (t.transpose(1, 2) for t in (self.rotate(q), self.rotate(k), v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(z.transpose(1, 2).flatten(-2))
        h = self.norm_2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class GPT2Block(nn.Module):
    """GPT-2 as most people write it: LayerNorm, one matrix for q k v, GELU at 4 C, biases."""

    def __init__(self, cfg):
        super().__init__()
        C, self.H = cfg.hidden_size, cfg.num_attention_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.H, -1))
        q, k, v = (t.transpose(1, 2) for t in heads.unbind(2))  # (B, H, T, D)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(z.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class HuggingFace(nn.Module):
    """LlamaForCausalLM of transformers, of the same shape."""

    def __init__(self, cfg):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM
        same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "max_position_embeddings")
        self.cfg, shape = cfg, {name: getattr(cfg, name) for name in same}
        self.llama = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False))
        self.layers = self.llama.model.layers

    def forward(self, idx, targets):
        return self.unembed(self.llama.model(idx).last_hidden_state, targets)

    def unembed(self, x, targets):
        logits = self.llama.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


RIVALS = {"LlamaForCausalLM": HuggingFace,
          "plain Llama": lambda cfg: Rival(cfg, PlainBlock, lambda C: RMSNorm(C, 1e-5), False),
          "nanoGPT-style": lambda cfg: Rival(cfg, GPT2Block, nn.LayerNorm, True)}


# ---------------------------------------------------------------- measuring

def settings(width, attn="softmax"):
    """The run, a corpus of random tokens, and the shape of its model."""
    run = train.resolve(train.Run(attn=attn, **SHAPES[width]))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(run.vocab_size - 1, (10**6,), generator=generator).to(torch.int16)
    corpus = Corpus("random", run.vocab_size, run.vocab_size - 1, train=tokens, val=tokens)
    return run, corpus, train.model_config(run, corpus)


def stepper(width, attn="softmax", rival=None, compiled=False, bf16=False, kernel=False):
    """A function that makes one training step, of our model or of a rival's. `kernel`: attention by
    torch's kernel when compiled too, as rivals do."""
    run, corpus, cfg = settings(width, attn)
    model = RIVALS[rival](cfg) if rival else GPT(cfg)
    train.compile_model(model, compiled, CPU)
    model.fused = kernel or not compiled
    state = SimpleNamespace(run=run, corpus=corpus, model=model, device=CPU, step=0,
                            optimizer=train.make_optimizer(model, run, CPU),
                            batches=torch.Generator().manual_seed(1))
    cast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    return lambda: train.train_step(state, cast)


def fastest() -> str:
    """What train.py chooses with --compile."""
    return "compiled, bf16" if multiplies_bf16(CPU) else "compiled"


def cases(width):
    """{name: a function that does it once}"""
    found = {attn: stepper(width, attn) for attn in ATTENTIONS}
    found["compiled"] = stepper(width, compiled=True)
    if multiplies_bf16(CPU):  # without, it is a hundred times slower
        found["bf16"] = stepper(width, bf16=True)
        found["compiled, bf16"] = stepper(width, compiled=True, bf16=True)
    fast = fastest()
    found[f"{fast}, kernel"] = stepper(width, compiled=True, bf16="bf16" in fast, kernel=True)
    for rival in RIVALS:
        found[rival] = stepper(width, rival=rival)
        found[f"{rival}, {fast}"] = stepper(width, "softmax", rival, True, "bf16" in fast)
    a, b = torch.randn(2, N, N)
    found["peak"] = lambda: a @ b
    return found


def rates(width, rounds, clock):
    """{case: how often a second, in each round}"""
    steps = cases(width)
    for step in bar(steps.values(), f"width {width}, first steps"):
        step()
    found = {name: [] for name in steps}
    for _ in bar(range(rounds), f"width {width}, rounds"):
        for name, step in steps.items():
            step()  # brings its numbers back into the cache
            count, begin = 0, clock()
            while clock() < begin + SLICE:
                step()
                count += 1
            found[name].append(round(count / (clock() - begin), 4))
    return found


def first_step(width) -> float:
    """Seconds of the processor, those of the compiler included, of a first compiled step."""
    step = stepper(width, compiled=True, bf16="bf16" in fastest())
    begin = sum(os.times()[:4])
    step()
    return sum(os.times()[:4]) - begin


def compile_times(width) -> dict:
    """`first_step` in a process of its own, twice: when nothing is kept yet, and when all is."""
    words = [sys.executable, "-m", "tests.bench", "--first-step", str(width)]
    with tempfile.TemporaryDirectory() as kept:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": kept, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        cold, warm = (float(subprocess.check_output(words, env=env)) for _ in range(2))
    return {"cold": round(cold, 1), "warm": round(warm, 1)}


def measure(width, threads, rounds) -> dict:
    torch._dynamo.reset()
    run, _, cfg = settings(width)
    L, C, T, V = cfg.num_hidden_layers, cfg.hidden_size, run.seq_len, cfg.vocab_size
    weights = L * (4 * C * C + 3 * C * cfg.intermediate_size) + C * V  # without the embedding
    clock = time.process_time if threads == 1 else time.perf_counter
    return {"width": C, "layers": L, "vocabulary": V, "T": T, "B": run.batch_size,
            "flops_per_token": 6 * weights + 6 * L * C * T, "fastest": fastest(),
            "compile": compile_times(width), "environment": environment(CPU, threads),
            "rates": rates(width, rounds, clock)}


# ---------------------------------------------------------------- tables

def against(found, a, b):
    """Quartiles of the speed of case a over that of case b, compared within each round."""
    ratios = [x / y for x, y in zip(found["rates"][a], found["rates"][b])]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def table(found):
    """The measurements of one width as Markdown: what was asked for, and every case."""
    rates_, fast, threads = found["rates"], found["fastest"], found["environment"]["threads"]
    tokens = found["T"] * found["B"]
    peak = 2 * N**3 * statistics.median(rates_["peak"])
    title = (
        f"**Width {found['width']}**, {found['layers']} layers, V {found['vocabulary']}, "
        f"T {found['T']}, B {found['B']}; {threads} thread{'s' * (threads > 1)}, "
        f"{len(rates_['softmax'])} rounds. Peak: {peak / 1e9:.0f} GFLOP/s in fp32. First compiled "
        f"step: {found['compile']['cold']:.0f} s, then {found['compile']['warm']:.0f} s.")
    whole = 1.6 if found["width"] > 128 else 1.25
    asked = [(fast, "LlamaForCausalLM", whole), (fast, "plain Llama", whole),
             (fast, "nanoGPT-style", 1.0), ("headnorm", "softmax", 1 / 1.05),
             ("sigmoid", "softmax", 1 / 1.1)]
    same = (f"{fast}, kernel", *(f"{rival}, {fast}" for rival in RIVALS))
    asked += [(fast, other, None) for other in same]
    goals = [(a, b, f"{least:.2f}" if least else "-", f"{against(found, a, b)[1]:.2f}")
             for a, b, least in asked]
    rows = []
    for name in rates_:
        if name != "peak":
            speed = tokens * statistics.median(rates_[name])
            low, middle, high = against(found, name, "softmax")
            share = found["flops_per_token"] * speed / peak
            rows.append((name, f"{speed:,.0f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}",
                         "-" if "GPT" in name else f"{share:.0%}"))
    head = ("case", "tokens/s", "speed over softmax", "quartiles", "share of the peak")
    return "\n\n".join((
        title, markdown(("speed of", "over that of", "asked for", "found"), goals),
        markdown(head, rows)))


def render():
    """Put the tables into speed.md."""
    found = read_json(RESULTS)["shapes"].values()
    fill_page(PAGE, {"speed": "\n\n".join(map(table, found))})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="(1)")
    parser.add_argument("--rounds", type=int, default=15, help="of all cases (15)")
    parser.add_argument("--render", action="store_true", help="only the tables, from the JSON")
    parser.add_argument("--first-step", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.first_step:
        print(first_step(args.first_step))
        return
    if not args.render:
        found = read_json(RESULTS) if RESULTS.exists() else {"shapes": {}}
        for width in SHAPES:
            shape = measure(width, args.threads, args.rounds)
            found["shapes"][f"width {width}, threads {args.threads}"] = shape
            write_json(RESULTS, found)
    render()


if __name__ == "__main__":
    main()
