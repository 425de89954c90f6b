"""A parsed body becomes tasks for the engine: prompts as ids, limits checked, sampling settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.sampling import SamplingConfig
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.serve.schema import Body, ChatBody, CompletionBody
from bitnet_mlx.serve.work import Task
from bitnet_mlx.tokenizer import Tokenizer

_COMPLETION_TOKENS = 16  # what OpenAI's /v1/completions gives to one who names no number


@dataclass(frozen=True)
class Model:
    """What is served. context: positions of one text. max_tokens: of a reply to a chat that names no number."""

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    context: int
    max_tokens: int
    created: int  # seconds since 1970

    def tasks(self, body: Body) -> list[Task]:
        """The texts that a body asks for, `n` for each prompt, in the order of their indices. Raises ApiError."""
        if body.model != self.name:
            raise ApiError(
                404,
                f"The model {body.model[:200]!r} is not served here; {self.name!r} is",
                param="model",
                code="model_not_found",
            )
        sampling = self._sampling(body)
        tasks = []
        for ids, field in self._prompts(body):
            self._check_ids(ids, field)
            limit = min(self._limit(body), self.context - len(ids) + 1)
            for _ in range(body.n):
                # Texts of one request must not be equal because it has a seed.
                seed = None if body.seed is None else (body.seed + len(tasks)) % (1 << 64)
                tasks.append(Task(ids, limit, sampling.replaced(seed=seed), body.stop, body.top))  # type: ignore[attr-defined]
        return tasks

    def _prompts(self, body: Body) -> list[tuple[Sequence[int], str]]:
        """(ids, the field that they come from) of each prompt."""
        if isinstance(body, ChatBody):
            if self.tokenizer.chat_template is None:
                raise ApiError(
                    400, f"{self.name} is a base model without a chat template: it continues a text; use /v1/completions",
                    param="messages", code="no_chat_template",
                )  # fmt: skip
            messages = [{"role": m.role, "content": m.content} for m in body.messages]
            try:
                return [(self.tokenizer.apply_chat_template(messages), "messages")]
            except ConfigError as error:
                raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        assert isinstance(body, CompletionBody)
        return [(self.tokenizer.encode(p) if isinstance(p, str) else p, "prompt") for p in body.prompt]

    def _limit(self, body: Body) -> int:
        if isinstance(body, ChatBody):
            return body.max_completion_tokens or body.max_tokens or self.max_tokens
        return body.max_tokens or _COMPLETION_TOKENS

    def _check_ids(self, ids: Sequence[int], field: str) -> None:
        if not ids:
            raise ApiError(
                400,
                f"{field} is empty, and this model has no token that begins a text",
                param=field,
                code="invalid_value",
            )
        if len(ids) > self.context:
            raise ApiError(
                400, f"{field} has {len(ids)} tokens; this model's context holds {self.context}", param=field,
                code="context_length_exceeded",
            )  # fmt: skip
        vocabulary = self.decoder.config.vocab_size
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = next(i for i in ids if not 0 <= i < vocabulary)
            raise ApiError(
                400, f"{field} holds the token {wrong}; this model has the ids 0 to {vocabulary - 1}", param=field,
                code="invalid_value",
            )  # fmt: skip

    def _sampling(self, body: Body) -> SamplingConfig:
        bias: dict[int, float] = {}
        for key, value in body.logit_bias.items():
            token = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
            if not 0 <= token < self.decoder.config.vocab_size:
                raise ApiError(
                    400, f"logit_bias names the token {key[:40]!r}; ids from 0 to {self.decoder.config.vocab_size - 1} are "
                    "allowed", param="logit_bias", code="invalid_value",
                )  # fmt: skip
            bias[token] = value
        return SamplingConfig.from_generation_config(self.tokenizer.generation_config).replaced(
            temp=body.temperature, top_p=body.top_p, top_k=body.top_k, min_p=body.min_p,
            repetition_penalty=body.repetition_penalty, presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty, logit_bias=bias or None,
        )  # fmt: skip
