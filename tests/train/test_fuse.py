"""Fused adapters: the floats are weight and adapter, ternary again tells what is lost, and a worse model is not written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.api import make_decoder
from bitnet_mlx.checkpoint.adapter import read_parts
from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import BitnetError, ConfigError, FormatError, TrainError
from bitnet_mlx.quality.score import score
from bitnet_mlx.ternary import TernaryTensor
from bitnet_mlx.tokenizer import load_tokenizer
from bitnet_mlx.train.fuse import _texts, fuse
from bitnet_mlx.train.fuse_options import FuseOptions
from bitnet_mlx.train.fuse_report import report
from bitnet_mlx.train.fused import fused_weights
from tests.support import hf_folder, tiny_tokenizers
from tests.train.test_lora import command

TEXT = "hello world the quick brown fox jumps over a lazy dog\n"
RANK, SCALE = 2, 1.5


def base_folder(path: Path, **changes: Any) -> hf_folder.HFFolder:
    folder = hf_folder.write(path, "bitnet", "packed", vocab_size=420, **changes)
    tiny_tokenizers.byte_level(path)
    return folder


def write_adapter(
    folder: Path, base: hf_folder.HFFolder, size: float, *, dora: bool = False, num_layers: int = 1
) -> dict:
    """By hand, as mlx-lm writes one, on the last layers; values of B are about `size` weights. Returns the tensors."""
    rng, tensors, layers = np.random.default_rng(3), {}, base.config["num_hidden_layers"]
    for layer in range(layers - num_layers, layers):
        for name, (n, k) in hf_folder.linears(base.config).items():
            module = f"model.layers.{layer}.{name}"
            tensors[f"{module}.lora_a"] = rng.standard_normal((k, RANK)) / np.sqrt(RANK)
            tensors[f"{module}.lora_b"] = rng.standard_normal((RANK, n)) * size * base.scale[module] / SCALE
            if dora:
                tensors[f"{module}.m"] = rng.uniform(1, 2, n)
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), {name: mx.array(v) for name, v in tensors.items()})
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters, "iters": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def expected(base: hf_folder.HFFolder, tensors: dict, module: str) -> tuple[np.ndarray, np.ndarray]:
    """(W, W + adapter) of a linear, float64, from the int8 values and the scale as its file has them."""
    scale = float(mx.array(base.scale[module]).astype(mx.bfloat16).astype(mx.float32))
    w = base.t[module].astype(np.float64) * scale
    if f"{module}.lora_a" not in tensors:
        return w, w
    a, b = (tensors[f"{module}.lora_{x}"].astype(np.float64) for x in "ab")
    total = w + SCALE * (a @ b).T
    if f"{module}.m" in tensors:
        total *= (tensors[f"{module}.m"] / np.linalg.norm(total, axis=1))[:, None]
    return w, total


def run(place: Path, **changes: Any) -> dict[str, Any]:
    given = dict(model=str(place / "base"), adapter_path=place / "ad", save_path=place / "out", load={}, backend="cpu")
    return fuse(FuseOptions(**{**given, **changes}))


@pytest.mark.parametrize("dora", [False, True])
def test_floats_are_weight_and_adapter(dora: bool, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    tensors = write_adapter(tmp_path / "ad", base, 0.2, dora=dora)
    (tmp_path / "text.txt").write_text(TEXT * 3)
    record = run(tmp_path, dequantize=True, data=(tmp_path / "text.txt",))
    written: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for module in base.t:
        w, total = expected(base, tensors, module)
        np.testing.assert_allclose(np.array(written[f"{module}.weight"]), total, rtol=2e-7, atol=1e-9)
        if module in record["layers"]:
            ratio = np.linalg.norm(total - w) / np.linalg.norm(w)
            assert record["layers"][module]["delta"] == pytest.approx(ratio, rel=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    names = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ]
    assert list(record["layers"]) == [f"model.layers.1.{name}" for name in (*names, "mlp.down_proj")]
    assert record["lost"] == 0
    # What is left is what the quantiser of activations rounds: far less than the adapter does.
    assert record["quality"]["fused"]["kl"] < 0.1 * record["quality"]["base"]["kl"]
    kinds = [type(read_weights(tmp_path / "out").linears[m].weight).__name__ for m in base.t]
    assert kinds == ["TernaryTensor"] * 7 + ["DenseRows"] * 7  # the first layer had no adapter


def test_floats_of_another_type_and_the_bits_of_inputs(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    tensors = write_adapter(tmp_path / "ad", base, 0.2)
    run(tmp_path, dequantize=True, dtype="bfloat16")
    written: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert all(written[f"{module}.weight"].dtype == mx.bfloat16 for module in base.t)
    weights = read_weights(base.path, activations=16)
    module = next(name for name in base.t if f"{name}.lora_a" in tensors)
    parts = read_parts(tmp_path / "ad", weights.config)
    for method in ("absmean", "least-squares"):
        made = fused_weights(weights, parts, method, None, [], {}).linears[module].weight
        assert isinstance(made, TernaryTensor) and made.activation_bits == 16


def test_ternary_again_tells_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = base_folder(tmp_path / "base")
    tensors = write_adapter(tmp_path / "ad", base, 0.2)
    record = run(tmp_path)
    made, before = read_weights(tmp_path / "out").linears, read_weights(tmp_path / "base").linears
    for module in base.t:
        w, total = expected(base, tensors, module)
        weight, own = made[module].weight, before[module].weight
        assert isinstance(weight, TernaryTensor) and isinstance(own, TernaryTensor)
        if module not in record["layers"]:
            assert np.array_equal(weight.words, own.words) and np.array_equal(weight.scale, own.scale)
            continue
        delta = np.linalg.norm(total - w)
        told = record["layers"][module]
        assert told["lost"] == pytest.approx(np.linalg.norm(weight.rows(slice(None)) - total) / delta, rel=1e-4)
        assert told["lost"] <= 1 + 1e-6 < told["absmean_lost"]  # the nearest is at least as near as the base
        m = np.abs(total).mean()
        absmean = np.clip(np.rint(total / m), -1, 1) * m
        assert told["absmean_lost"] == pytest.approx(np.linalg.norm(absmean - total) / delta, rel=1e-3)
    assert record["lost"] > 0.5 and "fusing loses" in caplog.text and record["warnings"]
    assert run(tmp_path, scales="group", force=True)["lost"] < record["lost"]


def test_what_ternary_weights_can_hold_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """DoRA's magnitudes alone, with a scale a row."""
    base = base_folder(tmp_path / "base")
    write_adapter(tmp_path / "ad", base, 0.0, dora=True)
    (tmp_path / "text.txt").write_text(TEXT * 3)
    record = run(tmp_path, scales="row", data=(tmp_path / "text.txt",))
    assert record["lost"] < 1e-6 and not caplog.text and record["quality"]["fused"]["kl"] < 1e-6
    assert record["quality"]["base"]["kl"] > 1e-3


