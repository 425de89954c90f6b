"""GGUF files from the command line and from Python: the same text as the same weights give from a folder."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitnet_mlx
from bitnet_mlx.api import embedded_model
from bitnet_mlx.checkpoint.convert import convert
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.write import write_native
from bitnet_mlx.cli.main import main
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.weights import DecoderWeights
from bitnet_mlx.serve.pooling import Pooling, find_pooling
from bitnet_mlx.ternary import TernaryTensor
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support import gguf_models, gguf_vocabularies
from tests.support import tiny_tokenizers as tiny
from tests.support.random_model import random_weights, tiny_config
from tests.support.same_weights import assert_same

BACKENDS = ["numpy", "cpu", "mlx"]
KINDS = ["I2_S", "TQ1_0", "TQ2_0"]
CONFIG_KEYS = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act rms_norm_eps max_position_embeddings tie_word_embeddings"
).split()


def model(vocabulary: int) -> DecoderWeights:
    """Scales and embeddings that float16 holds, rows that divide into blocks of 256."""
    config = tiny_config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, eos_token_ids=(1,),
    )  # fmt: skip
    weights = random_weights(config, 1, head="float32")
    assert isinstance(weights.embed_tokens, DenseRows)
    weights.embed_tokens.data[...] = weights.embed_tokens.data.astype(np.float16)
    for linear in weights.linears.values():
        assert isinstance(linear.weight, TernaryTensor)
        linear.weight.scale[...] = linear.weight.scale.astype(np.float16)
    return weights


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as a folder under "folder", and as a GGUF file under each kind."""
    root = tmp_path_factory.mktemp("gguf")
    source = tiny.byte_level(root / "source", settings={"chat_template": tiny.CHAT})
    weights = model(load_tokenizer(source).vocab_size)
    stated = {name: getattr(weights.config, name) for name in CONFIG_KEYS}
    stated |= {"eos_token_id": 1, "rope_theta": weights.config.rope.rope_theta}
    found = {"folder": write_native(weights, stated, root / "model", copy_from=source, head_bits=16)}
    keys = gguf_models.metadata(weights.config, "bitnet-b1.58") | gguf_vocabularies.from_json(source)
    keys |= {"tokenizer.ggml.add_bos_token": True, "bitnet-b1.58.pooling_type": 3}
    for kind in KINDS:
        found[kind] = gguf_models.write(root / f"{kind}.gguf", keys, gguf_models.tensors(weights, kind, "F16"))
    return found


