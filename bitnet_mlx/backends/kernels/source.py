"""Kernel texts: header templates and thin bodies from metal_kernels, put together for a platform, with a hash of all."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

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
    compat: whether the body uses Metal's names, which CUDA then gets from a header. absent: inputs that are not given.
    """

    name: str
    body: str
    headers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    platforms: tuple[Platform, ...] = PLATFORMS
    shared_memory: int = 0
    compat: bool = True
    absent: tuple[str, ...] = ()

    def header_files(self, platform: Platform) -> tuple[str, ...]:
        """The headers for `platform`, in order."""
        return (_COMPAT, *self.headers) if platform == "cuda" and self.compat else self.headers

    def header_text(self, platform: Platform) -> str:
        """The headers for `platform`, without comments."""
        return "".join(read(name) for name in self.header_files(platform))

    def body_text(self) -> str:
        """The body, without comments; inputs that are absent are null pointers there, which a template switches off."""
        return self._nothing() + read(self.body)

    def included(self, platform: Platform) -> tuple[str, str]:
        """(header, body) as includes of the files, for a compiler that reads them: MLX hashes a kernel's whole text at
        every launch, 0.3 us a thousand characters. Texts in full where a path cannot stand in an include.

        The shapes that the body uses are named in a comment, where MLX finds them.
        """
        files = [path(name) for name in (*self.header_files(platform), self.body)]
        if any(set('"\n\\') & set(str(file)) for file in files):
            return self.header_text(platform), self.body_text()
        lines = [f'#include "{file}"\n' for file in files]
        shapes = " ".join(f"{name}_shape" for name in self.inputs if f"{name}_shape" in read(self.body))
        return "".join(lines[:-1]), f"{self._nothing()}// {shapes}\n{lines[-1]}"

    def _nothing(self) -> str:
        space = "device " if self.compat else ""
        return "".join(f"const {space}float* {name} = nullptr;\n" for name in self.absent)

    def given(self, *inputs: Any | None) -> tuple[KernelSource, tuple[Any, ...]]:
        """The kernel and its inputs without those that are None: an argument less is a cheaper launch."""
        absent = tuple(name for name, value in zip(self.inputs, inputs, strict=True) if value is None)
        return _without(self, absent), tuple(value for value in inputs if value is not None)

    def digest(self, platform: Platform) -> str:
        """16 hexadecimal digits over everything that the compiled kernel depends on, but its template's values."""
        parts = (self.name, self.header_text(platform), self.body_text(), *self.inputs, *self.outputs)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@lru_cache(maxsize=256)
def _without(source: KernelSource, absent: tuple[str, ...]) -> KernelSource:
    """A source with fewer inputs, one object for each set of them."""
    names = tuple(name for name in source.inputs if name not in absent)
    return replace(source, inputs=names, absent=absent) if absent else source


@lru_cache(maxsize=64)
def read(name: str) -> str:
    """One file of metal_kernels, without comments, empty lines and indentation: MLX copies and hashes it at each call."""
    try:
        text = path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise BackendError(
            f"[kernels] the file {name} of metal_kernels cannot be read ({error}); install the package again"
        ) from error
    lines = (line.strip() for line in _COMMENT.sub("", text).splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def path(name: str) -> Path:
    """Where a file of metal_kernels lies: in the folder beside the package in a checkout, or in the installed package."""
    checkout = Path(__file__).resolve().parents[3] / "metal_kernels" / name
    return checkout if checkout.is_file() else Path(str(resources.files("bitnet_mlx.metal_kernels").joinpath(name)))
