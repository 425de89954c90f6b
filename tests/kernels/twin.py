"""A runner for machines without a GPU: what each launch asks for, computed by the reference in numpy.

It stands in for the device where a test is about choices and launches; the emulator's tests run the kernels' own text.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.backends.kernels.check import codes_of
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import KINDS, Layout, parts, prepare
from bitnet_mlx.backends.kernels.problem import rounded
from bitnet_mlx.backends.kernels.run import DTYPES
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.formats import words2
from bitnet_mlx.ternary import TernaryTensor, quantize_activations
from tests.kernels.twin_attention import attended, merged


def twin(launch: Launch) -> list[mx.array]:
    """The outputs of a launch, evaluated."""
    template = dict(launch.template)
    values = [np.array(mx.array(a).astype(mx.float32) if a.dtype == mx.bfloat16 else a) for a in launch.inputs]
    arrays = dict(zip(launch.source.inputs, values, strict=True))
    name = launch.source.name
    if name == "quantize":
        outputs = _quantized(arrays, template)
    elif name == "rope_kv":
        outputs = _rotated(arrays, template, launch)
    elif name == "decode_attention":
        outputs = attended(arrays, template, launch)
    elif name == "decode_attention_merge":
        outputs = [merged(arrays["shares"], template["T"])]
    elif name == "quantized_matvec":
        q, s = _codes(arrays["x"].astype(np.float32), arrays, template)
        outputs = [_product(q, s, arrays, template)]
    elif "float" in name:
        outputs = [_product(arrays["x"], None, arrays, template)]
    else:
        layout = Layout("halves", template["W"]) if "ternary_matvec" in name and "dp4a" not in name else None
        layout = layout or Layout("bytes" if "cuda" in launch.source.platforms[:1] else "plain")
        k = arrays["w"].shape[1] * 16
        xq, _, s = parts(arrays["x"], layout, k)
        outputs = [_product(codes_of(xq.astype(np.float32), layout, k), s, arrays, template)]
    found = []
    for y, (shape, dtype) in zip(outputs, launch.outputs, strict=True):
        assert y.shape == shape, f"{name}: shape {y.shape}, the launch says {shape}"
        found.append(mx.array(y).astype(DTYPES[dtype]))
    mx.eval(found)
    return found


def _product(q: np.ndarray, s: Any, arrays: dict[str, np.ndarray], template: dict[str, Any]) -> np.ndarray:
    w, scale = arrays["w"], arrays["scale"]
    k = w.shape[1] * 16
    q = np.pad(q, [(0, 0), (0, k - q.shape[1])])
    if scale.size == 1 and scale.ndim < 2:
        scale = scale.reshape(())
    if np.all(q == np.rint(q)):
        weight = TernaryTensor(w, scale, (w.shape[0], k))
        y = numpy_ref.quantized_linear(q, np.ones(len(q), np.float32) if s is None else s, weight)
    else:
        y = (q.astype(np.float64) @ (words2.unpack(w, k) * (scale[:, None] if scale.ndim == 1 else scale)).T).astype(
            np.float32
        )
    if template["BIAS"]:
        y = y + arrays["bias"]
    y = rounded(y, template["T"])
    return rounded(arrays["residual"] + y, template["T"]) if template["RESIDUAL"] else y


def _quantized(arrays: dict[str, np.ndarray], template: dict[str, Any]) -> list[np.ndarray]:
    q, s = _codes(arrays["x"].astype(np.float32), arrays, template)
    return [prepare(q, s, Layout(KINDS[template["LAYOUT"]], template["W"]))]


def _codes(x: np.ndarray, arrays: dict[str, np.ndarray], template: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    if template["ACT"]:
        x = numpy_ref.gated(*np.split(x, 2, axis=1), ["", "relu2", "silu"][template["ACT"]])
    if template["NORM"]:
        return numpy_ref.norm_quantize(x, arrays["weight"], float(np.int32(template["EPS"]).view(np.float32)))
    return quantize_activations(x)


def _rotated(arrays: dict[str, np.ndarray], template: dict[str, Any], launch: Launch) -> list[np.ndarray]:
    qkv, cos, sin = (arrays[name].astype(np.float32) for name in ("qkv", "cosines", "sines"))
    (b, heads, length, dim), _ = launch.outputs[0]
    x = qkv.reshape(b, length, -1, dim)
    kv_heads = (x.shape[2] - heads) // 2
    cos, sin = (np.broadcast_to(a, (b, *a.shape[1:])) for a in (cos, sin))
    turned = np.stack([numpy_ref.rope(x[i, :, : heads + kv_heads], cos[i], sin[i]) for i in range(b)])
    turned = rounded(turned, template["T"]).swapaxes(1, 2)
    return [turned[:, :heads], np.stack([turned[:, heads:], x[:, :, heads + kv_heads :].swapaxes(1, 2)])]
