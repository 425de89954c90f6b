"""A parsed body becomes tasks for the engine: prompts as ids, limits checked, sampling and grammar settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.generation.grammar import Grammar, Grammars
from bitnet_mlx.generation.sampling import SamplingConfig
from bitnet_mlx.generation.thinking import Place, ThoughtReader, place, special_marks, thinks
from bitnet_mlx.models.decoder import Decoder
from bitnet_mlx.serve.answers import Answer, Choice, Kind
from bitnet_mlx.serve.calls import CallReader
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.serve.pooling import Pooling
from bitnet_mlx.serve.prompts import conversation_ids
from bitnet_mlx.serve.schema import Body, ChatBody, CompletionBody, ReasoningFormat
from bitnet_mlx.serve.tools import ToolFormat, call_grammar, tool_format
from bitnet_mlx.serve.work import Task
from bitnet_mlx.tokenizer import Tokenizer

_COMPLETION_TOKENS = 16  # what OpenAI's /v1/completions gives to one who names no number


@dataclass(frozen=True)
class Job:
    """A request that is ready: its texts, `body.texts` of each prompt in the order of their indices, and its answer."""

    body: Body
    tasks: list[Task]
    answer: Answer

    def best(self, choices: Sequence[Choice]) -> list[Choice]:
        """Those of the texts that are returned: of each prompt's the `n` best, the best first."""
        made, n = self.body.texts, self.body.n
        if made == n:
            return list(choices)
        groups = (choices[at : at + made] for at in range(0, len(choices), made))
        return [choice for group in groups for choice in sorted(group, key=lambda c: -c.rate)[:n]]


@dataclass(frozen=True)
class Model:
    """What is served. context: positions of one text. max_tokens: of a reply to a chat that names no number.

    pooling: None for a model without embeddings. reasoning_format: of requests that name none.
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    context: int
    max_tokens: int
    created: int  # seconds since 1970
    pooling: Pooling | None = None
    reasoning_format: ReasoningFormat = "auto"

    @cached_property
    def grammars(self) -> Grammars:
        """Made when a request first needs a grammar. Raises ConfigError where llguidance is missing."""
        stop_ids = self.tokenizer.eos_token_ids | frozenset(self.decoder.config.eos_token_ids)
        return Grammars(self.tokenizer, self.decoder.config.vocab_size, stop_ids)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How this model writes tool calls. Raises ApiError where it has no way."""
        return tool_format(self.tokenizer)

    def job(self, body: Body) -> Job:
        """What a body asks for. Raises ApiError."""
        self.check_name(body.model)
        chat = body if isinstance(body, ChatBody) else None
        form = self.tool_format if chat and chat.offered else None
        sampling, prompts = self._sampling(body), self._prompts(body)
        where = self._place(body, prompts[0][0])
        first = Task((), 0, sampling, body.stop, body.top, self._grammar(body, form, where or "after"))
        if isinstance(body, CompletionBody):
            rated = body.top is None and body.texts > body.n  # best_of goes by log probabilities
            first = replace(first, echo=body.echo, top=0 if rated else body.top)
        else:
            shown = frozenset(special_marks(self.tokenizer).values()) if where else frozenset()
            first = replace(first, shown=shown | (form.shown if form else frozenset()))
        tasks = []
        for ids, field in prompts:
            self.check_ids(ids, field)
            limit = min(self._limit(body), self.context - len(ids) + 1)
            for _ in range(body.texts):
                # Texts of one request must not be equal because it has a seed.
                seed = None if body.seed is None else (body.seed + len(tasks)) % (1 << 64)
                tasks.append(replace(first, ids=ids, max_tokens=limit, sampling=first.sampling.replaced(seed=seed)))
        kind = Kind(chat is not None, body.top is not None)
        call = ""
        if chat and form:
            tools = [tool.table() for tool in chat.offered]
            enforced, named = first.grammar is not None, chat.tool_choice.kind == "named"
            kind = replace(kind, calls=lambda: CallReader(form, tools, enforced), named=named)
            call = "" if enforced else form.start  # the grammar lets thoughts hold any text
        if where:
            kind = replace(kind, thoughts=lambda: ThoughtReader(where == "inside", call))
        return Job(body, tasks, Answer(kind, self.name, self.tokenizer, [len(ids) for ids, _ in prompts]))

    def check_name(self, name: str) -> None:
        """Raises ApiError 404 for another model's."""
        if name != self.name:
            raise ApiError(
                404,
                f"The model {name[:200]!r} is not served here; {self.name!r} is",
                param="model",
                code="model_not_found",
            )

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Raises ApiError 400 for what the model cannot be fed."""
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

    def _prompts(self, body: Body) -> list[tuple[Sequence[int], str]]:
        """(ids, the field that they come from) of each prompt."""
        if isinstance(body, ChatBody):
            return [(conversation_ids(self.tokenizer, body), "messages")]
        assert isinstance(body, CompletionBody)
        return [(self.tokenizer.encode(p) if isinstance(p, str) else p, "prompt") for p in body.prompt]

    def _place(self, body: Body, ids: Sequence[int]) -> Place | None:
        """Where the prompt ends with regard to thoughts; None where there are none, or nobody asks to tell them apart."""
        if not isinstance(body, ChatBody) or (body.reasoning_format or self.reasoning_format) == "none":
            return None
        return place(self.tokenizer, ids) if thinks(self.tokenizer) else None

    def _grammar(self, body: Body, form: ToolFormat | None, where: Place) -> Grammar | None:
        """What each text must be, behind its thoughts. Raises ApiError 400 naming the field whose wish cannot be enforced."""
        called = isinstance(body, ChatBody) and form is not None
        field = "tools" if called else "structured_outputs" if body.structured_outputs else "response_format"
        try:
            if isinstance(body, ChatBody) and form is not None:
                parallel = body.parallel_tool_calls
                source = call_grammar(form, body.tools, body.tool_choice, parallel, body.schema_table)
                return self.grammars.lark(source, where) if source else None
            if body.schema_table is not None:
                return self.grammars.json_schema(body.schema_table, where)
            wanted = body.structured_outputs
            if wanted is not None and wanted.choice is not None:
                return self.grammars.choice(wanted.choice, where)
            regex = wanted.regex if wanted is not None else None
            return self.grammars.regex(regex, where) if regex is not None else None
        except ConfigError as error:
            raise ApiError(400, f"{field}: {error}", param=field, code="invalid_value") from error

    def _limit(self, body: Body) -> int:
        if isinstance(body, ChatBody):
            return body.max_completion_tokens or body.max_tokens or self.max_tokens
        return _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens

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
            repetition_penalty=body.repetition_penalty, repetition_context_size=body.repetition_context_size,
            presence_penalty=body.presence_penalty, frequency_penalty=body.frequency_penalty, logit_bias=bias or None,
        )  # fmt: skip
