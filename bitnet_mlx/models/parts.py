"""How the tokens of several sequences share the MLX decoder's passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PIECE = 512  # rows of one pass, so that memory does not grow with the prompt


@dataclass(frozen=True)
class Part:
    """Tokens of one sequence that a pass takes. at: its first token in the pass. last: whether its tokens end here."""

    sequence: int
    ids: Sequence[int]
    at: int
    last: bool


def passes(tokens: Sequence[Sequence[int]], most: int) -> list[list[Part]]:
    """All tokens in passes of at most `most` rows; a sequence that does not fit goes on in the next pass."""
    found: list[list[Part]] = [[]]
    room = most
    for sequence, ids in enumerate(tokens):
        start = 0
        while start < len(ids):
            if not room:
                found.append([])
                room = most
            count = min(room, len(ids) - start)
            end = start + count
            found[-1].append(Part(sequence, ids[start:end], most - room, end == len(ids)))
            room, start = room - count, end
    return found
