"""Conversations: the same replies with and without reuse of the cache, and a history that survives an interrupt."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation import ChatSession, SamplingConfig, conversation_ids, prompt_ids
from tests.support import tiny_tokenizers as tiny
from tests.support.tiny_chat_model import pair

TURNS = ["hello world", "def return", "你好"]


def text_of(session: ChatSession, message: str) -> str:
    return "".join(r.text for r in session.reply(message))


@pytest.mark.parametrize("template", ["plain", "rewriting"])
@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temp=1.0, seed=5)])
def test_the_same_replies_with_and_without_reuse(template: str, sampling: SamplingConfig, tmp_path: Path) -> None:
    """The second template counts the messages at its start, so that turns share next to nothing."""
    source = tiny.CHAT if template == "plain" else "{{ messages | length }}" + tiny.CHAT
    decoder, tokenizer = pair(tmp_path, template=source, max_position_embeddings=512, num_hidden_layers=1)
    replies = {}
    fed = {}
    for reuse in (True, False):
        decoder.fed.clear()
        session = ChatSession(decoder, tokenizer, "be brief", sampling=sampling, max_tokens=8, reuse_cache=reuse)
        replies[reuse] = [text_of(session, turn) for turn in TURNS]
        fed[reuse] = sum(map(len, decoder.fed))
        assert [m["content"] for m in session.messages[::2]] == TURNS
        assert [m["content"] for m in session.messages[1::2]] == replies[reuse]
    assert replies[True] == replies[False]
    if template == "plain":
        assert fed[True] < 0.6 * fed[False]


def test_only_new_tokens_are_fed(tmp_path: Path) -> None:
    decoder, tokenizer = pair(tmp_path, max_position_embeddings=512)
    session = ChatSession(decoder, tokenizer, max_tokens=5)
    list(session.reply(TURNS[0]))
    decoder.fed.clear()
    first = next(iter(session.reply(TURNS[1])))
    assert first.cached_tokens > 0
    assert len(decoder.fed[0]) == first.prompt_tokens - first.cached_tokens < first.prompt_tokens


def test_the_same_message_again_after_a_reset(tmp_path: Path) -> None:
    decoder, tokenizer = pair(tmp_path)
    session = ChatSession(decoder, tokenizer, max_tokens=6)
    before = text_of(session, TURNS[0])
    session.reset()
    assert session.messages == []
    assert text_of(session, TURNS[0]) == before


def test_an_interrupted_answer_stays_and_the_talk_goes_on(tmp_path: Path) -> None:
    decoder, tokenizer = pair(tmp_path, max_position_embeddings=512)
    session = ChatSession(decoder, tokenizer, max_tokens=30)
    decoder.interrupt_at = 8
    shown: list[str] = []
    parts = (response.text for response in session.reply(TURNS[0]))
    with pytest.raises(KeyboardInterrupt):
        shown.extend(parts)
    assert session.messages == [{"role": "user", "content": TURNS[0]}, {"role": "assistant", "content": "".join(shown)}]
    decoder.interrupt_at = None
    after = text_of(session, TURNS[1])
    fresh = ChatSession(decoder, tokenizer, max_tokens=30)
    fresh.messages = session.messages[:2]
    assert text_of(fresh, TURNS[1]) == after, "the cache held nothing of the broken step"


def test_a_closed_stream_keeps_its_part(tmp_path: Path) -> None:
    decoder, tokenizer = pair(tmp_path)
    session = ChatSession(decoder, tokenizer, max_tokens=30)
    stream = session.reply(TURNS[0])
    parts = [next(stream).text for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]
    assert session.messages[-1]["content"] == "".join(parts)


def test_an_interrupt_before_the_first_token_takes_the_message_back(tmp_path: Path) -> None:
    decoder, tokenizer = pair(tmp_path)
    session = ChatSession(decoder, tokenizer, max_tokens=4)
    decoder.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        list(session.reply(TURNS[0]))
    assert session.messages == []
    decoder.interrupt_at = None
    assert text_of(session, TURNS[0])


def test_a_prompt_that_the_cache_holds_whole_is_still_answered(tmp_path: Path) -> None:
    """Interrupted between the prompt's last position and the first token; the same message again."""
    decoder, tokenizer = pair(tmp_path)
    want = text_of(ChatSession(decoder, tokenizer, max_tokens=4), TURNS[0])
    session = ChatSession(decoder, tokenizer, max_tokens=4)

    def interrupt_at_the_end(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(session.reply(TURNS[0], interrupt_at_the_end))
    decoder.fed.clear()
    assert text_of(session, TURNS[0]) == want
    assert len(decoder.fed[0]) == 1


@pytest.mark.parametrize("raw", [True, False])
def test_a_conversation_that_no_longer_fits(raw: bool, tmp_path: Path) -> None:
    decoder, tokenizer = pair(tmp_path)
    session = ChatSession(decoder, tokenizer, max_tokens=4, max_kv_size=60, raw=raw)
    text_of(session, "hello")
    messages, held = list(session.messages), session.positions
    with pytest.raises(ConfigError, match="the context holds 60"):
        list(session.reply("hello world " * 40))
    assert session.messages == messages and session.positions == held
    assert text_of(session, "a")


def test_raw_conversations_continue_the_text(tmp_path: Path) -> None:
    decoder, tokenizer = pair(tmp_path, template=None)
    session = ChatSession(decoder, tokenizer, max_tokens=6, raw=True)
    first = list(session.reply("hello"))
    again = list(session.reply(" world"))
    ids = [*tokenizer.encode("hello"), *(r.token for r in first), *tokenizer.encode(" world", add_special_tokens=False)]
    assert again[0].prompt_tokens == len(ids)
    logits = decoder.step([ids], [decoder.make_cache()])[0]
    assert again[0].token == logits.argmax()


def test_raw_text_goes_on_without_the_token_that_ended_it(tmp_path: Path) -> None:
    decoder, tokenizer = pair(tmp_path, template=None)
    tokens = [r.token for r in ChatSession(decoder, tokenizer, max_tokens=6, raw=True).reply("hello")]
    last = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 1)
    tokenizer.eos_token_ids = frozenset({tokens[last]})
    session = ChatSession(decoder, tokenizer, max_tokens=6, raw=True)
    assert [r.finish_reason for r in session.reply("hello")][-1] == "stop"
    start = tokenizer.encode("hello")
    assert session.positions == len(start) + last
    decoder.fed.clear()
    list(session.reply(" world"))
    assert decoder.fed[0][-1:] == tokenizer.encode(" world", add_special_tokens=False)[-1:]
    assert tokens[last] not in decoder.fed[0]


