"""Whole completions: run the stream to its end and sum it up."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from inspect import signature
from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.sampling import SamplingConfig
from bitnet_mlx.generation.steps import SpeculationReport
from bitnet_mlx.generation.stream import GenerationResponse, stream_generate
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """What a finished stream amounts to; the fields of `generate --json` that the loop knows."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    ttft_s: float
    peak_memory_bytes: int | None
    speculation: SpeculationReport | None = None  # where tokens were guessed

    @staticmethod
    def of(responses: Iterable[GenerationResponse]) -> Completion:
        """Drain a stream. Raises what the stream raises."""
        parts: list[str] = []
        last: GenerationResponse | None = None
        for last in responses:
            parts.append(last.text)
        if last is None:
            raise ConfigError("[generate] the stream is at its end already; start a new one")
        return Completion(
            "".join(parts), last.finish_reason, last.prompt_tokens, last.generation_tokens, last.prompt_tps,
            last.generation_tps, last.ttft_s, last.peak_memory_bytes, last.speculation,
        )  # fmt: skip

    def speeds(self) -> str:
        """What the prompt and the text took, in a line."""
        return (
            f"prompt {self.prompt_tokens} tokens at {self.prompt_tps:.1f}/s, first token {self.ttft_s:.2f} s, "
            f"generated {self.generation_tokens} at {self.generation_tps:.1f}/s ({self.finish_reason})"
        )

    def record(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_tokens: int = 256,
    *,
    verbose: bool = False,
    **options: Any,
) -> str:
    """The text that follows a prompt. verbose: print it as it comes, then what it took. Options are stream_generate's:
    sampling, stop, max_kv_size and the rest.
    """
    unknown = options.keys() - signature(stream_generate).parameters.keys()
    if unknown:
        raise ConfigError(f"[generate] no option {', '.join(sorted(unknown))}{_instead(unknown)}")
    stream = stream_generate(model, tokenizer, prompt, max_tokens, **options)
    completion = Completion.of(_printed(stream) if verbose else stream)
    if verbose:
        sys.stdout.write(f"\n{completion.speeds()}\n")
    return completion.text


def _instead(names: Collection[str]) -> str:
    """What sets options of other programs' names."""
    ours = {field.name for field in fields(SamplingConfig)}
    if "sampler" in names or ours & set(names):
        given = ", ".join(f"{name}=..." for name in sorted(ours & set(names)) or ["temp"])
        return f"; sampling=bitnet_mlx.generation.SamplingConfig({given}) says how tokens are drawn"
    return "; help(bitnet_mlx.stream_generate) tells those that there are"


def _printed(stream: Iterable[GenerationResponse]) -> Iterator[GenerationResponse]:
    for response in stream:
        sys.stdout.write(response.text)
        sys.stdout.flush()
        yield response


def prompt_ids(
    tokenizer: Tokenizer, prompt: str, system_prompt: str | None = None, ignore_chat_template: bool = False
) -> list[int]:
    """Ids of one prompt: a user's turn where the model has a chat template, else the text as it stands.

    Raises ConfigError for a system prompt that would not reach the model.
    """
    if ignore_chat_template or tokenizer.chat_template is None:
        if system_prompt is not None:
            why = (
                "it is told to ignore its chat template" if ignore_chat_template else "this model has no chat template"
            )
            raise ConfigError(f"[generate] a system prompt was given and {why}; write it into the prompt instead")
        return tokenizer.encode(prompt)
    return conversation_ids(tokenizer, [{"role": "user", "content": prompt}], system_prompt)


def conversation_ids(
    tokenizer: Tokenizer, messages: Sequence[dict[str, str]], system_prompt: str | None = None
) -> list[int]:
    """Ids of a conversation that the model answers next, the system prompt first.

    Raises ConfigError when the template refuses the messages or leaves the system prompt out.
    """
    if system_prompt is None:
        return tokenizer.apply_chat_template(messages)
    whole = [{"role": "system", "content": system_prompt}, *messages]
    ids = tokenizer.apply_chat_template(whole)
    if system_prompt.strip() and ids == tokenizer.apply_chat_template(messages):
        raise ConfigError(
            "[chat template] the model's template leaves the system prompt out; put its text into the first message"
        )
    return ids
