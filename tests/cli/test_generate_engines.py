"""generate and chat from a folder on disk to text, through every engine that runs here."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from bitnet_mlx.checkpoint.write import write_native
from bitnet_mlx.cli.main import main
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support import tiny_tokenizers as tiny
from tests.support.random_model import random_weights, tiny_config

BACKENDS = ["numpy", "cpu", "mlx"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("end_to_end")
    source = tiny.byte_level(root / "source", settings={"chat_template": tiny.CHAT})
    config = tiny_config(vocab_size=load_tokenizer(source).vocab_size, eos_token_ids=(1,))
    names = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings",
        "tie_word_embeddings",
    )  # fmt: skip
    stated = {name: getattr(config, name) for name in names} | {"eos_token_id": 1, "rope_theta": config.rope.rope_theta}
    tiny.write_json(source / "generation_config.json", {"eos_token_id": [1, 3]})
    return write_native(random_weights(config, seed=1), stated, root / "model", copy_from=source, head_bits=8)


def definition(folder: Path, count: int) -> str:
    """The greedy answer, computed without the loop, the cache or the command."""
    from bitnet_mlx.checkpoint.read import read_weights

    decoder, tokenizer = NumpyDecoder(read_weights(folder)), load_tokenizer(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello world"}])
    out: list[int] = []
    for _ in range(count):
        out.append(int(decoder.step([ids + out], [decoder.make_cache()])[0].argmax()))
    assert not {1, 3} & set(out)
    return tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_text_on_every_engine(backend: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "hello world", "--max-tokens", "8", "--temp", "0", "--json", "--backend", backend]
    assert main(["generate", "--model", str(folder), *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["text"], record["backend"], record["model"]) == (definition(folder, 8), backend, str(folder))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conversation_on_every_engine(
    backend: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same first turn after a reset: what the cache held of the first conversation is gone."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello world\nhi\n/reset\nhello world\n")))
    assert main(["chat", "--model", str(folder), "--max-tokens", "5", "--json", "--backend", backend]) == 0
    turns = json.loads(capsys.readouterr().out)["turns"]
    assert len(turns) == 3
    assert turns[0]["text"] == turns[2]["text"] == definition(folder, 5)
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"] == turns[2]["prompt_tokens"]
