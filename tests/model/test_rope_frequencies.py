"""RoPE's inverse frequencies are the same numbers on every processor."""

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
