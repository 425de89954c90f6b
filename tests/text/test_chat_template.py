"""Rendered conversations equal transformers', and what templates may not do is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support import tiny_tokenizers as tiny

TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hello <b>&amp;</b> \"quoted\" 'x' 你好"},
    {"role": "assistant", "content": "Hi.\n"},
    {"role": "user", "content": "  Bye  "},
]

# The forms that the supported families' templates take, in our words: headers, capitalised roles, bracketed turns.
TEMPLATES = {
    "headers": tiny.CHAT,
    "roles": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
        "message['role'] | capitalize + ': ' + message['content'] | trim + '<|im_end|>' %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
    "brackets": (
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
        "{%- set messages = messages[1:] %}{%- endif %}\n{{- bos_token }}\n"
        "{%- for m in messages %}\n  {%- if m.role == 'user' %}\n"
        "    {{- '[INST] ' + (system + '\n\n' if loop.first and system is defined else '') "
        "+ m.content + ' [/INST]' }}\n"
        "  {%- else %}\n    {{- ' ' + m.content + eos_token }}\n  {%- endif %}\n{%- endfor %}"
    ),
    "blocks": (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n\tU:{{ m.content }}\n  {% endif %}\n{% endfor %}\nend\n"
    ),
    "loops": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index }}{{ m | tojson }}"
        "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
        "{{ {'b': 1, 'a': '<é>'} | tojson(indent=2, sort_keys=true) }}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% generation %}{{ ns.n }}"
        "{{ m.content }}{% endgeneration %}{% endfor %}{{ tools is none }}{{ documents is none }}{{ extra }}"
    ),
    "date": "{{ strftime_now('%Y') | length }}{{ messages | length }}{{ unk_token }}|{{ eos_token }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_rendered_text_and_ids_equal_transformers(name: str, kind: str, tmp_path: Path) -> None:
    settings = {"chat_template": TEMPLATES[name]}
    make: Any = tiny.byte_level if kind == "json" else tiny.sentencepiece_model
    folder = make(tmp_path, settings=settings)
    theirs, ours = tiny.auto(folder), load_tokenizer(folder)
    for messages in (TALK, TALK[1:], TALK[1:2]):
        for prompt in (True, False):
            options: dict[str, Any] = {"add_generation_prompt": prompt, "extra": "x"}
            text = theirs.apply_chat_template(messages, tokenize=False, **options)
            assert ours.render_chat_template(messages, **options) == text
            ids = theirs.encode(text, add_special_tokens=False)
            if ids[:1] != [theirs.bos_token_id]:
                ids = [theirs.bos_token_id, *ids]
            assert ours.apply_chat_template(messages, **options) == ids


@pytest.mark.parametrize(
    "template", [tiny.CHAT, tiny.CHAT.replace("{{ bos_token }}", ""), "{{ bos_token }}" + tiny.CHAT]
)
def test_exactly_one_bos(template: str, tmp_path: Path) -> None:
    ours = load_tokenizer(tiny.byte_level(tmp_path, settings={"chat_template": template}))
    ids = ours.apply_chat_template(TALK)
    assert ids.count(0) == 1 and ids[0] == 0
    assert ours.encode("<|bos|>hello").count(0) == 1


def test_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    folder = tiny.byte_level(tmp_path, bos=False, settings={"chat_template": tiny.CHAT.replace("{{ bos_token }}", "")})
    assert 0 not in load_tokenizer(folder).apply_chat_template(TALK)


def test_the_template_file_wins(tmp_path: Path) -> None:
    folder = tiny.byte_level(tmp_path, settings={"chat_template": "settings"})
    assert load_tokenizer(folder).chat_template == "settings"
    tiny.write_json(folder / "chat_template.json", {"chat_template": "older file"})
    assert load_tokenizer(folder).chat_template == "older file"
    (folder / "chat_template.jinja").write_text("file é", encoding="utf-8")
    assert load_tokenizer(folder).chat_template == tiny.auto(folder).chat_template == "file é"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    ours, theirs = load_tokenizer(folder), tiny.auto(folder)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for given, text in ((None, "file é"), (tools, "with tools")):
        assert ours.render_chat_template(TALK, tools=given) == text
        assert theirs.apply_chat_template(TALK, tools=given, tokenize=False) == text


def test_the_template_file_wins_over_templates_of_other_names_too(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = tiny.byte_level(tmp_path, settings={"chat_template": named})
    (folder / "chat_template.jinja").write_text("file")
    ours, theirs, tools = load_tokenizer(folder), tiny.auto(folder), [{"name": "f"}]
    assert ours.render_chat_template(TALK, tools=tools) == "file"
    assert theirs.apply_chat_template(TALK, tools=tools, tokenize=False) == "file"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    ours = load_tokenizer(tiny.byte_level(tmp_path, settings={"chat_template": named}))
    assert ours.render_chat_template(TALK) == "D"
    assert ours.render_chat_template(TALK, tools=[{"name": "f"}]) == "T"
    ours = load_tokenizer(tiny.byte_level(tmp_path, settings={"chat_template": [{"name": "rag", "template": "R"}]}))
    with pytest.raises(ConfigError, match="templates rag and none called default"):
        ours.render_chat_template(TALK)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% if %}", "line 1 of the model's template is not valid Jinja"),
        ("{{ messages[9].role.x }}", "refused a conversation with the roles system, user"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ namespace(__class__=1) }}", "underscore"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "underscore"),
        ("{% include 'x' %}", "no loader"),
        ("{{ range(99999999) | list }}", "too big"),
    ],
)
def test_a_bad_template_is_a_config_error(template: str, message: str, tmp_path: Path) -> None:
    ours = load_tokenizer(tiny.byte_level(tmp_path, settings={"chat_template": template}))
    with pytest.raises(ConfigError, match=message) as caught:
        ours.apply_chat_template(TALK)
    assert str(caught.value).startswith("[chat template]") and "--ignore-chat-template" in str(caught.value)


def test_templates_see_plain_data_alone(tmp_path: Path) -> None:
    ours = load_tokenizer(tiny.byte_level(tmp_path, settings={"chat_template": "{{ x }}"}))
    with pytest.raises(ConfigError, match="x is a PosixPath"):
        ours.render_chat_template(TALK, x=tmp_path)
    message = {"role": "user", "content": ["a", {"type": "image", "image": tmp_path}]}
    with pytest.raises(ConfigError, match=r"messages\[0\].content\[1\].image is a PosixPath"):
        ours.render_chat_template([message])
    with pytest.raises(ConfigError, match="conversation is empty"):
        ours.render_chat_template([])


def test_a_text_with_methods_of_its_own_is_a_plain_text_to_a_template(tmp_path: Path) -> None:
    class Loud(str):
        def shout(self) -> str:
            return self.upper()

    template = "{{ messages[0].content.shout is defined }} {{ x.shout is defined }} {{ messages[0].content }}"
    ours = load_tokenizer(tiny.byte_level(tmp_path, settings={"chat_template": template}))
    assert ours.render_chat_template([{"role": "user", "content": Loud("hi")}], x=Loud("hi")) == "False False hi"


def test_what_a_message_leaves_out_is_not_there(tmp_path: Path) -> None:
    """Clients send every field, most of them null; templates ask whether there are tool calls."""
    template = "{% for m in messages %}{{ 'calls' if 'tool_calls' in m else 'none' }};{% endfor %}"
    ours = load_tokenizer(tiny.byte_level(tmp_path, settings={"chat_template": template}))
    talk = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "tool_calls": [{"id": "1"}]}]
    assert ours.render_chat_template(talk) == "none;calls;"


def test_a_base_model_offers_raw_completion(tmp_path: Path) -> None:
    ours = load_tokenizer(tiny.byte_level(tmp_path))
    assert ours.chat_template is None
    with pytest.raises(ConfigError, match=r"base model.*--ignore-chat-template"):
        ours.apply_chat_template(TALK)
