"""The flags that generate and chat share, and what they become."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bitnet_mlx.api import ACTIVATIONS, DTYPES, HEAD_BITS, I2S_LAYOUTS
from bitnet_mlx.backends import NAMES
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.precision import KV_BITS, PRESETS

if TYPE_CHECKING:
    from bitnet_mlx.generation import GenerationResponse, SamplingConfig
    from bitnet_mlx.tokenizer import Tokenizer


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and what computes it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="DIR|REPO|GGUF",
        help="a folder, a Hugging Face name or a GGUF file (default: the model in the package)",
    )
    group.add_argument("--revision", help="branch, tag or commit of a Hugging Face model (default: main)")
    group.add_argument("--backend", choices=NAMES, default="auto", help="what computes (default: auto)")
    group.add_argument(
        "--activations", type=int, choices=ACTIVATIONS, help="bits of activations (default: the model's own)"
    )
    group.add_argument(
        "--head-bits", type=int, choices=HEAD_BITS, help="bits of the output head (default: as in the file)"
    )
    add_precision_arguments(group)
    add_dtype_argument(group)
    group.add_argument(
        "--i2s-layout",
        choices=I2S_LAYOUTS,
        help="byte layout of a GGUF file's I2_S tensors (default: found from the weights)",
    )
    group.add_argument(
        "--ternarize",
        action="store_true",
        help="take float layers for BitNet's master weights, where config.json does not say so",
    )
    group.add_argument("--adapter-path", metavar="DIR", help="run with this adapter (see bitnet-mlx lora)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")


def add_precision_arguments(group: Any) -> None:
    """A preset, and the bits of the cache; for a parser or a group of one."""
    group.add_argument(
        "--kv-bits", type=int, choices=KV_BITS, help="bits of the KV cache (MLX engines; default: dtype's)"
    )
    group.add_argument(
        "--precision",
        choices=PRESETS,
        help="head, KV cache and dtype together: the least memory, a balance, or the most accurate; other flags go before "
        "(default: each as its own flag says)",
    )


def add_dtype_argument(group: Any) -> None:
    """Of what is not ternary."""
    text = (
        "type of everything that is not ternary (default: float32 on cpu, numpy and MLX's CPU device, else the model's)"
    )
    group.add_argument("--dtype", choices=DTYPES, help=text)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """How text is made. Sampling flags left out keep what the model's generation_config.json says, else greedy."""
    told = "the model's: what its generation_config.json says"
    group = parser.add_argument_group("generation", told)
    group.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="tokens to generate at most (default: 256)"
    )
    group.add_argument(
        "--temp",
        type=float,
        metavar="T",
        help="temperature; 0 takes the most likely token (default: the model's, else 0)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="keep the most likely tokens that hold this share (default: the model's, else 1)",
    )
    group.add_argument(
        "--top-k", type=int, metavar="K", help="keep the K most likely tokens (default: the model's, else 0: all)"
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="keep tokens at least P times as likely as the best (default: the model's, else 0)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="make recent tokens less likely (default: the model's, else 1: off)",
    )
    group.add_argument(
        "--repetition-context-size", type=int, metavar="N", help="how many tokens are recent (default: 20)"
    )
    group.add_argument(
        "--seed", type=int, metavar="S", help="makes sampling repeatable (default: another one each time)"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    group.add_argument(
        "--max-kv-size", type=int, metavar="N", help="limit the context to N tokens (default: the model's)"
    )
    add_template_arguments(group)


def add_template_arguments(group: Any) -> None:
    """How a text becomes a model's turn."""
    group.add_argument("--ignore-chat-template", action="store_true", help="give the text to the model as it stands")
    group.add_argument("--system-prompt", metavar="TEXT", help="instructions that come before the conversation")


def add_prompt_cache_argument(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """The file of a computed prompt."""
    parser.add_argument(
        "--prompt-cache-file", metavar="FILE", required=required,
        help="a file that cache-prompt, or /save in chat, writes: what it holds comes before the prompt, computed already",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded. Raises ConfigError."""
    from bitnet_mlx.generation import SamplingConfig

    if args.max_tokens < 1:
        raise ConfigError(f"[generate] --max-tokens is {args.max_tokens}; it must be at least 1")
    check_template(args)
    SamplingConfig().replaced(**_sampling_flags(args))


def check_template(args: argparse.Namespace) -> None:
    """Raises ConfigError for a system prompt that no template would take."""
    if args.ignore_chat_template and args.system_prompt is not None:
        raise ConfigError(
            "[generate] --system-prompt needs the template that --ignore-chat-template leaves out; give one of them"
        )


def load_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of bitnet_mlx.load."""
    names = ("backend", "revision", "head_bits", "dtype", "activations", "threads", "i2s_layout", "ternarize")
    names += ("kv_bits", "precision", "adapter_path")
    return {name: getattr(args, name) for name in names}


def sampling_config(args: argparse.Namespace, tokenizer: Tokenizer) -> SamplingConfig:
    """The flags over the model's own defaults. Raises ConfigError for what is not allowed."""
    from bitnet_mlx.generation import SamplingConfig

    return SamplingConfig.from_generation_config(tokenizer.generation_config).replaced(**_sampling_flags(args))


def _sampling_flags(args: argparse.Namespace) -> dict[str, Any]:
    names = ("temp", "top_p", "top_k", "min_p", "repetition_penalty", "repetition_context_size", "seed")
    return {name: getattr(args, name) for name in names}


def add_escape_argument(parser: argparse.ArgumentParser) -> None:
    """As llama.cpp names it, which has it on; mlx-lm does so always."""
    parser.add_argument(
        "--escape", "-e", action="store_true",
        help=r"read \n, \t, \r and \\ in the flags' texts (--prompt, --system-prompt, --stop) as line end, tab, return and "
        "backslash",
    )  # fmt: skip


def unescape(args: argparse.Namespace) -> None:
    """What --escape asks for. Without it a prompt that seems to be meant so is told of."""
    if not args.escape:
        if "\\n" in args.prompt and "\n" not in args.prompt:
            print(r"note: \n in the prompt stays as it is; with --escape it is a line end", file=sys.stderr)
        return
    for name, value in vars(args).items():
        if name in ("prompt", "system_prompt") and value is not None:
            setattr(args, name, _unescaped(value))
        elif name == "stop" and value is not None:
            args.stop = [_unescaped(text) for text in value]


def _unescaped(text: str) -> str:
    return re.sub(r"\\([ntr\\])", lambda found: _ESCAPES[found[1]], text)


def prompt_text(command: str, text: str) -> str:
    """A prompt; "-" reads stdin. Raises ConfigError when it is not UTF-8."""
    try:
        if text == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        text.encode("utf-8")  # bytes that are not UTF-8 reach argv as lone surrogates
        return text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        where = "stdin" if text == "-" else "--prompt"
        raise ConfigError(
            f"[{command}] {where} is not UTF-8 ({error.reason} at position {error.start}); UTF-8 text is needed: "
            "convert it first, for example with iconv -f latin1 -t utf-8"
        ) from error


def show(text: str) -> None:
    """Text to stdout at once; characters that the terminal's encoding lacks are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def shown(stream: Iterator[GenerationResponse]) -> Iterator[GenerationResponse]:
    """The same stream; each text is printed as it comes."""
    for response in stream:
        show(response.text)
        yield response


def prefill_progress(enabled: bool) -> Callable[[int, int], None] | None:
    """For --verbose: how much of a long prompt is done, on stderr."""
    if not enabled:
        return None
    return lambda done, total: print(f"prompt: {done} of {total} tokens", file=sys.stderr, flush=True)
