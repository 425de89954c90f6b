"""From a prompt to text: sampling, streaming, stop strings, conversations."""

import sys
from types import ModuleType
from typing import Any

from bitnet_mlx.generate.api import Completion, conversation_ids, generate, prompt_ids
from bitnet_mlx.generate.chat import ChatSession
from bitnet_mlx.generate.sampling import Sampler, SamplingConfig
from bitnet_mlx.generate.stream import GenerationResponse, stream_generate

__all__ = [
    "ChatSession", "Completion", "GenerationResponse", "Sampler", "SamplingConfig",
    "conversation_ids", "generate", "prompt_ids", "stream_generate",
]  # fmt: skip


class _Package(ModuleType):
    """`bitnet_mlx.generate` is this package and, as in mlx_lm, a function: once the package is imported, Python binds the
    name to the package, so the package can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
