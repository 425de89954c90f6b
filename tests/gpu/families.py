"""One check a family of kernels, on the boundary shapes and rows that the emulator's tests use; every output compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.backends.kernels import attention, dp4a, fused, matmul, matvec, rope, trits
from bitnet_mlx.backends.kernels.fused import variants
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout, halves, prepare
from bitnet_mlx.backends.kernels.run import run
from bitnet_mlx.backends.kernels.source import Platform
from bitnet_mlx.backends.mlx_import import mx
from bitnet_mlx.formats import trits5, words2
from bitnet_mlx.ternary import TernaryTensor
from tests.backend import shapes
from tests.kernels.attention_cases import Case as Attention
from tests.kernels.attention_cases import check as check_attention
from tests.kernels.fused_cases import CASES as ODD
from tests.kernels.fused_cases import FusedCase
from tests.kernels.quantize_cases import DTYPES, LAYOUTS, Case, same_rows

VECTOR_ROWS = (1, 2, 3, 8)
MATRIX_ROWS = (9, 17)


class Device:
    """Runs launches of numpy arrays on the GPU and counts them."""

    def __init__(self, platform: Platform) -> None:
        self.platform: Platform = platform
        self.launches = 0

    def __call__(self, launch: Launch) -> list[np.ndarray]:
        self.launches += 1
        inputs = tuple(_on_device(a) for a in launch.inputs)
        filled = Launch(launch.source, inputs, launch.template, launch.grid, launch.threadgroup, launch.outputs)
        found = run(filled, self.platform)
        return [np.array(y.astype(mx.float32) if y.dtype == mx.bfloat16 else y) for y in found]


def _on_device(a: Any) -> mx.array:
    values = np.asarray(a)
    if values.dtype.name == "bfloat16":
        return mx.array(values.astype(np.float32)).astype(mx.bfloat16)
    return mx.array(values)


@dataclass(frozen=True)
class Products:
    """A backend of tests/backend/shapes.py by one family of kernels. make(x, w, scale, bias, k) is a launch."""

    device: Device
    layout: Callable[[int], Layout]
    make: Callable[..., Launch]
    storage: Callable[[np.ndarray, int], np.ndarray] = lambda words, k: words

    def accumulate(self, q: np.ndarray, weight: TernaryTensor) -> np.ndarray:
        ones = TernaryTensor(weight.words, np.ones_like(weight.scale), weight.shape)
        return self.linear(q, np.ones(len(q), np.float32), ones, None)

    def linear(self, q: np.ndarray, s: np.ndarray, weight: TernaryTensor, bias: np.ndarray | None) -> np.ndarray:
        n, k = weight.shape
        added = np.zeros(n, np.float32) if bias is None else bias  # always one, so that one kernel serves both
        x = prepare(q, s, self.layout(k))
        return self.device(self.make(x, self.storage(weight.words, k), weight.scale, added, len(q), n, k))[0]


def _products(device: Device, products: Products, ms: tuple[int, ...], kinds: tuple[str, ...]) -> int:
    for n, k in shapes.PAIRS:
        shapes.check_products(n, k, products, ms, kinds, added=True)
    return len(shapes.PAIRS) * len(ms) * len(kinds)


def dp4a_family(device: Device) -> int:
    """The dp4a mat-vec, in a form of its own for each M."""
    forms = {1: dp4a.Dp4aVariant(1, 2, 2, 2, 4), 2: dp4a.Dp4aVariant(4, 4, 1, 1, 8), 3: dp4a.Dp4aVariant(2, 2, 1, 4, 8)}

    def make(x: Any, w: Any, scale: Any, bias: Any, m: int, n: int, k: int) -> Launch:
        return dp4a.dp4a_matvec(x, w, scale, bias, variant=forms.get(m, dp4a.Dp4aVariant()), dtype="float32")

    return _products(device, Products(device, lambda k: Layout("bytes"), make), VECTOR_ROWS, shapes.SCALES)


def fused_family(device: Device) -> int:
    """The mat-vec that quantises its own row, in the first forms for its shape and in odd ones, on rows of every kind."""
    cases = [
        FusedCase(n, k, form, "bfloat16", act=act, extras=extras)
        for n, k, act, extras in ((3840, 2560, None, 0), (2560, 2560, None, 2), (2560, 6912, "relu2", 2))
        for form in variants(n, k, True)[:2]
    ]
    cases += [FusedCase(13824, 2560, scale="row"), *ODD]
    for case in cases:
        for row in range(shapes.ROWS):
            found = device(case.launch(row))[0].astype(DTYPES[case.dtype])
            shapes.same(found, case.expected(row), f"row {row} of {case}")
    return len(cases) * shapes.ROWS


def halves_family(device: Device, kinds: tuple[str, ...] = ("tensor", "row")) -> int:
    """The half-mantissa mat-vec: the Metal text."""

    def make(x: Any, w: Any, scale: Any, bias: Any, m: int, n: int, k: int) -> Launch:
        variant = matvec.MatvecVariant(4, 2)
        return matvec.matvec(x, w, scale, bias, layout=halves(k), variant=variant, dtype="float32")

    return _products(device, Products(device, halves, make), VECTOR_ROWS, kinds)


def trits_family(device: Device) -> int:
    """The mat-vec from 1.6-bit words: the Metal text."""

    def make(x: Any, w: Any, scale: Any, bias: Any, m: int, n: int, k: int) -> Launch:
        return trits.trits_matvec(x, w, scale, bias, variant=trits.TritsVariant(4, 2), dtype="float32")

    products = Products(device, lambda k: Layout("trits"), make, lambda words, k: trits5.pack(words2.unpack(words, k)))
    return _products(device, products, VECTOR_ROWS, ("tensor", "row"))


def matmul_family(device: Device) -> int:
    """The product for prefill, in the first form for its shape."""
    layout = matmul.LAYOUTS[device.platform]

    def make(x: Any, w: Any, scale: Any, bias: Any, m: int, n: int, k: int) -> Launch:
        variant = matmul.variants(2560, 2560, m, device.platform)[0]
        return matmul.matmul(x, w, scale, bias, layout=layout, variant=variant, dtype="float32")

    return _products(device, Products(device, lambda k: layout, make), MATRIX_ROWS, shapes.SCALES)


def quantize_family(device: Device, layout: Layout = LAYOUTS[0]) -> int:
    """Codes, biases and scales to the last bit, with a norm and without, and behind both activation functions."""
    checked = 0
    at = LAYOUTS.index(layout)
    for i, (norm, act) in enumerate(((False, None), (True, None), (True, "relu2"), (at % 2 == 0, "silu"))):
        case = Case(("float32", "bfloat16")[(i + at) % 2], layout, norm, act)
        for k in (8, 100, 2560, 6912, 20000) if norm or act is None else (8, 100, 2560):
            found = device(case.launch(k))[0]
            same_rows(found, case.expected(k), layout, k, f"{case}, K {k}")
            checked += 1
    return checked


def rope_family(device: Device) -> int:
    """Rotated queries and keys, and values, to the last bit."""
    rng = np.random.default_rng(0)
    for heads, kv, dim, b, length in ((20, 5, 128, 1, 1), (6, 2, 64, 2, 5), (4, 4, 80, 1, 33)):
        qkv = rng.standard_normal((b, length, (heads + 2 * kv) * dim)).astype(np.float32)
        angle = rng.uniform(0, 4000, (1, length, dim // 2))
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        q, kv_out = device(rope.rope_kv(qkv, cos, sin, heads=heads, kv_heads=kv, dtype="float32"))
        x = qkv.reshape(b, length, -1, dim)
        turned = np.stack([numpy_ref.rope(x[i, :, : heads + kv], cos[0], sin[0]) for i in range(b)]).swapaxes(1, 2)
        shapes.same(q, turned[:, :heads], "queries")
        shapes.same(kv_out[0], turned[:, heads:], "keys")
        shapes.same(kv_out[1], x[:, :, heads + kv :].swapaxes(1, 2), "values")
    return 3


def attention_family(device: Device) -> int:
    """Attention of one token within a rounding of float64's, in one launch and in two, and the cache to the last bit."""
    cases = [
        Attention(20, 5, 128, 256, old, new, dtype=dtype, batch=batch)
        for dtype in ("float32", "bfloat16")
        for old, new, batch in ((0, 0, 1), (211, 37, 2), (256, 63, 1))
    ]
    cases += [Attention(20, 5, 128, room, old, 63, dtype="bfloat16") for room in (512, 4096) for old in (0, 1, room)]
    cases += [
        Attention(6, 2, 64, 300, 300, 5, dtype="float16", batch=3, angles=3, spread=8),
        Attention(3, 1, 80, 300, 299, 0),
    ]
    for case in cases:
        qkv, cos, sin, past, recent, lengths = case.inputs()
        cut = attention.plan(case.batch, case.heads, case.kv_heads, case.dim, case.room, case.slots, case.dtype)
        launch = attention.decode_attention(
            qkv, cos, sin, past, recent, lengths, heads=case.heads, dtype=case.dtype, cut=cut
        )
        out, kept = device(launch)
        out = device(attention.merge(out, case.dtype))[0] if cut.shares > 1 else out
        check_attention(case, out.astype(DTYPES[case.dtype]), kept.astype(DTYPES[case.dtype]))
    return len(cases)