def generated(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    arguments = ["--model", str(path), "--prompt", "hello world", "--max-tokens", "8", "--temp", "0", "--json", *flags]
    assert main(["generate", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_generate(kind: str, backend: str, paths: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = generated(paths[kind], capsys, "--backend", backend)
    there = generated(paths["folder"], capsys, "--backend", backend)
    assert found["text"] == there["text"] and found["prompt_tokens"] == there["prompt_tokens"] > 5
    assert found["model"] == str(paths[kind])


def test_chat(paths: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for name in ("I2_S", "folder"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\nworld\n")))
        flags = ["--max-tokens", "5", "--backend", "numpy", "--json"]
        assert main(["chat", "--model", str(paths[name]), *flags]) == 0
        texts.append([turn["text"] for turn in json.loads(capsys.readouterr().out)["turns"]])
    assert texts[0] == texts[1] and len(texts[0]) == 2


def test_python(paths: dict[str, Path]) -> None:
    decoder, tokenizer = bitnet_mlx.load(paths["TQ1_0"], backend="numpy")
    there, _ = bitnet_mlx.load(paths["folder"], backend="numpy")
    ids = tokenizer.encode("the quick brown fox")
    ours, theirs = (d.step([ids], [d.make_cache()], "all")[0] for d in (decoder, there))
    np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def opens() -> list[str]:
    """The interpreter's own record of the files that are opened from now on."""
    found: list[str] = []
    sys.addaudithook(lambda event, given: found.append(str(given[0])) if event == "open" else None)
    return found


def test_a_file_is_parsed_once(paths: dict[str, Path], opens: list[str], tmp_path: Path) -> None:
    """Tokenizer and weights share one open file when a model is loaded, and all readers do in a conversion."""
    path = str(paths["TQ1_0"])
    opens.clear()
    _, tokenizer = bitnet_mlx.load(path, backend="numpy")
    assert opens.count(path) == 1 and tokenizer.name_or_path == path
    assert find_pooling(path, None, tokenizer.gguf_pooling) == Pooling("last")
    assert opens.count(path) == 1
    opens.clear()
    convert(path, tmp_path / "out", force=True)
    assert opens.count(path) == 1
    load_tokenizer(path)
    read_weights(path)
    assert opens.count(path) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_inspect(kind: str, paths: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(paths[kind]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(paths["folder"]), "--json"]) == 0
    there = json.loads(capsys.readouterr().out)
    same = (
        "family parameters ternary_parameters zeros_share zeros_share_least zeros_share_most activation_bits "
        "scale_direction scale_granularity tied layers hidden_size heads kv_heads head_dim vocab_size hidden_act "
        "sub_norms max_context rope_theta chat_template read_bytes"
    ).split()
    for record in (found, there):
        record["read_bytes"].pop("head")  # float16 in the one, float32 in the other
    for key in same:
        assert found[key] == there[key], key
    assert found["storage"] == "gguf" and found["files"] == [f"{kind}.gguf"]
    types = [text.split(" ")[0] for text in found["storage_types"]]
    assert sorted(types) == sorted([kind, "F16", "F32"]) and found["tokenizer"] == "tokenizers (metadata)"
    bits = {"I2_S": 2 + 8 * 32 / 256**2, "TQ1_0": 54 / 32, "TQ2_0": 66 / 32}[kind]
    assert found["bits_per_ternary_weight"] == pytest.approx(bits, rel=0.01)
    assert main(["inspect", str(paths[kind])]) == 0
    told = capsys.readouterr().out
    assert f", {kind}" in told and "GGUF, F16" in told and (kind != "I2_S" or "I2_S layout 128" in told)


@pytest.mark.parametrize("kind", ["I2_S", "TQ1_0"])
def test_convert(kind: str, paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file becomes a folder that has the same weights, the same words and the same answers."""
    flags = ["--hf-path", str(paths[kind]), "--mlx-path", str(tmp_path / "out"), "--head-bits", "16", "--json"]
    assert main(["convert", *flags]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["verified"] and done["bytes_in"] == paths[kind].stat().st_size
    assert_same(read_weights(tmp_path / "out"), read_weights(paths[kind]))
    ours, there = load_tokenizer(tmp_path / "out"), load_tokenizer(paths[kind])
    for text in tiny.TEXTS:
        assert ours.encode(text) == there.encode(text)
    for name in ("special_ids", "special_tokens", "bos_token_id", "eos_token_ids", "adds_bos", "chat_template"):
        assert getattr(ours, name) == getattr(there, name), name
    found = generated(tmp_path / "out", capsys, "--backend", "numpy")
    assert found["text"] == generated(paths[kind], capsys, "--backend", "numpy")["text"]


def test_the_layout_as_a_flag(paths: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    right = generated(paths["I2_S"], capsys, "--i2s-layout", "128", "--backend", "numpy")["text"]
    wrong = generated(paths["I2_S"], capsys, "--i2s-layout", "64", "--backend", "numpy")["text"]
    assert right == generated(paths["TQ2_0"], capsys, "--backend", "numpy")["text"] != wrong
    command = ["convert", "--hf-path", str(paths["I2_S"]), "--mlx-path", str(tmp_path / "m"), "--head-bits", "16"]
    assert main([*command, "--i2s-layout", "64"]) == 0
    capsys.readouterr()
    assert generated(tmp_path / "m", capsys, "--backend", "numpy")["text"] == wrong
    flags = ["--model", str(paths["folder"]), "--prompt", "x", "--i2s-layout", "64"]
    assert main(["generate", *flags]) == 2
    assert "is no GGUF file" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["128", "64"])
def test_the_embedded_model_writes_the_same_story(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Really trained weights, the layout found from them, the tokenizer as a whole in the metadata."""
    folder = embedded_model()
    weights = read_weights(folder)
    exact = replace(weights, embed_tokens=(rows := DenseRows(weights.embed_tokens.rows(slice(None)), "float32")))
    exact.lm_head = rows
    keys = gguf_models.metadata(weights.config, "bitnet-b1.58") | gguf_vocabularies.from_json(folder)
    keys["tokenizer.huggingface.json"] = (folder / "tokenizer.json").read_text()
    path = gguf_models.write(tmp_path / "tiny.gguf", keys, gguf_models.tensors(exact, "I2_S", "F32", layout))
    flags = [
        "--prompt",
        "Once upon a time 12",
        "--max-tokens",
        "24",
        "--backend",
        "numpy",
        "--json",
        "--ignore-chat-template",
    ]
    texts = []
    for model in (folder, path):
        assert main(["generate", "--model", str(model), *flags]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] and len(texts[0]) > 20
