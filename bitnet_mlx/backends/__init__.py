"""What multiplies packed ternary weights: one file or folder a backend, and the choice between them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from bitnet_mlx.errors import BackendError, ConfigError

NAMES = ("auto", "metal", "cuda", "mlx", "cpu", "numpy")
GPUS = ("metal", "cuda")
ON_MLX = (*GPUS, "mlx")  # models of these are MLX modules, of any dtype
# What must be there, by a module of its own: pip leaves empty folders where mlx was, and Python takes those for a package.
_NEEDS = {"metal": "mlx.core", "cuda": "mlx.core", "mlx": "mlx.core", "cpu": "numba"}


@dataclass(frozen=True)
class Choice:
    """The backend that will run, and why it was taken."""

    name: str
    reason: str


def missing(name: str) -> str | None:
    """Why the backend cannot run here, or None if it can. Imports nothing but what the question needs."""
    needed = _NEEDS.get(name)
    if needed and not _found(needed):
        return f"the package {needed.partition('.')[0]} is not installed"
    try:
        if name == "metal":
            from bitnet_mlx.backends import metal

            return metal.missing()
        if name == "cuda":
            from bitnet_mlx.backends import cuda

            return cuda.missing()
        if name == "mlx":
            from bitnet_mlx.backends import metal

            return metal.hidden()
    except BackendError as error:  # MLX is there and does not import
        return str(error)
    return None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def choose(name: str = "auto") -> Choice:
    """Settle the backend. A named one is taken or refused, never replaced; "auto" takes the fastest that is here.

    Raises ConfigError for an unknown name and BackendError for a backend that cannot run on this machine.
    """
    if name not in NAMES:
        raise ConfigError(f"[backend] {name!r} was asked for; {', '.join(NAMES)} are known")
    if name != "auto":
        reason = missing(name)
        if reason:
            others = [other for other in NAMES[1:] if not missing(other)]
            raise BackendError(
                f"[backend] {name} cannot run here: {reason}; install what it needs, or use --backend {' or '.join(others)}"
            )
        return Choice(name, "asked for by name")
    for gpu, device in (("metal", "an Apple GPU"), ("cuda", "an NVIDIA GPU")):
        if not missing(gpu):
            return Choice(gpu, f"MLX computes on {device} here; our kernels, checked on it, with stock MLX behind them")
    reason = missing("cpu")
    if not reason:
        return Choice("cpu", "no GPU that MLX can use; compiled CPU code")
    return Choice("numpy", f"no GPU that MLX can use, and no compiled CPU code: {reason}")


def check_threads(threads: int | None, backend: str) -> None:
    """Raises ConfigError for a number of CPU threads that the backend does not take."""
    if threads is not None and backend != "cpu":
        raise ConfigError(
            f"[threads] {threads} were asked for and the backend is {backend}; only cpu takes a number of them"
        )
    if threads is not None and threads < 1:
        raise ConfigError(f"[threads] {threads} were asked for; 1 or more is allowed")


def choose_on_mlx(name: str = "auto") -> Choice:
    """The same for what needs MLX modules, such as training: "auto" takes a GPU, else MLX on the CPU.

    Raises BackendError where MLX is missing, ConfigError for a backend that is not on MLX.
    """
    if name == "auto":
        name = next((gpu for gpu in GPUS if not missing(gpu)), "mlx")
    if name not in ON_MLX:
        raise ConfigError(f"[backend] {name} was asked for; training runs on {', '.join(ON_MLX)}")
    return choose(name)
