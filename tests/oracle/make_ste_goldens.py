"""Gradients of the straight-through estimators, by torch's autograd in float64, on numbers that are stored beside them.

    python tests/oracle/make_ste_goldens.py tests/train/data/ste_torch.npz

Each quantiser is written as its papers write it: the surrogate, plus the detached rest of rounding. Rounding is in float32.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

N, K, ROWS = 13, 29, 6
SETTINGS = {
    "standard": (1.5, 2.0),
    "clipped": (1.1, 2.0),
    "soft": (1.5, 2.7),
    "learnable": (0.9, 2.0),
    "learnable15": (1.5, 2.0),
}
BLENDS = (0.35, 1.0)


def detached(surrogate: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return surrogate + (exact - surrogate).detach()


def ternary(w: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return (w.detach().float() * (1 / m.detach().float())).round().clamp(-1, 1).double()


def quantised(kind: str, w: torch.Tensor, log_scale: torch.Tensor, clip: float, sharpness: float) -> torch.Tensor:
    m = w.detach().abs().mean().clamp(min=1e-5)
    if kind == "learnable":  # LSQ's own code: the gradient of the scale is weighed, that of rounding passes
        scale = torch.exp(log_scale)
        weight = w.numel() ** -0.5
        scale = detached(scale * weight, scale)
        u = (w / scale).clamp(-clip, clip)
        return detached(u, ternary(w, scale)) * scale
    exact = ternary(w, m) * m
    if kind == "standard":
        return detached(w, exact)
    if kind == "clipped":
        return detached(torch.nn.functional.hardtanh(w / m, -clip, clip) * m, exact)
    stairs = (torch.tanh(sharpness * (w / m - 0.5)) + torch.tanh(sharpness * (w / m + 0.5))) / 2
    return detached(stairs * m, exact)


def main(path: str) -> None:
    rng = np.random.default_rng(11)
    shapes = {"x": (ROWS, K), "w": (N, K), "c": (ROWS, N)}
    out = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    out["log_scale"] = np.float32(-0.4)
    for name, (clip, sharpness) in SETTINGS.items():
        for blend in BLENDS:
            x, w, log_scale, c = (
                torch.tensor(out[n].astype(np.float64), requires_grad=n != "c") for n in ("x", "w", "log_scale", "c")
            )
            wq = quantised(name.removesuffix("15"), w, log_scale, clip, sharpness)
            y = x @ ((1 - blend) * w + blend * wq).T
            (torch.sin(y) * c).sum().backward()
            key = f"{name}.{blend}"
            out[f"{key}.y"], out[f"{key}.dw"] = y.detach().numpy(), w.grad.numpy()
            if log_scale.grad is not None:
                out[f"{key}.dscale"] = log_scale.grad.numpy()
    np.savez(path, **{name: np.asarray(value, np.float32) for name, value in out.items()})


if __name__ == "__main__":
    main(sys.argv[1])
