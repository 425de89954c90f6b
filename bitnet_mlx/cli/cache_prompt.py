"""bitnet-mlx cache-prompt: a prompt's keys and values in a file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from bitnet_mlx.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", "-p", required=True, metavar="TEXT|-", help="the text to compute; - reads it from stdin"
    )
    options.add_escape_argument(parser)
    options.add_prompt_cache_argument(parser, required=True)
    options.add_model_arguments(parser)
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--max-kv-size", type=int, metavar="N", help="limit the context to N tokens (default: the model's)"
    )
    options.add_template_arguments(group)


def run(args: argparse.Namespace) -> int:
    options.unescape(args)
    prompt = options.prompt_text("cache-prompt", args.prompt)
    options.check_template(args)
    from bitnet_mlx import load
    from bitnet_mlx.generation import prompt_ids, stream_generate
    from bitnet_mlx.generation.prompt_cache import Said, check_place, save_prompt
    from bitnet_mlx.generation.stream import check_context

    check_place(Path(args.prompt_cache_file))
    start = time.perf_counter()
    model, tokenizer = load(args.model, **options.load_arguments(args))
    load_s = time.perf_counter() - start
    ids = prompt_ids(tokenizer, prompt, args.system_prompt, args.ignore_chat_template)
    raw = args.ignore_chat_template or tokenizer.chat_template is None
    cache = model.make_cache(check_context(model, args.max_kv_size))
    progress = options.prefill_progress(args.verbose)
    first = next(
        stream_generate(model, tokenizer, ids, 1, max_kv_size=args.max_kv_size, cache=cache, progress=progress)
    )
    name = args.model or "embedded"
    said = Said(prompt, system_prompt=args.system_prompt, raw=raw)
    size = save_prompt(args.prompt_cache_file, model, cache, ids, said, name)
    record = {
        "file": args.prompt_cache_file, "bytes": size, "prompt_tokens": len(ids), "prompt_tps": first.prompt_tps,
        "load_s": load_s, "peak_memory_bytes": first.peak_memory_bytes, "backend": model.name, "model": name,
    }  # fmt: skip
    if args.json:
        print(json.dumps(record))
        return 0
    print("{file}: {prompt_tokens} tokens, {bytes} bytes".format(**record))
    print(f"[{model.name}] load {load_s:.2f} s, prompt at {first.prompt_tps:.1f}/s", file=sys.stderr)
    return 0
