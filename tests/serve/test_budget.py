"""The memory that keys and values may take: a function of sizes."""

from __future__ import annotations

import pytest

from bitnet_mlx.errors import ConfigError, MemoryLimitError
from bitnet_mlx.memory.plan import Machine
from bitnet_mlx.models.decoder_numpy import NumpyDecoder
from bitnet_mlx.serve.budget import kv_budget, parse_bytes
from tests.support.random_model import random_weights, tiny_config

GIB = 1 << 30
ROW = 2 * 2 * 2 * 18 * 4  # bytes of a position


@pytest.mark.parametrize(
    ("text", "want"),
    [("0", 0), ("1000", 1000), ("512M", 512 * 10**6), ("1.5GB", 1_500_000_000), ("2 k", 2000), ("7b", 7)],
)
def test_sizes_as_mlx_lm_writes_them(text: str, want: int) -> None:
    assert parse_bytes(text, "--x") == want


@pytest.mark.parametrize("text", ["", "-1", "nan", "1e9", "1T", "GB", "9" * 30, "1.5.2M"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--x is"):
        parse_bytes(text, "--x")


@pytest.mark.parametrize(
    ("machine", "asked", "want"),
    [
        # 16 GiB keep 2 for the system, half of the rest is given, a quarter of that to beginnings, at most 2 GiB.
        (Machine(16 * GIB, 14 * GIB), (None, None), (16 * 256 * ROW, pytest.approx(14 * GIB / 8, rel=0.02))),
        (Machine(512 * GIB, 400 * GIB), (None, None), (16 * 256 * ROW, 2 * GIB)),
        (Machine(16 * GIB, 2 << 20), (None, None), (pytest.approx((2 << 20) * 3 / 8, rel=0.9), None)),
        (Machine(None, None), (None, None), (16 * 256 * ROW, GIB // 8)),
        (Machine(16 * GIB, 14 * GIB), (10 * ROW, 0), (10 * ROW, 0)),
        (Machine(16 * GIB, 14 * GIB), (GIB, 5), (16 * 256 * ROW, 5)),
        (Machine(GIB, 1), (GIB, 0), (16 * 256 * ROW, 0)),
    ],
)
def test_what_a_machine_gives(machine: Machine, asked: tuple, want: tuple) -> None:
    decoder = NumpyDecoder(random_weights(tiny_config(), seed=1))
    got = kv_budget(decoder, 256, 16, *asked, machine=machine)
    assert all(w is None or g == w for g, w in zip(got, want, strict=True)), got


def test_half_of_what_is_left_is_given_and_no_more() -> None:
    """3/8 to texts, 1/8 to beginnings."""
    decoder = NumpyDecoder(random_weights(tiny_config(), seed=1))
    machine = Machine(16 * GIB, 2 << 20)
    kv, prefixes = kv_budget(decoder, 256, 16, None, None, machine=machine)
    assert kv == pytest.approx(3 * prefixes, abs=3) and 0 < kv + prefixes <= 1 << 20
    assert kv_budget(decoder, 256, 16, None, 0, machine=machine) == (pytest.approx(kv + prefixes, abs=1), 0)


def test_no_room_is_told() -> None:
    decoder = NumpyDecoder(random_weights(tiny_config(), seed=1))
    with pytest.raises(MemoryLimitError, match="keys and values need more"):
        kv_budget(decoder, 256, 16, None, None, machine=Machine(GIB, 1))
    with pytest.raises(ConfigError, match="has room for no position: one takes 576 bytes"):
        kv_budget(decoder, 256, 16, 500, None, machine=Machine(GIB, 1))
