"""The flags of speculative decoding, which generate and chat share, and the line that tells what it gave."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from bitnet_mlx.cli import options
from bitnet_mlx.errors import ConfigError

if TYPE_CHECKING:
    from bitnet_mlx.generation import Speculation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speculative decoding (the same text, sooner)")
    add = group.add_argument
    add("--draft-model", metavar="DIR|REPO|GGUF", help="a smaller model of the same vocabulary, which guesses")
    add("--prompt-lookup", action="store_true", help="guess what followed where the same tokens stood before")
    add(
        "--num-draft-tokens", type=int, metavar="N",
        help="tokens to guess at once, always (default: as many as pay by what is measured, none where none do)",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded. Raises ConfigError."""
    if args.draft_model is not None and args.prompt_lookup:
        raise ConfigError("[speculate] --draft-model and --prompt-lookup both guess; give one of them")
    if args.num_draft_tokens is not None and args.draft_model is None and not args.prompt_lookup:
        raise ConfigError(
            "[speculate] --num-draft-tokens was given and nothing guesses; give --draft-model or --prompt-lookup as well"
        )


def make(args: argparse.Namespace, model: Any, tokenizer: Any) -> Speculation | None:
    """What the flags ask for; a draft model is loaded. Raises ConfigError, and what load raises."""
    from bitnet_mlx.generation import Speculation

    if args.prompt_lookup:
        return Speculation.by_lookup(model, args.num_draft_tokens)
    if args.draft_model is None:
        return None
    from bitnet_mlx import load

    same = {name: options.load_arguments(args)[name] for name in ("threads", "dtype", "kv_bits", "precision")}
    draft, draft_tokenizer = load(args.draft_model, backend=model.name, **same)
    return Speculation.by_model(model, tokenizer, draft, draft_tokenizer, args.num_draft_tokens)


def told(report: Any) -> str:
    """For the line about speed; empty where nothing was guessed."""
    if report is None:
        return ""
    gain = "" if report.gain is None else f", {report.gain:.2f} times the speed"
    off = ", switched off" if report.off else ""
    return (
        f", {report.drafter}: {report.accepted} of {report.drafted} guesses right ({report.acceptance:.0%}){gain}{off}"
    )
