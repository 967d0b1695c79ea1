"""How fast is a training step, against what, and what made it so: `python -m tests.bench`.

Everything is measured in one process, in rounds: each case runs for a moment, then the next, and
again from the start. A ratio is taken within a round, so whatever else the machine does meets both
sides; the table gives the median over rounds and, as spread, the quartiles. Times no test.

A step is what train.py does: draw a batch, forward, backward, clip, AdamW. Tokens are random.
The share of the peak counts, for each token of a training step,

    6 P + 6 L C T   floating point operations,

P the weights of all matrices but the embedding (2 for forward, 4 for backward), and causal
attention: of 12 L C T for whole squares (q k' and the sum over values) half is needed. The peak is
that of a 1024 x 1024 matrix product on the same threads, measured in the same rounds.
"""

import argparse
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import model as decoder
import train
from data.border import fill, read_json, write_atomically, write_json
from model import ATTENTIONS, GPT, Attention, Config, RMSNorm, rope_turns, rotate, untapped

RESULTS = Path(__file__).parent / "results" / "bench.json"
PAGE = RESULTS.with_name("speed.md")
KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "seq_len",
    "batch_size",
)
SHAPES = {
    "tiny": {key: train.SIZES["tiny"][key] for key in KEYS},
    "wide": dict(zip(KEYS, (128, 344, 4, 2, 1024, 128, 16))),
}


# ---------------------------------------------------------------- the baseline


