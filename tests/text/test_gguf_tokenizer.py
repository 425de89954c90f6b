"""Tokenizers from GGUF metadata against the folders that the metadata was made from, and the libraries that own them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Library

from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from bitnet_mlx.tokenizer.gguf import hf_files, read_vocabulary
from tests.support import gguf_files, gguf_vocabularies
from tests.support import tiny_tokenizers as tiny

LONG = (
    *tiny.TEXTS,
    *tiny.lines(60, seed=5),
    "12345 and 1234567 in 2024",
    "It's HE'LL we'Ve",
    "a\n\n\n b \t c\r\n\r\nd",
)
# As Llama 3's and Qwen 2's tokenizer.json have them.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
WRONG_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Human: {{ m['content'] }}\n\nBITNETAssistant: {% endif %}"
    "{% endfor %}{{ eos_token }}"
)


def loaded(path: Path, keys: dict[str, Any]) -> Tokenizer:
    path.mkdir(exist_ok=True)
    return load_tokenizer(gguf_files.write(path / "model.gguf", "llama", keys, []))


@pytest.mark.parametrize("bos", [True, False])
def test_byte_level_bpe_as_its_folder(bos: bool, tmp_path: Path) -> None:
    folder = tiny.byte_level(tmp_path, bos=bos, settings={"chat_template": tiny.CHAT})
    there = load_tokenizer(folder)
    found = loaded(tmp_path, gguf_vocabularies.from_json(folder, **{"tokenizer.ggml.add_bos_token": bos}))
    library = Library.from_file(str(folder / "tokenizer.json"))
    for text in LONG:
        ids = found.encode(text)
        assert ids == there.encode(text) == library.encode(text).ids, text
        assert found.encode(text, False) == library.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) == there.decode(ids) and found.decode(found.encode(text, False)) == text
    for name in ("vocab_size", "special_ids", "special_tokens", "bos_token_id", "eos_token_ids", "adds_bos"):
        assert getattr(found, name) == getattr(there, name), name
    messages = [{"role": "user", "content": " hello "}]
    assert found.apply_chat_template(messages) == there.apply_chat_template(messages)


@pytest.mark.parametrize("pre", ["llama-bpe", "falcon3", "falcon_e", "qwen2"])
def test_splits_of_other_models(pre: str, tmp_path: Path) -> None:
    """The same vocabulary under a tokenizer.json that has the model's own pre-tokenizer, built with the library. No merge
    makes one word of it, which Llama 3's takes whole all the same."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    folder = tiny.byte_level(tmp_path, bos=False)
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    state["model"]["merges"] = [merge for merge in merges if merge.replace(" ", "") != "Ġdef"]
    assert len(state["model"]["merges"]) < len(merges)
    tiny.write_json(path, state)
    library = Library.from_file(str(path))
    split = pre_tokenizers.Split(Regex(QWEN2 if pre == "qwen2" else LLAMA3), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if pre == "qwen2":
        library.normalizer = normalizers.NFC()
    else:
        library.model.ignore_merges = True
    keys = gguf_vocabularies.from_json(folder, pre)
    found = loaded(tmp_path, keys)
    for text in LONG:
        assert found.encode(text, False) == library.encode(text).ids, text
    assert found.adds_bos == (pre != "qwen2")
    told = read_vocabulary(keys, tmp_path / "model.gguf").notices
    assert any("that falcon_e means the same was not verified" in text for text in told) == (pre == "falcon_e")


def test_of_two_tokens_of_one_text_the_first_counts(tmp_path: Path) -> None:
    keys = gguf_vocabularies.from_json(tiny.byte_level(tmp_path))
    before = loaded(tmp_path, keys)
    tokens = keys["tokenizer.ggml.tokens"]
    more = {
        "tokenizer.ggml.tokens": [*tokens, "Ġthe"],
        "tokenizer.ggml.token_type": [*keys["tokenizer.ggml.token_type"], 1],
    }
    found = loaded(tmp_path / "more", keys | more)
    ids = found.encode("over the lazy dog")
    assert tokens.index("Ġthe") in ids and ids == before.encode("over the lazy dog")


@pytest.mark.parametrize("fallback", [True, False])
def test_sentencepiece_as_sentencepiece(fallback: bool, tmp_path: Path) -> None:
    folder = tiny.sentencepiece_model(
        tmp_path, byte_fallback=fallback, remove_extra_whitespaces=False, normalization_rule_name="identity",
        settings={"legacy": True},
    )  # fmt: skip
    owner = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    found, there = loaded(tmp_path, gguf_vocabularies.from_sentencepiece(folder)), load_tokenizer(folder)
    for text in LONG:
        if "<" in text:  # special tokens, which sentencepiece does not look for
            assert found.encode(text, False) == there.encode(text, False)
            continue
        assert found.encode(text, False) == owner.encode(text), text
        assert found.encode(text) == [owner.bos_id(), *owner.encode(text)]
        assert found.decode(owner.encode(text)) == there.decode(owner.encode(text))
    for name in ("vocab_size", "special_ids", "special_tokens", "bos_token_id", "eos_token_ids", "adds_bos"):
        assert getattr(found, name) == getattr(there, name), name


def test_a_vocabulary_that_calls_its_unknown_token_normal(tmp_path: Path) -> None:
    folder = tiny.sentencepiece_model(tmp_path, byte_fallback=False)
    keys = gguf_vocabularies.from_sentencepiece(folder)
    right = loaded(tmp_path, keys)
    kinds = keys["tokenizer.ggml.token_type"]
    unknown = keys["tokenizer.ggml.unknown_token_id"]
    found = loaded(tmp_path / "normal", keys | {"tokenizer.ggml.token_type": [1 if k == 2 else k for k in kinds]})
    ids = found.encode("hello Ω world")
    assert unknown in ids and ids == right.encode("hello Ω world")


def test_a_sentencepiece_vocabulary_without_the_leading_space(tmp_path: Path) -> None:
    folder = tiny.sentencepiece_model(tmp_path, add_dummy_prefix=False)
    owner = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    keys = gguf_vocabularies.from_sentencepiece(folder, **{"tokenizer.ggml.add_space_prefix": False})
    keys |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    found = loaded(tmp_path, keys)
    assert found.encode("the quick fox") == [*owner.encode("the quick fox"), owner.eos_id()]


def official(folder: Path) -> dict[str, Any]:
    """A vocabulary with what is wrong in microsoft's file: no pre-tokenizer, no word on BOS, another template."""
    state = gguf_vocabularies.from_json(tiny.byte_level(folder, bos=False), None)
    names = {"<|bos|>": "<|begin_of_text|>", "<|eos|>": "<|end_of_text|>", "<|start|>": "<|eot_id|>"}
    state["tokenizer.ggml.tokens"] = [names.get(t, t) for t in state["tokenizer.ggml.tokens"]]
    return state | {"tokenizer.chat_template": WRONG_TEMPLATE}


def test_the_official_file_is_corrected_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = loaded(tmp_path, official(tmp_path))
    assert "tokenizer.ggml.pre is missing; text is split as for Llama 3" in caplog.text
    assert "chat template (BITNETAssistant) is not the one" in caplog.text
    messages = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hey, are you conscious?"}]
    told = "<|begin_of_text|>System: Be brief.<|eot_id|>User: Hey, are you conscious?<|eot_id|>Assistant: "
    assert found.render_chat_template(messages) == told
    ids = found.apply_chat_template(messages)
    assert ids[0] == found.bos_token_id == found.token_to_id("<|begin_of_text|>") and ids.count(ids[0]) == 1
    assert found.eos_token_ids == {found.token_to_id("<|end_of_text|>"), found.token_to_id("<|eot_id|>")}
    seven = [found.decode([i]) for i in found.encode("1234567", False)]
    assert "".join(seven) == "1234567" and max(map(len, seven)) <= 3


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "official"])
def test_the_files_of_a_folder_say_the_same(kind: str, tmp_path: Path) -> None:
    make = {"byte_level": tiny.byte_level, "sentencepiece": tiny.sentencepiece_model}.get(kind)
    build = gguf_vocabularies.from_json if kind == "byte_level" else gguf_vocabularies.from_sentencepiece
    keys = official(tmp_path) if make is None else build(make(tmp_path / "source"))
    keys["tokenizer.chat_template.tool_use"] = "tools"
    there = loaded(tmp_path, keys)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in hf_files(read_vocabulary(keys, tmp_path / "model.gguf")).items():
        (folder / name).write_bytes(content)
    ours = load_tokenizer(folder)
    for text in LONG:
        assert ours.encode(text) == there.encode(text), text
    for name in ("vocab_size", "special_ids", "special_tokens", "bos_token_id", "eos_token_ids", "adds_bos"):
        assert getattr(ours, name) == getattr(there, name), name
    if "tokenizer.chat_template" in keys:
        assert ours.chat_template == there.chat_template is not None


