"""Which text is read, in which order, and how it becomes ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitnet_mlx.errors import BitnetError, ConfigError, FormatError
from bitnet_mlx.train import tokenizer as bpe
from bitnet_mlx.train.corpus import find_files, read_corpus
from bitnet_mlx.train.data import Windows, read_ids
from bitnet_mlx.train.prepare import byte_lengths, prepare, vocabulary
from tests.train.support import options, write_texts


def test_duplicates_and_strange_bytes_are_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_bytes(b"x = 1\r\n")  # the same but for its line end
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.md").write_text("  \n")
    (tmp_path / "e.bin").write_text("never read")
    corpus = read_corpus(find_files([tmp_path]))
    assert [(d.text, corpus.duplicates, corpus.not_utf8) for d in corpus.documents] == [("x = 1\n", 1, 1)]


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    train, held = write_texts(tmp_path / "train"), tmp_path / "held"
    held.mkdir()
    copy = train / "module_3.py"
    (held / "same.py").write_bytes(copy.read_bytes())
    data = prepare(options(train, tmp_path / "out", eval_data=(held,)))
    assert data.facts["train_files"] == 11
    assert data.held_out_bytes == copy.stat().st_size
    assert not (tmp_path / "out").exists()  # nothing is written before a run is accepted
    (tmp_path / "out").mkdir()
    data.keep(tmp_path / "out")
    text = bpe.load(tmp_path / "out").decode(data.ids.tolist(), skip_special_tokens=True)
    assert copy.read_text() not in text
    assert (train / "module_4.py").read_text() in text


def test_a_fraction_holds_out_whole_documents(tmp_path: Path) -> None:
    corpus = read_corpus(find_files([write_texts(tmp_path)]))
    train, held = corpus.split(0.25)
    assert (len(train.documents), len(held.documents)) == (9, 3)
    assert not {d.digest for d in train.documents} & {d.digest for d in held.documents}
    assert train.nbytes + held.nbytes == corpus.nbytes
    for fraction, count in ((0.001, 1), (0.999, 11), (0.0, 0)):  # some on each side, wherever some are wanted
        train, held = corpus.split(fraction)
        assert (len(train.documents), len(held.documents)) == (12 - count, count)


def test_the_tokenizer_is_the_same_each_time_and_loses_nothing(tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted(write_texts(tmp_path).iterdir())]
    first, second = bpe.train_bpe(texts, 300), bpe.train_bpe(texts, 300)
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 300
    strange = "def f(x):\n\n\t  if x:\r\n        return 'é\U0001f600 12345'  # a_b\n \n"
    assert first.decode(first.encode(strange).ids) == strange


def test_line_ends_and_digits_are_cut_off() -> None:
    tokenizer = bpe.train_bpe(["def f(a):\n    return 1234\n"] * 50, 400)
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode("def f(a):\n    return 1234\n").ids]
    assert tokens == ["def", " f", "(a", "):", "\n    ", "return", " ", "1", "2", "3", "4", "\n"]


def test_bytes_are_known_without_the_tokenizers_library(tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted(write_texts(tmp_path / "d").iterdir())] + ["naïve \U0001f600\n"]
    tokenizer = bpe.train_bpe(texts, 300)
    bpe.save(tokenizer, tmp_path, 32)
    ids = bpe.encode_documents(tokenizer, texts)
    assert byte_lengths(vocabulary(tmp_path))[ids].sum() == sum(len(t.encode()) for t in texts)
    assert (ids == 0).sum() == len(texts)
    np.save(tmp_path / "train.npy", ids)
    np.save(tmp_path / "held.npy", bpe.encode_documents(tokenizer, texts[-2:]))
    ready = prepare(options(tmp_path / "train.npy", tmp_path / "out", eval_data=(tmp_path / "held.npy",)))
    assert ready.held_out_bytes == sum(len(t.encode()) for t in texts[-2:])
    with pytest.raises(ConfigError, match="with token ids give --eval-data"):
        prepare(options(tmp_path / "train.npy", tmp_path / "out", eval_fraction=0.1))


def test_a_run_that_goes_on_keeps_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, out = write_texts(tmp_path / "texts"), tmp_path / "out"
    first = prepare(options(texts, out))
    out.mkdir()
    first.keep(out)
    monkeypatch.setattr(bpe, "train_bpe", None)
    again = prepare(options(texts, out, resume=True, vocab_size=280))
    assert again.vocab == first.vocab and np.array_equal(again.ids, first.ids)


def test_every_pass_reads_every_window_once_in_another_order() -> None:
    windows = Windows(tokens=1000, length=30, batch=4, seed=1)
    assert windows.per_epoch == 32
    starts = np.concatenate([windows.starts(step) for step in range(16)]).reshape(2, 32)
    for epoch in starts:
        cut = np.sort(epoch)
        assert np.all(np.diff(cut) == 30)
        assert 0 <= cut[0] < 30 and cut[-1] + 31 <= 1000
    assert not np.array_equal(*starts)
    again = Windows(tokens=1000, length=30, batch=4, seed=1)
    np.testing.assert_array_equal(again.starts(11), starts.ravel()[44:48])
    assert not np.array_equal(Windows(1000, 30, 4, seed=2).starts(0), windows.starts(0))


@pytest.mark.parametrize("tokens", [31, 32, 60, 61, 62])
def test_short_data_stays_inside(tokens: int) -> None:
    windows = Windows(tokens, length=30, batch=3, seed=0)
    starts = np.concatenate([windows.starts(step) for step in range(20)])
    assert starts.min() >= 0 and starts.max() + 31 <= tokens


def test_too_little_data_is_named() -> None:
    with pytest.raises(ConfigError, match=r"30 tokens, fewer than one sequence of 30"):
        Windows(30, length=30, batch=1, seed=0)


def test_ids_from_both_file_kinds(tmp_path: Path) -> None:
    ids = np.array([1, 2, 299, 0], np.uint16)
    np.save(tmp_path / "a.npy", ids)
    ids.tofile(tmp_path / "a.bin")
    for name in ("a.npy", "a.bin"):
        np.testing.assert_array_equal(read_ids(tmp_path / name, 300), ids)
        with pytest.raises(FormatError, match="id 299, but the vocabulary has 299"):
            read_ids(tmp_path / name, 299)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "not.npy").write_bytes(b"abc")
    np.save(tmp_path / "wide.npy", ids.astype(np.int64))
    for name in ("odd.bin", "not.npy", "wide.npy"):
        with pytest.raises(FormatError, match=name):
            read_ids(tmp_path / name, 300)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    np.save(tmp_path / "ids.npy", np.zeros(9, np.uint16))
    for given, message in (
        (tmp_path / "nowhere", "no file or folder at"),
        (tmp_path / "empty", "no text under"),
        (tmp_path / "blank.txt", "no usable text"),
        (tmp_path / "ids.npy", "need their tokenizer.json"),
    ):
        with pytest.raises(BitnetError, match=message):
            prepare(options(given, tmp_path / "out"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        prepare(options(tmp_path, tmp_path / "file"))