class BaselineBlock(nn.Module):
    """GPT-2 as most people write it: LayerNorm, one matrix for q k v, GELU at 4 C, biases."""

    def __init__(self, C, H):
        super().__init__()
        self.H = H
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.c_out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.H, -1).transpose(1, 2)
            for t in self.c_attn(self.ln_1(x)).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class Baseline(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(s["vocab_size"], s["hidden_size"]), nn.Embedding(
            s["seq_len"], s["hidden_size"]
        )
        self.blocks = nn.Sequential(
            *(
                BaselineBlock(s["hidden_size"], s["num_attention_heads"])
                for _ in range(s["num_hidden_layers"])
            )
        )
        self.ln_f = nn.LayerNorm(s["hidden_size"])
        self.lm_head = nn.Linear(s["hidden_size"], s["vocab_size"], bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return logits, F.cross_entropy(
            logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1
        )


def baseline(s, corpus, compiled=False):
    """Its usual loop: windows stacked one by one, AdamW as torch gives it."""
    model = Baseline(s)
    forward = torch.compile(model) if compiled else model
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    T, B, count = s["seq_len"], s["batch_size"], 0

    def step():
        nonlocal count
        ix = torch.randint(len(corpus.train) - T, (B,))
        x = torch.stack([corpus.train[i : i + T].long() for i in ix])
        y = torch.stack([corpus.train[i + 1 : i + 1 + T].long() for i in ix])
        _, loss = forward(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        count += 1
        if count % 10 == 0:
            loss.item()

    return step


# ---------------------------------------------------------------- our step, and changes of it


class FusedAttention(Attention):
    """One matrix for q, k and v, and no taps."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size, bias=False)
        del self.q_proj, self.k_proj, self.v_proj

    def forward(self, x, rope, bias, tap):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.H, self.D).permute(2, 0, 3, 1, 4)
        q, k = rotate(torch.stack((q, k)), *rope)
        return self.o_proj(self.mix(q, k, v, x, bias, tap).reshape(B, T, C))


class FusedMLP(nn.Module):
    """One matrix for gate and up, and no taps."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_up = nn.Linear(cfg.hidden_size, 2 * cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x, tap):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def rotate_by_halves(x, cos, sin):
    """`model.rotate` as most people write it: four products of halves and a concatenation."""
    (a, b), cos, sin = x.float().chunk(2, dim=-1), *(t.chunk(2, dim=-1)[1] for t in (cos, sin))
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def norm_by_length(self, x):
    """`model.RMSNorm` with one reduction for the sum of squares, instead of square and mean."""
    y = x.float()
    mean_square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square() / y.shape[-1]
    return self.weight * (y * torch.rsqrt(mean_square + self.eps)).type_as(x)


def norm_by_torch(self, x):
    return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def our_model(s, attn="softmax", fused_qkv=False, fused_mlp=False):
    cfg = Config(
        **{key: s[key] for key in KEYS[:5]}, max_position_embeddings=s["seq_len"], attn=attn
    )
    model = GPT(cfg)
    for layer in model.layers:
        if fused_qkv:
            layer.self_attn = FusedAttention(cfg)
        if fused_mlp:
            layer.mlp = FusedMLP(cfg)
    return model


def split_loss(model, x, y, chunks=1, head_dtype=torch.float32):
    """The forward pass with the loss over pieces of the batch, or the head in another dtype."""
    rope, h = rope_turns(model.rope_freq, x.shape[1]), model.embed_tokens(x)
    for layer in model.layers:
        h = layer(h, rope, None, untapped)
    total = 0.0
    for part, target in zip(model.norm(h).flatten(0, 1).chunk(chunks), y.flatten().chunk(chunks)):
        with torch.autocast("cpu", torch.bfloat16, enabled=head_dtype == torch.bfloat16):
            logits = model.lm_head(part)
        total = total + F.cross_entropy(logits.float(), target, reduction="sum")
    return None, total / y.numel()


def ours(
    s,
    corpus,
    attn="softmax",
    bf16=False,
    compiled=False,
    optimizer={},
    clip={},
    gather=None,
    set_to_none=True,
    loss={},
    turn=rotate,
    norm=RMSNorm.forward,
    precision="highest",
    **shape,
):
    """A step of train.py with everything at its default but what the keywords change."""
    model = our_model(s, attn, **shape)
    run = train.resolve(train.Run(attn=attn))
    adamw = train.make_optimizer(model, run, torch.device("cpu"))
    if optimizer:
        adamw = torch.optim.AdamW(adamw.param_groups, lr=run.lr, betas=(0.9, 0.95), **optimizer)
    forward = (
        torch.compile(model)
        if compiled
        else (lambda x, y: split_loss(model, x, y, **loss)) if loss else model
    )
    cast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    draw = torch.Generator().manual_seed(1)
    batch = gather or (lambda: corpus.batch(s["batch_size"], s["seq_len"], draw, bos=run.bos))
    count = 0

    def step():
        nonlocal count
        x, y = batch()
        torch.set_float32_matmul_precision(precision)
        with cast, patch.object(decoder, "rotate", turn), patch.object(RMSNorm, "forward", norm):
            value = forward(x, y)[1]
        adamw.zero_grad(set_to_none=set_to_none)
        value.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, **clip)
        adamw.step()
        torch.set_float32_matmul_precision("highest")
        count += 1
        if count % 10 == 0:
            value.item()

    return step


def index_table(s, corpus):
    """Batches by an (n, T + 1) table of indices instead of a view of all windows."""
    draw, T, B = torch.Generator().manual_seed(1), s["seq_len"], s["batch_size"]

    def batch():
        starts = torch.randint(len(corpus.train) - T - 1, (B,), generator=draw)
        tokens = corpus.train[starts[:, None] + torch.arange(T + 1)].long()
        return tokens[:, :-1], tokens[:, 1:]

    return batch


def product(dtype, n=1024):
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    return lambda: a @ b


def cases(s, corpus, threads, with_compile):
    """{name: (what makes the step, threads)}; the first is what all others are compared with."""
    bf16 = torch.cpu._is_avx512_bf16_supported()
    found = (
        {"softmax": {}}
        | {attn: dict(attn=attn) for attn in ATTENTIONS[1:]}
        | {
            "AdamW not fused": dict(optimizer=dict(fused=False)),
            "AdamW foreach": dict(optimizer=dict(foreach=True)),
            "clip foreach": dict(clip=dict(foreach=True)),
            "no clipping": dict(clip=None),
            "gradients zeroed, not freed": dict(set_to_none=False),
            "batch by index table": dict(gather=index_table(s, corpus)),
            "rotation by halves": dict(turn=rotate_by_halves),
            "RMSNorm by one reduction": dict(norm=norm_by_length),
            "RMSNorm by F.rms_norm": dict(norm=norm_by_torch),
            "q k v in one matrix": dict(fused_qkv=True),
            "gate and up in one matrix": dict(fused_mlp=True),
            "loss in 4 chunks": dict(loss=dict(chunks=4)),
        }
    )
    if bf16:
        found |= {
            "bf16 autocast": dict(bf16=True),
            "output matrix bf16": dict(loss=dict(head_dtype=torch.bfloat16)),
            "products inside in bf16": dict(precision="medium"),
        }
    if with_compile:
        found |= {"compile": dict(compiled=True)} | (
            {"compile, bf16": dict(compiled=True, bf16=True)} if bf16 else {}
        )
    made = {
        name: ((lambda how=how: ours(s, corpus, **how)), threads) for name, how in found.items()
    }
    made["baseline"] = (lambda: baseline(s, corpus)), threads
    if with_compile:
        made["baseline, compile"] = (lambda: baseline(s, corpus, compiled=True)), threads
    for other in sorted({1, 2, os.cpu_count() or 1} - {threads}):
        if other <= (os.cpu_count() or 1):
            made[f"{other} thread{'s' * (other > 1)}"] = (lambda: ours(s, corpus)), other
    made["peak fp32"] = (lambda: product(torch.float32)), threads
    if bf16:
        made["peak bf16"] = (lambda: product(torch.bfloat16)), threads
    return made


# ---------------------------------------------------------------- measuring


def measure(made, seconds):
    """{name: calls per second in each round} and {name: seconds that the first call took}."""
    steps, first, rates = {}, {}, {name: [] for name in made}
    for name, (make, threads) in made.items():
        torch.set_num_threads(threads)
        start = time.perf_counter()
        steps[name] = make()
        steps[name]()
        first[name] = time.perf_counter() - start
        for _ in range(3):
            steps[name]()
    rounds = max(5, round(seconds / len(made) / 0.25))
    for _ in range(rounds):
        for name, step in steps.items():
            torch.set_num_threads(made[name][1])
            step()
            calls, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < 0.25:
                step()
                calls += 1
            rates[name].append(calls / passed)
    return rates, first


def middle(values):
    """[lower quartile, median, upper quartile]"""
    return statistics.quantiles(values, n=4, method="inclusive")


def bench(shape, seconds, threads, with_compile):
    """Measure one shape -> a row for each case, and what the shares of the peak are made of."""
    s = SHAPES[shape]
    stream = torch.randint(
        s["vocab_size"] - 1, (10**6,), generator=torch.Generator().manual_seed(0)
    ).to(torch.int16)
    corpus = data.Corpus("random", s["vocab_size"], s["vocab_size"] - 1, train=stream, val=stream)
    rates, first = measure(cases(s, corpus, threads, with_compile), seconds)
    model = our_model(s)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name
    )
    flops = 6 * matrices + 6 * s["num_hidden_layers"] * s["hidden_size"] * s["seq_len"]
    tokens, rows = s["batch_size"] * s["seq_len"], {}
    for name, values in rates.items():
        if name.startswith("peak"):
            rows[name] = {"gflops": [round(2 * 1024**3 * v / 1e9, 1) for v in middle(values)]}
            continue
        rows[name] = {
            "tokens_per_second": [round(tokens * v) for v in middle(values)],
            "ratio": [
                round(v, 3) for v in middle([a / b for a, b in zip(values, rates["softmax"])])
            ],
            "first_step_seconds": round(first[name], 2),
        }
    for name, peak in (
        ("softmax", "peak fp32"),
        ("bf16 autocast", "peak bf16"),
        ("compile", "peak fp32"),
        ("compile, bf16", "peak bf16"),
    ):
        if name in rows and peak in rows:
            share = [
                tokens * flops * a / (2 * 1024**3 * b) for a, b in zip(rates[name], rates[peak])
            ]
            rows[name]["share_of_peak"] = [round(v, 3) for v in middle(share)]
    return {
        "shape": s,
        "parameters": parameters,
        "flops_per_token": flops,
        "rounds": len(rates["softmax"]),
        "cases": rows,
    }


def table(found):
    """The measurements of one shape as Markdown."""
    s, rows = found["shape"], found["cases"]
    out = [
        f"width {s['hidden_size']}, {s['num_hidden_layers']} layers, V {s['vocab_size']}, "
        f"T {s['seq_len']}, B {s['batch_size']}: "
        f"{found['parameters']:,} parameters, {found['rounds']} rounds",
        "",
        "| case | tokens/s | against softmax | quartiles | share of peak |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "gflops" in row:
            out.append(
                f"| {name} | {row['gflops'][1]:,.0f} GFLOP/s | | "
                f"{row['gflops'][0]:,.0f} to {row['gflops'][2]:,.0f} | |"
            )
        else:
            share = f"{row['share_of_peak'][1]:.0%}" if "share_of_peak" in row else ""
            low, mid, high = row["ratio"]
            out.append(
                f"| {name} | {row['tokens_per_second'][1]:,} | {mid:.2f} | "
                f"{low:.2f} to {high:.2f} | {share} |"
            )
    return "\n".join(out)


def render():
    """Put the tables into speed.md."""
    found = read_json(RESULTS)["shapes"].values()
    text = fill(PAGE.read_text(encoding="utf-8"), {"speed": "\n\n".join(map(table, found))})
    write_atomically(PAGE, lambda part: part.write_text(text, encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=180, help="of measuring, for each shape (default: 180)"
    )
    parser.add_argument(
        "--shape", choices=list(SHAPES), action="append", help="only this one (default: all)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=min(os.cpu_count() or 1, 4),
        help="(default: the cores, at most 4)",
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="leave torch.compile out: it takes a minute to start",
    )
    args = parser.parse_args()
    result = {
        "environment": train.environment(torch.device("cpu"), args.threads),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "shapes": {},
    }
    for shape in args.shape or SHAPES:
        torch._dynamo.reset()
        found = result["shapes"][shape] = bench(
            shape, args.seconds, args.threads, not args.no_compile
        )
        print(f"{shape}: {table(found)}\n", flush=True)
    write_json(RESULTS, result)
    render()
    print(f"written to tests/results/{RESULTS.name} and {PAGE.name}")


if __name__ == "__main__":
    main()
