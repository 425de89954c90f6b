"""Outputs and gradients of a master linear at several blends, and of the teacher's KL, computed with torch in float64.

    python tests/oracle/make_qat_goldens.py tests/train/data/qat_torch.npz

Codes and ternary values are rounded in float32, half to even; gradients pass straight through both quantisers.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

N, K, ROWS, VOCAB, T = 14, 30, 5, 23, 1.7
BLENDS = (0.0, 0.3, 1.0)


def straight(x: torch.Tensor, quantised: torch.Tensor, blend: float) -> torch.Tensor:
    return x + (blend * (quantised.double() - x)).detach()


def codes(x: torch.Tensor) -> torch.Tensor:
    wide = x.detach().float()
    s = 127 / wide.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (wide * s).round().clamp(-128, 127).double() / s.double()


def ternary(w: torch.Tensor) -> torch.Tensor:
    wide = w.detach().float()
    m = wide.abs().mean().clamp(min=1e-5)
    return (wide * (1 / m)).round().clamp(-1, 1).double() * m.double()


def main(path: str) -> None:
    rng = np.random.default_rng(7)
    shapes = {"x": (ROWS, K), "w": (N, K), "bias": (N,), "c": (ROWS, N), "p": (ROWS, VOCAB), "q": (ROWS, VOCAB)}
    out = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for blend in BLENDS:
        x, w = (torch.tensor(out[name].astype(np.float64), requires_grad=True) for name in "xw")
        y = straight(x, codes(x), blend) @ straight(w, ternary(w), blend).T + torch.tensor(
            out["bias"].astype(np.float64)
        )
        (torch.sin(y) * torch.tensor(out["c"].astype(np.float64))).sum().backward()
        for name, value in (("y", y.detach()), ("dx", x.grad), ("dw", w.grad)):
            out[f"{blend}.{name}"] = value.numpy().astype(np.float32)
    p, q = (torch.tensor(out[name].astype(np.float64) * 3, requires_grad=name == "q") for name in "pq")
    logs = [torch.log_softmax(v / T, -1) for v in (q, p)]
    kl = torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean") * T**2
    kl.backward()
    out["kl"], out["kl.dq"] = np.float32(kl.item()), q.grad.numpy().astype(np.float32)
    np.savez(path, **out)


if __name__ == "__main__":
    main(sys.argv[1])
