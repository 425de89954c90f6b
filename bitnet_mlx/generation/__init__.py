"""From a prompt to text: sampling, streaming, stop strings, conversations."""

from bitnet_mlx.generation.api import Completion, conversation_ids, generate, prompt_ids
from bitnet_mlx.generation.chat import ChatSession
from bitnet_mlx.generation.sampling import Sampler, SamplingConfig
from bitnet_mlx.generation.speculation import Speculation
from bitnet_mlx.generation.stream import GenerationResponse, stream_generate

__all__ = [
    "ChatSession",
    "Completion",
    "GenerationResponse",
    "Sampler",
    "SamplingConfig",
    "Speculation",
    "conversation_ids",
    "generate",
    "prompt_ids",
    "stream_generate",
]
