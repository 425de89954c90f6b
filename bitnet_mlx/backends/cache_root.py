"""The package's cache folder: compiled CPU code and what was measured about kernels live below it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "BITNET_MLX_CACHE_DIR"


def cache_root() -> Path:
    """BITNET_MLX_CACHE_DIR, or the platform's own place. It need not exist."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "bitnet-mlx"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "bitnet-mlx" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitnet-mlx"
