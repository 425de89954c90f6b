"""How fast checkpoints of bitnet-b1.58-2B-4T's shape convert, and what that takes in memory.

    python benchmarks/bench_convert.py [--formats words2,...] [--runs N] [--cold] [--record benchmarks/results/FILE.jsonl]

Two random checkpoints are made on the disk: bfloat16 master weights (4.8 GB) and Hugging Face's packed layout (1.2 GB).
Each is converted by whole processes of `bitnet-mlx convert`, timed from outside; peak memory is the kernel's figure, mapped
pages counted. --cold drops a source's pages from the system's cache before each run. `inspect` is timed on what there is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_decode import machine  # noqa: E402
from bench_start import TOKENIZER_FILES, spread, timed  # noqa: E402

from bitnet_mlx.api import embedded_model  # noqa: E402
from bitnet_mlx.bench.random_decoder import config_2b  # noqa: E402
from bitnet_mlx.checkpoint.safetensors_writer import Pending, pending, write_safetensors  # noqa: E402
from bitnet_mlx.formats.dense import float32_to_bfloat16  # noqa: E402

LIMITS = {
    "masters": {"mb_per_s": 150.0, "peak_rss_bytes": 1.5e9},
    "packed": {"seconds": 10.0, "peak_rss_bytes": 1.0e9},
}
INSPECT_LIMIT_S = 1.0
STORAGE = {"masters": "online", "packed": "offline"}


def make(folder: Path, kind: str, layers: int) -> None:
    """A checkpoint: every tensor a stretch of one pool of random values, each beginning elsewhere."""
    config = config_2b(layers=layers)
    rng = np.random.default_rng(0)
    pool = float32_to_bfloat16(rng.standard_normal(1 << 25).astype(np.float32) * np.float32(0.02))
    four = np.array(
        [a | b << 2 | c << 4 | d << 6 for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
    )
    bytes_ = four.astype(np.uint8)[rng.integers(0, 81, 1 << 24)]

    def stretches(source: np.ndarray, size: int) -> Iterator[np.ndarray]:
        while size:
            start = int(rng.integers(0, source.size // 2))
            part = source[start : start + min(size, 1 << 22)]
            size -= part.size
            yield part

    def matrix(name: str, shape: tuple[int, int], dtype: str, source: np.ndarray) -> Pending:
        return Pending(name, dtype, shape, lambda: stretches(source, shape[0] * shape[1]))

    tensors = [matrix("model.embed_tokens.weight", (config.vocab_size, config.hidden_size), "BF16", pool)]
    one = float32_to_bfloat16(np.ones(config.intermediate_size, np.float32))
    norms = {"model.norm": config.hidden_size}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        norms |= {f"{at}.{name}": size for name, size in config.norm_sizes().items()}
        for name, (n, k) in config.linear_shapes().items():
            if kind == "masters":
                tensors.append(matrix(f"{at}.{name}.weight", (n, k), "BF16", pool))
            else:
                tensors.append(matrix(f"{at}.{name}.weight", (n // 4, k), "U8", bytes_))
                tensors.append(pending(f"{at}.{name}.weight_scale", one[:1], "BF16"))
    tensors += [pending(f"{name}.weight", one[:size], "BF16") for name, size in norms.items()]
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config_json(config, kind)))
    for name in TOKENIZER_FILES:
        shutil.copyfile(embedded_model() / name, folder / name)


def config_json(config: Any, kind: str) -> dict[str, Any]:
    """As the model's own."""
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "hidden_act")  # fmt: skip
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": STORAGE[kind]}
    return {**{name: getattr(config, name) for name in names}, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "quantization_config": quantization}  # fmt: skip


def drop_cache(path: Path) -> None:
    """Pages of a file leave the system's cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(source: Path, kind: str, form: str, runs: int, cold: bool) -> dict[str, Any]:
    """One source to one format, several times."""
    target = source.parent / ("out.gguf" if form.startswith("gguf") else "out")
    times, peaks, last = [], [], {}
    for _ in range(runs):
        if cold:
            drop_cache(source / "model.safetensors")
        arguments = [
            "convert",
            "--hf-path",
            str(source),
            "--mlx-path",
            str(target),
            "--format",
            form,
            "--json",
            "--force",
        ]
        seconds, peak, output = timed(arguments)
        times.append(seconds)
        peaks.append(peak)
        last = json.loads(output.splitlines()[-1])
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    return {
        "source": kind, "format": form, "page_cache": "cold" if cold else "warm", "seconds": spread(times),
        "mb_per_s": last["bytes_in"] / 1e6 / float(np.median(times)), "peak_rss_bytes": spread(peaks),
        "bytes_in": last["bytes_in"], "bytes_out": last["bytes_out"], "bits_per_weight": last["bits_per_weight"],
        "verified": last["verified"],
    }  # fmt: skip


def show(figure: dict[str, Any]) -> None:
    """One line of the table."""
    s, peak = figure["seconds"], figure["peak_rss_bytes"]
    print(f"{figure['source']:<8} -> {figure['format']:<11} {figure['page_cache']:<5} {s['median']:6.2f} s "
          f"({s['min']:.2f} to {s['max']:.2f}), {figure['mb_per_s']:6.0f} MB/s, peak RSS {peak['max'] / 1e6:5.0f} MB, "
          f"{figure['bytes_in'] / 1e9:.2f} -> {figure['bytes_out'] / 1e9:.2f} GB", flush=True)  # fmt: skip


def measure(args: argparse.Namespace, scratch: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every conversion and inspection."""
    figures, inspections = [], {}
    for kind in LIMITS:
        # In a process of its own: a child's peak memory begins with what its parent holds.
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(scratch / kind, kind, args.layers))
        maker.start()
        maker.join()
        for form in args.formats:
            for cold in (False, True) if args.cold else (False,):
                figures.append(convert(scratch / kind, kind, form, args.runs, cold))
                show(figures[-1])
        inspections[kind] = spread([timed(["inspect", str(scratch / kind), "--json"])[0] for _ in range(args.runs)])
        print(f"inspect {kind}: {inspections[kind]['median']:.2f} s, limit {INSPECT_LIMIT_S}", flush=True)
        shutil.rmtree(scratch / kind)
    return figures, inspections


def main() -> None:
    """Measure, print a table, and end with the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["words2"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where 7 GB of files may lie for a while (default: the system's)")
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        figures, inspections = measure(args, Path(name))
    load = os.getloadavg()[0]
    record = {"benchmark": "convert", **machine(), "layers": args.layers, "load_average": load, "conversions": figures,
              "inspect_s": inspections, "limits": {**LIMITS, "inspect_s": INSPECT_LIMIT_S}}  # fmt: skip
    line = json.dumps(record)
    if args.record:
        with args.record.open("a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
