"""Where the ends of a text come from, and what damaged files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitnet_mlx.errors import FormatError, UnsupportedModelError
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support import tiny_tokenizers as tiny


def ids_of(folder: Path, **files: dict[str, Any]) -> set[int]:
    for name, value in files.items():
        tiny.write_json(folder / f"{name}.json", value)
    return set(load_tokenizer(folder).eos_token_ids)


def test_every_source_of_end_tokens_counts(tmp_path: Path) -> None:
    folder = tiny.byte_level(tmp_path)  # <|bos|> 0, <|eos|> 1, <|start|> 2, <|im_end|> 3
    assert ids_of(folder) == {1}
    assert ids_of(folder, config={"eos_token_id": 7}) == {1, 7}
    assert ids_of(folder, config={"eos_token_id": [7, 8]}) == {1, 7, 8}
    assert ids_of(folder, config={"eos_token_id": None}, generation_config={"eos_token_id": [9, 10]}) == {1, 9, 10}
    assert ids_of(folder, config={"eos_token_id": -1}, generation_config={}) == {1}
    tiny.byte_level(folder, settings={"eos_token": None})
    assert ids_of(folder, special_tokens_map={"eos_token": "<|start|>"}) == set(), "an explicit null stands"


def test_an_end_of_turn_counts_when_the_template_writes_it(tmp_path: Path) -> None:
    folder = tiny.byte_level(tmp_path, settings={"chat_template": tiny.CHAT})
    assert ids_of(folder) == {1, 3}
    tiny.byte_level(folder, settings={"chat_template": "{{ '<|eot_id|>' }}"})  # not in the vocabulary
    assert ids_of(folder) == {1}
    tiny.byte_level(folder, settings={"chat_template": "no end"})  # in the vocabulary, not in the template
    assert ids_of(folder) == {1}


def test_special_tokens_map_fills_what_the_settings_leave_out(tmp_path: Path) -> None:
    folder = tiny.byte_level(tmp_path)
    tiny.write_json(folder / "tokenizer_config.json", {})
    tiny.write_json(
        folder / "special_tokens_map.json", {"eos_token": {"content": "<|eos|>"}, "pad_token": "<|im_end|>"}
    )
    ours = load_tokenizer(folder)
    assert (set(ours.eos_token_ids), ours.pad_token_id, ours.bos_token_id) == ({1}, 3, 0)
    assert ours.special_tokens == {"eos_token": "<|eos|>", "pad_token": "<|im_end|>"}


def test_ids_that_the_files_state_count_where_no_token_is_named(tmp_path: Path) -> None:
    folder = tiny.byte_level(tmp_path, settings={"eos_token": None})
    tiny.write_json(folder / "config.json", {"eos_token_id": [9, 7], "pad_token_id": 8})
    ours = load_tokenizer(folder)
    assert (ours.eos_token_id, ours.pad_token_id) == (7, 8)
    tiny.write_json(folder / "config.json", {"pad_token_id": 5000})  # past the vocabulary
    ours = load_tokenizer(folder)
    assert (ours.eos_token_id, ours.pad_token_id) == (None, None)


def test_an_end_that_is_added_is_not_taken_for_a_beginning(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = tiny.byte_level(tmp_path, bos=False, settings={"bos_token": None})
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(single="$A <|eos|>", special_tokens=[("<|eos|>", 1)])
    library.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder)
    assert (ours.bos_token_id, ours.adds_bos) == (None, False)
    assert ours.encode("hello") == [*ours.encode("hello", add_special_tokens=False), 1]


def test_a_text_is_never_cut_or_padded(tmp_path: Path) -> None:
    """Files of models that were trained with the library hold the length of their batches."""
    from tokenizers import Tokenizer

    folder = tiny.byte_level(tmp_path)
    texts = ("hello world " * 20, "x")
    expected = [load_tokenizer(folder).encode(text) for text in texts]
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(6)
    library.enable_padding(length=6, pad_id=3)
    library.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder)
    assert [ours.encode(text) for text in texts] == expected


def test_a_folder_with_the_model_file_alone(tmp_path: Path) -> None:
    tiny.sentencepiece_model(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_token_id, set(ours.eos_token_ids), ours.encode("")) == (1, {2}, [1])


def test_spiece_model_adds_no_bos(tmp_path: Path) -> None:
    tiny.sentencepiece_model(tmp_path, name="spiece.model")
    assert 1 not in load_tokenizer(tmp_path).encode("hello")


def test_ids_outside_the_vocabulary_have_no_text(tmp_path: Path) -> None:
    """Models pad their vocabulary; such an id can be generated."""
    for make in (tiny.byte_level, tiny.sentencepiece_model):
        ours = load_tokenizer(make(tmp_path / make.__name__))
        assert ours.decode([5000, -1]) == ""
        assert ours.id_to_token(5000) is None and ours.token_to_id("<absent>") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json cannot be read"),
        ("tokenizer.json", b'{"model": {"type": "Mystery"}}', "tokenizer.json cannot be read"),
        ("tokenizer_config.json", b"\xff\xfe", "tokenizer_config.json is not UTF-8"),
        ("tokenizer_config.json", b"{'a': 1}", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", b"[]", "a JSON object is expected"),
        ("config.json", b'{"eos_token_id": "two"}', "eos_token_id is 'two'"),
        ("generation_config.json", b'{"eos_token_id": [1, null]}', "an integer or a list of integers"),
        ("added_tokens.json", b'{"<x>": "1"}', "an integer is expected"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "has no id or text"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"9000": {"content": "<x>"}}}', "not of one model"),
        ("chat_template.jinja", b"\xe9", "not UTF-8"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    folder = tiny.byte_level(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no tokenizer; one of tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_not_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(FormatError, match=r"not a sentencepiece model.*tiktoken"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("decoder", "name"), [({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"), (None, "none")]
)
def test_a_decoder_that_cannot_be_streamed_is_refused(decoder: Any, name: str, tmp_path: Path) -> None:
    path = tiny.byte_level(tmp_path) / "tokenizer.json"
    tiny.write_json(path, {**json.loads(path.read_text()), "decoder": decoder})
    with pytest.raises(UnsupportedModelError, match=f"the decoder {name};"):
        load_tokenizer(tmp_path)


def test_importing_the_package_loads_no_library() -> None:
    import subprocess
    import sys

    code = (
        "import bitnet_mlx.tokenizer, sys;"
        "heavy = {'tokenizers', 'sentencepiece', 'jinja2', 'numpy', 'mlx', 'transformers'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
