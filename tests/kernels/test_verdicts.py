"""What a check calls wrong, what it counts as a rounding of the chip, and that each answer is kept under a name of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from bitnet_mlx.backends.kernels import check, products
from bitnet_mlx.backends.kernels.biased import BiasedProduct
from bitnet_mlx.backends.kernels.launch import Launch
from bitnet_mlx.backends.kernels.layout import Layout, parts, prepare
from bitnet_mlx.backends.kernels.problem import Product, rounded
from bitnet_mlx.backends.kernels.row_attention import Data, DecodeAttention
from bitnet_mlx.backends.kernels.row_fused import FusedProduct
from bitnet_mlx.backends.kernels.row_kernels import FloatProduct, Quantiser, RopeKv
from bitnet_mlx.backends.kernels.tune import Tuner
from bitnet_mlx.backends.mlx_import import mx
from tests.kernels.test_self_protection import Device, corrupting
from tests.kernels.twin import twin

PLAIN = Layout("plain")
QUANTISER = Quantiser(136, PLAIN, "float32")


def changed(change: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Any:
    """A device whose quantiser gives other codes or scales. change: (x, q, s) -> (q, s)."""

    def run(launch: Launch) -> list[mx.array]:
        q, _, s = parts(np.array(twin(launch)[0]), PLAIN, 136)
        q, s = change(np.array(launch.inputs[0]), q[:, :136].astype(np.int8), s)
        return [mx.array(prepare(q, s, PLAIN))]

    return run


def test_a_code_that_is_not_beside_a_half_is_wrong_however_near() -> None:
    def up(near: float) -> Any:
        def change(x: np.ndarray, q: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            value = x * s[:, None]
            below = (np.rint(value) == np.floor(value)) & (np.abs(value - np.floor(value) - 0.5) < near) & (q < 127)
            return (q + below).astype(np.int8), s

        return changed(change)

    assert QUANTISER.check(up(1e-3)).sound
    assert not QUANTISER.check(up(0.05)).sound


def test_a_scale_may_differ_in_its_last_place_alone() -> None:
    def off(ulps: int) -> Any:
        return changed(lambda x, q, s: (q, (s.view(np.int32) + ulps).view(np.float32)))

    assert QUANTISER.check(off(0)).exact
    near = QUANTISER.check(off(2))
    assert near.sound and near.ties == 10
    assert not QUANTISER.check(off(20)).sound


def test_what_stands_beside_the_codes_must_be_theirs() -> None:
    """The sum of a row's codes, which products take as it is."""

    def run(launch: Launch) -> list[mx.array]:
        rows = np.array(twin(launch)[0])
        rows[3, PLAIN.code_words(136)] ^= 1
        return [mx.array(rows)]

    assert QUANTISER.check(run).wrong == 1


@pytest.mark.parametrize("shape", [(1, 3), (3, 3, 1), (3,)])
def test_an_output_of_another_shape_is_wrong_altogether(shape: tuple[int, ...]) -> None:
    assert check.compared(np.ones(shape), np.ones((3, 3))) == check.Verdict(9, 9)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_whatever_mlx_raises_is_a_verdict(kind: type[Exception]) -> None:
    def fails(_: Launch) -> list[mx.array]:
        raise kind("no such thing")

    assert QUANTISER.check(fails).error == f"{kind.__name__}: no such thing"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_is_held_to_its_roundings(dtype: str) -> None:
    data = Data.of(DecodeAttention.of(1, 4, 2, 8, 100, 64, dtype), (257, 63))
    out = data.out[None, None].astype(np.float32)
    kept = np.zeros_like(data.recent)
    kept[:, :, :63], kept[:, :, 63] = data.recent[:, :, :63], data.new
    assert data.verdict(out, kept[:, None], dtype).sound
    near, far = (3e-5, 2e-4) if dtype == "float32" else (0, 2e-2)
    assert data.verdict(rounded(out + near * data.size, dtype), kept[:, None], dtype).sound
    assert not data.verdict(out + far * data.size, kept[:, None], dtype).sound
    for place, value in (((0, 0, 63, 0), 9.0), ((1, 1, 5, 3), 9.0), ((0, 0, 20, 0), np.nan)):
        other = kept.copy()
        other[place] = value
        assert not data.verdict(out, other[:, None], dtype).sound
    short = Data.of(DecodeAttention.of(1, 4, 2, 8, 100, 64, dtype), (0, 40))
    kept = np.zeros_like(short.recent)
    kept[:, :, :40], kept[:, :, 40] = short.recent[:, :, :40], short.new
    assert short.verdict(short.out, kept, dtype).sound
    kept[0, 0, 50] = np.inf  # behind what counts, where the next step reads it
    assert not short.verdict(short.out, kept, dtype).sound


