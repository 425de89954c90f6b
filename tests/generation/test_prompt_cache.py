"""Computed prompts on disk: the same text as without them, and refused where they do not belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from bitnet_mlx.api import make_decoder
from bitnet_mlx.checkpoint.safetensors_file import SafetensorsFile
from bitnet_mlx.checkpoint.safetensors_writer import pending, write_safetensors
from bitnet_mlx.errors import BitnetError, ConfigError, FormatError
from bitnet_mlx.generation import ChatSession, stream_generate
from bitnet_mlx.generation.prompt_cache import Said, keep_shared, load_prompt, save_prompt
from bitnet_mlx.models.cache_state import fingerprint
from bitnet_mlx.tokenizer import Tokenizer, load_tokenizer
from tests.support import tiny_tokenizers as tiny
from tests.support.random_model import random_weights, tiny_config

ENGINES = {
    "numpy": ("numpy", None, None), "cpu": ("cpu", None, None), "mlx": ("mlx", None, None),
    "mlx bfloat16": ("mlx", "bfloat16", None), "mlx 16": ("mlx", None, 16), "mlx 8": ("mlx", None, 8),
}  # fmt: skip
TEXT, MORE = "hello world def return", " hello hello"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(tiny.byte_level(folder, settings={"chat_template": tiny.CHAT}))


def decoder_of(tokenizer: Tokenizer, engine: str = "numpy", seed: int = 1, scale: float = 1.0, **changes: Any) -> Any:
    backend, dtype, bits = ENGINES[engine]
    config = tiny_config(vocab_size=tokenizer.vocab_size, eos_token_ids=(), num_hidden_layers=2, head_dim=64, **changes)
    weights = random_weights(config, seed=seed)
    weights.norms["model.norm"] = weights.norms["model.norm"] * np.float32(0.15 * scale)
    return make_decoder(backend, weights, dtype, None, bits)


def tokens_of(decoder: Any, tokenizer: Tokenizer, ids: list[int], cache: Any = None) -> tuple[list[int], int]:
    responses = list(stream_generate(decoder, tokenizer, ids, 12, cache=cache))
    return [r.token for r in responses], responses[0].cached_tokens


def saved(path: Path, decoder: Any, tokenizer: Tokenizer, raw: bool = True) -> list[int]:
    ids = tokenizer.encode(TEXT)
    cache = decoder.make_cache()
    next(stream_generate(decoder, tokenizer, ids, 1, cache=cache))
    save_prompt(path, decoder, cache, ids, Said(TEXT, raw=raw), "a/model")
    return ids


@pytest.mark.parametrize("engine", list(ENGINES))
def test_the_same_tokens_and_bits_as_without_a_file(engine: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two decoders of the same weights: one writes, the other goes on. On MLX the prompt is fed in the same two parts."""
    if engine.startswith("mlx"):
        pytest.importorskip("mlx.core")
    writer, reader = (decoder_of(tokenizer, engine) for _ in range(2))
    ids = saved(tmp_path / "p.st", writer, tokenizer)
    found = load_prompt(tmp_path / "p.st", reader, "a/model")
    whole = found.next_ids(tokenizer, MORE)
    assert whole == tokenizer.encode(TEXT + MORE)
    shared = keep_shared(found.cache, found.ids, whole)
    assert shared >= len(ids) - 1
    kept = reader.make_cache()
    reader.step([ids], [kept])
    kept.trim(shared)
    want = tokens_of(reader, tokenizer, whole, kept)
    assert tokens_of(reader, tokenizer, whole, found.cache) == want == (want[0], shared)
    if engine in ("numpy", "cpu"):
        assert tokens_of(reader, tokenizer, whole)[0] == want[0]
        for ours, theirs in zip(found.cache.keys + found.cache.values, kept.keys + kept.values, strict=True):
            assert np.array_equal(ours[:, : kept.offset], theirs[:, : kept.offset])


def test_others_can_read_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With the format's own reader: ids, and keys of the shape that the module states."""
    decoder = decoder_of(tokenizer)
    ids = saved(tmp_path / "p.st", decoder, tokenizer)
    arrays = safetensors.numpy.load_file(tmp_path / "p.st")
    assert arrays["tokens"].tolist() == ids
    cache = decoder.make_cache()
    decoder.step([ids], [cache])
    assert np.array_equal(arrays["layers.1.0"], cache.keys[1][:, : len(ids)])
    assert np.array_equal(arrays["layers.1.1"], cache.values[1][:, : len(ids)])


