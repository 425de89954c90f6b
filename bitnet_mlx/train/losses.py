"""What a student is trained on: the targets, and the distance from a teacher.

The loss is (1 - k) cross entropy + k T^2 KL(teacher || student), both of the distributions at temperature T, the mean over
all positions (Hinton et al., 2015).
"""

from __future__ import annotations

import mlx.core as mx

from bitnet_mlx.models.decoder_mlx import MlxModel
from bitnet_mlx.train.optimizer import Tensors
from bitnet_mlx.train.qat_options import QatOptions


def distance(teacher: mx.array, student: mx.array, temperature: float) -> mx.array:
    """T^2 KL(teacher || student) of logits [..., V] at a temperature, the mean over positions, float32 []."""
    p, q = (x.astype(mx.float32) / temperature for x in (teacher, student))
    p, q = p - mx.logsumexp(p, axis=-1, keepdims=True), q - mx.logsumexp(q, axis=-1, keepdims=True)
    return temperature**2 * (mx.exp(p) * (p - q)).sum(axis=-1).mean()


def losses(student: MlxModel, batch: mx.array, signal: Tensors, options: QatOptions) -> Tensors:
    """int32 [B, L + 1] -> "loss", which is trained on, and its parts, each float32 []; 0 where a part is not used.

    signal: what the teacher gives for batch[:, :-1] (train/teacher.py).
    """
    k = options.kl_weight
    logits = student(batch[:, :-1])
    entropy, kl = mx.fast.cross_entropy(logits.astype(mx.float32), batch[:, 1:]).mean(), mx.array(0.0)
    if k:
        kl = distance(signal["logits"], logits, options.temperature)
    return {"loss": (1 - k) * entropy + k * kl, "cross_entropy": entropy, "kl": kl}
