"""`convert` of a small trained float model by each method: what is written runs, and how near it is to its parent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.api import make_decoder
from bitnet_mlx.calibration.layerwise import gptq_linears
from bitnet_mlx.calibration.least_squares import fit, spread
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.cli.main import main
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats.dense import DenseRows
from bitnet_mlx.quality.one_layer import run_layer
from bitnet_mlx.ternary import TernaryTensor
from tests.support import hf_folder, tiny_tokenizers
from tests.support.random_model import random_weights, tiny_config

LINEARS = tuple(tiny_config().linear_shapes())
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 420}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("post_training")
    hf_folder.write(folder / "float", "llama", "dense", seed=1, **WIDE)
    hf_folder.write(folder / "packed", "llama", "packed", seed=1, **WIDE)
    for name in ("float", "packed"):
        tiny_tokenizers.byte_level(folder / name)
    (folder / "text.txt").write_text("\n".join(tiny_tokenizers.lines(60)), "utf-8")
    (folder / "short.txt").write_text("hello", "utf-8")
    return folder


def convert(place: Path, capsys: pytest.CaptureFixture[str], *words: object, to: str = "out") -> dict[str, Any]:
    flags = ["--hf-path", place / "float", "--mlx-path", place / to, "--force", *words, "--json"]
    assert main(["convert", *map(str, flags)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_each_method_and_what_it_costs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--calibration-data", place / "text.txt", "--calibration-samples", 1, "--head-bits", 16]
    kl = {}
    for method in ("absmean", "least-squares", "gptq"):
        record = convert(place, capsys, "--ternarize-method", method, *data)
        held = record["ternarize"]["held_out"]
        kl[method] = held["kl"]
        assert record["verified"] and record["ternarize"]["kept"] == [] and held["tokens"] > 20
        weights, parent = read_weights(place / "out"), read_weights(place / "float")
        for name, linear in weights.linears.items():
            assert isinstance(linear.weight, TernaryTensor) and linear.weight.scale.ndim == (
                0 if method == "absmean" else 2
            )
            w = parent.linears[name].weight.rows(slice(None)).astype(np.float64)
            error = np.linalg.norm(linear.weight.rows(slice(None)) - w) / np.linalg.norm(w)
            assert record["layers"][name]["relative_error"] == pytest.approx(error, rel=1e-3)
        if method == "least-squares":
            w = parent.linears["model.layers.1.mlp.down_proj"].weight.rows(slice(None))
            t, s = fit(w)
            assert np.array_equal(
                weights.linears["model.layers.1.mlp.down_proj"].weight.rows(slice(None)),
                t * spread(s, w.shape).astype("f4"),
            )
    assert kl["gptq"] < kl["absmean"] and kl["gptq"] < kl["least-squares"]
    words = [
        "--hf-path",
        place / "float",
        "--mlx-path",
        place / "out",
        "--force",
        "--ternarize-method",
        "least-squares",
    ]
    assert main(["convert", *map(str, [*words, *data[:4]])]) == 0
    assert "KL" in (shown := capsys.readouterr().out) and "Training (bitnet-mlx qat) gets nearer" in shown


def test_gptq_serves_the_layers_that_it_was_fitted_to() -> None:
    """Outputs of every linear on the calibration text, the layers before it ternary, against absmean's in its place."""
    weights = random_weights(tiny_config(sub_norms=False, hidden_act="silu"), 2, dense=LINEARS)
    texts = [[int(i) for i in np.random.default_rng(1).integers(0, 67, 60)] for _ in range(2)]
    keep = {"model.layers.1.mlp.up_proj"}
    found = gptq_linears(weights, texts, "row", keep)
    assert isinstance(found["model.layers.1.mlp.up_proj"].weight, DenseRows)
    seen: dict[str, list[np.ndarray]] = {}
    decoder: Any = make_decoder("numpy", weights)
    decoder.hooks.tap = lambda name, x, y: seen.setdefault(name, []).append(x)
    for ids in texts:
        decoder.step([ids], [decoder.make_cache()], "last")
    for name in LINEARS[:3]:  # of layer 0, whose inputs no ternary layer has changed
        full = f"model.layers.0.{name}"
        x, w = (
            np.concatenate(seen[full]).astype(np.float64),
            weights.linears[full].weight.rows(slice(None)).astype(np.float64),
        )
        t, s = fit(w.astype(np.float32), "row")
        own = np.square(x @ (w - found[full].weight.rows(slice(None))).T).sum()
        assert own < 0.9 * np.square(x @ (w - t * s[:, None]).T).sum()