def test_fitted_to_a_text_more_is_kept_on_it(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    write_adapter(tmp_path / "ad", base, 0.2, num_layers=2)
    (tmp_path / "text.txt").write_text(TEXT * 30)
    data = (tmp_path / "text.txt",)
    nearest = run(tmp_path, data=data, limit=200)
    fitted = run(tmp_path, data=data, limit=200, calibration_data=tmp_path / "text.txt", force=True)
    kl = [record["quality"]["fused"]["kl"] for record in (nearest, fitted)]
    assert "fitted to" in fitted["notices"][-1] and kl[1] < 0.6 * kl[0], kl
    assert nearest["quality"]["base"]["tokens"] == 200
    held_out = run(tmp_path, calibration_data=tmp_path / "text.txt", force=True, length=16)
    ids = load_tokenizer(base.path).encode(TEXT * 30)
    alone = score(make_decoder("cpu", read_weights(base.path)), ids[-(len(ids) // 8) :], 1, 16, 8)
    found = held_out["quality"]["base"]
    assert found["tokens"] == alone.tokens and found["nats_per_token"] == pytest.approx(alone.nats / alone.tokens)


def test_what_is_fitted_to_is_not_measured_on(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT * 30)
    ids = load_tokenizer(base.path).encode(TEXT * 30)
    options = FuseOptions(calibration_data=tmp_path / "text.txt", calibration_samples=1000, load={})
    fit_to, [held] = _texts(options, base.path, 16)
    seen = [i for stretch in fit_to for i in stretch]
    assert seen == ids[: len(seen)] and list(held.ids) == ids[-len(held.ids) :] and len(held.ids) == len(ids) // 8
    assert len(ids) - len(held.ids) - 16 < len(seen) <= len(ids) - len(held.ids)
    assert len(_texts(replace(options, calibration_samples=3), base.path, 16)[0]) == 3


def test_a_model_that_is_worse_than_the_base_is_not_written(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    write_adapter(tmp_path / "ad", base, 0.05)
    with pytest.raises(
        TrainError, match=r"further from base and adapter than the base is; .* 1 for the base\. Run base"
    ):
        run(tmp_path, method="absmean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ad", "base"]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dequantize": True, "method": "gptq"}, ConfigError, "--dequantize writes floats, for which --method"),
        ({"method": "gptq"}, ConfigError, "give --calibration-data"),
        ({"method": "absmean", "scales": "row"}, ConfigError, "one scale a tensor"),
        ({"method": "absmean", "calibration_data": Path("x")}, ConfigError, "fits to no text"),
        ({"adapter_path": Path("nowhere")}, ConfigError, "no adapter_config.json in nowhere"),
        ({"format": "hf", "scales": "row"}, FormatError, "has a scale for each row"),
        ({"limit": 0}, ConfigError, "--limit is 0"),
        ({"calibration_samples": 0}, ConfigError, "--calibration-samples is 0"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], kind: type[BitnetError], message: str, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    write_adapter(tmp_path / "ad", base, 0.05)
    with pytest.raises(kind, match=message):
        run(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    write_adapter(tmp_path / "ad", base, 0.2)
    (tmp_path / "text.txt").write_text(TEXT * 20)
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in base.path.iterdir()}
    line = ["fuse", "--model", base.path, "--adapter-path", tmp_path / "ad", "--save-path", tmp_path / "out"]
    done = command(*line, "--calibration-data", tmp_path / "text.txt", "--format", "hf")
    assert done.returncode == 0, done.stderr
    assert (
        "model.layers.1.mlp.down_proj" in done.stdout and "base and adapter" in done.stdout and ": hf, " in done.stdout
    )
    again = command(*line, "--json")
    assert again.returncode == 2 and "replace it with --force" in again.stderr
    prompt = ["--prompt", "hello", "--max-tokens", 3, "--temp", 0, "--json"]
    assert json.loads(command("generate", "--model", tmp_path / "out", *prompt).stdout)["generation_tokens"] == 3
    other = base_folder(tmp_path / "other", intermediate_size=96)
    wrong = command("fuse", "--model", other.path, "--adapter-path", tmp_path / "ad", "--save-path", tmp_path / "no")
    assert wrong.returncode == 1 and "mlp.down_proj.lora_a is [100, 2] and not [96, 2]" in wrong.stderr
    assert before == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in base.path.iterdir()}


def test_over_master_weights(tmp_path: Path) -> None:
    """What `train` writes: floats that are ternarised when read."""
    base = hf_folder.write(tmp_path / "base", "bitnet", "online", vocab_size=420)
    tiny_tokenizers.byte_level(base.path)
    names = hf_folder.linears(base.config)
    base.scale = {f"model.layers.{layer}.{name}": 0.1 for layer in range(2) for name in names}
    write_adapter(tmp_path / "ad", base, 0.2)
    assert run(tmp_path, dequantize=True)["lost"] == 0
    before, after = (
        read_weights(tmp_path / name).linears["model.layers.0.mlp.up_proj"].weight for name in ("base", "out")
    )
    assert np.array_equal(before.rows(slice(None)), after.rows(slice(None)))
    assert run(tmp_path, force=True)["lost"] <= 1 + 1e-6


def test_what_people_are_told() -> None:
    figures = {"delta": 0.1, "relative_error": 0.2, "lost": 0.3, "absmean_lost": 0.4}
    dense = {"delta": 0.5, "relative_error": 0.0, "lost": 0.0, "absmean_lost": None}
    text = {"perplexity": 7.5, "bits_per_byte": 2.25}
    quality = {
        "base": {**text, "kl": 0.5, "top1_agreement": 0.75},
        "adapter": text,
        "fused": {**text, "kl": 0.25, "top1_agreement": 1},
    }
    whole = {"delta": 0.6, "relative_error": 0.7, "lost": 0.8, "absmean_lost": 0.9}
    record = {**whole, "layers": {"a": figures, "b": dense}, "quality": quality, "notices": ["mind"], "path": "out",
              "format": "words2", "bytes_out": 2048}  # fmt: skip
    lines = report(record)
    rows = [line.split() for line in lines]
    assert rows[1:4] == [
        ["a", "10.00%", "20.00%", "30.00%", "40.00%"], ["b", "50.00%", "0.00%", "0.00%"],
        ["all", "60.00%", "70.00%", "80.00%", "90.00%"],
    ]  # fmt: skip
    assert ["base", "7.5", "2.2500", "0.5", "75.0%"] in rows and ["fused", "7.5", "2.2500", "0.25", "100.0%"] in rows
    assert "note: mind" in lines and lines[-1].startswith("out: words2, 2")
