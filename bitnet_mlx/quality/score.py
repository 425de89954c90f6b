"""What a decoder makes of a text, and how far it is from a teacher: measured from the logits that its backend computes.

Windows are those of quality/bits.py. KL is that of the model's distribution from the teacher's, sum p_t (ln p_t - ln p_m),
the mean over the scored positions, in nats; agreement is the share of them where both have the same most likely token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.quality.bits import bits_per_byte, scored_logits, windows

_ROWS = 128  # positions whose logits are widened to float64 at a time
Progress = Callable[[int, int], None]  # tokens scored, tokens in all


@dataclass
class Score:
    """Sums over scored tokens. nats, teacher_nats, kl: in nats. agreed: tokens where the best token is the teacher's.

    nbytes: of the UTF-8 text that the scored tokens stand for. teacher_nats, kl and agreed are None without a teacher.
    """

    tokens: int = 0
    nbytes: int = 0
    nats: float = 0.0
    teacher_nats: float | None = None
    kl: float | None = None
    agreed: int | None = None

    def __add__(self, other: Score) -> Score:
        def plus(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + b

        agreed = None if self.agreed is None or other.agreed is None else self.agreed + other.agreed
        return Score(
            self.tokens + other.tokens, self.nbytes + other.nbytes, self.nats + other.nats,
            plus(self.teacher_nats, other.teacher_nats), plus(self.kl, other.kl), agreed,
        )  # fmt: skip

    def record(self) -> dict[str, float | int]:
        """The figures by name, for JSON."""
        found: dict[str, float | int] = {
            "tokens": self.tokens, "bytes": self.nbytes, "nats_per_token": self.nats / self.tokens,
            "perplexity": perplexity(self.nats / self.tokens), "bits_per_byte": bits_per_byte(self.nats, self.nbytes),
        }  # fmt: skip
        if self.teacher_nats is not None and self.kl is not None and self.agreed is not None:
            found.update(
                teacher_perplexity=perplexity(self.teacher_nats / self.tokens),
                teacher_bits_per_byte=bits_per_byte(self.teacher_nats, self.nbytes),
                kl=self.kl / self.tokens, top1_agreement=self.agreed / self.tokens,
            )  # fmt: skip
        return found


def perplexity(nats: float) -> float:
    """e to the mean cross entropy of a token, in nats; the largest float where that is larger."""
    return math.exp(min(nats, 709.0))


def score(
    decoder: Decoder,
    ids: Sequence[int],
    nbytes: int,
    length: int,
    stride: int,
    teacher: Decoder | None = None,
    progress: Progress | None = None,
) -> Score:
    """Score ids [tokens], all but the first, in windows of at most `length` tokens that move on by `stride`.

    nbytes: of the text that ids[1:] stand for. Raises ConfigError where there are fewer than two tokens, or where the
    teacher's vocabulary has another size.
    """
    if teacher is not None and teacher.config.vocab_size != decoder.config.vocab_size:
        raise ConfigError(
            f"[evaluate] the teacher knows {teacher.config.vocab_size} tokens, the model {decoder.config.vocab_size}; "
            "a teacher of the same vocabulary is needed"
        )
    found = Score(nbytes=nbytes) if teacher is None else Score(0, nbytes, 0.0, 0.0, 0.0, 0)
    for window in windows(len(ids), length, stride):
        targets = np.asarray(ids[window.first : window.stop + 1], np.int64)
        own = scored_logits(decoder, ids, window, length)
        theirs = None if teacher is None else scored_logits(teacher, ids, window, length)
        for at in range(0, len(targets), _ROWS):
            part = slice(at, at + _ROWS)
            found = found + _rows(own[part], targets[part], None if theirs is None else theirs[part])
        if progress is not None:
            progress(found.tokens, len(ids) - 1)
    return found


def _rows(own: np.ndarray, targets: np.ndarray, theirs: np.ndarray | None) -> Score:
    rows = np.arange(len(targets))
    log_own = log_softmax(own)
    nats = -float(log_own[rows, targets].sum())
    if theirs is None:
        return Score(len(targets), 0, nats)
    log_theirs = log_softmax(theirs)
    kl = float((np.exp(log_theirs) * (log_theirs - log_own)).sum())
    agreed = int((own.argmax(-1) == theirs.argmax(-1)).sum())
    return Score(len(targets), 0, nats, -float(log_theirs[rows, targets].sum()), kl, agreed)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [L, V] -> float64 of the same shape."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
