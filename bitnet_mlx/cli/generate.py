"""bitnet-mlx generate: one prompt, one text."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

from bitnet_mlx.cli import options, profiling, speculation
from bitnet_mlx.errors import ConfigError

if TYPE_CHECKING:
    from bitnet_mlx.generation import Completion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, metavar="TEXT|-", help="the prompt; - reads it from stdin")
    options.add_model_arguments(parser)
    options.add_generation_arguments(parser)
    speculation.add_arguments(parser)
    profiling.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    prompt = _prompt(args.prompt)
    options.check(args)
    speculation.check(args)
    profiling.check(args)
    from bitnet_mlx import load
    from bitnet_mlx.generation import Completion, prompt_ids, stream_generate

    start = time.perf_counter()
    model, tokenizer = load(args.model, **options.load_arguments(args))
    load_s = time.perf_counter() - start
    sampling = options.sampling_config(args, tokenizer)
    ids = prompt_ids(tokenizer, prompt, args.system_prompt, args.ignore_chat_template)
    stream = stream_generate(
        model,
        tokenizer,
        ids,
        args.max_tokens,
        sampling=sampling,
        stop=args.stop,
        max_kv_size=args.max_kv_size,
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


def _prompt(text: str) -> str:
    """The prompt; "-" reads stdin. Raises ConfigError when it is not UTF-8."""
    try:
        if text == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        text.encode("utf-8")  # bytes that are not UTF-8 reach argv as lone surrogates
        return text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        where = "stdin" if text == "-" else "--prompt"
        raise ConfigError(
            f"[generate] {where} is not UTF-8 ({error.reason} at position {error.start}); UTF-8 text is needed: "
            "convert it first, for example with iconv -f latin1 -t utf-8"
        ) from error


def statistics(completion: Completion, load_s: float, backend: str) -> str:
    """One line about speed, for stderr."""
    return (
        f"[{backend}] load {load_s:.2f} s, prompt {completion.prompt_tokens} tokens at {completion.prompt_tps:.1f}/s, "
        f"first token {completion.ttft_s:.2f} s, generated {completion.generation_tokens} "
        f"at {completion.generation_tps:.1f}/s ({completion.finish_reason}){speculation.told(completion.speculation)}"
    )
