"""How fast is a training step, beside two others of the same width, depth and number of heads?

    python -m tests.bench            # about 15 minutes; what is in bench.json is not measured again
    python -m tests.bench --render   # only the table of tests/results/speed.md

Every model is trained by `train.train_step` on the same random tokens. They take turns, SLICE
seconds each. One thread is timed by the processor's clock, which other programs do not move.
"""
import time
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from data import Corpus
from data.common import environment, multiplies_bf16
from model import ATTENTIONS, GPT
from tests import runner

FILE, PAGE = runner.RESULTS / "bench.json", runner.RESULTS / "speed.md"
CPU, SLICE, ROUNDS = torch.device("cpu"), 0.25, 12
LARGER = {"num_hidden_layers": 4, "vocab_size": 1024, "seq_len": 128}
SHAPES = {
    64: {},
    128: {"hidden_size": 128, "intermediate_size": 344, **LARGER},
    256: {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, **LARGER},
}


# ---------------------------------------------------------------- the other two

class NanoGPT(nn.Module):
    """GPT-2 in the style of nanoGPT: LayerNorm, GELU, learned positions."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.hidden_size
        self.tokens = nn.Embedding(cfg.vocab_size, C)
        self.positions = nn.Embedding(cfg.max_position_embeddings, C)
        self.layers = nn.ModuleList(NanoBlock(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm, self.lm_head = nn.LayerNorm(C), nn.Linear(C, cfg.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for layer in self.layers:
            x = layer(x)
        return self.unembed(x, targets)

    def unembed(self, x, targets):
        logits = self.lm_head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class NanoBlock(nn.Module):
    """One matrix for q, k and v; a hidden layer of 4 C; biases."""

    def __init__(self, cfg):
        super().__init__()
        C, self.H = cfg.hidden_size, cfg.num_attention_heads
        self.norm_1 = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, C)
        self.norm_2 = nn.LayerNorm(C)
        self.up = nn.Linear(C, 4 * C)
        self.down = nn.Linear(4 * C, C)

    def forward(self, x):
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.H, -1))
        q, k, v = (t.transpose(1, 2) for t in heads.unbind(2))  # (B, H, T, D)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(z.transpose(1, 2).flatten(-2))
        hidden = F.gelu(self.up(self.norm_2(x)))
        return x + self.down(hidden)


class HuggingFace(nn.Module):
    """LlamaForCausalLM of transformers."""

    def __init__(self, cfg):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM
        same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "max_position_embeddings")
        shape = {name: getattr(cfg, name) for name in same}
        self.cfg = cfg
        self.llama = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False))
        self.layers = self.llama.model.layers

    def forward(self, idx, targets):
        return self.unembed(self.llama.model(idx).last_hidden_state, targets)

    def unembed(self, x, targets):
        logits = self.llama.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


OTHERS = {"LlamaForCausalLM": HuggingFace, "nanoGPT-style": NanoGPT}


# ---------------------------------------------------------------- measuring

def settings(width, attn="softmax") -> train.Run:
    return train.resolve(train.Run(attn=attn, size="tiny", **SHAPES[width]))


def stepper(run, build, compiled=False, device=CPU):
    """A function that makes one training step of the model build(cfg), on random tokens."""
    bos = run.vocab_size - 1
    tokens = torch.randint(bos, (10**6,), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(torch.int16)
    corpus = Corpus("random", run.vocab_size, bos, train=tokens, val=tokens)
    model = build(train.model_config(run, corpus)).to(device)
    cast = train.compile_model(model, compiled, device)
    state = runner.training(run, model, corpus, seed=1, device=device)
    return lambda: train.train_step(state, cast)


def fastest() -> str:
    """What `train.py --compile` chooses on a CPU."""
    return "compiled, bf16" if multiplies_bf16(CPU) else "compiled"


def cases(width) -> dict:
    """{name: a function that makes one step}"""
    found = {attn: stepper(settings(width, attn), GPT) for attn in ATTENTIONS}
    found[fastest()] = stepper(settings(width), GPT, compiled=True)
    for name, build in OTHERS.items():
        found[name] = stepper(settings(width), build)
        found[f"{name}, {fastest()}"] = stepper(settings(width), build, compiled=True)
    return found


def measure(width, threads) -> dict:
    """Steps a second of each case, in each round."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    clock = time.process_time if threads == 1 else time.perf_counter
    steps = cases(width)
    rates = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            step()  # compiles in the first round; later it brings the weights into the cache
            count, begin = 0, clock()
            while clock() < begin + SLICE:
                step()
                count += 1
            rates[name].append(round(count / (clock() - begin), 4))
    run = settings(width)
    return {"width": width, "T": run.seq_len, "B": run.batch_size, "fastest": fastest(),
            "environment": environment(CPU, threads), "rates": rates}


PLAN = {("shapes", f"width {width}, threads {threads}"): (measure, width, threads)
        for threads in (1, 2) for width in SHAPES}


# ---------------------------------------------------------------- table

def tables(found) -> dict[str, str]:
    """Thousands of tokens a second, a column for each shape: medians over rounds."""
    shapes = list(found["shapes"].values())
    head = ["thousand tokens a second"]
    for shape in shapes:
        threads = shape["environment"]["threads"]
        head.append(f"C {shape['width']}, {threads} thread{'s' * (threads > 1)}")
    rows = []
    for name in shapes[0]["rates"]:
        speeds = [s["T"] * s["B"] * median(s["rates"][name]) / 1000 for s in shapes]
        label = name if name.startswith(tuple(OTHERS)) else f"ours, {name}"
        rows.append([label, *(f"{speed:.1f}" for speed in speeds)])
    return {"speed": runner.markdown(head, rows)}


if __name__ == "__main__":
    runner.main("bench", __doc__, FILE, PLAN,
                lambda found: runner.fill_page(PAGE, tables(found)), jobs=1)
