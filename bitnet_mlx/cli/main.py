"""The command line: finds the command, imports that one module, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 the work failed, 2 the command was used wrongly, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from bitnet_mlx import __version__
from bitnet_mlx.errors import BackendError, BitnetError, KernelWarning

if TYPE_CHECKING:
    from bitnet_mlx.cli.parser import Parser

_FORMAT = warnings.formatwarning
COMMANDS = {
    "generate": "print a model's continuation of a prompt",
    "chat": "talk with a model",
    "cache-prompt": "compute a prompt once, into a file that generate and chat go on from",
    "serve": "answer OpenAI's API over HTTP",
    "convert": "turn a checkpoint of any format that is read into another, and compare",
    "inspect": "tell what a checkpoint is, without loading it whole",
    "train": "train a ternary model from text files",
    "qat": "turn a float model into a ternary one by training, with a teacher",
    "lora": "train an adapter over a packed model's weights, which stay as they are",
    "fuse": "put an adapter into its model's weights, and tell what of it is left",
    "calibrate": "run text through a model: ranges of activations, clips, layers to keep",
    "evaluate": "perplexity and bits per byte on text; distance from a teacher, by layer too",
    "memory": "predict what a model takes in memory, and whether it fits this machine",
    "bench": "measure speed on this machine",
    "doctor": "tell what this machine can run, and check each engine against the reference",
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bitnet-mlx COMMAND [options]",
            "",
            "Run, convert, train and inspect ternary (BitNet b1.58) language models.",
            "",
            "commands:",
            *lines,
            "",
            "bitnet-mlx COMMAND --help tells a command's options; bitnet-mlx --version the version.",
            "Every command takes --json (one JSON record, the last line of stdout), --verbose and --debug.",
        ]
    )


def _module(command: str) -> ModuleType:
    return import_module(f"bitnet_mlx.cli.{command.replace('-', '_')}")


def build_parser(command: str) -> Parser:
    """The parser of one command, with the options that all commands share.

    What it takes is imported here, where Ctrl-C is caught already.
    """
    from bitnet_mlx.cli import foreign
    from bitnet_mlx.cli.parser import Parser

    parser = Parser(command, COMMANDS[command])
    parser.add_argument("--json", action="store_true", help="print one JSON record as the last line of stdout")
    parser.add_argument(
        "--verbose", action="store_true", help="tell more on stderr, such as the backend chosen and why"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    _module(command).add_arguments(parser)
    if command in foreign.NOT_AS_IN_MLX_LM:
        told = f"Not as in mlx-lm (in brackets what that does): {foreign.NOT_AS_IN_MLX_LM[command]}"
        parser.epilog = f"{parser.epilog} {told}" if parser.epilog else told
    return parser


def _fail(error: BaseException, debug: bool, code: int) -> int:
    if debug:
        import traceback

        traceback.print_exception(type(error), error, error.__traceback__)
    print(f"error: {error}", file=sys.stderr)
    return code


def _show_notices(verbose: bool) -> None:
    """What the library logs goes to stderr as plain lines; --verbose shows its reasons as well."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("bitnet_mlx")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    warnings.formatwarning = _warning_text


def _warning_text(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings as plain lines, others as ever."""
    if issubclass(category, KernelWarning):
        return f"warning: {message}\n"
    return _FORMAT(message, category, filename, lineno, line)


def run_command(command: str, arguments: list[str]) -> int:
    """Run one command and return its exit code. No traceback is shown without --debug."""
    debug = "--debug" in arguments
    try:
        args = build_parser(command).parse_args(arguments)
        _show_notices(args.verbose)
        return _module(command).run(args)
    except BitnetError as error:
        return _fail(error, debug, error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise  # main's
    except OSError as error:
        return _fail(error, debug, 1)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("mlx"):
            return _unexpected(command, error, debug)
        note = (
            f"[{command}] MLX is needed, and is not installed here ({error}); it runs on Macs with Apple silicon and on "
            "Linux: pip install bitnet-mlx again, which brings the version that it was tested with"
        )
        return _fail(BackendError(note).with_traceback(error.__traceback__), debug, 1)
    except Exception as error:
        return _unexpected(command, error, debug)


def _unexpected(command: str, error: Exception, debug: bool) -> int:
    """A fault of ours: say so in one line, and where the traceback is to be had."""
    note = f"[{command}] unexpected {type(error).__name__}: {error}; run again with --debug and report what it prints"
    return _fail(RuntimeError(note).with_traceback(error.__traceback__), debug, 1)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `bitnet-mlx`. What it printed has arrived when it returns, or it says why not."""
    _ready_streams()
    code = 0
    try:
        try:
            code = _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _point_stdout_at_nothing()  # the reader has gone, as `head` goes: nobody is left to complain to
        return 1
    except OSError as error:  # such as a full disk, unless that was told already
        _point_stdout_at_nothing()
        return code or _fail(error, False, 1)
    return code


def _ready_streams() -> None:
    """Streams that the shell closed (`>&-`) lead nowhere, and letters that stdout's encoding lacks are escaped."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - as long as the process lives
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _point_stdout_at_nothing() -> None:
    """So that the interpreter's own flush at its end does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    if len(arguments) > 1 and arguments[0] == "help" and arguments[1] in COMMANDS:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"bitnet-mlx {__version__}")
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        from bitnet_mlx.cli import foreign

        meant = foreign.COMMANDS.get(command) or foreign.nearest(command, COMMANDS)
        told = f", did you mean {meant}?" if meant else "."
        if command.startswith("-"):
            told = f"; a command comes before its options: bitnet-mlx generate {command} ..., for example."
        print(f"error: [bitnet-mlx] no command {command!r}{told} Known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run_command(command, arguments[1:])
