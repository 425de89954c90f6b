"""Sizes from headers against what is then really held: every storage, on the host and in MLX's arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from bitnet_mlx.api import embedded_model, make_decoder
from bitnet_mlx.bench.memory import ALLOWED, predict, run
from bitnet_mlx.checkpoint.adapter import AdapterConfig, read_parts
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.checkpoint.weigh import model_size
from bitnet_mlx.checkpoint.write import write_native
from bitnet_mlx.errors import FormatError
from bitnet_mlx.memory import clear_cache
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.demand import demand, joined
from bitnet_mlx.models.owners import cache_bytes, holdings
from bitnet_mlx.models.weights import DecoderWeights
from tests.support import gguf_models, hf_folder
from tests.support.random_model import random_weights, tiny_config

# What MLX counts beyond an array's bytes: it may take a buffer from its cache that is larger, up to twice as large. Metal's
# allocator, which serves MLX's CPU device too, counts whole pages of 16 KB as well, and these models are small.
SLACK = 1.0 if mx.metal.is_available() else ALLOWED

FOLDERS: dict[str, dict[str, Any]] = {
    "packed": {"storage": "packed"},
    "inverse": {"storage": "inverse"},
    "online": {"storage": "online", "dtype": mx.float16},
    "dense": {"storage": "dense", "dtype": mx.float16},
    "float32": {"storage": "packed", "dtype": mx.float32, "tie_word_embeddings": True},
    "llama": {"family": "llama", "storage": "packed", "attention_bias": True},
    "mixed": {"storage": "packed", "dense": ("model.layers.1.mlp.up_proj",),
              "quantization": {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.up_proj"]}},
}  # fmt: skip


def check(folder: Path, head_bits: int | None = None) -> DecoderWeights:
    size = model_size(folder).with_head_bits(head_bits)
    weights = read_weights(folder, head_bits=head_bits)
    tables = sum(m.host() for m in size.tables)
    assert sum(m.host() for m in size.linears) + size.norms + tables == weights.nbytes
    for engine in ("numpy", "cpu"):
        held = holdings(make_decoder(engine, weights))
        found = demand(size, engine, threads=2)
        assert (found.weights, found.head) == (held["weights"], held["head"]), engine
    return weights


def check_mlx(folder: Path, weights: DecoderWeights, head_bits: int | None = None) -> None:
    clear_cache()
    before = mx.get_active_memory()
    model = make_decoder("mlx", weights)
    held = holdings(model)
    found = demand(model_size(folder), "mlx", head_bits=head_bits)
    assert (found.weights, found.head) == (held["weights"], held["head"])
    taken = mx.get_active_memory() - before  # MLX's own count
    assert taken == pytest.approx(found.weights + found.head, rel=SLACK)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_storage(name: str, tmp_path: Path) -> None:
    hf_folder.write(tmp_path, **FOLDERS[name])
    check_mlx(tmp_path, check(tmp_path))
    if name in ("packed", "float32"):
        check_mlx(tmp_path, check(tmp_path, 4), 4)


def stated(config: DecoderConfig) -> dict[str, Any]:
    """config.json's keys."""
    names = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings",
    )  # fmt: skip
    return {**{name: getattr(config, name) for name in names}, "rope_theta": 10000.0}


@pytest.mark.parametrize("kind", ["TQ2_0", "I2_S"])
def test_gguf_files(kind: str, tmp_path: Path) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=256)
    weights = random_weights(config, head="float32")
    for linear in weights.linears.values():
        linear.weight.scale[...] = linear.weight.scale.astype(np.float16)  # type: ignore[union-attr]
    content = gguf_models.tensors(weights, kind, permute=False, head="F32")
    gguf_models.write(tmp_path / "model.gguf", gguf_models.metadata(config, "bitnet-b1.58"), content)
    check_mlx(tmp_path / "model.gguf", check(tmp_path / "model.gguf"))


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
@pytest.mark.parametrize("head", ["bfloat16", "8", "4"])
def test_native_folders(scale: str, head: str, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=scale != "row")
    weights = random_weights(config, scale=scale, head=head)
    folder = write_native(weights, stated(config), tmp_path / "native")
    check_mlx(folder, check(folder))


