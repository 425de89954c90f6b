"""The flags for a text that must be JSON of a schema, and the sampler that they become."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_mlx.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from bitnet_mlx.generation import Sampler, SamplingConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """As llama.cpp names them."""
    group = parser.add_argument_group("structure").add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="SCHEMA", help="write JSON that this schema allows ('{}': any)")
    group.add_argument("--json-schema-file", metavar="FILE", help="likewise, the schema from a file")


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded. Raises ConfigError."""
    if _schema(args) is not None:
        from bitnet_mlx.generation.grammar import library

        library()


def sampler(args: argparse.Namespace, model: Any, tokenizer: Any, config: SamplingConfig) -> Sampler:
    """A sampler that writes what the flags ask for. Raises ConfigError for a schema that cannot be enforced."""
    from bitnet_mlx.generation import Sampler

    schema = _schema(args)
    if schema is None:
        return Sampler(config)
    from bitnet_mlx.generation.grammar import Grammars

    stop_ids = tokenizer.eos_token_ids | frozenset(model.config.eos_token_ids)
    return Sampler(config, Grammars(tokenizer, model.config.vocab_size, stop_ids).json_schema(schema).begin())


def _schema(args: argparse.Namespace) -> dict[str, Any] | None:
    flag, text = "--json-schema", args.json_schema
    if args.json_schema_file is not None:
        flag = f"--json-schema-file {args.json_schema_file}"
        try:
            text = Path(args.json_schema_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"[generate] {flag} cannot be read ({error}); give a file with a JSON schema") from error
    if text is None:
        return None
    from bitnet_mlx.formats.strict_json import parse_json

    try:
        schema = parse_json(text, f"[generate] {flag}")
    except FormatError as error:
        raise ConfigError(f"{error}; a JSON schema is an object, such as {{}}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"[generate] {flag} is a JSON {type(schema).__name__}; a schema is an object, such as {{}}")
    return schema
