"""What a user waits for and what it costs in memory: start-up of the command, and a 500 MB native model on the cpu engine.

    python benchmarks/bench_start.py [--runs N] [--record benchmarks/results/FILE.jsonl]

Each figure is of a whole process, timed from outside, medians and spread over the runs. "First token" is a process that
generates one token with the embedded model, compiled code on disk (the second run and later). The 500 MB model has the
layer shapes of bitnet-b1.58-2B-4T, 30 layers, random weights; its peak memory is the kernel's figure for the process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_decode import machine  # noqa: E402

from bitnet_mlx.api import embedded_model  # noqa: E402
from bitnet_mlx.bench.random_decoder import config_2b, random_decoder  # noqa: E402
from bitnet_mlx.checkpoint.write import write_native  # noqa: E402

COMMAND = [sys.executable, "-m", "bitnet_mlx"]
ONE_TOKEN = ["generate", "--prompt", "def read_config(path):", "--max-tokens", "1", "--backend", "cpu", "--json"]
LIMITS = {"help_s": 0.25, "first_token_s": 1.5}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def timed(arguments: list[str]) -> tuple[float, int, str]:
    """(seconds, peak resident bytes, stdout) of one whole process."""
    start = time.perf_counter()
    child = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"[bench] {' '.join(arguments)} failed with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values), "runs": len(values)}


def write_model(folder: Path) -> None:
    """The 30-layer model as a native folder with the embedded model's tokenizer."""
    config = config_2b(layers=30, vocab_size=3072)
    tokenizer = folder.parent / "tokenizer"
    tokenizer.mkdir()
    for name in TOKENIZER_FILES:
        (tokenizer / name).write_bytes((embedded_model() / name).read_bytes())
    source = {
        "model_type": "bitnet", "architectures": ["BitNetForCausalLM"], "hidden_act": "relu2", "rope_theta": 500000.0,
        "tie_word_embeddings": True, "eos_token_id": 0, "torch_dtype": "bfloat16",
    }  # fmt: skip
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"):  # fmt: skip
        source[name] = getattr(config, name)
    write_native(random_decoder(config), source, folder, copy_from=tokenizer)


def start_up(runs: int) -> dict[str, Any]:
    """--help, --version and the first token of the embedded model."""
    timed(ONE_TOKEN)  # compiles, if that is still to be done
    return {
        "help_s": spread([timed(["--help"])[0] for _ in range(runs)]),
        "first_token_s": spread([timed(ONE_TOKEN)[0] for _ in range(runs)]),
    }


def large_model(runs: int) -> dict[str, Any]:
    """Peak memory and speed of a 500 MB model, beside its limit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        # In a process of its own: a child's peak memory begins with what its parent holds.
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(folder,))
        writer.start()
        writer.join()
        size = (folder / "model.safetensors").stat().st_size
        arguments = ["generate", "--model", str(folder), "--prompt", "def f(x):", "--max-tokens", "16", "--temp", "0"]
        results = [timed([*arguments, "--backend", "cpu", "--json"]) for _ in range(runs)]
    records = [json.loads(output) for _, _, output in results]
    return {
        "file_bytes": size,
        "limit_bytes": int(1.15 * size + 250e6),
        "peak_rss_bytes": spread([peak for _, peak, _ in results]),
        "reported_peak_bytes": spread([r["peak_memory_bytes"] for r in records]),
        "load_s": spread([r["load_s"] for r in records]),
        "generation_tps": spread([r["generation_tps"] for r in records]),
    }


def main() -> None:
    """Measure, print a table, and end with the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    record = {
        "benchmark": "start", **machine(), "start_up": start_up(args.runs), "large_model": large_model(min(args.runs, 3)),
        "limits": LIMITS,
    }  # fmt: skip
    for name, limit in LIMITS.items():
        figure = record["start_up"][name]
        print(f"{name:<14} {figure['median']:.3f} ({figure['min']:.3f} to {figure['max']:.3f}), limit {limit}")
    large = record["large_model"]
    print(f"500 MB model   file {large['file_bytes'] / 1e6:.0f} MB, peak RSS {large['peak_rss_bytes']['max'] / 1e6:.0f} MB, "
          f"limit {large['limit_bytes'] / 1e6:.0f} MB; load {large['load_s']['median']:.2f} s, "
          f"{large['generation_tps']['median']:.1f} tokens/s")  # fmt: skip
    line = json.dumps(record)
    if args.record:
        with args.record.open("a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
