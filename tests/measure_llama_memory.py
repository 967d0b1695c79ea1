"""Does opening a checkpoint need more memory than its file?

    python -m tests.measure_llama_memory [--layers 2 6] [--tokens 16] [--probe-tokens 512]

Writes synthetic bf16 checkpoints with the widths of Llama-3-8B and fewer layers, opens each with
`GPT.from_llama` in a fresh process, runs one forward pass that touches every weight, then measures the
whole chain (`probe.links`) on 2 windows of 512 tokens, and records the peaks of the resident memory. Since all tensors are as large as the real ones, only the number of layers
is extrapolated. Files are removed afterwards; results go to tests/results/llama_memory.json.
"""

import argparse
import json
import os
import platform
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import probe
from model import GPT, Config

HERE = Path(__file__).parent
GB = 1e9


def write_checkpoint(folder: Path, layers: int, shard_bytes=2e9) -> int:
    """A sharded bf16 checkpoint of small random weights, written piece by piece -> bytes of its files."""
    raw = {**json.loads((HERE / "llama_configs" / "Llama-3-8B.json").read_text()), "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        shapes = {n if n == "lm_head.weight" else f"model.{n}": p.shape for n, p in GPT(Config.from_hf(raw)).named_parameters()}
    shards, room = [], 0
    for name, shape in shapes.items():
        if room < shape.numel() * 2:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= shape.numel() * 2
    block = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().view(torch.int16).numpy().tobytes()
    total, weight_map = 0, {}
    for i, names in enumerate(shards):
        header, offset = {}, 0
        for name in names:
            end = offset + shapes[name].numel() * 2
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = folder / f"model-{i + 1:05}.safetensors"
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            while offset:
                offset -= file.write(block[:offset])
        total += path.stat().st_size
        weight_map.update(dict.fromkeys(names, path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def resident() -> float:
    """GB of this process that are in memory now, mapped file pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GB


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def child(folder: str, tokens: int, probe_tokens: int):
    torch.set_num_threads(1)
    out = {"start_gb": resident()}
    start = time.perf_counter()
    gpt = GPT.from_llama(folder)
    out |= {"open_seconds": time.perf_counter() - start, "opened_gb": resident(), "peak_after_open_gb": peak()}
    start = time.perf_counter()
    with torch.no_grad():
        logits, _ = gpt(torch.arange(tokens)[None])
        gpt.embed_tokens.weight.view(torch.int16).max()  # reads the rows that no token has touched
    out |= {"forward_seconds": time.perf_counter() - start, "peak_gb": peak(), "finite": bool(torch.isfinite(logits).all()),
            "parameters": sum(p.numel() for p in gpt.parameters()), "dtype": str(logits.dtype)}
    start = time.perf_counter()
    probe.links(gpt, torch.randint(gpt.cfg.vocab_size, (2, probe_tokens), generator=torch.Generator().manual_seed(0)))
    out |= {"probe_seconds": time.perf_counter() - start, "probe_peak_gb": peak()}
    print(json.dumps(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 6], help="layers of the two checkpoints (default: 2 6)")
    parser.add_argument("--tokens", type=int, default=16, help="length of the forward pass (default: 16)")
    parser.add_argument("--probe-tokens", type=int, default=512, help="length of the windows that are probed (default: 512)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.tokens, args.probe_tokens)
    rows = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            size = write_checkpoint(Path(folder), layers) / GB
            run = subprocess.run([sys.executable, "-m", "tests.measure_llama_memory", "--child", folder, "--tokens", str(args.tokens),
                                  "--probe-tokens", str(args.probe_tokens)],
                                 cwd=HERE.parent, capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr)
        row = {"layers": layers, "file_gb": size, **json.loads(run.stdout)}
        row["beyond_file_gb"] = row["peak_gb"] - size
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        rows.append(row)
    a, b = rows
    full = 8_030_261_248 * 2 / GB
    slopes = {key: (b[key] - a[key]) / (b["file_gb"] - a["file_gb"]) for key in ("peak_gb", "probe_peak_gb")}
    whole = {key: b[key] + slope * (full - b["file_gb"]) for key, slope in slopes.items()}
    result = {
        "command": f"python -m tests.measure_llama_memory --layers {a['layers']} {b['layers']} --tokens {args.tokens} "
                   f"--probe-tokens {args.probe_tokens}",
        "rows": rows,
        "formula": "peak_gb = last peak + slope * (file_gb - last file_gb)",
        "slope": slopes,
        "llama_3_8b": {"file_gb": full, **whole, "beyond_file_gb": whole["peak_gb"] - full},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "safetensors": __import__("safetensors").__version__, "system": platform.system()},
    }
    target = HERE / "results" / "llama_memory.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["llama_3_8b"]), "slopes", slopes, "->", target.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