def test_a_base_model_is_refused(tmp_path: Path) -> None:
    decoder, tokenizer = pair(tmp_path, template=None)
    with pytest.raises(ConfigError, match=r"base model.*--ignore-chat-template"):
        ChatSession(decoder, tokenizer)


def test_a_system_prompt_reaches_the_model_or_is_refused(tmp_path: Path) -> None:
    decoder, tokenizer = pair(tmp_path / "takes")
    assert "be brief" in tokenizer.decode(prompt_ids(tokenizer, "hi", "be brief"))
    _, leaves = pair(
        tmp_path / "leaves", template="{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="leaves the system prompt out"):
        conversation_ids(leaves, [{"role": "user", "content": "hi"}], "be brief")
    _, refuses = pair(
        tmp_path / "refuses",
        template="{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}x",
    )
    with pytest.raises(ConfigError, match="No system role"):
        ChatSession(decoder, refuses, "be brief")
    _, base = pair(tmp_path / "base", template=None)
    with pytest.raises(ConfigError, match="no chat template"):
        prompt_ids(base, "hi", "be brief")
    with pytest.raises(ConfigError, match="ignore its chat template"):
        prompt_ids(tokenizer, "hi", "be brief", ignore_chat_template=True)
    assert prompt_ids(base, "hi") == base.encode("hi")
    assert prompt_ids(tokenizer, "hi", ignore_chat_template=True) == tokenizer.encode("hi")
