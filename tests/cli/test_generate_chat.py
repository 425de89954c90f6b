"""generate and chat as a user types them, over a small random model in the place of a loaded one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bitnet_mlx
from bitnet_mlx.checkpoint.safetensors_file import SafetensorsFile
from bitnet_mlx.cli.main import main
from bitnet_mlx.generation import generate
from bitnet_mlx.tokenizer import Tokenizer
from tests.support import tiny_tokenizers as tiny
from tests.support.scripted_model import ScriptedDecoder
from tests.support.tiny_chat_model import RecordingDecoder

FIELDS = {
    "text", "finish_reason", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps", "ttft_s", "load_s",
    "peak_memory_bytes", "speculation", "backend", "model",
}  # fmt: skip
Given = Callable[..., tuple[RecordingDecoder, Tokenizer]]


def test_text_streams_to_stdout_and_speed_to_stderr(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, tokenizer = given()
    assert main(["generate", "--prompt", "hello", "--max-tokens", "9"]) == 0
    out, err = capsys.readouterr()
    assert out == generate(decoder, tokenizer, "hello", 9) + "\n"
    assert len(err.splitlines()) == 1 and "[numpy] load" in err and "generated 9" in err


def test_json_is_one_record_and_nothing_else(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, tokenizer = given(stdin="hello wörld".encode())
    assert main(["generate", "--model", "some/model", "--prompt", "-", "--max-tokens", "5", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    record = json.loads(out)
    assert set(record) == FIELDS
    assert (record["backend"], record["model"], record["finish_reason"]) == ("numpy", "some/model", "length")
    assert record["text"] == generate(decoder, tokenizer, "hello wörld", 5)
    assert record["prompt_tokens"] == len(tokenizer.encode("hello wörld")) and record["generation_tokens"] == 5


def test_sampling_flags_stops_and_the_models_own_defaults(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    given(generation={"do_sample": True, "temperature": 5.0})

    def text(*flags: str) -> str:
        assert main(["generate", "--prompt", "hello", "--max-tokens", "12", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["text"]

    greedy = text("--temp", "0")
    assert text("--seed", "3") == text("--seed", "3") != greedy, (
        "the model's temperature holds unless a flag says otherwise"
    )
    assert text("--top-k", "1") == text("--temp", "0", "--seed", "9") == greedy
    assert text("--temp", "0", "--stop", greedy[4:7], "--stop", "absent") == greedy[: greedy.find(greedy[4:7])]


def test_guesses_change_nothing_and_are_told(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    """The model of the test is its own draft here: `load` gives it whatever is asked for."""
    given()
    flags = ["generate", "--prompt", "hello", "--max-tokens", "20", "--temp", "0.7", "--seed", "5"]
    assert main(flags) == 0
    plain = capsys.readouterr().out
    for more, name in ((["--prompt-lookup"], "prompt look-up"), (["--draft-model", "some/model"], "draft model")):
        assert main([*flags, *more, "--num-draft-tokens", "3"]) == 0
        out, err = capsys.readouterr()
        assert out == plain and f", {name}: " in err and "guesses right" in err
        assert main([*flags, *more, "--num-draft-tokens", "3", "--json"]) == 0
        record = json.loads(capsys.readouterr().out)["speculation"]
        assert record["drafter"] == name and record["accepted"] <= record["drafted"] and record["off"] is None
    assert record["acceptance"] == 1.0 and record["verifications"] == 5 and record["accepted"] == 14


def test_a_chat_model_gets_a_turn_and_a_base_model_the_text(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, tokenizer = given(template=tiny.CHAT)
    flags = ["generate", "--prompt", "hello", "--max-tokens", "1"]
    assert main([*flags, "--system-prompt", "be brief"]) == 0
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert decoder.fed[0] == tokenizer.apply_chat_template(messages)
    decoder.fed.clear()
    assert main([*flags, "--ignore-chat-template"]) == 0
    assert decoder.fed[0] == tokenizer.encode("hello")
    capsys.readouterr()


def test_json_of_a_schema(given: Given, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """From the command line and from a file, with guesses and without: always the schema's JSON, and the same."""
    given()
    schema = '{"type": "array", "items": {"enum": ["sea", "port"]}, "minItems": 2, "maxItems": 3}'
    (tmp_path / "schema.json").write_text(schema)
    texts = []
    for flags in (["--json-schema", schema], ["--json-schema-file", str(tmp_path / "schema.json"), "--prompt-lookup"]):
        assert main(["generate", "--prompt", "ships = ", "--max-tokens", "200", "--json", *flags]) == 0
        record = json.loads(capsys.readouterr().out)
        texts.append(record["text"])
        assert record["finish_reason"] == "stop"
    ports = json.loads(texts[0])
    assert texts[0] == texts[1] and len(ports) in (2, 3) and set(ports) <= {"sea", "port"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x", "--max-tokens", "0"], "--max-tokens is 0; it must be at least 1"),
        (["--prompt", "x", "--temp", "-1"], "temp is -1.0"),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "x", "--stop", ""], "stop is ''"),
        (["--prompt", "hello " * 500], "the context holds 400"),
        (["--prompt", "x", "--max-kv-size", "401"], "1 to 400"),
        (["--prompt", "x", "--system-prompt", "s"], "no chat template"),
        (["--prompt", "x", "--system-prompt", "s", "--ignore-chat-template"], "give one of them"),
        (["--prompt", "x", "--draft-model", "a/b", "--prompt-lookup"], "both guess; give one of them"),
        (["--prompt", "x", "--num-draft-tokens", "3"], "nothing guesses; give --draft-model or --prompt-lookup"),
        (["--prompt", "x", "--prompt-lookup", "--num-draft-tokens", "0"], "num_draft_tokens is 0; 1 to 64"),
        (["--prompt", "x", "--json-schema", "3"], "--json-schema is a JSON int; a schema is an object"),
        (["--prompt", "x", "--json-schema", '{"not": {}}'], 'cannot be enforced: Unimplemented keys: ["not"]'),
        (["--prompt", "x", "--json-schema-file", "missing.json"], "--json-schema-file missing.json cannot be read"),
        (["--prompt", "-"], "stdin is not UTF-8 (invalid start byte at position 3)"),
        (["--prompt", "a\udcff"], "--prompt is not UTF-8"),
        ([], "--prompt"),
        (["--prompt", "x", "--head-bits", "5"], "--head-bits"),
    ],
)
def test_mistakes_exit_2_with_one_message(
    flags: list[str], message: str, given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    given(stdin=b"abc\xff")
    try:
        code = main(["generate", *flags])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and message in err and "Traceback" not in err


def test_verbose_tells_the_progress_of_the_prompt(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    given()
    assert main(["generate", "--prompt", "hello", "--max-tokens", "1", "--verbose"]) == 0
    assert "prompt: 2 of 2 tokens" in capsys.readouterr().err


def test_an_interrupt_shows_what_was_made(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, tokenizer = given()
    decoder.interrupt_at = 6
    assert main(["generate", "--prompt", "hello"]) == 130
    out, err = capsys.readouterr()
    assert out == generate(decoder, tokenizer, "hello", 5) + "\n" and "Traceback" not in err


def test_a_conversation(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    lines = b"hello\n\n/clear\nhello\n/exit\nnever\n"
    given(stdin=lines, template=tiny.CHAT)
    assert main(["chat", "--max-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    first, second = out.split("\n")[:2]
    assert out == f"{first}\n{second}\n" and first == second
    told = [line for line in err.splitlines() if "forgotten" not in line]
    assert len(told) == 2 and all("[numpy] 6 tokens at" in line and "of 400" in line for line in told)
    given(stdin=lines, template=tiny.CHAT)
    assert main(["chat", "--max-tokens", "6", "--json"]) == 0
    out, _ = capsys.readouterr()
    record = json.loads(out)
    assert out.count("\n") == 1
    assert [turn["text"] for turn in record["turns"]] == [first, second]
    assert record["model"] == "embedded" and record["backend"] == "numpy"


def test_messages_of_several_lines_and_commands(
    given: Given, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What reaches the model, seen in what chat saves; a saved conversation goes on without computing it again."""
    lines = 'one \\\ntwo\n"""\n three\n\n/clear """\n/save FILE\n/quit\n'.replace("FILE", str(tmp_path / "talk.st"))
    given(stdin=lines.encode(), template=tiny.CHAT)
    assert main(["chat", "--max-tokens", "3"]) == 0
    assert "6 tokens" not in capsys.readouterr().err
    said = json.loads(SafetensorsFile(tmp_path / "talk.st").metadata["bitnet_mlx"])["messages"]
    assert [m["content"] for m in said[::2]] == ["one \ntwo", "\n three\n\n/clear "]
    decoder, _ = given(stdin=f"/load {tmp_path / 'talk.st'}\nhello\n".encode(), template=tiny.CHAT)
    assert main(["chat", "--max-tokens", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    record, held = json.loads(out), len(SafetensorsFile(tmp_path / "talk.st").array("tokens"))
    assert f"talk.st: {len(said)} messages, {held} tokens" in err
    assert len(decoder.fed[0]) < 0.5 * record["turns"][0]["prompt_tokens"], "only what is new is fed"
    again, _ = given(stdin=b"hello\n", template=tiny.CHAT)
    assert main(["chat", "--max-tokens", "3", "--json", "--prompt-cache-file", str(tmp_path / "talk.st")]) == 0
    assert json.loads(capsys.readouterr().out)["turns"][0]["text"] == record["turns"][0]["text"]
    assert again.fed == decoder.fed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/foo bar", "/foo is no command; /help lists them"),
        ("/save", "/save needs a file"),
        ("/save there.st", "nothing was said yet"),
        ("/load absent.st", "absent.st cannot be read"),
        ("hello\n/save absent/x.st", "folder that is not there"),
    ],
)
def test_commands_that_fail_end_a_pipe(
    line: str, message: str, given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    given(stdin=line.encode(), template=tiny.CHAT)
    assert main(["chat", "--max-tokens", "3"]) in (1, 2)
    assert message in capsys.readouterr().err
    given(stdin=b"/help\n", template=tiny.CHAT)
    assert main(["chat"]) == 0
    assert "/save FILE" in capsys.readouterr().err


def test_chat_with_a_base_model(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    given(stdin=b"hello\n")
    assert main(["chat"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "base model" in err and "--ignore-chat-template" in err
    given(stdin=b"hello\n")
    assert main(["chat", "--ignore-chat-template", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("where", ["terminal", "pipe", "dumb", "colourless"])
def test_thoughts_are_dim_on_a_terminal(
    given: Given, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """Elsewhere the text is as the model writes it."""
    _, tokenizer = given(stdin=b"hello\n", template=tiny.CHAT + "{# </think> #}")
    text = "<think>\nI <see>.\n</think>\n\nAye."
    decoder = ScriptedDecoder(tokenizer, text, max_position_embeddings=400)
    monkeypatch.setattr(bitnet_mlx, "load", lambda *_, **__: (decoder, tokenizer))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: where != "pipe")
    monkeypatch.setenv("TERM", "dumb" if where == "dumb" else "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if where == "colourless":
        monkeypatch.setenv("NO_COLOR", "1")
    assert main(["chat", "--max-tokens", "60"]) == 0
    out = capsys.readouterr().out
    if where != "terminal":
        assert out == text + "\n"
        return
    dim = re.findall("\x1b\\[2m(.*?)\x1b\\[22m", out)
    assert "".join(dim) == "I <see>." and re.sub("\x1b\\[2m.*?\x1b\\[22m", "", out) == "\n\nAye.\n"


def test_an_interrupted_pipe_ends(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, _ = given(stdin=b"hello\nhello\n", template=tiny.CHAT)
    decoder.interrupt_at = 4
    assert main(["chat", "--max-tokens", "9"]) == 130
    assert len(decoder.fed) == 4 and "Traceback" not in capsys.readouterr().err


def test_chat_refuses_a_line_that_is_not_utf8(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    given(stdin=b"hello\n\xe9\n", template=tiny.CHAT)
    assert main(["chat", "--max-tokens", "3"]) == 2
    assert "line 2 of stdin is not UTF-8" in capsys.readouterr().err
