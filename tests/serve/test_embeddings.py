"""Embeddings through the official client, against torch and transformers on every engine, and whose pooling is taken."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import FormatError
from bitnet_mlx.models.decoder_cpu import CpuDecoder
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.serve.embedding import Embeddings
from bitnet_mlx.serve.jobs import Model
from bitnet_mlx.serve.pooling import Pooling, find_pooling
from bitnet_mlx.serve.schema import EmbeddingBody
from bitnet_mlx.serve.work import Vector
from bitnet_mlx.tokenizer import load_tokenizer
from tests.golden import recipe
from tests.golden.cases import CASES
from tests.serve.running import Running, model, serving, until
from tests.support import tiny_tokenizers as tiny
from tests.support.random_model import random_weights, tiny_config

DATA = Path(__file__).parent / "data" / "embeddings_torch.npz"
TOLERANCE = 2e-6  # of vectors of length 1; measured on x86: 3e-7


@cache
def weights(name: str, folder: Path) -> DecoderWeights:
    recipe.write(CASES[name], folder / name)
    return read_weights(folder / name, activations=CASES[name].activation_bits)


@pytest.mark.parametrize("name", ["qwen3-groups", "qwen3-online"])
@pytest.mark.parametrize("engine", [NumpyDecoder, CpuDecoder, MlxModel])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_against_transformers(
    name: str, engine: Callable[[Any], Any], pooling: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    tokenizer = load_tokenizer(tiny.byte_level(folder / "embedding tokenizer"))
    with np.load(DATA) as golden:
        want, lengths = golden[f"{name}/{pooling}"], golden["lengths"].tolist()
    texts = [list(CASES[name].tokens[:length]) for length in lengths]
    with serving(engine(weights(name, folder)), tokenizer, pooling=pooling) as server, server.client() as client:
        got = client.embeddings.create(model="test/model", input=texts)
        plain = client.embeddings.create(model="test/model", input=texts, encoding_format="float")
        short = client.embeddings.create(model="test/model", input=texts[-1], dimensions=5)
    np.testing.assert_allclose([e.embedding for e in got.data], want, atol=TOLERANCE)
    assert [e.embedding for e in plain.data] == [e.embedding for e in got.data]  # base64 and decimal
    assert [e.index for e in got.data] == [0, 1, 2]
    assert got.usage.prompt_tokens == got.usage.total_tokens == sum(lengths)
    np.testing.assert_allclose(short.data[0].embedding, want[-1, :5] / np.linalg.norm(want[-1, :5]), atol=TOLERANCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(*model(tmp_path_factory.mktemp("model")), pooling="last", running=3, waiting=4) as running:
        yield running


def test_texts_and_ids_and_many_at_a_time(server: Running) -> None:
    """More inputs than may wait are taken in turn, beside a text that is being written."""
    tokenizer, decoder = server.tokenizer, server.decoder
    words = ["hello", "world def", "naïve café"]
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        writing = pool.submit(client.completions.create, model="test/model", prompt="hello", max_tokens=30)
        some = client.embeddings.create(model="test/model", input=words * 5)
        assert len(some.data) == 15
        for word, one in zip(words * 5, some.data, strict=True):
            ids = tokenizer.encode(word)
            state = decoder.hidden([ids], [decoder.make_cache()])[0][-1]
            np.testing.assert_allclose(one.embedding, state / np.linalg.norm(state), atol=TOLERANCE)
        ids = [tokenizer.encode(word) for word in words]
        assert [e.embedding for e in client.embeddings.create(model="test/model", input=ids).data] == [
            e.embedding for e in some.data[:3]
        ]
        one = client.embeddings.create(model="test/model", input=words[1]).data
        assert one[0].embedding == some.data[1].embedding
        alone = client.completions.create(model="test/model", prompt="hello", max_tokens=30)
        assert writing.result(60).choices[0].text == alone.choices[0].text


def test_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    """Its text waits behind one that is being written, and is never read."""
    decoder, tokenizer = model(tmp_path)
    decoder.gate = threading.Semaphore(2)
    with serving(decoder, tokenizer, pooling="mean", running=1) as server, server.client() as client:
        stream = client.completions.create(model="test/model", prompt="hello", max_tokens=30, stream=True)
        next(stream)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/embeddings", json={"model": "test/model", "input": "x"}, timeout=0.3)
        until(lambda: 'embeddings",status="499"} 1' in httpx.get(f"{server.url}/metrics").text, "it has left")
        decoder.gate.release(100)
        assert list(stream)
        until(lambda: "texts_cancelled_total 1" in httpx.get(f"{server.url}/metrics").text, "its text is let go of")


def test_a_text_longer_than_a_step(tmp_path: Path) -> None:
    """The mean goes over all of its parts."""
    decoder, tokenizer = model(tmp_path, max_position_embeddings=400)
    fast = CpuDecoder(decoder.weights)
    ids = np.random.default_rng(1).integers(4, 400, 300).tolist()
    with serving(fast, tokenizer, pooling="mean") as server, server.client() as client:
        got = client.embeddings.create(model="test/model", input=ids).data[0].embedding
    mean = fast.hidden([ids], [fast.make_cache()])[0].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(got, mean / np.linalg.norm(mean), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"input": [1] * 257}, 400, "input"),
        ({"input": ["x"] * 2049}, 400, "input"),
        ({"input": [[]]}, 400, "input"),
        ({"input": None}, 400, "input"),
        ({"dimensions": 100}, 400, "dimensions"),
        ({"model": "other"}, 404, "model"),
    ],
)
def test_what_is_refused(server: Running, changes: dict[str, Any], status: int, param: str) -> None:
    response = httpx.post(f"{server.url}/v1/embeddings", json={"model": "test/model", "input": "x", **changes})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize(
    ("dimensions", "normalize", "want"),
    [(None, False, [3, 4, 12]), (2, False, [3, 4]), (3, True, [3 / 13, 4 / 13, 12 / 13]), (2, True, [0.6, 0.8])],
)
def test_a_length_of_1_is_given_where_the_model_has_it(
    dimensions: int | None, normalize: bool, want: list[float], server: Running
) -> None:
    decoder = NumpyDecoder(random_weights(tiny_config(hidden_size=3, num_attention_heads=1, num_key_value_heads=1)))
    own = Model("m", decoder, server.tokenizer, 256, 16, 0, Pooling("mean", normalize))
    asked = Embeddings(own, EmbeddingBody(model="m", input=[[1, 2]], dimensions=dimensions))
    asked.add(0, Vector(np.array([3, 4, 12], np.float32)))
    assert asked.answer()["data"][0]["embedding"] == pytest.approx(want, rel=1e-6)


def modules(folder: Path, kinds: list[str], pooling: dict[str, Any]) -> Path:
    """sentence-transformers' files."""
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    table = [{"idx": i, "path": places[k], "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(kinds)]
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(table))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


LAST = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}


