"""Q2_0: the rule told weight by weight, and the group found from sizes. The bytes of real files were not to be had."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_mlx.errors import FormatError
from bitnet_mlx.formats import q2, words2


def by_the_rule(t: np.ndarray, d: np.ndarray, group: int) -> bytes:
    out = bytearray()
    for row, scales in zip(t, d, strict=True):
        for g, scale in enumerate(scales):
            out += np.float16(scale).tobytes()
            codes = (row[g * group : (g + 1) * group] + 1).tolist()
            for i in range(0, group, 4):
                out.append(sum(code << 2 * j for j, code in enumerate(codes[i : i + 4])))
    return bytes(out)


@settings(deadline=None, max_examples=40, database=None)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(q2.GROUPS), st.integers(0, 2**32 - 1))
def test_every_weight_lands_where_the_rule_says(n: int, groups: int, group: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = groups * group
    t = rng.integers(-1, 2, (n, k)).astype(np.int8)
    d = rng.uniform(0.01, 3, (n, groups)).astype(np.float16).astype(np.float32)
    data = q2.from_words2(words2.pack(t), d, k, group)
    assert data.tobytes() == by_the_rule(t, d, group) and data.size == q2.nbytes(n, k, group)
    words, scales = q2.to_words2(data, k, group)
    assert np.array_equal(words, words2.pack(t)) and np.array_equal(scales, d)


def test_the_group_follows_from_the_room() -> None:
    n, k = 8, 2560
    assert q2.nbytes(n, k, 128) == 8 * 20 * 34 and q2.nbytes(n, k, 64) == 8 * 40 * 18
    for group in q2.GROUPS:
        room = -(-q2.nbytes(n, k, group) // 32) * 32
        assert q2.possible_groups(n, k, room, 32) == (group,)
    assert q2.possible_groups(1, 128, 64, 32) == (128, 64)  # 34 and 36 bytes: padding hides the difference
    assert q2.possible_groups(n, k, 7000, 32) == ()
    assert q2.possible_groups(n, k, q2.nbytes(n, k, 128) + 32, 32) == ()  # padding is shorter than the alignment
    assert q2.possible_groups(3, 192, 192, 32) == (64,)


def test_code_3_and_wrong_shapes_are_refused() -> None:
    data = q2.from_words2(words2.pack(np.zeros((9, 256), np.int8)), np.ones((9, 2), np.float32), 256, 128)
    data[7, 40] = 0xFF
    with pytest.raises(FormatError, match="tensor w holds code 3 in row 7;"):
        q2.to_words2(data, 256, 128, "w")
    with pytest.raises(FormatError, match="groups of 64 are uint8"):
        q2.to_words2(data, 256, 64, "w")
    with pytest.raises(FormatError, match="do not divide into groups of 128"):
        q2.to_words2(data, 192, 128, "w")
