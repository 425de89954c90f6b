"""RoPE's inverse frequencies are the same numbers on every processor, and those of transformers where they are scaled."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest

from bitnet_mlx.models.config import RopeConfig
from bitnet_mlx.models.rope import scaled_frequencies


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000042.0, 1e7])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_powers_are_rounded_once(theta: float, head_dim: int) -> None:
    """Against decimals of 40 digits. NumPy's own float32 power differs in some of them where a processor has AVX-512."""
    found, factor = scaled_frequencies(RopeConfig(rope_theta=theta), head_dim, 4096)
    with localcontext() as context:
        context.prec = 40
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        powers = [Decimal(theta) ** Decimal(float(exponent)) for exponent in exponents]
    assert factor == 1.0
    np.testing.assert_array_equal(found, np.float32(1) / np.array([float(p) for p in powers]).astype(np.float32))


# What transformers 5.24's own functions give for four pairs and a context of 256: each case on another way through them.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALED: dict[str, tuple[RopeConfig, list[float], float]] = {
    "yarn": (RopeConfig(**YARN), [1.0, 0.0625, 0.0024999999, 0.00025], 1.138629436111989),
    "yarn, not truncated": (
        RopeConfig(**YARN, truncate=False), [1.0, 0.02559525, 0.0024999999, 0.00025], 1.138629436111989
    ),
    "yarn, a ramp past the pairs": (
        RopeConfig(50.0, "yarn", 4.0, original_max_position_embeddings=1024, beta_fast=100.0, beta_slow=0.25),
        [1.0, 0.33576813, 0.11111679, 0.036088437], 1.138629436111989,
    ),
    "yarn, a ramp of no width": (
        RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096, beta_fast=8.0, beta_slow=8.0,
                   truncate=False),
        [1.0, 0.1, 0.0024999999, 0.00025], 1.138629436111989,
    ),
    "yarn with mscale": (
        RopeConfig(**YARN, mscale=0.7, mscale_all_dim=1.0), [1.0, 0.0625, 0.0024999999, 0.00025], 0.9634746568860826
    ),
    "llama3": (
        RopeConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=200),
        [1.0, 0.076173715, 0.00125, 0.000125], 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_are_transformers(name: str) -> None:
    rope, expected, attention = SCALED[name]
    found, factor = scaled_frequencies(rope, 8, 256)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert factor == pytest.approx(attention, rel=1e-12)
