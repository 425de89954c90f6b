"""bitnet-mlx chat: a conversation."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from bitnet_mlx.cli import chat_commands, options, speculation
from bitnet_mlx.cli.chat_answer import answer
from bitnet_mlx.cli.chat_input import Reader
from bitnet_mlx.errors import BitnetError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"{chat_commands.LEAVING} /help, typed in the conversation, tells its commands."
    options.add_model_arguments(parser)
    options.add_generation_arguments(parser)
    options.add_prompt_cache_argument(parser)
    speculation.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    options.check(args)
    speculation.check(args)
    from bitnet_mlx import load
    from bitnet_mlx.generation import ChatSession

    start = time.perf_counter()
    model, tokenizer = load(args.model, **options.load_arguments(args))
    load_s = time.perf_counter() - start
    session = ChatSession(
        model, tokenizer, args.system_prompt, sampling=options.sampling_config(args, tokenizer),
        max_tokens=args.max_tokens, stop=args.stop, max_kv_size=args.max_kv_size, raw=args.ignore_chat_template,
        speculation=speculation.make(args, model, tokenizer),
    )  # fmt: skip
    name = args.model or "embedded"
    if args.prompt_cache_file:
        session.load(args.prompt_cache_file, name)
    turns = _converse(session, args, name, model.name)
    if args.json:
        print(json.dumps({"turns": turns, "load_s": load_s, "backend": model.name, "model": name}))
    return 0


def _converse(session: Any, args: argparse.Namespace, name: str, backend: str) -> list[dict[str, Any]]:
    """Answer message after message. Before a person, one that fails is reported and the conversation goes on."""
    turns: list[dict[str, Any]] = []
    reader = Reader()
    interrupted = False  # since the last message
    while True:
        try:
            message = reader.read()
            if message is None or (message.command and not chat_commands.obey(message.text, session, name)):
                return turns
            if not message.command:
                interrupted = not answer(session, message.text, args, backend, turns, reader.person)
                continue
        except KeyboardInterrupt:
            if not reader.person:
                raise
            print(file=sys.stderr)
            if interrupted:
                return turns
            print(f"({chat_commands.LEAVING})", file=sys.stderr)
            interrupted = True
            continue
        except (BitnetError, OSError) as error:
            if args.debug or not reader.person:
                raise
            print(error, file=sys.stderr)
        interrupted = False