def test_another_model_engine_or_precision_is_refused_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    decoder = decoder_of(tokenizer)
    saved(tmp_path / "p.st", decoder, tokenizer)
    others = {
        "made by the model a/model .* this is b/model": [
            decoder_of(tokenizer, seed=2), decoder_of(tokenizer, scale=1.001), decoder_of(tokenizer, rms_norm_eps=1e-6)
        ],
        "backend numpy and this is cpu": [decoder_of(tokenizer, "cpu")],
    }  # fmt: skip
    for message, decoders in others.items():
        for other in decoders:
            with pytest.raises(ConfigError, match=rf"p.st was .*{message}"):
                load_prompt(tmp_path / "p.st", other, "b/model")
    with pytest.raises(ConfigError, match="holds .* positions and the context 3; raise --max-kv-size"):
        load_prompt(tmp_path / "p.st", decoder, "a/model", 3)
    pytest.importorskip("mlx.core")
    saved(tmp_path / "p.st", decoder_of(tokenizer, "mlx"), tokenizer)
    for engine, message in (
        ("mlx bfloat16", "dtype float32 and this is bfloat16"),
        ("mlx 8", "kv_bits None and this is 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_prompt(tmp_path / "p.st", decoder_of(tokenizer, engine), "b/model")
    assert fingerprint(decoder_of(tokenizer, "mlx")) == fingerprint(decoder_of(tokenizer, "mlx"))
    assert fingerprint(decoder_of(tokenizer, "mlx")) != fingerprint(decoder_of(tokenizer, "mlx", scale=1.001))


def test_damaged_files_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    decoder, path, other = decoder_of(tokenizer), tmp_path / "p.st", tmp_path / "other.st"
    saved(path, decoder, tokenizer)
    file = SafetensorsFile(path)
    about = json.loads(file.metadata["bitnet_mlx"])
    arrays = {name: file.array(name) for name in file.tensors}

    def written(metadata: Any = about, **changed: np.ndarray | None) -> Path:
        kept = {name: a for name, a in {**arrays, **changed}.items() if a is not None}
        write_safetensors(other, [pending(name, a) for name, a in kept.items()], {"bitnet_mlx": json.dumps(metadata)})
        return other

    damaged: list[tuple[str, Callable[[], Path]]] = [
        ("no prompt cache of this package", lambda: written(tokens=None)),
        ("another form", lambda: written({**about, "format": 2})),
        ("what was said", lambda: written({**about, "messages": [{"role": 1}]})),
        ("what was said", lambda: written({**about, "text": None})),
        ("different lengths", lambda: written(**{"layers.1.0": arrays["layers.1.0"][:, :2]})),
        ("other shapes", lambda: written(**{"layers.1.0": arrays["layers.1.0"][..., :7]})),
        ("no tensor 'layers.1.1'", lambda: written(**{"layers.1.1": None})),
        ("positions for 1 tokens", lambda: written(tokens=arrays["tokens"][:1])),
        ("unknown tokens", lambda: written(tokens=arrays["tokens"] + 10**6)),
    ]
    for message, make in damaged:
        with pytest.raises(FormatError, match=message):
            load_prompt(make(), decoder, "a/model")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError, match="truncated"):
        load_prompt(path, decoder, "a/model")


def test_a_failed_write_leaves_the_file_that_was_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    decoder = decoder_of(tokenizer)
    saved(tmp_path / "p.st", decoder, tokenizer)
    before = (tmp_path / "p.st").read_bytes()
    cache = decoder.make_cache()
    decoder.step([[5, 6]], [cache])
    calls = 0

    class Failing(list):  # a layer that cannot be read when its turn to be written comes
        def __iter__(self) -> Any:
            nonlocal calls
            calls += 1
            raise BitnetError("gone")

    cache.values = Failing()
    with pytest.raises(BitnetError, match="gone"):
        save_prompt(tmp_path / "p.st", decoder, cache, [5, 6], Said(), "a/model")
    assert calls and (tmp_path / "p.st").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("raw", [True, False])
def test_a_conversation_goes_on_after_save_and_load(raw: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def session(system: str | None) -> ChatSession:
        return ChatSession(decoder_of(tokenizer), tokenizer, system, max_tokens=6, raw=raw)

    def text(talk: ChatSession, message: str) -> tuple[str, int]:
        responses = list(talk.reply(message))
        return "".join(r.text for r in responses), responses[0].cached_tokens

    talk = session(None if raw else "be brief")
    for message in ("hello", "world"):
        text(talk, message)
    talk.save(tmp_path / "talk.st", "a/model")
    held = talk.positions
    want, cached = text(talk, "return")
    other = session(None)  # the file says how it began
    text(other, "something else")
    other.load(tmp_path / "talk.st", "a/model")
    assert other.positions == held and len(other.messages) == 4
    assert text(other, "return") == (want, cached)
    assert cached >= held - (1 if raw else 10), "a random answer may be split anew"
    assert other.messages == talk.messages
    with pytest.raises(ConfigError, match="a chat template"):
        ChatSession(decoder_of(tokenizer), tokenizer, raw=not raw).load(tmp_path / "talk.st", "a/model")


def test_a_computed_prompt_opens_a_conversation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """cache-prompt's file in a chat: the first message comes right behind its text."""
    for raw in (True, False):
        decoder = decoder_of(tokenizer)
        said = Said(TEXT, raw=raw)
        ids = tokenizer.encode(TEXT) if raw else tokenizer.apply_chat_template([{"role": "user", "content": TEXT}])
        cache = decoder.make_cache()
        decoder.step([ids], [cache])
        save_prompt(tmp_path / "p.st", decoder, cache, ids, said, "a/model")
        talk, plain = (ChatSession(decoder, tokenizer, max_tokens=5, raw=raw) for _ in range(2))
        talk.load(tmp_path / "p.st", "a/model")
        responses, want = list(talk.reply(MORE)), list(plain.reply(TEXT + MORE))
        assert [r.token for r in responses] == [r.token for r in want]
        assert responses[0].cached_tokens > 3 and want[0].cached_tokens == 0
        assert talk.messages == plain.messages
        talk.load(tmp_path / "p.st", "a/model")
        for forgotten in (talk, plain):
            forgotten.reset()
        assert [r.token for r in talk.reply(MORE)] == [r.token for r in plain.reply(MORE)]
