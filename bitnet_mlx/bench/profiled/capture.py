"""A Metal capture of one decode step, which Xcode opens."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_mlx.errors import BackendError, ConfigError


def check_capture(path: str) -> None:
    """Raises BackendError where Metal is not there, ConfigError for a path or a setting that Metal would refuse."""
    if sys.platform != "darwin":
        raise BackendError(f"[capture] a Metal capture was asked for and this is {sys.platform}; it needs a Mac")
    if not path.endswith(".gputrace") or Path(path).exists():
        raise ConfigError(f"[capture] {path} was given; a new path that ends in .gputrace is needed")
    if os.environ.get("MTL_CAPTURE_ENABLED") != "1":
        raise ConfigError("[capture] Metal captures only for processes started with MTL_CAPTURE_ENABLED=1; set it")


def capture(model: Any, ids: Sequence[int], path: str) -> None:
    """Capture one step of `ids` after one that warms up. The model computes on Metal (check_capture).

    Raises BackendError for a model on another engine.
    """
    if model.name not in ("metal", "mlx"):
        raise BackendError(f"[capture] the backend is {model.name}; a Metal capture needs --backend metal or mlx")
    import mlx.core as mx

    cache = model.make_cache()
    model.step([ids], [cache])
    mx.metal.start_capture(path)
    try:
        model.step([ids], [cache])
    finally:
        mx.metal.stop_capture()
