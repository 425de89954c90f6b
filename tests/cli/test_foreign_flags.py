"""A flag of mlx-lm means the same here, or is refused with what to say instead; likewise llama.cpp's and misspelt ones."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from pathlib import Path

import pytest

from bitnet_mlx.cli import foreign, main
from bitnet_mlx.errors import ConfigError

OURS = {
    "generate": "generate", "chat": "chat", "convert": "convert", "fuse": "fuse", "cache_prompt": "cache-prompt",
    "perplexity": "evaluate", "benchmark": "bench", "evaluate": "evaluate", "server": "serve", "lora": "lora",
}  # fmt: skip


def theirs(name: str) -> dict[str, dict[str, ast.expr]]:
    """The options of one command of mlx-lm, read from its source without importing it."""
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None and spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / f"{name}.py").read_text(encoding="utf-8")
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            for word in node.args:
                assert isinstance(word, ast.Constant)
                found[str(word.value)] = {k.arg: k.value for k in node.keywords if k.arg}
    assert len(found) > 5, found
    return found


def refusal(command: str, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        main.build_parser(command).parse_args(list(words))
    return str(caught.value)


@pytest.mark.parametrize("name", list(OURS))
def test_each_flag_of_mlx_lm_is_ours_or_is_answered(name: str) -> None:
    command = OURS[name]
    known = main.build_parser(command)._option_string_actions
    for flag, how in theirs(name).items():
        if flag not in known:
            told = refusal(command, flag, "1")
            assert told.startswith(f"[{command}] {flag}: "), told
            continue
        switch = "action" in how  # store_true, or --X and --no-X
        ours = known[flag]
        if flag != "--verbose":  # the one that takes a value there; a value is refused here
            assert (ours.nargs == 0) == switch, flag


@pytest.mark.parametrize("command", list(main.COMMANDS))
def test_what_is_refused_is_no_flag_of_ours_and_advice_names_flags_that_there_are(command: str) -> None:
    parser = main.build_parser(command)
    known = set(parser._option_string_actions)
    table = foreign.BY_COMMAND.get(command, {})
    assert not set(table) & known
    for advice in table.values():
        if advice.startswith("say --"):
            assert advice.split()[1].rstrip(";,:") in known, advice


def test_several_words_of_llama_cpp_are_answered_at_once_before_what_is_missing() -> None:
    told = refusal("generate", "-m", "model.gguf", "-n", "5", "-ngl", "99", "-f", "prompt.txt")
    assert all(f"{flag}: " in told for flag in ("-m", "-n", "-ngl", "-f")), told
    assert "say --prompt - < FILE" in told


def test_a_misspelt_flag_names_the_nearest_and_all_are_told() -> None:
    told = refusal("generate", "--prompt", "x", "--max-tokns", "5", "--no-such-flag")
    assert "no option --max-tokns, did you mean --max-tokens?" in told
    assert "no option --no-such-flag" in told


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--temperature", "--temp T"), ("--max-new-tokens", "--max-tokens N"), ("-v", "--verbose"), ("--device", "--backend B")],
)  # fmt: skip
def test_flags_of_other_programs(flag: str, said: str) -> None:
    """For each difflib's nearest would be another option, or none."""
    assert f"{flag}: say {said}" in refusal("generate", "--prompt", "x", flag, "1")


def test_a_text_that_begins_as_an_option_does() -> None:
    assert "expected one argument (one that begins with - is given as OPTION=TEXT)" in refusal("generate", "-p", "--x")
    parsed: argparse.Namespace = main.build_parser("generate").parse_args(["--prompt=--x"])
    assert parsed.prompt == "--x"


def test_a_value_without_an_option_is_named() -> None:
    assert "True belongs to no option (switches take no value" in refusal("generate", "-p", "x", "--verbose", "True")


@pytest.mark.parametrize("words", [("hello",), ("--max-tokens", "5", "hello"), ("hello", "--temp", "0")])
def test_a_text_without_its_flag_is_named_with_what_is_missing(words: tuple[str, ...]) -> None:
    told = refusal("generate", *words)
    assert "hello belongs to no option" in told and "the following arguments are required: --prompt/-p" in told


def test_what_is_missing_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal("generate") == (
        "[generate] the following arguments are required: --prompt/-p; bitnet-mlx generate --help tells the options"
    )
    assert "required: what;" in refusal("bench")
    parser = main.build_parser("generate")
    for _ in range(2):
        with pytest.raises(ConfigError, match="required: --prompt/-p"):
            parser.parse_args([])
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "[--debug] --prompt TEXT|-" in capsys.readouterr().out  # no brackets: it is needed


@pytest.mark.parametrize(
    ("typed", "ours"),
    [("server", "bitnet-mlx serve"), ("cache_prompt", "cache-prompt"), ("perplexity", "evaluate"), ("generat", "generate")],
)  # fmt: skip
def test_a_command_of_another_name_is_answered(typed: str, ours: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([typed]) == 2
    assert (
        f"did you mean {ours}" in capsys.readouterr().err.replace("bitnet-mlx ", "", 1)
        or ours in foreign.COMMANDS[typed]
    )


@pytest.mark.parametrize("command", list(foreign.NOT_AS_IN_MLX_LM))
def test_help_tells_what_differs(command: str) -> None:
    shown = " ".join(main.build_parser(command).format_help().split())
    assert foreign.NOT_AS_IN_MLX_LM[command] in shown


@pytest.mark.parametrize("name", ["generate", "server", "chat"])
def test_a_default_that_differs_is_told(name: str) -> None:
    """mlx-lm's default, ours, and what --help says of them."""
    flag = "--max-tokens"
    there = theirs(name)[flag]["default"]
    value = there.value if isinstance(there, ast.Constant) else constant(name, ast.unparse(there))
    ours = main.build_parser(OURS[name]).get_default(flag[2:].replace("-", "_"))
    told = f"{flag} {ours} ({value})" in foreign.NOT_AS_IN_MLX_LM[OURS[name]]
    assert told == (ours != value)


def constant(name: str, wanted: str) -> object:
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None and spec.submodule_search_locations
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / f"{name}.py").read_text(encoding="utf-8"))
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == wanted]
    assert len(values) == 1
    return ast.literal_eval(values[0])


def test_convert_takes_mlx_lms_names() -> None:
    given: argparse.Namespace = main.build_parser("convert").parse_args(["--model", "here"])
    assert (given.hf_path, given.mlx_path) == ("here", "mlx_model")
