"""The frame of the command line: help, version, unknown commands, and what a failure looks like."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from bitnet_mlx import __version__
from bitnet_mlx.cli import main as cli
from bitnet_mlx.cli import options
from bitnet_mlx.errors import KernelWarning


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bitnet_mlx", *arguments], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_help_lists_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_no_command_prints_usage_and_exits_2() -> None:
    done = run()
    assert done.returncode == 2
    assert "usage: bitnet-mlx" in done.stdout


def test_version() -> None:
    assert run("--version").stdout.strip() == f"bitnet-mlx {__version__}"


def test_unknown_command_names_the_known_ones() -> None:
    done = run("generat")
    assert done.returncode == 2
    assert "'generat'" in done.stderr and "generate" in done.stderr


def test_options_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--model", "m"]) == 2
    assert (
        "no command '--model'; a command comes before its options: bitnet-mlx generate --model"
        in capsys.readouterr().err
    )


def test_help_of_a_command() -> None:
    assert run("help", "inspect").stdout == run("inspect", "--help").stdout
    assert run("help", "nothing").stdout == run("--help").stdout


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_each_command_answers_help(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout and "--debug" in done.stdout


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_an_unknown_flag_is_a_usage_error(command: str) -> None:
    done = run(command, "--no-such-flag")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_users_mistake_shows_no_traceback(tmp_path: object) -> None:
    done = run("generate", "--model", f"{tmp_path}/absent", "--prompt", "x")
    assert done.returncode in (1, 2)
    assert done.stdout == "" and "absent" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "unbuffered"), [("--help", ""), ("inspect --help", ""), ("inspect", ""), ("inspect", "1")]
)
def test_a_reader_that_has_gone_is_no_fault(line: str, unbuffered: str) -> None:
    """As with `bitnet-mlx inspect | head -1`: nothing is complained of, whenever the text is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = write_to(writer, line, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("line", ["--help", "inspect"])
def test_what_cannot_be_written_is_told_once(line: str) -> None:
    """As on a full disk; here by a file that is not open for writing."""
    done = write_to(os.open(os.devnull, os.O_RDONLY), line)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 9] Bad file descriptor\n")


def write_to(stdout: int, line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitnet_mlx", *line.split()]
    try:
        return subprocess.run(
            command,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
        )
    finally:
        os.close(stdout)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ValueError("odd"), 1, "unexpected ValueError: odd; run again with --debug"),
    ],
    ids=["os", "interrupt", "ours"],
)
def test_what_stops_a_command_is_told_in_a_line(
    fault: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise fault

    monkeypatch.setattr("bitnet_mlx.cli.inspect.run", fail)
    assert cli.main(["inspect"]) == code
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and ("unexpected" in err) == isinstance(fault, ValueError)


def test_our_warnings_are_plain_lines_and_others_are_as_ever() -> None:
    assert cli._warning_text(KernelWarning("it is slow here"), KernelWarning, "a.py", 3) == "warning: it is slow here\n"
    assert cli._warning_text(UserWarning("other"), UserWarning, "a.py", 3).startswith("a.py:3: UserWarning: other")


def test_text_is_escaped_where_a_terminal_lacks_its_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    options.show("café")
    assert raw.getvalue() == b"caf\\xe9"


def test_debug_shows_the_traceback(tmp_path: object) -> None:
    done = run("generate", "--model", f"{tmp_path}/absent", "--prompt", "x", "--debug")
    assert "Traceback" in done.stderr and "absent" in done.stderr


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_explains_every_option_and_tells_each_default_of_a_number_or_a_choice(command: str) -> None:
    for action in cli.build_parser(command)._actions:
        flag, text = "/".join(action.option_strings), action.help or ""
        assert text, f"{flag} has no help"
        if action.option_strings and not action.required and (action.type in (int, float) or action.choices):
            assert "default" in text or "with it" in text, f"{flag}: {text}"
        if (
            action.default
            and isinstance(action.default, (str, int, float))
            and not isinstance(action.default, bool)
            and action.nargs != 0
        ):
            assert str(action.default) in text or f"{action.default:g}" in text or "the default" in text, (
                f"{flag}: {text}"
            )


def test_inspect_counts_the_cache_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A position of the embedded model's cache: 8 layers of 2 heads of 64 numbers, keys and values."""
    reads = []
    for context in ("0", "100"):
        assert cli.main(["inspect", "--json", "--context", context]) == 0
        reads.append(json.loads(capsys.readouterr().out))
    assert cli.main(["inspect", "--context", "-1"]) == 2
    assert "--context is -1; 0 or more is allowed" in capsys.readouterr().err
    none, some = (found["read_bytes_per_token"] for found in reads)
    assert some - none == 100 * 8 * 2 * 2 * 64 * reads[0]["kv_bits"] // 8


def test_little_is_imported_before_ctrl_c_is_caught() -> None:
    code = (
        "import sys; before = set(sys.modules); import bitnet_mlx.cli.main; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"argparse", "bitnet_mlx.cli.parser", "bitnet_mlx.cli.foreign", "logging"} & set(done.stdout.split())
