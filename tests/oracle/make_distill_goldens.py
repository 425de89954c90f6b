"""The distances between a teacher and a student and their gradients, by torch in float64, on numbers stored beside them.

python tests/oracle/make_distill_goldens.py tests/train/data/distill_torch.npz
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch.nn import functional

B, L, H, VOCAB, K, T = 2, 7, 12, 31, 5, 1.6
# heads and width of a head of queries, and of keys and values; the heads that relations are cut into
TEACHER, STUDENT, HEADS = ((6, 8), (2, 8)), ((4, 5), (2, 5)), (2, 2)


def relations(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, any, L, D] -> log-probabilities [B, heads, L, L]."""
    rows = states.permute(0, 2, 1, 3).flatten(2)
    cut = torch.stack(rows.chunk(heads, dim=-1), dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", cut, cut) / cut.shape[-1] ** 0.5
    future = torch.triu(torch.ones(L, L, dtype=torch.bool), 1)
    return torch.log_softmax(scores.masked_fill(future, -torch.inf), -1)


def relation_distance(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for theirs, own, heads in zip(teacher, student, (HEADS[0], HEADS[1], HEADS[1]), strict=True):
        p, q = relations(theirs, heads), relations(own, heads)
        for i in range(L):  # row by row, so that no masked place takes part
            row = functional.kl_div(q[:, :, i, : i + 1], p[:, :, i, : i + 1], log_target=True, reduction="sum")
            total = total + row / (3 * B * heads * L)
    return total


def kept_distance(teacher: torch.Tensor, student: torch.Tensor, k: int) -> torch.Tensor:
    """KL of the K most likely tokens and one outcome for all others."""
    p, q = torch.softmax(teacher / T, -1), torch.softmax(student / T, -1)
    top = p.topk(k, -1).indices
    p, q = (torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q))
    return T**2 * (p * (p / q).log()).sum(-1).mean()


def main(path: str) -> None:
    rng = np.random.default_rng(3)
    out: dict[str, np.ndarray] = {}

    def two(name: str, *shapes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        for who, shape in zip(("t", "s"), shapes, strict=True):
            out[f"{name}.{who}"] = (1.5 * rng.standard_normal(shape)).astype(np.float32)
        t, s = (torch.tensor(out[f"{name}.{who}"].astype(np.float64)) for who in ("t", "s"))
        return t, s.requires_grad_()

    def done(name: str, loss: torch.Tensor, *student: torch.Tensor) -> None:
        loss.backward()
        out[f"{name}.loss"] = np.float64(loss.item())
        for i, s in enumerate(student):
            assert s.grad is not None
            out[f"{name}.grad{i}"] = s.grad.numpy().astype(np.float32)

    t, s = two("cosine", (B, L, H), (B, L, H))
    done("cosine", (1 - functional.cosine_similarity(s, t, dim=-1)).mean(), s)
    t, s = two("mse", (B, L, H), (B, L, H))
    done("mse", functional.mse_loss(s, t) / t.square().mean(), s)
    t, s = two("kept", (B, L, VOCAB), (B, L, VOCAB))
    done("kept", kept_distance(t, s, K), s)
    states = [
        two(f"relation.{name}", (B, TEACHER[i][0], L, TEACHER[i][1]), (B, STUDENT[i][0], L, STUDENT[i][1]))
        for name, i in (("q", 0), ("k", 1), ("v", 1))
    ]
    done("relation", relation_distance([t for t, _ in states], [s for _, s in states]), *(s for _, s in states))
    np.savez(path, **out)


if __name__ == "__main__":
    main(sys.argv[1])
