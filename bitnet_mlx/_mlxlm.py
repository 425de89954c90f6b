"""The only door to mlx-lm. Importing it takes seconds, loads transformers and lowers the process's file limit for good:
so it is imported when something of it is called for, and the limit is left alone.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace

from bitnet_mlx.errors import BackendError

_lock = threading.Lock()


def module(name: str) -> ModuleType:
    """mlx_lm's module of this name ("models.cache"), imported now if it was not. Raises BackendError if it cannot be."""
    with _lock:
        try:
            import resource
        except ImportError:  # Windows has no such limits, and no MLX either
            return _import(name)
        # mlx_lm.utils calls setrlimit(RLIMIT_NOFILE, (2048, 4096)); a lowered hard limit could not be raised again.
        original = resource.setrlimit
        resource.setrlimit = lambda *_: None  # type: ignore[assignment]
        try:
            return _import(name)
        finally:
            resource.setrlimit = original


def tool_parser(chat_template: str, vocabulary: Mapping[str, int]) -> ModuleType | None:
    """The parser that mlx-lm takes for a model's tool calls, None where it has none.

    It has `parse_tool_call(text, tools)`, `tool_call_start` and `tool_call_end`. Raises BackendError without mlx-lm.
    """
    infer = module("tokenizer_utils")._infer_tool_parser
    if list(inspect.signature(infer).parameters) == ["chat_template"]:  # mlx-lm 0.31
        name = infer(chat_template)
    else:
        name = infer(SimpleNamespace(chat_template=chat_template, get_vocab=lambda: vocabulary))
    return None if name is None else module(f"tool_parsers.{name}")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"mlx_lm.{name}")
    except ImportError as error:
        raise BackendError(
            f"[mlx-lm] mlx_lm.{name} does not import here ({error}); install mlx-lm, or leave out the option that needs it"
        ) from error
