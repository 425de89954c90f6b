"""Single numbers in a compiled step.

MLX makes a kernel of every handful of operations on them, with constants such as an array's size in its text: seconds of a
compiler each on CUDA, for work that takes no time. These keep the operations apart; each is then a kernel that MLX has.
"""

from __future__ import annotations

import mlx.core as mx


def alone(x: mx.array) -> mx.array:
    """The same array, whose operation is not compiled together with those that follow."""
    return mx.contiguous(x)


def numbers(x: mx.array) -> list[mx.array]:
    """The numbers of x [n], of its dtype, [] each. An index by a number would gather."""
    return [part.reshape(()) for part in mx.split(x, x.size)]
