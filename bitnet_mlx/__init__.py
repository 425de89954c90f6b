"""bitnet-mlx: run, convert, train, measure and serve ternary (BitNet b1.58) language models.

    from bitnet_mlx import load, generate
    model, tokenizer = load()
    print(generate(model, tokenizer, "def read_config(path):", max_tokens=48))

Importing this package imports nothing else: each name below is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOME = {
    "load": "bitnet_mlx.api",
    "convert": "bitnet_mlx.checkpoint.convert",
    "generate": "bitnet_mlx.generation",
    "stream_generate": "bitnet_mlx.generation",
    "profile_generation": "bitnet_mlx.bench.profiled",
    "TernaryTensor": "bitnet_mlx.ternary",
    "BitLinear": "bitnet_mlx.nn.bitlinear",
    "MemoryTracker": "bitnet_mlx.memory.tracker",
    "BitnetError": "bitnet_mlx.errors",
    "FormatError": "bitnet_mlx.errors",
    "UnsupportedModelError": "bitnet_mlx.errors",
    "BackendError": "bitnet_mlx.errors",
    "ConfigError": "bitnet_mlx.errors",
    "MemoryLimitError": "bitnet_mlx.errors",
    "ServeError": "bitnet_mlx.errors",
}

__all__ = [
    "BackendError",
    "BitLinear",
    "BitnetError",
    "ConfigError",
    "FormatError",
    "MemoryLimitError",
    "MemoryTracker",
    "ServeError",
    "TernaryTensor",
    "UnsupportedModelError",
    "convert",
    "generate",
    "load",
    "profile_generation",
    "stream_generate",
]

if TYPE_CHECKING:
    from bitnet_mlx.api import load
    from bitnet_mlx.bench.profiled import profile_generation
    from bitnet_mlx.checkpoint.convert import convert
    from bitnet_mlx.errors import (
        BackendError,
        BitnetError,
        ConfigError,
        FormatError,
        MemoryLimitError,
        ServeError,
        UnsupportedModelError,
    )
    from bitnet_mlx.generation import generate, stream_generate
    from bitnet_mlx.memory.tracker import MemoryTracker
    from bitnet_mlx.nn.bitlinear import BitLinear
    from bitnet_mlx.ternary import TernaryTensor


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitnet_mlx' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*(name for name in globals() if name.startswith("__")), *__all__])
