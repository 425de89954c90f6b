"""bitnet-mlx generate: one prompt, one text."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from bitnet_mlx.cli import grammar, options, profiling, speculation

if TYPE_CHECKING:
    from bitnet_mlx.generation import Completion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", "-p", required=True, metavar="TEXT|-", help="the prompt; - reads it from stdin")
    options.add_model_arguments(parser)
    options.add_generation_arguments(parser)
    options.add_escape_argument(parser)
    options.add_prompt_cache_argument(parser)
    grammar.add_arguments(parser)
    speculation.add_arguments(parser)
    profiling.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    options.unescape(args)
    prompt = options.prompt_text("generate", args.prompt)
    options.check(args)
    grammar.check(args)
    speculation.check(args)
    profiling.check(args)
    from bitnet_mlx import load
    from bitnet_mlx.generation import Completion, stream_generate

    start = time.perf_counter()
    model, tokenizer = load(args.model, **options.load_arguments(args))
    load_s = time.perf_counter() - start
    sampling = options.sampling_config(args, tokenizer)
    ids, cache = _start(args, model, tokenizer, prompt)
    stream = stream_generate(
        model,
        tokenizer,
        ids,
        args.max_tokens,
        sampling=grammar.sampler(args, model, tokenizer, sampling),
        stop=args.stop,
        max_kv_size=args.max_kv_size,
        cache=cache,
        speculation=speculation.make(args, model, tokenizer),
        progress=options.prefill_progress(args.verbose),
    )
    if args.profile:
        stream = profiling.watched(stream, args, model, ids, load_s, sampling)
    if args.json:
        completion = Completion.of(stream)
        origin = {"load_s": load_s, "backend": model.name, "model": args.model or "embedded"}
        print(json.dumps({**completion.record(), **origin}))
        return 0
    try:
        completion = Completion.of(options.shown(stream))
    except KeyboardInterrupt:
        options.show("\n")
        raise
    options.show("\n")
    print(statistics(completion, load_s, model.name), file=sys.stderr)
    return 0


def _start(args: argparse.Namespace, model: Any, tokenizer: Any, prompt: str) -> tuple[list[int], Any]:
    """The prompt's ids, and the cache that holds the first of them where a file has them."""
    from bitnet_mlx.generation import prompt_ids
    from bitnet_mlx.generation.prompt_cache import keep_shared, load_prompt

    if not args.prompt_cache_file:
        return prompt_ids(tokenizer, prompt, args.system_prompt, args.ignore_chat_template), None
    saved = load_prompt(args.prompt_cache_file, model, args.model or "embedded", args.max_kv_size)
    saved.said.check(args.system_prompt, args.ignore_chat_template)
    ids = saved.next_ids(tokenizer, prompt)
    keep_shared(saved.cache, saved.ids, ids)
    return ids, saved.cache


def statistics(completion: Completion, load_s: float, backend: str) -> str:
    """One line about speed, for stderr."""
    return f"[{backend}] load {load_s:.2f} s, {completion.speeds()}{speculation.told(completion.speculation)}"
