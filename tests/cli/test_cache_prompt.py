"""cache-prompt, and generate and chat that go on from its file: the same answers, the beginning fed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitnet_mlx.cli.main import main
from tests.support import tiny_tokenizers as tiny

START, REST = "the quick brown fox ", "jumps"
BRIEF = ["--system-prompt", "be brief"]


def answer(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, Any]:
    assert main([*line, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("template", "flags"),
    [(tiny.CHAT, []), (tiny.CHAT, BRIEF), (tiny.CHAT, ["--ignore-chat-template"]), (None, [])],
    ids=["chat", "system", "raw", "base"],
)
def test_the_same_answer_and_less_to_feed(
    template: str | None, flags: list[str], given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder, _ = given(template=template)
    file = str(tmp_path / "start.safetensors")
    plain = answer(capsys, "generate", "--prompt", START + REST, "--max-tokens", "6", *flags)
    decoder.fed.clear()
    made = answer(
        capsys, "cache-prompt", "--prompt", START, "--prompt-cache-file", file, "--model", "own/model", *flags
    )
    assert made["prompt_tokens"] == len(decoder.fed[0]) and made["bytes"] == Path(file).stat().st_size
    assert (made["file"], made["model"], made["backend"]) == (file, "own/model", "numpy")
    decoder.fed.clear()
    cached = ["--prompt", REST, "--prompt-cache-file", file]
    again = answer(capsys, "generate", *cached, "--max-tokens", "6", "--max-kv-size", "300")
    assert (again["text"], again["prompt_tokens"]) == (plain["text"], plain["prompt_tokens"])
    assert len(decoder.fed[0]) < plain["prompt_tokens"] - 4
    if template and "--ignore-chat-template" not in flags:
        # The file says how it was made, and no flag can say otherwise.
        for wrong in (["--system-prompt", "another"], ["--ignore-chat-template"]):
            assert main(["generate", *cached, *wrong]) == 2
            assert "the file was made with" in capsys.readouterr().err
        given(stdin=f"{REST}\n".encode(), template=template)
        [turn] = answer(capsys, "chat", "--prompt-cache-file", file, "--max-tokens", "6")["turns"]
        assert turn["text"] == plain["text"]
    assert main(["generate", *cached, "--max-kv-size", "3"]) == 2
    assert "positions and the context 3; raise --max-kv-size" in capsys.readouterr().err


def test_a_beginning_that_is_too_long_is_refused(
    given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given()
    file = tmp_path / "start.safetensors"
    assert main(["cache-prompt", "--prompt", START, "--max-kv-size", "2", "--prompt-cache-file", str(file)]) == 2
    assert "the context holds 2" in capsys.readouterr().err and not file.exists()
