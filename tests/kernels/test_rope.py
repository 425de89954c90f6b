"""The RoPE kernel on the emulated grid equals numpy_ref.rope to the last bit, and puts every head where it belongs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitnet_mlx.backends import numpy_ref
from bitnet_mlx.backends.kernels.rope import rope_kv
from bitnet_mlx.errors import BackendError
from tests.backend.shapes import f32, same
from tests.emulator import Edit, emulate
from tests.kernels.quantize_cases import DTYPES

# batch, tokens, heads, key-value heads, head dimension, batches of angles
SHAPES = [(1, 1, 20, 5, 128, 1), (2, 3, 4, 4, 64, 2), (2, 7, 3, 1, 80, 1), (1, 2, 1, 1, 4, 1), (3, 1, 2, 1, 6, 3)]


def check(shape: tuple[int, ...], dtype: str, rope: Callable[..., np.ndarray], **options: object) -> None:
    """q and kv of random inputs, against `rope` (x [M, heads, D], cos, sin [M, D / 2]) rounded once to dtype."""
    batch, length, heads, kv_heads, dim, angles = shape
    rng = np.random.default_rng(shape)
    qkv = rng.standard_normal((batch, length, (heads + 2 * kv_heads) * dim)).astype(DTYPES[dtype])
    turn = rng.uniform(-400, 400, (angles, length, dim // 2)).astype(np.float32)
    cos, sin = np.cos(turn), np.sin(turn)
    launch = rope_kv(qkv, cos, sin, heads=heads, kv_heads=kv_heads, dtype=dtype)
    q, kv = emulate(launch, **options)  # type: ignore[arg-type]
    for b in range(batch):
        x = qkv[b].astype(np.float32).reshape(length, -1, dim)
        rotated = rope(x[:, : heads + kv_heads], cos[b % angles], sin[b % angles]).astype(DTYPES[dtype])
        same(q[b], rotated[:, :heads].swapaxes(0, 1), f"queries, {dtype} {shape}")
        same(kv[0, b], rotated[:, heads:].swapaxes(0, 1), f"keys, {dtype} {shape}")
        values = qkv[b].reshape(length, -1, dim)[:, heads + kv_heads :]
        same(kv[1, b], values.swapaxes(0, 1), f"values, {dtype} {shape}")


def rounded_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """numpy_ref.rope by float64 operations, each rounded to float32."""
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    first, second = f32(f32(a * c) - f32(b * s)), f32(f32(b * c) + f32(a * s))
    return np.concatenate([first, second], axis=-1).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope(shape: tuple[int, ...], dtype: str) -> None:
    check(shape, dtype, numpy_ref.rope)
    check(shape, dtype, rounded_rope, seed=1)


def test_no_contraction_changes_a_bit() -> None:
    for flag in ("contract", "split_fma"):
        check(SHAPES[1], "float32", numpy_ref.rope, flags=(flag,))


def test_a_contraction_let_in() -> None:
    bare = ("add_rn(mul_rn(x, c), -mul_rn(y, s))", "x * c - y * s")
    check(SHAPES[1], "float32", numpy_ref.rope, edit=bare)
    with pytest.raises(AssertionError, match="differ"):
        check(SHAPES[1], "float32", numpy_ref.rope, edit=bare, flags=("contract",))


@pytest.mark.parametrize(
    "edit",
    [
        ("cosines_shape[0] == 1 ? 0 : b", "0"),
        ("kept < kv_heads ? 0 : 1", "0"),
        ("index < batch * length", "index <= batch * length"),
        ("head < HEADS + kv_heads", "head < HEADS"),
    ],
    ids=["another token's angle", "values not written", "past the end", "keys not rotated"],
)
def test_planted_faults(edit: Edit) -> None:
    with pytest.raises(AssertionError):
        check(SHAPES[4], "bfloat16", numpy_ref.rope, edit=edit)


@pytest.mark.parametrize(
    ("width", "cos", "sin"), [(64, (1, 2, 4), (1, 2, 4)), (40, (2, 2, 4), (2, 2, 4)), (40, (1, 2, 4), (1, 2, 5))]
)
def test_shapes_that_do_not_fit(width: int, cos: tuple[int, ...], sin: tuple[int, ...]) -> None:
    qkv, c, s = (np.zeros(shape, np.float32) for shape in ((1, 2, width), cos, sin))
    with pytest.raises(BackendError, match=r"\[rope_kv\]"):
        rope_kv(qkv, c, s, heads=3, kv_heads=1, dtype="float32")
