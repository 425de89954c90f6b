"""What multiplies packed ternary weights: one file or folder a backend, and the choice between them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from bitnet_mlx.errors import BackendError, ConfigError

NAMES = ("auto", "mlx", "cpu", "numpy")


@dataclass(frozen=True)
class Choice:
    """The backend that will run, and why it was taken."""

    name: str
    reason: str


def missing(name: str) -> str | None:
    """Why the backend cannot run here, or None if it can. Imports nothing but what the question needs."""
    if name == "cpu":
        return None if importlib.util.find_spec("numba") else "the package numba is not installed"
    if name == "mlx":
        return None if importlib.util.find_spec("mlx") else "the package mlx is not installed"
    return None


def _mlx_has_gpu() -> bool:
    """Whether MLX is here and computes on a GPU (Metal on a Mac, CUDA elsewhere)."""
    if missing("mlx"):
        return False
    import mlx.core as mx

    return mx.default_device() == mx.gpu


def choose(name: str = "auto") -> Choice:
    """Settle the backend. A named one is taken or refused, never replaced; "auto" takes the fastest that is here.

    Raises ConfigError for an unknown name and BackendError for a backend that cannot run on this machine.
    """
    if name not in NAMES:
        raise ConfigError(f"[backend] {name!r} was asked for; {', '.join(NAMES)} are known")
    if name != "auto":
        reason = missing(name)
        if reason:
            raise BackendError(f"[backend] {name} cannot run here: {reason}; install it, or use --backend numpy")
        return Choice(name, "asked for by name")
    if _mlx_has_gpu():
        return Choice("mlx", "MLX computes on a GPU here")
    reason = missing("cpu")
    if not reason:
        return Choice("cpu", "no GPU that MLX can use; compiled CPU code")
    return Choice("numpy", f"no GPU that MLX can use, and no compiled CPU code: {reason}")
