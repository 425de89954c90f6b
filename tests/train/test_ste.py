"""Gradients through rounding: torch's numbers, finite differences, and what a learnt scale becomes on disk."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from bitnet_mlx.checkpoint.read import read_weights
from bitnet_mlx.errors import ConfigError
from bitnet_mlx.formats import hf, words2
from bitnet_mlx.ternary import TernaryTensor
from bitnet_mlx.train.export import stored
from bitnet_mlx.train.loop import train
from bitnet_mlx.train.qat import qat
from bitnet_mlx.train.ste import KINDS, STE, quantize_weight
from tests.train.support import options as train_options
from tests.train.support import qat_options, silent, write_texts

GOLDEN = np.load(Path(__file__).parent / "data" / "ste_torch.npz")
# As tests/oracle/make_ste_goldens.py has them.
SETTINGS = {
    "standard": STE("standard"), "clipped": STE("clipped", 1.1), "soft": STE("soft", sharpness=2.7),
    "learnable": STE("learnable", 0.9), "learnable15": STE("learnable", 1.5),
}  # fmt: skip
X, W, C, LOG_SCALE = (GOLDEN[name] for name in ("x", "w", "c", "log_scale"))


def outputs(ste: STE, w: mx.array, log_scale: mx.array, blend: float, dtype: mx.Dtype = mx.float32) -> mx.array:
    at = None if blend == 1 else mx.array(blend)
    wq = quantize_weight(w, ste, dtype, log_scale if ste.learnable else None, at)
    return mx.array(X).astype(dtype) @ wq.T


def gradients(ste: STE, blend: float, dtype: mx.Dtype = mx.float32) -> tuple[np.ndarray, np.ndarray]:
    """Of sum(sin(y) c) with respect to W and the logarithm of its scale."""

    def loss(w: mx.array, log_scale: mx.array) -> mx.array:
        return (mx.sin(outputs(ste, w, log_scale, blend, dtype).astype(mx.float32)) * mx.array(C)).sum()

    dw, dscale = mx.grad(loss, argnums=(0, 1))(mx.array(W), mx.array(LOG_SCALE))
    assert dw.dtype == mx.float32 and dw.shape == W.shape and dscale.shape == ()
    return np.array(dw), np.array(dscale)


@pytest.mark.parametrize("blend", [0.35, 1.0])
@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_and_gradients_are_torchs(name: str, blend: float) -> None:
    ste, key = SETTINGS[name], f"{name}.{blend}"
    found = np.array(outputs(ste, mx.array(W), mx.array(LOG_SCALE), blend))
    np.testing.assert_allclose(found, GOLDEN[f"{key}.y"], rtol=1e-5, atol=2e-5)
    dw, dscale = gradients(ste, blend)
    np.testing.assert_allclose(dw, GOLDEN[f"{key}.dw"], rtol=1e-4, atol=2e-5)
    if ste.learnable:
        assert dscale == pytest.approx(float(GOLDEN[f"{key}.dscale"]), rel=1e-4)


def smooth(ste: STE, w: np.ndarray, m: float) -> np.ndarray:
    """What stands for t m in the backward pass, float64."""
    u, k = w / m, ste.sharpness
    if ste.kind == "soft":
        return m * (np.tanh(k * (u - 0.5)) + np.tanh(k * (u + 0.5))) / 2
    return w if ste.kind == "standard" else m * np.clip(u, -ste.clip, ste.clip)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_differences_of_the_smooth_parts(kind: str) -> None:
    """Central differences in float64, with the rest of rounding held: (t - smooth) of the start, which m scales if learnt."""
    ste, blend, h = STE(kind, 1.2, 3.0), 0.6, 1e-6
    w0, weight = W.astype(np.float64), W.size**-0.5
    m0 = float(np.exp(np.float64(LOG_SCALE))) if ste.learnable else float(np.abs(w0).mean())
    rest = np.clip(np.rint(w0 / m0), -1, 1) - smooth(ste, w0, m0) / m0

    def loss(w: np.ndarray, log_scale: float) -> float:
        m = m0 * np.exp(log_scale) if ste.learnable else m0
        wq = (1 - blend) * w + blend * (smooth(ste, w, m) + rest * m)
        return float((np.sin(X @ wq.T) * C).sum())

    dw, dscale = gradients(ste, blend)
    expected = np.empty_like(w0)
    for index in np.ndindex(*w0.shape):
        step = np.zeros_like(w0)
        step[index] = h
        expected[index] = (loss(w0 + step, 0) - loss(w0 - step, 0)) / (2 * h)
    # float32 against float64: 1e-4 of each, 1e-5 of the largest. No weight lies within h of the clip's edge.
    np.testing.assert_allclose(dw, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    by_scale = weight * (loss(w0, h) - loss(w0, -h)) / (2 * h) if ste.learnable else 0.0
    assert dscale == pytest.approx(by_scale, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_and_float32_gradients(kind: str) -> None:
    """The ternary values are rounded to the products' dtype once; gradients stay within bfloat16's rounding of float32's."""
    ste = STE(kind)
    scale = mx.array(LOG_SCALE) if ste.learnable else None
    wide = quantize_weight(mx.array(W), ste, mx.float32, scale)
    narrow = quantize_weight(mx.array(W), ste, mx.bfloat16, scale)
    assert mx.array_equal(wide.astype(mx.bfloat16), narrow).item()
    (dw, _), (exact, _) = gradients(ste, 1.0, mx.bfloat16), gradients(ste, 1.0)
    assert np.abs(dw - exact).max() < 0.05 * np.abs(exact).max()


