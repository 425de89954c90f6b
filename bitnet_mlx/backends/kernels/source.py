"""Kernel texts: header templates and thin bodies from metal_kernels, put together for a platform, with a hash of all."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

from bitnet_mlx.errors import BackendError

Platform = Literal["metal", "cuda"]
PLATFORMS: tuple[Platform, ...] = ("metal", "cuda")
_COMPAT = "cuda_compat.h"  # gives CUDA the Metal names that the bodies use
_COMMENT = re.compile(r"//[^\n]*")


@dataclass(frozen=True)
class KernelSource:
    """A kernel's text and its arguments' names.

    name: a C identifier. body: the file with the statements of the kernel function. headers: files that stand before
    it, in order. inputs, outputs: names that the body uses. shared_memory: bytes of dynamic shared memory (CUDA).
    compat: whether the body uses Metal's names, which CUDA then gets from a header.
    """

    name: str
    body: str
    headers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    platforms: tuple[Platform, ...] = PLATFORMS
    shared_memory: int = 0
    compat: bool = True

    def header_text(self, platform: Platform) -> str:
        """The headers for `platform`, without comments."""
        names = (_COMPAT, *self.headers) if platform == "cuda" and self.compat else self.headers
        return "".join(read(name) for name in names)

    def body_text(self) -> str:
        """The body, without comments."""
        return read(self.body)

    def digest(self, platform: Platform) -> str:
        """16 hexadecimal digits over everything that the compiled kernel depends on, but its template's values."""
        parts = (self.name, self.header_text(platform), self.body_text(), *self.inputs, *self.outputs)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)
def read(name: str) -> str:
    """One file of metal_kernels, without comments, empty lines and indentation: MLX copies and hashes it at each call."""
    try:
        text = _folder_text(name)
    except OSError as error:
        raise BackendError(
            f"[kernels] the file {name} of metal_kernels cannot be read ({error}); install the package again"
        ) from error
    lines = (line.strip() for line in _COMMENT.sub("", text).splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def _folder_text(name: str) -> str:
    """From the installed package, or from the folder beside it in a checkout."""
    checkout = Path(__file__).resolve().parents[3] / "metal_kernels" / name
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    return resources.files("bitnet_mlx.metal_kernels").joinpath(name).read_text(encoding="utf-8")
