"""Adapters over packed layers: torch's numbers, and nothing changed while B is 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from bitnet_mlx.checkpoint.adapter import AdapterConfig, read_config, with_adapter
from bitnet_mlx.checkpoint.adapter_mlx import adapter_parameters, attach, save_adapter
from bitnet_mlx.errors import ConfigError, FormatError
from bitnet_mlx.formats import words2
from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.nn import lora
from bitnet_mlx.nn.bitlinear import BitLinear
from bitnet_mlx.nn.dense import DenseLinear, GroupedLinear
from bitnet_mlx.ternary import TernaryTensor
from tests.support.random_model import random_rows, random_weights, tiny_config

GOLDEN = np.load(Path(__file__).parent / "data" / "lora_torch.npz")
IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.mark.parametrize(("kind", "layer"), [("lora", lora.LoRALinear), ("dora", lora.DoRALinear)])
def test_outputs_and_gradients_are_torchs(kind: str, layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_ROWS", 8)  # several blocks of rows, the last one ragged
    t = GOLDEN["t"]
    base = BitLinear(TernaryTensor(words2.pack(t), GOLDEN["row_scale"], t.shape), GOLDEN["bias"])
    adapted = layer(base, *t.shape, r=3, scale=2.5)
    names = [name for name in ("x", "lora_a", "lora_b", "m") if f"{kind}.d_{name}" in GOLDEN]
    given = {name: mx.array(GOLDEN[name]) for name in names}

    def loss(given: dict[str, mx.array]) -> mx.array:
        for name in names[1:]:
            setattr(adapted, name, given[name])
        return (mx.sin(adapted(given["x"])) * mx.array(GOLDEN["c"])).sum()

    found = mx.grad(loss)(given)
    for name in names[1:]:
        setattr(adapted, name, given[name])
    np.testing.assert_allclose(np.array(adapted(given["x"])), GOLDEN[f"{kind}.y"], rtol=1e-5, atol=1e-5)
    for name in names:
        expected = GOLDEN[f"{kind}.d_{name}"]
        np.testing.assert_allclose(np.array(found[name]), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("storage", ["float32", "8", "4"])
def test_over_layers_that_are_not_packed(storage: str) -> None:
    rows = random_rows(np.random.default_rng(0), 10, 72, storage)
    base = DenseLinear(rows) if storage == "float32" else GroupedLinear(rows)
    x = mx.random.normal((3, 72))
    expected = np.array(base(x))
    assert np.array_equal(np.array(lora.LoRALinear(base, 10, 72)(x)), expected)
    np.testing.assert_allclose(np.array(lora.DoRALinear(base, 10, 72)(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense", [(), ("mlp.up_proj",)])
def test_a_new_adapter_changes_nothing(dense: tuple[str, ...]) -> None:
    weights = random_weights(tiny_config(), bias=True, dense=dense)
    expected = np.array(MlxModel(weights)(IDS))
    model = MlxModel(weights)
    assert len(attach(model, AdapterConfig())) == 2 * 7 * 2
    # Norms are modules of their own then, and may differ in the last bit from those that are fused with the quantiser.
    np.testing.assert_allclose(np.array(model(IDS)), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    trained = MlxModel(weights)
    names = attach(trained, AdapterConfig(num_layers=1, keys=("mlp.down_proj", "self_attn.q_proj")))
    assert sorted(names) == [
        f"model.layers.1.{k}.{leaf}" for k in ("mlp.down_proj", "self_attn.q_proj") for leaf in ("lora_a", "lora_b")
    ]
    assert {name for name, _ in tree_flatten(trained.trainable_parameters())} == set(names)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_comes_back_from_the_disk(kind: str, tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    model = MlxModel(weights)
    config = AdapterConfig(kind, 1, rank=2, keys=("self_attn.v_proj",))
    parameters = {k: mx.random.normal(v.shape) for k, v in attach(model, config).items()}
    save_adapter(tmp_path, parameters, config, {"model": None})
    assert read_config(tmp_path) == config
    model.update(tree_unflatten(list(parameters.items())))
    model.eval()
    again = MlxModel(with_adapter(weights, tmp_path))
    assert np.array_equal(np.array(again(IDS)), np.array(model(IDS)))
    assert not np.array_equal(np.array(again(IDS)), np.array(MlxModel(weights)(IDS)))
    assert {name: a.shape for name, a in adapter_parameters(again).items()} == config.tensors(weights.config)
    with pytest.raises(ConfigError, match="adapter already"):
        attach(again, config)


def test_mlx_lm_reads_the_files(tmp_path: Path) -> None:
    """The names, shapes and configuration that mlx-lm's own loader asks for, on its own layer over the same weights."""
    from mlx import nn

    from bitnet_mlx import _mlxlm

    config = AdapterConfig(num_layers=-1, rank=2, keys=("self_attn.q_proj",))
    weights = random_weights(tiny_config())
    ours = MlxModel(weights)
    parameters = {k: mx.random.normal(v.shape) for k, v in attach(ours, config).items()}
    save_adapter(tmp_path, parameters, config, {})

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Module()
            self.model.layers = [nn.Module() for _ in ours.layers]
            for layer in self.model.layers:
                layer.self_attn = nn.Module()
                layer.self_attn.q_proj = nn.Linear(72, 72, bias=False)

        @property
        def layers(self) -> list[nn.Module]:
            return self.model.layers

    twin = _mlxlm.module("tuner.utils").load_adapters(Twin(), str(tmp_path))
    fresh = MlxModel(with_adapter(weights, tmp_path))
    x = mx.random.normal((2, 72))
    a, b = twin.layers[1].self_attn.q_proj, fresh.layers[1].self_attn.q_proj
    np.testing.assert_allclose(np.array(a(x) - a.linear(x)), np.array(b(x) - b.linear(x)), rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    with pytest.raises(ConfigError, match=r"no linear mlp\.nothing"):
        attach(MlxModel(weights), AdapterConfig(keys=("mlp.nothing",)))
    config = AdapterConfig(rank=2)
    save_adapter(tmp_path, attach(MlxModel(weights), config), config, {})
    narrow = random_weights(tiny_config(intermediate_size=96))
    with pytest.raises(FormatError, match=r"of another model .*down_proj.lora_a is \[100, 2\] and not \[96, 2\]"):
        with_adapter(narrow, tmp_path)
    with pytest.raises(FormatError, match=r"layers.2.mlp.down_proj.lora_a is missing.* and 10 more"):
        with_adapter(random_weights(tiny_config(num_hidden_layers=3)), tmp_path)
    path = tmp_path / "adapters.safetensors"
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    name = next(iter(tensors))
    mx.save_safetensors(str(path), {**tensors, "lm_head.lora_a": mx.zeros((72, 2))})
    with pytest.raises(FormatError, match="lm_head.lora_a is not known"):
        with_adapter(weights, tmp_path)
    for bad in (mx.full(tensors[name].shape, float("nan")), tensors[name].astype(mx.int32)):
        mx.save_safetensors(str(path), {**tensors, name: bad})
        with pytest.raises(FormatError, match=f"{name} is .*; finite floats are needed"):
            with_adapter(weights, tmp_path)
    path.write_bytes(b"{")
    with pytest.raises(FormatError, match="damaged"):
        with_adapter(weights, tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match="no file"):
        with_adapter(weights, tmp_path)
    for text, kind, message in (
        ('{"num_layers": 2}', FormatError, "no adapter's configuration"),
        ('{"peft_type": "LORA", "r": 8}', ConfigError, "is PEFT's"),
        ('{"fine_tune_type": "full", "num_layers": 2, "lora_parameters": null}', ConfigError, "'full'; lora, dora"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(kind, match=message):
            with_adapter(weights, tmp_path)
