"""A sentencepiece model file from a vocabulary: the few fields of its protobuf message that splitting needs.

Field numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
_BPE = 2  # TrainerSpec.ModelType


def model_bytes(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    named: dict[str, str],
    *,
    space_prefix: bool = True,
    trim_spaces: bool = False,
) -> bytes:
    """ModelProto of a BPE vocabulary.

    kinds: the types of sentencepiece (1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte), as GGUF has
    them too. named: "unk", "bos", "eos" and "pad" to their tokens. space_prefix: whether a text gets a leading space.
    trim_spaces: whether runs of spaces become one.
    """
    pieces = b"".join(
        _bytes(1, _bytes(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    trainer = _number(3, _BPE) + _number(4, len(tokens)) + _number(35, int(BYTE in kinds))
    for field, name in enumerate(("unk", "bos", "eos", "pad"), 45):
        if name in named:
            trainer += _bytes(field, named[name].encode())
    normalizer = _bytes(1, b"identity") + _number(3, int(space_prefix)) + _number(4, int(trim_spaces)) + _number(5, 1)
    return pieces + _bytes(2, trainer) + _bytes(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
