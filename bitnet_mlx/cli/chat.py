"""bitnet-mlx chat: a conversation, one message a line."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from bitnet_mlx.cli import options
from bitnet_mlx.errors import BitnetError, ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser)
    options.add_generation_arguments(parser)


def run(args: argparse.Namespace) -> int:
    options.check(args)
    from bitnet_mlx import load
    from bitnet_mlx.generation import ChatSession

    start = time.perf_counter()
    model, tokenizer = load(args.model, **options.load_arguments(args))
    load_s = time.perf_counter() - start
    session = ChatSession(
        model,
        tokenizer,
        args.system_prompt,
        sampling=options.sampling_config(args, tokenizer),
        max_tokens=args.max_tokens,
        stop=args.stop,
        max_kv_size=args.max_kv_size,
        raw=args.ignore_chat_template,
    )
    turns = _converse(session, args)
    if args.json:
        print(json.dumps({"turns": turns, "load_s": load_s, "backend": model.name, "model": args.model or "embedded"}))
    return 0


def _converse(session: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Answer line after line. Before a person, a turn that fails is reported and the conversation goes on."""
    from bitnet_mlx.generation import Completion

    turns = []
    progress = options.prefill_progress(args.verbose)
    for message in _messages():
        if message == "/reset":
            session.reset()
            continue
        try:
            stream = session.reply(message, progress)
            turns.append(Completion.of(stream if args.json else options.shown(stream)).record())
        except BitnetError as error:
            if args.debug or not sys.stdin.isatty():
                raise
            print(error, file=sys.stderr)
        except KeyboardInterrupt:  # ends this answer; what was said stays in the history
            print(file=sys.stderr)
        if not args.json:
            options.show("\n")
    return turns


def _messages() -> Iterator[str]:
    """Lines of stdin that are not blank, up to its end or /exit. Raises ConfigError when one is not UTF-8."""
    for number in range(1, sys.maxsize):
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"[chat] line {number} of stdin is not UTF-8 ({error.reason} at byte {error.start}); convert it first"
            ) from error
        if not line or text == "/exit":
            return
        if text:
            yield text