def float_family(device: Device) -> int:
    """Activations in floating point, on whole numbers, whose sums nothing rounds."""
    checked = 0
    for n, k in shapes.PAIRS:
        rng = np.random.default_rng((n, k))
        t = rng.integers(-1, 2, (n, k)).astype(np.int8)
        for m in (1, 3, 8):
            x = rng.integers(-128, 128, (m, k)).astype(np.float32)
            one = np.ones(1, np.float32)
            launch = matvec.float_matvec(x, words2.pack(t), one, variant=matvec.MatvecVariant(2, 2), dtype="float32")
            shapes.same(device(launch)[0], x.astype(np.float64) @ t.T, f"M {m}, N {n}, K {k}")
            checked += 1
    return checked


FAMILIES: dict[str, Callable[[Device], int]] = {
    "dp4a": dp4a_family,
    "fused": fused_family,
    "halves": halves_family,
    "halves, groups": partial(halves_family, kinds=("group",)),
    "trits": trits_family,
    "matmul": matmul_family,
    **{f"quantize {x.kind} {x.words}": partial(quantize_family, layout=x) for x in LAYOUTS},
    "rope": rope_family,
    "attention": attention_family,
    "float": float_family,
}
PLATFORMS: dict[Platform, tuple[str, ...]] = {
    "metal": tuple(name for name in FAMILIES if name not in ("dp4a", "fused")),
    "cuda": tuple(FAMILIES),
}


def check(name: str, platform: Platform) -> dict[str, Any]:
    """One family's record: exact or not, what differs first, how many cases and launches."""
    device = Device(platform)
    record: dict[str, Any] = {"family": name, "exact": True, "error": ""}
    try:
        record["cases"] = FAMILIES[name](device)
    except (AssertionError, RuntimeError, ValueError) as error:
        record |= {"exact": False, "error": str(error)[:2000]}
    return {**record, "launches": device.launches}


def source_digests(platform: Platform) -> dict[str, str]:
    """The sources that ran, by a hash of their text."""
    sources = [dp4a.SOURCE, dp4a.GROUPS, matvec.MATVEC, matvec.GROUPS, matvec.FLOAT, trits.SOURCE, rope.SOURCE]
    sources += [attention.SOURCE, attention.MERGE, fused.SOURCE]
    return {source.name: source.digest(platform) for source in sources if platform in source.platforms}