def questions(kernel: Any, others: dict[str, Any]) -> list[str]:
    names = {field.name for field in fields(kernel) if field.name not in ("runner", "reach")}
    assert names == set(others), "each field is varied"
    return [k.question for k in (kernel, *(replace(kernel, **{name: value}) for name, value in others.items()))]


def test_no_two_kernels_share_an_answer() -> None:
    one = Quantiser(136, PLAIN, "bfloat16", True, "relu2", 1e-5)
    candidate, other = products.candidates("cuda", 12, 160, 1)[:2]
    product = Product(12, 160, 1, "row", "bfloat16")
    fused = FusedProduct(one, candidate, 12, "row", False, False, twin)
    varied = [
        questions(one, {"k": 137, "layout": Layout("bytes"), "dtype": "float32", "norm": False, "act": "silu", "eps": 1e-6}),
        questions(
            FloatProduct(9, 140, 2, "row", "float32"),
            {"n": 8, "k": 141, "m": 3, "scale": "group", "dtype": "float16", "bias": True},
        ),
        questions(BiasedProduct(product, candidate), {"product": replace(product, m=3), "candidate": other}),
        questions(RopeKv(4, 2, 6, "float32"), {"heads": 6, "kv_heads": 1, "dim": 8, "dtype": "bfloat16"}),
        questions(
            DecodeAttention(4, 2, 8, "float32", 2, 8, False),
            {"heads": 6, "kv_heads": 1, "dim": 16, "dtype": "bfloat16", "queries": 1, "split": True, "simdgroups": 8},
        )[:-1],  # how many simdgroups follows from the rest
        [k.question for k in (fused, *(replace(fused, **change) for change in (
            {"n": 13}, {"scale": "tensor"}, {"bias": True}, {"residual": True}, {"quantiser": replace(one, act="")},
            {"quantiser": replace(one, norm=False)}, {"quantiser": replace(one, k=200)},
            {"quantiser": replace(one, dtype="float16")},
        )))],
        [str(replace(Product(12, 150, 2, "row", "float32"), **change)) for change in (
            {}, {"n": 13}, {"k": 151}, {"m": 3}, {"scale": "tensor"}, {"dtype": "bfloat16"},
        )],
    ]  # fmt: skip
    flat = [question for group in varied for question in group]
    assert len(flat) > 30 and len(set(flat)) == len(flat)


def test_a_wrong_variant_is_a_fault_though_stock_mlx_is_faster_than_the_others() -> None:
    def run(launch: Launch) -> list[mx.array]:
        return corrupting("ternary_matvec")(launch) if ("R", 2) in launch.template else twin(launch)

    device = Device(run, slow="matvec")
    choice = Tuner("metal", device, device.timer).product(Product(12, 150, 2, "row", "float32"))
    assert (
        choice.label is None and choice.fault and "stock MLX in float32" in choice.reason and "rows=2" in choice.reason
    )


def test_where_each_kernel_is_compiled_anew_one_is_tried_in_the_models_dtype_alone() -> None:
    seen: list[Launch] = []

    def run(launch: Launch) -> list[mx.array]:
        seen.append(launch)
        return twin(launch)

    device = Device(run)
    choice = Tuner("cuda", device, device.timer).product(Product(12, 160, 2, "row", "bfloat16"))
    assert choice.label and len([label for label in device.timed if not label.startswith("stock")]) == 1
    assert {value for launch in seen for name, value in launch.template if name == "T"} == {"bfloat16"}
