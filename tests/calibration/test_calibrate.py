"""`bitnet-mlx calibrate` on small models: ranges, errors and losses against direct computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.api import make_decoder
from bitnet_mlx.calibration.collect import plain_product
from bitnet_mlx.calibration.histogram import Histogram
from bitnet_mlx.calibration.keep import noise_by_layer, recommend
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.cli.main import main
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.models.config import DecoderConfig
from bitnet_mlx.models.weights import Linear
from bitnet_mlx.quality.observed import Observable, samples
from bitnet_mlx.ternary import TernaryTensor, quantize_activations
from bitnet_mlx.tokenizer import load_tokenizer
from tests.support import hf_folder, tiny_tokenizers
from tests.support.random_model import random_weights, tiny_config

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
CASES: dict[str, tuple[DecoderConfig, dict[str, Any]]] = {
    "bitnet": (tiny_config(), {"scale": "group"}),
    "qwen3": (tiny_config(sub_norms=False, hidden_act="silu", qk_norms=True), {"bias": True}),
    "norms inside": (tiny_config(), {"normed": ("mlp.up_proj", "self_attn.q_proj")}),
    "floats inside": (tiny_config(), {"dense": ("mlp.down_proj", "self_attn.k_proj")}),
    "16 bits": (tiny_config(activation_bits=16), {}),
}


def looked_into(decoder: Observable, clips: dict[str, float] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    seen: dict[str, Any] = {}
    decoder.hooks.tap = lambda name, x, y: seen.update({name: (x, y)})
    decoder.hooks.clips = clips or {}
    [logits] = decoder.step([IDS], [decoder.make_cache()], "all")
    decoder.hooks.tap, decoder.hooks.clips = None, {}
    return logits, seen


@pytest.mark.parametrize("case", CASES)
def test_what_a_model_tells_of_itself(case: str) -> None:
    config, more = CASES[case]
    weights = random_weights(config, 3, **more)
    found = {}
    for backend in ("numpy", "mlx"):
        decoder: Any = make_decoder(backend, weights)
        [plain] = decoder.step([IDS], [decoder.make_cache()], "all")
        logits, seen = looked_into(decoder)
        assert np.array_equal(logits, plain)  # looking changes nothing
        assert len(seen) == 2 * 8 and np.array_equal(seen["model.layers.0"][1], seen["model.layers.1"][0])
        assert seen["model.layers.0.mlp.up_proj"][0] is seen["model.layers.0.mlp.gate_proj"][0] or more.get("normed")
        for name, (x, y) in seen.items():
            linear = weights.linears.get(name)
            if linear is None:
                continue
            w = linear.weight.rows(slice(None)).astype(np.float64)
            q, s = quantize_activations(x)
            rounds = isinstance(linear.weight, TernaryTensor) and linear.weight.activation_bits == 8
            wanted = (q / s[:, None] if rounds else x) @ w.T + (0 if linear.bias is None else linear.bias)
            np.testing.assert_allclose(y, wanted, atol=2e-5 * np.abs(wanted).max())
            np.testing.assert_allclose(decoder.linear(name, x), y, atol=2e-6 * np.abs(y).max())
        found[backend] = seen, looked_into(decoder, {n: 0.3 * float(np.abs(x).max()) for n, (x, _) in seen.items()})
    for name, (x, y) in found["numpy"][0].items():
        for a, b in zip((x, y), found["mlx"][0][name], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())
    clipped, inside = found["numpy"][1]
    np.testing.assert_allclose(clipped, found["mlx"][1][0], atol=1e-4 * np.abs(clipped).max())
    name = "model.layers.0.self_attn.v_proj"
    x, y = inside[name]
    if config.activation_bits == 8:
        limit = 0.3 * float(np.abs(found["numpy"][0][name][0]).max())
        q, s = quantize_activations(np.clip(x, -limit, limit))
        wanted = (q / s[:, None]) @ weights.linears[name].weight.rows(slice(None)).T
        bias = weights.linears[name].bias
        np.testing.assert_allclose(y, wanted if bias is None else wanted + bias, atol=1e-4 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    for name, storage in (("student", "online"), ("float", "dense")):
        hf_folder.write(folder / name, "llama", storage, seed=4, vocab_size=420, num_hidden_layers=4)
        tiny_tokenizers.byte_level(folder / name)
    (folder / "text.txt").write_text(
        "the quick brown fox jumps over a lazy dog. hello world, naïve café!\n" * 8, "utf-8"
    )
    return folder


def run(place: Path, capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    flags = ["--data", place / "text.txt", "--samples", 2, "--length", 16, "--output", place / "calibration.json"]
    assert main(["calibrate", *map(str, [*flags, *words]), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_ranges_of_a_ternary_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(place, capsys, "--model", place / "student", "--backend", "cpu")
    assert record["looked_into_by"] == "numpy" and record["keep"] == [] and record["losses"].keys() == {
        "absmax", "percentile", "mse", "kl",
    }  # fmt: skip
    ids = load_tokenizer(place / "student").encode((place / "text.txt").read_text("utf-8"))
    texts = samples(ids, 2, 16)
    assert len(texts) == 2 and texts[0] == list(ids[:16]) and texts[1][0] in ids
    decoder: Any = make_decoder("numpy", read_weights(place / "student"))
    inputs: dict[str, list[np.ndarray]] = {}
    decoder.hooks.tap = lambda name, x, y: inputs.setdefault(name, []).append(x)
    for text in texts:
        decoder.step([text], [decoder.make_cache()], "all")
    whole = json.loads((place / "calibration.json").read_text())
    assert len(whole["inputs"]) == 16 and len(whole["linears"]) == 28
    for entry in whole["inputs"]:
        x = np.concatenate(inputs[entry["name"]])
        q, s = quantize_activations(x)
        error = np.square(q / s[:, None] - x, dtype=np.float64).sum()
        assert (entry["min"], entry["max"], entry["tokens"]) == (x.min(), x.max(), 32)
        assert entry["int8_sqnr_db"] == pytest.approx(10 * np.log10(np.square(x, dtype="f8").sum() / error), abs=1e-3)
        assert entry["clips"]["absmax"] == np.abs(x).max() and entry["clipped"]["absmax"] == 0
        read, peaks = Histogram.read(entry["histogram"]), Histogram.read(entry["token_peaks"])
        assert read.count == x.size and peaks.absmax == np.abs(x).max() and peaks.low == np.abs(x).max(axis=1).min()
    assert sorted(n for e in whole["inputs"] for n in e["linears"]) == sorted(e["name"] for e in whole["linears"])


def test_layers_of_a_float_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(place, capsys, "--model", place / "float", "--backend", "numpy", "--plot", place / "a.png")
    assert (place / "a.png").read_bytes().startswith(b"\x89PNG") and record["losses"] is None
    costs = {entry["layer"]: entry["nats_per_token"] for entry in record["layers"]}
    weights, ternary = read_weights(place / "float"), read_weights(place / "student")
    ids = load_tokenizer(place / "float").encode((place / "text.txt").read_text("utf-8"))

    def nats(layer: int | None) -> float:
        chosen = {
            n: (ternary if n.startswith(f"model.layers.{layer}.") else weights).linears[n] for n in weights.linears
        }
        mixed = type(weights)(weights.config, weights.embed_tokens, weights.lm_head, chosen, weights.norms)
        decoder, total = make_decoder("numpy", mixed), 0.0
        for text in samples(ids, 2, 16):
            [logits] = decoder.step([text], [decoder.make_cache()], "all")
            wide = logits.astype(np.float64)
            total += float((np.log(np.exp(wide).sum(-1))[:-1] - wide[np.arange(15), text[1:]]).sum())
        return total / 30

    assert record["nats_per_token"] == pytest.approx(nats(None), rel=1e-6)
    assert costs[2] == pytest.approx(nats(2) - nats(None), rel=1e-3, abs=1e-4)
    assert record["keep"] == recommend(costs) and all(entry["noise"] > 0.05 for entry in record["layers"])


def test_the_table_and_ranges_only(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", place / "float", "--backend", "mlx", "--data", place / "text.txt", "--ranges-only"]
    more = ["--samples", "1", "--length", "8", "--output", place / "b.json"]
    assert main(["calibrate", *map(str, [*words, *more])]) == 0
    shown = capsys.readouterr().out
    for word in ("perplexity", "mse clip", "3.mlp.down_proj", "layers to keep", "by noise", "b.json"):
        assert word in shown


def test_who_is_kept() -> None:
    costs = dict.fromkeys(range(8), 1.0)
    assert recommend(costs | {5: 5, 6: 100, 7: 10}) == [6, 7]  # the costliest two of eight
    assert recommend({0: 1, 1: 1, 2: 9}) == [2]  # one, of fewer than four
    assert recommend({0: 0.9, 1: 0.1, 2: 0.1, 3: 0.12}) == [0]
    assert recommend({i: 5.0 if i > 5 else 1.0 for i in range(8)}) == [6, 7]
    assert recommend({0: 0.1, 1: 0.1}) == [] and recommend({}) == []
    assert noise_by_layer({"model.layers.1.a": (1.0, 4.0), "model.layers.1.b": (3.0, 4.0)}) == {1: 0.5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--percentile", "200"], "50 to 100"),
        (["--kv-bits", "8"], "leave out --kv-bits"),
        (["--precision", "memory"], "leave out --precision"),
        (["--output", "nowhere/c.json"], "its folder must be there"),
        (["--plot", "a.jpg"], ".png or .html"),
    ],
)
def test_one_clear_message(place: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", place / "student", "--data", place / "text.txt", "--length", "8", "--backend", "numpy"]
    assert main(["calibrate", *map(str, words), "--output", str(place / "c.json"), *flags]) == 2
    assert message in capsys.readouterr().err and not (place / "c.json").exists()


def test_a_product_without_a_quantiser_has_its_bias() -> None:
    x, w = np.ones((2, 3), np.float32), np.arange(12, dtype=np.float32).reshape(4, 3)
    bias = np.array([1, 2, 3, 4], np.float32)
    found = plain_product(x, Linear(DenseRows(w, "float32"), bias))
    assert found.tolist() == [[4, 14, 24, 34]] * 2