def test_a_named_token_is_special_whatever_its_type(tmp_path: Path) -> None:
    keys = gguf_vocabularies.from_json(tiny.byte_level(tmp_path))
    there = loaded(tmp_path, keys)
    plain = {"tokenizer.ggml.token_type": [1] * len(keys["tokenizer.ggml.tokens"])}
    found = loaded(tmp_path / "plain", keys | plain)
    assert found.encode("a<|eos|>b") == there.encode("a<|eos|>b") and 1 in found.special_ids
    assert found.decode(found.encode("a<|eos|>b"), True) == "ab"


def test_templates_by_name_and_what_ends_a_turn(tmp_path: Path) -> None:
    keys = gguf_vocabularies.from_json(tiny.byte_level(tmp_path))
    keys |= {
        "tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.ggml.eot_token_id": keys["tokenizer.ggml.tokens"].index("<|im_end|>"),
        "tokenizer.ggml.eom_token_id": keys["tokenizer.ggml.tokens"].index("<|start|>"),
        "tokenizer.ggml.padding_token_id": 4294967295,
    }  # fmt: skip
    found = loaded(tmp_path, keys)
    user = [{"role": "user", "content": "x"}]
    assert found.render_chat_template(user) == "plain" and found.render_chat_template(user, tools=[{}]) == "tools"
    assert found.eos_token_ids == {found.token_to_id(text) for text in ("<|eos|>", "<|im_end|>", "<|start|>")}
    assert found.pad_token_id is None


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no vocabulary": (
        {"tokenizer.ggml.tokens": None},
        FormatError,
        "holds no vocabulary .* take a GGUF file that has one",
    ),
    "no kind": ({"tokenizer.ggml.model": None}, FormatError, "holds no vocabulary"),
    "kind": ({"tokenizer.ggml.model": "bert"}, UnsupportedModelError, "'bert'; gpt2 .* and llama"),
    "pre": ({"tokenizer.ggml.pre": "tekken"}, UnsupportedModelError, "'tekken'; llama-bpe, .* are supported"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, FormatError, "token_type: it has 2 entries for"),
    "merge": ({"tokenizer.ggml.merges": ["Ġ qqq"]}, FormatError, "qqq' does not join two tokens"),
    "scores": ({"tokenizer.ggml.model": "llama"}, FormatError, "needs a score for each token"),
    "flag": ({"tokenizer.ggml.add_bos_token": 1}, FormatError, "add_bos_token: it is 1; a value of type bool"),
    "id": ({"tokenizer.ggml.bos_token_id": True}, FormatError, "a value of type int is needed"),
    "tokens": ({"tokenizer.ggml.tokens": [1, 2]}, FormatError, "holds a value that is no str"),
    "template": ({"tokenizer.chat_template": 3}, FormatError, "chat_template is 3; a text is needed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_key(name: str, tmp_path: Path) -> None:
    change, error, message = REFUSED[name]
    keys = gguf_vocabularies.from_json(tiny.byte_level(tmp_path)) | change
    with pytest.raises(error, match=message) as caught:
        loaded(tmp_path, {key: value for key, value in keys.items() if value is not None})
    assert "model.gguf" in str(caught.value)