def test_a_blend_of_an_array_ends_in_both_models_to_the_bit() -> None:
    w = mx.array(W)
    for kind in KINDS:
        for ends, expected in ((0.0, w), (1.0, quantize_weight(w, STE(kind)))):
            assert mx.array_equal(quantize_weight(w, STE(kind), blend=mx.array(ends)), expected).item()


def test_what_is_not_allowed() -> None:
    for changes, message in (
        ({"kind": "hard"}, "'hard'"),
        ({"clip": 0.0}, "--ste-clip"),
        ({"sharpness": -1.0}, "above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            STE(**changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--float rounds nothing"):
        train_options(Path("texts"), Path("out"), ste="soft", quantise=False)


def read_back(folder: Path, checkpoint: Path) -> None:
    """The folder's ternary weights and scales are those of a checkpoint's masters, to the bit."""
    state, read = mx.load(str(checkpoint / "state.safetensors")), read_weights(folder)
    assert isinstance(state, dict)
    for name, linear in read.linears.items():
        m = np.array(mx.exp(state[f"parameters.{name}.log_scale"]))
        t = np.clip(np.rint(np.array(state[f"parameters.{name}.weight"]) * (np.float32(1) / m)), -1, 1)
        assert isinstance(linear.weight, TernaryTensor) and linear.weight.scale.tobytes() == m.tobytes()
        np.testing.assert_array_equal(words2.unpack(linear.weight.words, t.shape[1]), t)
        assert np.abs(m / np.abs(np.array(state[f"parameters.{name}.weight"])).mean() - 1) > 1e-3  # it was learnt


def test_learnt_scales_are_what_qat_writes(tmp_path: Path) -> None:
    run = qat_options(tmp_path, "out", ste="learnable", eval_data=(), learning_rate=1e-2, attention_bias=True)
    record = qat(run, silent)
    assert np.isfinite(record["loss"])
    read_back(run.output, run.output / "checkpoints" / "step-00000006")
    before, after = read_weights(tmp_path / "float"), read_weights(run.output)
    for name, linear in before.linears.items():
        found, bias = after.linears[name].bias, linear.bias
        assert (found is None) == (bias is None) == (not name.rpartition(".")[0].endswith("self_attn"))
        if bias is not None and found is not None:
            np.testing.assert_allclose(found, bias, rtol=1e-6)


def test_learnt_scales_are_what_train_writes(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    train(train_options(texts, tmp_path / "start", iters=2), silent)
    run = train_options(texts, tmp_path / "out", iters=4, ste="learnable", model=tmp_path / "start", learning_rate=1e-2)
    train(run, silent)
    read_back(run.output, run.output / "checkpoints" / "step-00000004")


def test_a_learnt_scale_is_written_with_codes_and_a_bias_that_readers_multiply() -> None:
    """By hand, and by the reader of packed folders."""
    w = mx.array(np.array([[0.9, -0.1, 0.4, -2.0], [0.0, 0.26, -0.24, 1.0]] * 2, np.float32))
    masters = {
        "a.q_proj.weight": w,
        "a.q_proj.log_scale": mx.log(mx.array(0.5)),
        "a.q_proj.bias": mx.array([1.0, 2.0, 3.0, 4.0]),
    }
    tensors, quantization = stored({**masters, "norm.weight": mx.ones(4)})
    t = words2.unpack(hf.to_words2(np.array(tensors["a.q_proj.weight"]), 4), 4)
    assert t.tolist() == [[1, 0, 1, -1], [0, 1, 0, 1]] * 2
    scale = np.array(tensors["a.q_proj.weight_scale"])
    assert scale == pytest.approx([0.5]) and quantization["quantization_mode"] == "offline"
    np.testing.assert_allclose(scale * np.array(tensors["a.q_proj.bias"]), [1, 2, 3, 4], rtol=1e-6)
    assert set(tensors) == {"a.q_proj.weight", "a.q_proj.weight_scale", "a.q_proj.bias", "norm.weight"}


def test_the_estimator_is_the_one_asked_for(tmp_path: Path) -> None:
    asked = train_options(tmp_path, tmp_path, ste="soft", ste_clip=0.75, ste_sharpness=9.0)
    assert asked.estimator == STE("soft", 0.75, 9.0)
