"""Ids and texts equal those of the libraries that own the formats: transformers, tokenizers, sentencepiece."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from tests.support import tiny_tokenizers as tiny

JSON = ("byte_level", "byte_level_no_bos", "fallback_json")
SENTENCEPIECE = ("sp_fallback", "sp_legacy", "sp_no_fallback", "sp_unigram")


@pytest.mark.parametrize("kind", JSON)
def test_json_ids_and_texts_equal_transformers(
    kind: str, folders: dict[str, Path], tokenizers: dict[str, Tokenizer]
) -> None:
    theirs, ours = tiny.auto(folders[kind]), tokenizers[kind]
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id) == (
        len(theirs),
        theirs.bos_token_id,
        theirs.eos_token_id,
    )
    for text in [*tiny.TEXTS, *tiny.lines(20, seed=9), "a<tool>b<|im_end|> c", "<|start|>user"]:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_no_bos"])
def test_random_ids_decode_as_in_tokenizers(
    kind: str, folders: dict[str, Path], tokenizers: dict[str, Tokenizer]
) -> None:
    from tokenizers import Tokenizer as Library

    library, ours = Library.from_file(str(folders[kind] / "tokenizer.json")), tokenizers[kind]
    rng = random.Random(3)
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size + 3) for _ in range(rng.randrange(1, 25))]  # three are unknown
        for skip in (True, False):
            assert ours.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_ids_and_texts_equal_its_library(
    kind: str, folders: dict[str, Path], tokenizers: dict[str, Tokenizer]
) -> None:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(folders[kind] / "tokenizer.model"))
    ours = tokenizers[kind]
    for text in [t for t in tiny.TEXTS if "<s>" not in t] + tiny.lines(20, seed=9):
        ids = library.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == [library.bos_id(), *ids], text
        if library.unk_id() not in ids:
            assert ours.decode(ids) == library.decode(ids), text


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_random_pieces_decode_as_in_sentencepiece(
    kind: str, folders: dict[str, Path], tokenizers: dict[str, Tokenizer]
) -> None:
    """Damaged byte runs included: whole characters stay, every other byte is one U+FFFD."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(folders[kind] / "tokenizer.model"))
    rng = random.Random(5)
    for _ in range(400):
        ids = [rng.randrange(3, library.get_piece_size()) for _ in range(rng.randrange(1, 25))]
        assert tokenizers[kind].decode(ids) == library.decode(ids), ids


@pytest.mark.parametrize("kind", ["sp_fallback", "sp_legacy"])
def test_special_tokens_inside_a_text_equal_transformers(
    kind: str, folders: dict[str, Path], tokenizers: dict[str, Tokenizer]
) -> None:
    """transformers converts to a BPE of its own, whose prefix is not added to a text that begins with a space;
    sentencepiece adds it always, so such stretches are left out where every stretch has a prefix.
    """
    theirs, ours = tiny.auto(folders[kind]), tokenizers[kind]
    texts = ["a<s>b</s>", "<s>hello</s>", "hello<unk>world", "<s></s>", "hello world</s>the lazy<s>dog"]
    if kind == "sp_fallback":
        texts += ["a<s>b</s> c", "<s> hello </s> world"]
    for text in texts:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids, False) == theirs.decode(ids, skip_special_tokens=False), text
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_the_post_processor_decides_whatever_add_bos_token_says(add_bos: bool, bos: bool, tmp_path: Path) -> None:
    folder = tiny.byte_level(tmp_path, bos=bos, settings={"add_bos_token": add_bos})
    ids = load_tokenizer(folder).encode("hello")
    assert ids == tiny.auto(folder).encode("hello")
    assert ids.count(0) == int(bos)


@pytest.mark.parametrize("add_bos", [True, False])
def test_add_bos_token_decides_for_sentencepiece(add_bos: bool, tmp_path: Path) -> None:
    folder = tiny.sentencepiece_model(tmp_path, settings={"add_bos_token": add_bos, "add_eos_token": True})
    ids = load_tokenizer(folder).encode("hello")
    assert ids == tiny.auto(folder).encode("hello")
    assert (ids.count(1), ids[-1]) == (int(add_bos), 2)


def test_added_tokens_of_the_settings_are_added(tmp_path: Path) -> None:
    size = load_tokenizer(tiny.byte_level(tmp_path)).vocab_size
    added = {str(size): {"content": "<think>", "special": False}, str(size + 1): {"content": "<|x|>", "special": True}}
    folder = tiny.byte_level(tmp_path, settings={"added_tokens_decoder": added})
    theirs, ours = tiny.auto(folder), load_tokenizer(folder)
    ids = ours.encode("a<think>b<|x|>")
    assert ids == theirs.encode("a<think>b<|x|>") and ids[-1] == size + 1
    assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True) == "a<think>b"


def test_added_tokens_of_a_sentencepiece_model(tmp_path: Path) -> None:
    """Past the model's own pieces, as 1bitLLM's pad token; with rstrip, as Phi's."""
    size = load_tokenizer(tiny.sentencepiece_model(tmp_path)).vocab_size
    added = {
        str(size): {"content": "<pad>", "special": True},
        str(size + 1): {"content": "<|user|>", "special": True, "rstrip": True},
    }
    ours = load_tokenizer(
        tiny.sentencepiece_model(tmp_path, settings={"added_tokens_decoder": added, "pad_token": "<pad>"})
    )
    assert (ours.vocab_size, ours.pad_token_id) == (size + 2, size)
    assert ours.encode("<|user|> \n hello<pad>", add_special_tokens=False) == [
        size + 1,
        *ours.encode("<s>hello", add_special_tokens=False)[1:],
        size,
    ]
    assert ours.decode([size, size + 1], False) == "<pad><|user|>"


def test_added_tokens_that_begin_alike_or_take_spaces_equal_transformers(tmp_path: Path) -> None:
    size = load_tokenizer(tiny.sentencepiece_model(tmp_path)).vocab_size
    added = {
        "0": {"content": "<unk>", "special": True}, "1": {"content": "<s>", "special": True},
        "2": {"content": "</s>", "special": True}, str(size): {"content": "<|a|>", "special": True},
        str(size + 1): {"content": "<|a|>b", "special": True},
        str(size + 2): {"content": "<|left|>", "special": True, "lstrip": True},
    }  # fmt: skip
    folder = tiny.sentencepiece_model(tmp_path, settings={"added_tokens_decoder": added})
    ours, theirs = load_tokenizer(folder), tiny.auto(folder)
    for text in ("hello<|a|>b", "hello<|a|>", "hello  <|left|>world", "hello  <|a|>world"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False), text
    assert ours.encode("<|a|>b", add_special_tokens=False) == [size + 1]


def test_a_token_that_the_settings_name_is_special(tmp_path: Path) -> None:
    folder = tiny.byte_level(tmp_path, settings={"eos_token": "<tool>"})  # an added token that the file calls plain
    ours, theirs = load_tokenizer(folder), tiny.auto(folder)
    ids = ours.encode("a<tool>b")
    assert ids == theirs.encode("a<tool>b") and ours.eos_token_id in ours.special_ids
    assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True) == "ab"
