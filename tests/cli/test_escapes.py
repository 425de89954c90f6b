r"""\n in a prompt: as it stands, or with --escape as mlx-lm and llama.cpp read it."""

from __future__ import annotations

import io
import sys

import pytest

from bitnet_mlx.cli.main import main
from tests.cli.conftest import Given

# What mlx-lm makes of each prompt: prompt.replace("\\n", "\n").replace("\\t", "\t").
PROMPTS = {r"hello\nworld": "hello\nworld", r"a\tb\n\n": "a\tb\n\n", "plain": "plain", r"quick\brown": r"quick\brown"}


def fed(given: Given, *words: str) -> list[int]:
    decoder, _ = given()
    assert main(["generate", "--max-tokens", "1", *words]) == 0
    return decoder.fed[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_with_the_flag_as_mlx_lm_reads_it(prompt: str, given: Given) -> None:
    _, tokenizer = given()
    for flag in ("--escape", "-e"):
        assert fed(given, "--prompt", prompt, flag) == tokenizer.encode(PROMPTS[prompt])


def test_without_it_as_it_stands_and_told_of(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    _, tokenizer = given()
    note = r"note: \n in the prompt stays as it is; with --escape it is a line end"
    for prompt, told in ((r"a\nb", True), ("a\nb", False), ('print("a\\n")\n', False), (r"a\tb", False)):
        assert fed(given, "--prompt", prompt) == tokenizer.encode(prompt)
        assert (note in capsys.readouterr().err) == told, prompt


def test_a_backslash_can_be_said(given: Given) -> None:
    _, tokenizer = given()
    assert fed(given, "--prompt", r"a\\nb", "-e") == tokenizer.encode(r"a\nb")


def test_text_from_stdin_stands_as_it_is(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, tokenizer = given()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rb"a\nb"), encoding="utf-8"))
    assert main(["generate", "--max-tokens", "1", "--prompt", "-", "-e"]) == 0
    assert decoder.fed[0] == tokenizer.encode(r"a\nb")


def test_stops_and_system_prompts_as_well(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support import tiny_tokenizers

    seen: list[object] = []
    decoder, tokenizer = given(template=tiny_tokenizers.CHAT)
    monkeypatch.setattr("bitnet_mlx.generation.stream.StopStrings", lambda stop: seen.append(stop) or _no_stop(stop))
    words = ["--prompt", "hi", "--system-prompt", r"one\ntwo", "--stop", r"\n\n", "-e", "--max-tokens", "1"]
    assert main(["generate", *words]) == 0
    assert seen == [["\n\n"]]
    said = [{"role": "system", "content": "one\ntwo"}, {"role": "user", "content": "hi"}]
    assert decoder.fed[0] == tokenizer.apply_chat_template(said)


def _no_stop(stop: list[str]) -> object:
    from bitnet_mlx.generation.stops import StopStrings

    return StopStrings(stop)
