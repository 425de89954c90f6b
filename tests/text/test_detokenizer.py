"""Streamed pieces join to the decoded whole, and none of them is half a character."""

from __future__ import annotations

import random

import pytest

from bitnet_mlx.tokenizer import Detokenizer, Tokenizer
from bitnet_mlx.tokenizer.pieces import pieces_from_decoder
from tests.support import tiny_tokenizers as tiny
from tests.text.conftest import KINDS


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finalize()]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_texts_join_to_the_text(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    for text in [*tiny.TEXTS, *tiny.lines(20, seed=4)]:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            pieces = stream(tokenizer, ids, skip)
            assert "".join(pieces) == tokenizer.decode(ids, skip)
            assert pieces[-1] == "", "an unbroken text leaves nothing to the end"
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_random_ids_join_to_the_decoded_whole(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, rng = tokenizers[kind], random.Random(11)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size + 2) for _ in range(rng.randrange(30))]
        for skip in (True, False):
            assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", ["byte_level", "sp_fallback", "fallback_json"])
def test_a_character_appears_with_its_last_byte_and_no_later(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("🦊🦊", add_special_tokens=False)
    fox = [i for i in ids if len(tokenizer.decode([i]).strip()) > 0 or not tokenizer.decode([i]).isspace()]
    pieces = stream(tokenizer, fox, True)
    shown = [p for p in pieces if p.strip()]
    assert shown == ["🦊", "🦊"] and pieces[-1] == ""


def test_an_unfinished_character_is_replaced_at_the_end(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("x🦊", add_special_tokens=False)[:-1]
    pieces = stream(tokenizer, ids, True)
    assert "".join(pieces[:-1]) == "x" and pieces[-1] == "\ufffd"


def test_a_detokenizer_can_be_used_again(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("byte_level", "sp_fallback", "fallback_json"):
        tokenizer = tokenizers[kind]
        detokenizer = Detokenizer(tokenizer)
        ids = tokenizer.encode("hello wörld")
        for _ in range(2):
            assert "".join([detokenizer.add(i) for i in ids] + [detokenizer.finalize()]) == "hello wörld"


def test_work_does_not_grow_with_the_text(tokenizers: dict[str, Tokenizer]) -> None:
    """A piece is looked up once, and what is held back never exceeds three bytes."""
    tokenizer = tokenizers["byte_level"]
    detokenizer = Detokenizer(tokenizer)
    held = 0
    for token in tokenizer.encode("naïve 🦊 straße " * 200):
        detokenizer.add(token)
        held = max(held, len(detokenizer._decoder.getstate()[0]))
    assert held <= 3


def test_metaspace_equals_the_library(tokenizers: dict[str, Tokenizer]) -> None:
    """Metaspace drops every space of the first token, and of no other."""
    import json

    from tokenizers import decoders

    vocabulary = ["▁a", "▁▁b", "c▁", "▁", "d"]
    rng = random.Random(2)
    for scheme in ("always", "first", "never"):
        decoder = decoders.Metaspace(prepend_scheme=scheme)

        class Words:
            pieces = pieces_from_decoder(json.loads(decoder.__getstate__()), vocabulary.__getitem__)
            special_ids: frozenset[int] = frozenset()

        for _ in range(100):
            ids = [rng.randrange(len(vocabulary)) for _ in range(rng.randrange(1, 6))]
            detokenizer = Detokenizer(Words())
            text = "".join([detokenizer.add(i) for i in ids]) + detokenizer.finalize()
            assert text == decoder.decode([vocabulary[i] for i in ids])
