"""The count of kernel launches: its rules on small graphs, and what a layer takes, at most eleven."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import pytest

from bitnet_mlx.backends.kernels.ops import KernelOps
from bitnet_mlx.backends.kernels.run import run
from bitnet_mlx.bench import layer_launches_mlx as layer_launches
from bitnet_mlx.bench.launches_mlx import launches
from bitnet_mlx.bench.random_decoder import config_2b
from tests.support.random_model import tiny_config

X, ONES = mx.zeros((2, 3, 4, 8)), mx.array([1.0] * 8)
LAYER = [
    *("quantize", "ternary_matvec", "decode_attention", "quantize", "ternary_matvec"),
    *("quantize", "ternary_matvec", "quantize", "ternary_matvec"),
]
APART = ["rope_kv", "SliceUpdate", "attention"]  # in place of decode_attention where that is off


def kernel(x: mx.array) -> mx.array:
    made = mx.fast.metal_kernel(name="mine", input_names=["x"], output_names=["y"], source="y[0] = x[0];")
    shapes: dict[str, Any] = dict(output_shapes=[x.shape], output_dtypes=[x.dtype])
    return made(inputs=[x], grid=(1, 1, 1), threadgroup=(1, 1, 1), stream=mx.gpu, **shapes)[0]


def attention(q: mx.array, kv: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, kv[:, 0], kv[:, 1], scale=1.0)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.reshape(6, 32)[1:, None, :4].transpose(2, 0, 1)[::2], []),
        (lambda x: mx.split(mx.broadcast_to(x[..., None], (*x.shape, 5)).squeeze(), 2, axis=0), []),
        (lambda x: x.transpose(0, 2, 1, 3).reshape(2, 4, 24), ["Reshape"]),
        (lambda x: x[:, :1].transpose(0, 2, 1, 3).reshape(2, 32), []),
        (lambda x: x[:, :1].reshape(64), ["Reshape"]),
        (lambda x: mx.concatenate([x, x, x]), ["Concatenate"] + ["copy for Concatenate"] * 2),
        (lambda x: kernel(x), ["mine"]),
        (lambda x: kernel(x.T), ["mine", "copy for mine"]),
        (lambda x: kernel(mx.abs(x.T)), ["Abs", "mine", "copy for mine"]),  # written in the order of its input
        (lambda x: kernel(x.T + x[0, 0, 0, 0]), ["Add", "mine", "copy for mine"]),
        (lambda x: x @ x.swapaxes(2, 3), ["Matmul"]),
        (lambda x: x[:, :, ::2] @ x.swapaxes(2, 3), ["Matmul", "copy for Matmul"]),
        (lambda x: mx.fast.rms_norm(x, ONES, 1e-5), ["rms_norm"]),
        (lambda x: mx.fast.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=3), ["rope"]),
    ],
)  # fmt: skip
def test_rules(function: Any, expected: list[str]) -> None:
    assert launches(function, X) == expected


def test_keys_that_lie_apart_for_each_sequence_are_copied() -> None:
    """[2, B, heads, T, D] can be read in place and [B, 2, heads, T, D] cannot, unless B is 1."""
    q = mx.zeros((3, 4, 1, 8))
    outer, inner = mx.zeros((2, 3, 4, 16, 8)), mx.zeros((3, 2, 4, 16, 8))
    attend = mx.fast.scaled_dot_product_attention
    assert launches(lambda q, kv: mx.fast.scaled_dot_product_attention(q, kv[0, :], kv[1, :], scale=1.0), q, outer) == [
        "attention"
    ]
    assert len(launches(attention, q, inner)) == 3 and len(launches(attention, q[:1], inner[:1])) == 1
    assert mx.fast.scaled_dot_product_attention is attend  # put back


@pytest.mark.parametrize("scale", ["tensor", "group"])
def test_a_layer_takes_nine_launches(scale: str) -> None:
    found = layer_launches.kernel_launches(config_2b(1, 64), scale)
    assert [name.removesuffix("_groups") for name in found] == LAYER and len(found) == 9


def test_a_layer_takes_five_launches_on_cuda() -> None:
    product = "quantized_matvec"
    found = layer_launches.kernel_launches(config_2b(1, 64), "row", platform="cuda")
    assert found == [product, "decode_attention", product, product, product]
    assert len(layer_launches.kernel_launches(config_2b(1, 64), "group", platform="cuda")) == 9


def test_a_layer_takes_ten_where_shares_of_the_positions_are_merged() -> None:
    found = layer_launches.kernel_launches(config_2b(1, 64), past=2048)
    assert found == [*LAYER[:3], "decode_attention_merge", *LAYER[3:]]


def test_a_layer_takes_eleven_without_our_attention() -> None:
    class Without(KernelOps):
        def attends(self, *_: Any) -> bool:
            return False

    ops = Without("metal", runner=partial(run, platform="metal", stream=mx.gpu))
    assert layer_launches.ops_launches(config_2b(1, 64), ops) == [*LAYER[:2], *APART, *LAYER[3:]]


def test_silu_without_sub_norms_takes_as_many() -> None:
    config = tiny_config(hidden_act="silu", sub_norms=False)
    assert len(layer_launches.kernel_launches(config)) == 9


def test_a_planted_copy_is_counted() -> None:
    class Planted(KernelOps):
        def decode_attention(self, qkv: mx.array, *args: Any) -> tuple[mx.array, mx.array]:
            return super().decode_attention(qkv[..., ::-1], *args)

    ops = Planted("metal", runner=partial(run, platform="metal", stream=mx.gpu))
    found = layer_launches.ops_launches(config_2b(1, 64), ops)
    assert len(found) == 10 and "copy for decode_attention" in found


def test_plain_graphs_take_more_and_are_counted_alike() -> None:
    config = config_2b(1, 64)
    theirs = layer_launches.mlxlm_launches(config)
    assert theirs is not None and theirs.count("bitlinear_matmul") == 7 and theirs.count("SliceUpdate") == 2
    assert (theirs.count("rms_norm"), theirs.count("rope"), theirs.count("attention"), len(theirs)) == (4, 2, 1, 21)
    assert len(layer_launches.stock_launches(config)) > 100
    assert layer_launches.mlxlm_launches(tiny_config(sub_norms=False)) is None
