"""Outputs and gradients of LoRA and DoRA over ternary layers, computed with torch in float64 but for the int8 codes.

    python tests/oracle/make_lora_goldens.py tests/train/data/lora_torch.npz

The loss is sum(sin(y) * c). Codes are rounded in float32, half to even; their gradient passes straight through.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

N, K, R, ROWS, SCALE = 21, 40, 3, 5, 2.5


def straight_through(x: torch.Tensor) -> torch.Tensor:
    wide = x.detach().float()
    s = 127 / wide.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return x + ((wide * s).round().clamp(-128, 127).double() / s.double() - x).detach()


def main(path: str) -> None:
    rng = np.random.default_rng(5)
    t = rng.integers(-1, 2, (N, K)).astype(np.int8)
    t[4] = 0
    given = {
        "x": rng.standard_normal((ROWS, K)), "c": rng.standard_normal((ROWS, N)), "bias": rng.standard_normal(N),
        "lora_a": rng.standard_normal((K, R)) / 6, "lora_b": rng.standard_normal((R, N)) / 6,
        "m": rng.uniform(0.5, 2, N), "row_scale": rng.uniform(0.1, 1, N),
    }  # fmt: skip
    out = {name: value.astype(np.float32) for name, value in given.items()}
    out["t"] = t
    for kind in ("lora", "dora"):
        v = {name: torch.tensor(out[name].astype(np.float64), requires_grad=name != "c") for name in given}
        w = torch.tensor(t.astype(np.float64)) * v["row_scale"].detach()[:, None]
        y = straight_through(v["x"]) @ w.T + SCALE * (v["x"] @ v["lora_a"]) @ v["lora_b"]
        if kind == "dora":
            norms = (w + SCALE * (v["lora_a"] @ v["lora_b"]).T).norm(dim=1).detach()
            y = v["m"] / norms * y
        y = y + v["bias"].detach()
        (torch.sin(y) * v["c"]).sum().backward()
        out[f"{kind}.y"] = y.detach().numpy().astype(np.float32)
        for name in ("x", "lora_a", "lora_b", *(("m",) if kind == "dora" else ())):
            out[f"{kind}.d_{name}"] = v[name].grad.numpy().astype(np.float32)
    np.savez(path, **out)


if __name__ == "__main__":
    main(sys.argv[1])