def test_a_layer_by_itself_is_the_layer_of_the_model() -> None:
    weights = random_weights(tiny_config(), 6, dense=LINEARS)
    decoder: Any = make_decoder("numpy", weights)
    seen: dict[str, Any] = {}
    decoder.hooks.tap = lambda name, x, y: seen.update({name: (x, y)})
    decoder.step([[3, 1, 4, 1, 5]], [decoder.make_cache()], "last")
    x, y = seen["model.layers.1"]
    linears = {name: weights.layer_linear(1, name) for name in LINEARS}
    found = run_layer(weights, 1, linears, np.concatenate([x, x]), [5, 5], "mlx")
    np.testing.assert_allclose(found, np.concatenate([y, y]), atol=2e-4 * np.abs(y).max())


@pytest.mark.parametrize(("method", "kind"), [("absmean", "hf"), ("least-squares", "words2"), ("gptq", "hf")])
def test_layers_that_are_kept(method: str, kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "calibration.json").write_text(json.dumps({"keep": [1]}))
    more = [] if method == "absmean" else ["--calibration-data", place / "text.txt", "--ternarize-scales", "tensor"]
    record = convert(
        place, capsys, "--ternarize-method", method, "--format", kind, "--calibration", place / "calibration.json",
        "--calibration-samples", 1, *more,
    )  # fmt: skip
    assert len(record["ternarize"]["kept"]) == 7
    weights, parent = read_weights(place / "out"), read_weights(place / "float")
    for name, linear in weights.linears.items():
        if name.split(".")[2] == "1":
            assert np.array_equal(linear.weight.rows(slice(None)), parent.linears[name].weight.rows(slice(None)))
        else:
            assert isinstance(linear.weight, TernaryTensor)


def test_kept_layers_bring_a_model_nearer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--calibration-data", place / "text.txt", "--head-bits", 16]
    costs = [
        convert(place, capsys, *data, *more)["ternarize"]["held_out"]["kl"] for more in ([], ["--keep-layers", "0,1"])
    ]
    assert costs[1] < costs[0]
    assert convert(place, capsys, *data, "--keep-layers", "0,1,2")["ternarize"]["held_out"]["kl"] == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ternarize-method", "gptq"], "give --calibration-data"),
        (["--ternarize-scales", "row"], "absmean has one scale a tensor"),
        (["--keep-layers", "0,x"], "numbers of layers"),
        (["--keep-layers", "9"], "layers 0 to 2"),
        (["--keep-layers", "1", "--calibration", "c.json"], "one of them"),
        (["--calibration", "nowhere.json"], "no file nowhere.json"),
        (["--calibration", "{place}/text.txt"], "make it again"),
        (["--calibration-data", "{place}/short.txt"], "64 are the least"),
        (["--keep-layers", "1", "--hf-path", "{place}/packed"], "stored as packed"),
        (["--ternarize-method", "least-squares", "--hf-path", "{place}/packed"], "stored as packed"),
        (["--ternarize-method", "least-squares", "--format", "hf"], "one a matrix"),
    ],
)
def test_one_clear_message(place: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--hf-path",
        str(place / "float"),
        "--mlx-path",
        str(place / "no"),
        *(f.format(place=place) for f in flags),
    ]
    assert main(["convert", *words]) in (1, 2)
    assert message in capsys.readouterr().err and not (place / "no").exists()


def test_floats_of_master_weights_stay(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = "model.layers.0.mlp.up_proj"
    kept = {"modules_to_not_convert": ["lm_head", left]}
    hf_folder.write(tmp_path / "m", "llama", "online", quantization=kept, vocab_size=420)
    tiny_tokenizers.byte_level(tmp_path / "m")
    record = convert(
        place, capsys, "--hf-path", tmp_path / "m", "--ternarize-method", "least-squares", "--keep-layers", 1
    )
    assert record["ternarize"]["kept"][0] == left and len(record["ternarize"]["kept"]) == 8
    weights = read_weights(place / "out").linears
    assert isinstance(weights[left].weight, DenseRows) and isinstance(
        weights["model.layers.0.mlp.gate_proj"].weight, TernaryTensor
    )


def test_a_bitnet_gguf_holds_no_float_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_folder.write(
        tmp_path / "m", "bitnet", "dense", hidden_size=256, intermediate_size=256, head_dim=64, vocab_size=420
    )
    tiny_tokenizers.byte_level(tmp_path / "m")
    words = [
        "--hf-path",
        tmp_path / "m",
        "--mlx-path",
        tmp_path / "m.gguf",
        "--format",
        "gguf-tq2_0",
        "--keep-layers",
        "0",
    ]
    assert main(["convert", *map(str, words)]) == 1
    assert "read as master weights. Give --format words2" in capsys.readouterr().err


def test_what_is_ternary_is_not_made_so_again(place: Path) -> None:
    from bitnet_mlx.checkpoint.read import open_weights

    for more in ({"floats": True}, {"keep": ("model.layers.0.mlp.up_proj",)}):
        with pytest.raises(ConfigError, match="linears"):
            open_weights(place / "packed", **more)
