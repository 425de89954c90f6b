"""ggml's tensor types by number: those that are read, and the names and reasons of those that are not."""

from __future__ import annotations

import math

from bitnet_mlx.formats import ggml_floats, i2s, tq

NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 8: "Q8_0", 14: "Q6_K", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 36: "I2_S", 42: "Q2_0",
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 37: "I8_S", 38: "TL1", 39: "TL2", 40: "NVFP4",
    41: "Q1_0", 142: "PQ2_0", 143: "PTQ1_0",
}  # fmt: skip
DENSE = (*ggml_floats.PLAIN, *ggml_floats.BLOCKS)
TERNARY = ("TQ1_0", "TQ2_0", "I2_S", "Q2_0")
REASONS = {
    "TL1": "its bytes are arranged for one kernel of bitnet.cpp",
    "TL2": "its bytes are arranged for one kernel of bitnet.cpp (llama.cpp uses the number for MXFP4)",
    "PQ2_0": "its weights lie in a rotated basis (Hadamard), which is not undone here",
    "PTQ1_0": "its weights lie in a rotated basis (Hadamard), which is not undone here",
}


def size(kind: str, shape: tuple[int, ...], name: str) -> int | None:
    """Bytes of a tensor, or None where the type's size is unknown (Q2_0: two sizes share a number) or not read.

    Raises FormatError where the rows do not divide into the type's blocks.
    """
    rows, k = math.prod(shape[:-1]), shape[-1]
    if kind in DENSE:
        return rows * ggml_floats.row_bytes(kind, k, name)
    if kind in tq.BYTES:
        return rows * tq.row_bytes(kind, k, name)
    return i2s.nbytes(rows, k) if kind == "I2_S" else None
