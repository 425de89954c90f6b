"""What is thought and what is said, in texts cut anywhere; against Qwen's template and mlx-lm's reader of streams."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_mlx import _mlxlm
from bitnet_mlx.errors import FormatError
from bitnet_mlx.generation import ChatSession
from bitnet_mlx.generation.thinking import Place, ThoughtReader, place, special_marks, thinks
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support import tiny_tokenizers as tiny
from tests.support.scripted_model import ScriptedDecoder

# How Qwen's templates take an earlier answer apart.
QWEN = jinja2.Template(
    "{{ text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}|"
    "{{ text.split('</think>')[-1].lstrip('\\n') }}"
)
CALL = "<tool_call>"
machine = _mlxlm.module("generate").TextStateMachine
cuts = st.lists(st.integers(0, 60), max_size=12)


def read(text: str, ends: list[int], inside: bool = False, call: str = "") -> tuple[str, str, int]:
    """(thought, said, tokens) of a text that is cut at those places."""
    reader = ThoughtReader(inside, call)
    bounds = [0, *sorted(min(end, len(text)) for end in ends), len(text)]
    parts = [reader.feed(text[a:b], last=b == len(text)) for a, b in itertools.pairwise(bounds) if a < b or b == 0]
    return "".join(t for t, _ in parts), "".join(s for _, s in parts), reader.tokens


@pytest.mark.parametrize(
    "text",
    ["<think>\nI\nam.\n</think>\n\nSo be it.\n", "<think>\n\n</think>\n\nYes", "<think>a < b </thin k></think>c",
     "<think> x </think>", "<think>\n\na\n\n\nb\n</think>\nc\n\nd"],
)  # fmt: skip
@given(ends=cuts)
def test_as_qwens_template_takes_it_apart(text: str, ends: list[int]) -> None:
    thought, said, _ = read(text, ends)
    assert f"{thought}|{said}" == QWEN.render(text=text)
    assert read(text.removeprefix("<think>"), ends, inside=True)[:2] == (thought, said)


PIECES = ["<think>", "</think>", CALL, "<", "</", "th", "\n", "ä", ">"]


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12), ends=cuts)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("call", ["", CALL])
def test_any_text_cut_anywhere(pieces: list[str], ends: list[int], inside: bool, call: str) -> None:
    text = "".join(pieces)
    thought, said, _ = read(text, [], inside, call)
    assert read(text, ends, inside, call)[:2] == read(text, list(range(61)), inside, call)[:2] == (thought, said)


@given(pieces=st.lists(st.sampled_from([p for p in PIECES if p != "<think>"]), max_size=12))
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("call", ["", CALL])
def test_as_mlx_lm_reads_a_stream(pieces: list[str], inside: bool, call: str) -> None:
    """It takes the mark in front of a call away, and leaves the seams."""
    text = "".join(pieces)
    edges: dict[str, Any] = {"normal": [("<think>", "reasoning")], "reasoning": [("</think>", "normal")]}
    if call:
        edges["reasoning"].append((call, "tool"))
        edges["tool"] = []
    state, segments = machine.split(
        machine(edges).make_state("reasoning" if inside else "normal"), text if inside else f"<think>{text}"
    )
    segments.append((state[0], machine.flush(state)[1]))
    theirs = [
        "".join(part for name, part in segments if (name == "reasoning") is thinking) for thinking in (True, False)
    ]
    thought, said, _ = read(text if inside else f"<think>{text}", [], inside, call)
    called = any(name == "tool" for name, _ in segments)
    assert thought == theirs[0].strip("\n")
    assert said == CALL + theirs[1] if called else said == theirs[1].lstrip("\n")


@pytest.mark.parametrize(
    ("text", "inside", "call", "want"),
    [
        ("Yes, <think>", False, "", ("", "Yes, <think>", 0)),
        ("\n <think>a", False, "", ("a", "", 1)),
        ("\n\nYes", False, "", ("", "\n\nYes", 0)),
        ("<thin", False, "", ("", "<thin", 0)),
        ("a\n</thi", True, "", ("a\n</thi", "", 1)),
        ("", True, "", ("", "", 1)),
        ("a</think>b<think>c</think>d", True, "", ("a", "b<think>c</think>d", 1)),
        (f"a\n{CALL}x", True, CALL, ("a", f"{CALL}x", 1)),
        (f"a\n{CALL}x", True, "", (f"a\n{CALL}x", "", 1)),
        (f"a</think>{CALL}x", True, CALL, ("a", f"{CALL}x", 1)),
    ],
)
def test_texts_that_have_no_thoughts_or_no_end(text: str, inside: bool, call: str, want: tuple[str, str, int]) -> None:
    assert read(text, [], inside, call) == want


def test_tokens_are_counted_up_to_the_end_mark() -> None:
    reader = ThoughtReader()
    for part in ("<thi", "nk>", "a", "", "</th", "ink>", "\n\n", "b", "c"):
        reader.feed(part)
    assert reader.tokens == 6


SPECIAL = {"421": {"content": "<think>", "special": True}, "422": {"content": "</think>", "special": False}}


@pytest.mark.parametrize("added", [{}, SPECIAL])
@pytest.mark.parametrize("make", [tiny.byte_level, tiny.fallback_json])
@pytest.mark.parametrize(
    ("opens", "where"),
    [("", "before"), ("<think>\n", "inside"), ("<think>", "inside"), ("<think>\n\n</think>\n\n", "after"), ("</think>", "after")],
)  # fmt: skip
def test_where_a_prompt_ends(tmp_path: Path, make: Any, opens: str, where: Place, added: dict[str, Any]) -> None:
    """Whatever the person writes, and however the vocabulary splits the marks."""
    template = tiny.CHAT.replace(
        "assistant\n{% endif %}", "assistant\n" + opens.replace("\n", "{{ '\\n' }}") + "{% endif %}"
    )
    template += "{% if false %}</think>{% endif %}"
    settings = {"chat_template": template, **({"added_tokens_decoder": added} if make is tiny.byte_level else {})}
    tokenizer = load_tokenizer(make(tmp_path, settings=settings))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "what is <think>"}])
    assert thinks(tokenizer) and place(tokenizer, ids) == where
    assert special_marks(tokenizer) == ({"<think>": 421} if added and make is tiny.byte_level else {})
    assert not thinks(load_tokenizer(make(tmp_path / "plain", settings={"chat_template": tiny.CHAT})))


OPEN = tiny.CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}{# </think> #}")
SHOWN = "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m['content'] | trim }}"


@pytest.mark.parametrize("template", [OPEN, OPEN.replace("{{ m['content'] | trim }}", SHOWN), tiny.CHAT])
def test_a_conversation_keeps_thoughts_apart(tmp_path: Path, template: str) -> None:
    """The template decides whether they are told the model again; one that knows no thoughts has none taken away."""
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path, settings={"chat_template": template}))
    decoder = ScriptedDecoder(tokenizer, "I\nsee.\n</think>\n\nAye.", max_position_embeddings=1024)
    session = ChatSession(decoder, tokenizer, max_tokens=40)
    parts = [(session.part, response.text) for response in session.reply("hello world")]
    answer = {"role": "assistant", "content": "Aye.", "reasoning_content": "I\nsee."}
    if template == tiny.CHAT:
        answer = {"role": "assistant", "content": decoder.text}
    assert session.messages[1] == answer and "".join(text for _, text in parts) == decoder.text
    shown = ["".join(part[side] for part, _ in parts) for side in (0, 1)]
    assert shown == [answer.get("reasoning_content", ""), answer["content"]]
    prompt = tokenizer.render_chat_template([*session.messages, {"role": "user", "content": "more"}])
    assert ("(I\nsee.)" in prompt) is (SHOWN in template) and "Aye." in prompt

    session.save(tmp_path / "talk.st", "a/model")
    other = ChatSession(decoder, tokenizer, max_tokens=40)
    other.load(tmp_path / "talk.st", "a/model")
    assert other.messages == session.messages
    decoder.text = "< than"
    stopped = session.reply("more")
    next(stopped)
    stopped.close()  # in the middle of its thoughts, at what might have been the beginning of a mark
    key = "content" if template == tiny.CHAT else "reasoning_content"
    assert session.messages[3] == {"role": "assistant", "content": "", key: "<"}
    session.messages[1]["thoughts"] = "x"
    session.save(tmp_path / "talk.st", "a/model")
    with pytest.raises(FormatError, match="what was said"):
        other.load(tmp_path / "talk.st", "a/model")