def test_the_embedded_model() -> None:
    check_mlx(embedded_model(), check(embedded_model(), 6), 6)


@pytest.mark.parametrize("context", [1, 255, 257, 300, 700, 1024])
def test_the_cpu_engine_is_predicted_to_the_byte(context: int) -> None:
    plan = predict(embedded_model(), "embedded", "cpu", context, 2)
    measured = run(plan, embedded_model())
    assert measured.total == plan.total
    assert measured.process_peak > measured.process_before


@pytest.mark.parametrize(("context", "batch"), [(16, 1), (130, 3), (200, 2), (513, 1)])
def test_mlx_is_predicted_within_five_percent(context: int, batch: int) -> None:
    """One row a pass and many, one sequence and several side by side, a cache that grows."""
    plan = predict(embedded_model(), "embedded", "mlx", context, batch)
    measured = run(plan, embedded_model())
    assert (measured.weights, measured.head, measured.kv_cache) == (plan.weights, plan.head, plan.kv_cache)
    assert abs(measured.error) <= SLACK


def test_the_numpy_engine_stays_below_its_bound() -> None:
    plan = predict(embedded_model(), "embedded", "numpy", 24)
    assert run(plan, embedded_model()).error <= 0


def test_a_wrong_prediction_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is twice as large as it says is what a plan has to catch."""
    from bitnet_mlx.models import cache

    plan = predict(embedded_model(), "embedded", "cpu", 700)
    grow = cache.KVCache._grow
    monkeypatch.setattr(cache.KVCache, "_grow", lambda self, capacity: grow(self, 2 * capacity))
    measured = run(plan, embedded_model())
    assert not measured.within
    assert measured.kv_cache > 1.4 * plan.kv_cache


def test_bytes_of_caches() -> None:
    decoder = make_decoder("numpy", random_weights(tiny_config()))
    caches = [decoder.make_cache(64) for _ in range(3)]
    assert cache_bytes(caches) == 3 * 2 * 2 * 64 * 2 * 18 * 4
    assert isinstance(cache_bytes([]), int)
    assert np.iinfo(np.int64).max > cache_bytes(caches)


def an_adapter(folder: Path, kind: str, rank: int = 12, keys: tuple[str, ...] | None = None) -> Path:
    """Beside the last three layers of the embedded model."""
    how = AdapterConfig(kind, 3, rank, 2.0, keys=keys)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(how.record()))
    shapes = how.tensors(model_size(embedded_model()).config)
    save_file(
        {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}, folder / "adapters.safetensors"
    )
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("engine", ["cpu", "mlx", "numpy"])
def test_an_adapter_is_predicted(kind: str, engine: str, tmp_path: Path) -> None:
    folder = str(an_adapter(tmp_path / "adapter", kind))
    bare = predict(embedded_model(), "embedded", engine, 40)
    plan = predict(embedded_model(), "embedded", engine, 40, adapter_path=folder)
    measured = run(plan, embedded_model(), adapter_path=folder)
    assert (plan.weights, plan.head) == (measured.weights, measured.head)
    assert plan.weights > bare.weights + 3 * 12 * 4 * 4 * 384
    assert plan.measured == (engine == "cpu" or (engine, kind) == ("mlx", "lora"))
    if engine == "cpu":
        assert measured.total == plan.total
    elif plan.measured:
        assert abs(measured.error) <= SLACK
    else:
        assert measured.total < plan.total


def test_products_beside_an_adapter_are_not_joined(tmp_path: Path) -> None:
    folder = an_adapter(tmp_path / "adapter", "lora", keys=("self_attn.k_proj",))
    size = model_size(embedded_model())
    found = size.with_adapter(read_parts(folder, size.config))
    assert joined(size) - joined(found) == 3 * 4 * (384 + 128 + 128)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = an_adapter(tmp_path / "adapter", "lora")
    made = hf_folder.write(tmp_path / "model", "bitnet", "packed")
    made.save()
    with pytest.raises(FormatError, match="of another model"):
        predict(made.path, "x", "cpu", adapter_path=str(folder))