@pytest.mark.parametrize(
    ("kinds", "pooling", "asked", "want"),
    [
        (["Transformer", "Pooling", "Normalize"], {**LAST, "include_prompt": True}, None, Pooling("last", True)),
        (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True}, None, Pooling("mean", False)),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode": "lasttoken"}, None, Pooling("last", True)),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True}, None, None),
        (["Transformer", "Pooling"], {**LAST, "pooling_mode_mean_tokens": True}, None, None),
        (["Transformer", "Pooling", "Dense"], LAST, None, None),
        (["Transformer", "Pooling", "Normalize"], LAST, "mean", Pooling("mean", True)),
        (["Transformer", "Pooling"], LAST, "last", Pooling("last", False)),
        (["Transformer", "Pooling"], LAST, "none", None),
    ],
)
def test_whose_pooling_is_taken(
    tmp_path: Path, kinds: list[str], pooling: dict[str, Any], asked: str | None, want: Pooling | None
) -> None:
    assert find_pooling(modules(tmp_path / "m", kinds, pooling), asked) == want


def test_files_that_say_nothing_or_are_damaged(tmp_path: Path) -> None:
    assert find_pooling(tmp_path, None) is None
    assert find_pooling(tmp_path, "last") == Pooling("last", True)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(FormatError, match=r"modules\.json"):
        find_pooling(tmp_path, None)


@pytest.mark.parametrize(("number", "want"), [(1, "mean"), (3, "last"), (2, None), (None, None)])
def test_what_a_gguf_file_says(tmp_path: Path, number: int | None, want: str | None) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")  # it is not read again
    found = find_pooling(tmp_path / "m.gguf", None, number)
    assert (found.kind if found else None) == want
