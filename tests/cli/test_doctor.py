"""doctor: right on a sound machine, and it says so when an engine is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitnet_mlx import api
from bitnet_mlx.api import embedded_model
from bitnet_mlx.cli.main import main
from bitnet_mlx.doctor import cpu_product, products
from bitnet_mlx.doctor.products import EMBEDDED, MODEL_2B, Shape
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.models.hf_config import parse_config
from bitnet_mlx.models.weights import DecoderWeights, Linear
from bitnet_mlx.ternary import TernaryTensor
from tests.support.random_model import tiny_config


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products at small shapes, but for the test of the real ones."""
    small = (Shape(33, 100, "row"), Shape(8, 260, "group"), Shape(384, 384, "tensor"))
    monkeypatch.setattr(products, "SHAPES", small)


def record(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_engine_is_right_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = record(capsys)
    engines = {engine["name"]: engine for engine in found["engines"]}
    assert set(engines) == {"numpy", "cpu", "mlx", "metal", "cuda"}
    why = engines["metal"]["reason"]  # on a Mac the tests set MLX's device to the CPU
    assert ("no Metal device" in why or "default device" in why) and not engines["cuda"]["available"]
    assert engines["cpu"]["exact"] and engines["cpu"]["details"]["threading_layer"] in ("tbb", "omp", "workqueue")
    # Its attention rounds its own way, and one code that flips for it moves logits by some percent of their spread.
    assert engines["mlx"]["same_tokens"] and engines["mlx"]["worst"] < 0.1
    assert found["ok"] and found["packages"]["mlx"] and found["machine"]["mlx_from"] == "a wheel"
    assert found["machine"]["memory_bytes"] > 1 << 30 and found["machine"]["bandwidth"] > 0.1
    products = {(p["backend"], p["n"], p["m"]) for p in found["products"] if p["exact"] and p["time"] > 0}
    assert products == {(b, n, m) for b in ("cpu", "mlx") for n in (33, 8, 384) for m in (1, 8, 16)}
    assert all(p["to_float32"] > 0 for p in found["products"] if p["backend"] == "cpu")


def test_the_default_shapes_are_those_of_the_embedded_model_and_of_2b() -> None:
    config = parse_config(json.loads((embedded_model() / "config.json").read_text())).decoder
    assert {(s.n, s.k) for s in EMBEDDED} == joined(config)
    two = tiny_config(
        hidden_size=2560, intermediate_size=6912, num_attention_heads=20, num_key_value_heads=5, head_dim=128
    )
    assert {(s.n, s.k) for s in MODEL_2B} == joined(two)


def joined(config: DecoderConfig) -> set[tuple[int, int]]:
    """(N, K) of a layer's products where q, k and v are one, and gate and up another."""
    shapes = config.linear_shapes()
    n = {name.split(".")[1].removesuffix("_proj"): shape[0] for name, shape in shapes.items()}
    hidden = config.hidden_size
    return {
        (n["q"] + n["k"] + n["v"], hidden), (n["gate"] + n["up"], hidden),
        shapes["self_attn.o_proj"], shapes["mlp.down_proj"],
    }  # fmt: skip


def test_progress_goes_to_stderr_and_the_table_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "threading_layer" in out and "doctor: products with 33 x 100" in err
    lines = [line.split() for line in out.splitlines()]
    assert ["cpu", "33x100", "1", "exact"] in [line[:4] for line in lines]
    assert out.rstrip().endswith("all engines and kernels agree")


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sound = cpu_product.CpuProduct.multiply

    def broken(self: cpu_product.CpuProduct) -> np.ndarray:
        y = sound(self).copy()
        y[-1, -1] += 1
        return y

    monkeypatch.setattr(cpu_product.CpuProduct, "multiply", broken)
    assert main(["doctor", "--json"]) == 1
    found = record(capsys)
    assert not found["ok"] and {p["exact"] for p in found["products"] if p["backend"] == "cpu"} == {False}
    assert main(["doctor"]) == 1
    assert "WRONG: 1 of 33 outputs are wrong" in capsys.readouterr().out


def test_a_wrong_engine_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The cpu engine's place is taken by one whose first projection has another scale."""
    sound = api.make_decoder

    def broken(backend: str, weights: DecoderWeights, *rest: Any) -> Any:
        if backend != "cpu":
            return sound(backend, weights, *rest)
        name = "model.layers.0.self_attn.q_proj"
        w = weights.linears[name].weight
        assert isinstance(w, TernaryTensor)
        weights.linears[name] = Linear(replace(w, scale=np.asarray(w.scale * np.float32(1.01), np.float32)))
        return NumpyDecoder(weights)

    monkeypatch.setattr(api, "make_decoder", broken)
    assert main(["doctor", "--json"]) == 1
    found = record(capsys)
    assert not found["ok"] and [e["name"] for e in found["engines"] if not e["ok"]] == ["cpu"]
