"""bitnet-mlx lora: adapters trained over packed weights, with mlx-lm's names of files and options."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bitnet_mlx.cli.training import add_loop, add_numbers, options, watched
from bitnet_mlx.errors import ConfigError

_NUMBERS = (
    ("--num-layers", int, "N", "how many of the last layers get an adapter, -1 for all (default 16, or all)"),
    ("--rank", int, "R", "(default 8)"),
    ("--scale", float, "S", "factor on the adapter's output (default 20)"),
    ("--dropout", float, "P", "on the adapter's input (default 0)"),
    ("--max-seq-length", int, "L", "tokens a sample, at most the model's context (default 2048)"),
    ("--steps-per-eval", int, "N", "steps between looks at valid.jsonl (default 200)"),
    ("--val-batches", int, "N", "batches of valid.jsonl to look at, -1 for all (default 25)"),
    ("--test-batches", int, "N", "batches of test.jsonl to look at (default 500)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lora`; those left out keep LoraOptions' defaults."""
    add = parser.add_argument
    formats = "messages, prompt and completion, or text, a JSON object a line"
    add("-c", "--config", type=Path, metavar="FILE", help="YAML of options, as mlx-lm's; flags go before it")
    add("--data", type=Path, metavar="DIR", help=f"folder of train, valid and test.jsonl: {formats}")
    add("--model", metavar="DIR|REPO|GGUF", help="the base, left as it is (default: the model in the package)")
    add("--adapter-path", type=Path, metavar="DIR", help="where the adapter is (default: adapters)")
    add("--train", action="store_true", help="train the adapter on train.jsonl")
    add("--test", action="store_true", help="loss and perplexity of test.jsonl, with the adapter")
    add("--fine-tune-type", choices=["lora", "dora"], help="(default lora)")
    add(
        "--keys", nargs="+", metavar="NAME", help="linears to adapt, such as self_attn.q_proj (default: all of a layer)"
    )
    add("--mask-prompt", action="store_true", help="learn answers and completions alone")
    add("--long-samples", choices=["truncate", "drop"], help="what to do with longer samples (default truncate)")
    text = "several short samples a row, none of which sees another; --batch-size counts rows"
    add("--pack", action="store_true", help=text)
    add("--resume-adapter-file", type=Path, metavar="FILE", help="start from this adapters.safetensors")
    add_numbers(add, _NUMBERS)
    add("--backend", choices=["auto", "metal", "cuda", "mlx"], default="auto", help="what computes (default: auto)")
    add("--dtype", choices=["float32", "bfloat16"], help="of what passes between layers (default: the model's own)")
    add_loop(parser, batch_size=4, learning_rate=1e-5)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train or test an adapter, and return the command's record."""
    from bitnet_mlx.backends import choose_on_mlx
    from bitnet_mlx.train.lora_config import read_options
    from bitnet_mlx.train.lora_options import LoraOptions

    set_by_file = {} if args.config is None else read_options(args.config)
    if args.data is None and "data" not in set_by_file:
        raise ConfigError("[lora] nothing to learn from; give --data DIR, or data in the file of --config")
    chosen = options(args, LoraOptions, set_by_file)
    backend = choose_on_mlx(args.backend).name

    from bitnet_mlx import load
    from bitnet_mlx.models.decoder_mlx import MlxModel
    from bitnet_mlx.train.lora import lora

    trained = None if chosen.train else chosen.adapter_path
    model, tokenizer = load(chosen.model, backend=backend, dtype=args.dtype, adapter_path=trained)
    assert isinstance(model, MlxModel)
    return watched(lora, chosen, model, tokenizer)


def run(args: argparse.Namespace) -> int:
    record = train(args)
    if "rank" in record:
        return 0
    if args.json:
        print(json.dumps(record))
        return 0
    losses = ("first_loss", "loss", "valid_loss_before", "valid_loss", "test_loss", "test_perplexity")
    shown = [f"{name.replace('_', ' ')} {record[name]:.4f}" for name in losses if record.get(name) is not None]
    counts = [f"{record[k]} {k.replace('_', ' ')}" for k in record if k.endswith(("_long", "_dropped")) and record[k]]
    print(f"{record['adapter_path']}: {', '.join(shown + counts)}")
    return 0
