"""In every Python that the tests start MLX computes on its CPU device, whose numbers they expect, whatever the machine has.

By itself MLX takes a GPU where it was built for one, as on every Mac. What the GPU computes is checked on it, by doctor and
scripts/gpu_check. Python imports a module of this name at its start, out of PYTHONPATH (see tests/conftest.py).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _OnCpu:
    """Finds mlx.core as ever, and has its default device changed once it is loaded."""

    _asking = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "mlx.core" or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                module.set_default_device(module.cpu)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _OnCpu())  # type: ignore[arg-type]
