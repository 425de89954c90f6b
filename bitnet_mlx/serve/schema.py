"""What a request may hold: OpenAI's fields that are honoured, and of other servers' top_k, min_p, repetition_penalty,
repetition_context_size, structured_outputs, chat_template_kwargs and reasoning_format.

A field that is not known, or asks for what is not done here, is an error that names it. Null, and values that ask for
nothing (dialects.py), are accepted in place of any field, because clients send them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bitnet_mlx.serve.conversation import MAX_TOOLS, Message, Tool, ToolChoice, read_tool_choice
from bitnet_mlx.serve.fields import Strict, fault

# What becomes of a model's thoughts, by llama.cpp's names. none: they stay in the content. auto: they do not.
ReasoningFormat = Literal["auto", "deepseek", "none"]
MAX_CHOICES = 16
MAX_STOPS = 16
MAX_INPUTS = 2048
MAX_CHOICE = 200


def _stops(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts) or len(texts) > MAX_STOPS:
        raise fault("", "a text or a list of at most {most} texts is allowed, none of them empty", most=MAX_STOPS)
    return texts


def _prompts(value: Any) -> Any:
    """One text, texts, ids or lists of ids -> a list of texts and lists of ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])):
        value = [value]
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(p, str) or (isinstance(p, list) and all(map(_is_id, p))) for p in value)
    ):
        raise fault("", "a text, a list of token ids, or a list of either is allowed")
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class StreamOptions(Strict):
    """include_usage: one more chunk at the end, with the counts."""

    include_usage: bool = False


class JsonSchema(Strict):
    """The schema that an answer must obey. It is enforced whatever `strict` says."""

    name: str
    description: str | None = None
    strict: bool = False
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")


class ResponseFormat(Strict):
    """text: anything. json_object: any JSON object, or what `schema` allows (llama.cpp's form). json_schema: what that allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _go_together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise fault("json_schema", "json_schema goes with the type json_schema, which needs it")
        if self.schema_ is not None and self.type != "json_object":
            raise fault("schema", "schema goes with the type json_object; else it is json_schema.schema")
        return self

    @property
    def schema_table(self) -> dict[str, Any] | None:
        """The JSON schema to enforce, None for none."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return (self.schema_ or {"type": "object"}) if self.type == "json_object" else None


class StructuredOutputs(Strict):
    """What the whole answer must be, one of these. regex: it matches. json: of this schema. choice: one of these texts."""

    regex: str | None = None
    json_: dict[str, Any] | None = Field(None, alias="json")
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=MAX_CHOICE)

    @model_validator(mode="after")
    def _one_of_them(self) -> StructuredOutputs:
        if [self.regex, self.json_, self.choice].count(None) != 2:
            raise fault("", "one of regex, json and choice is expected")
        return self


class Body(Strict):
    """What both kinds of completion take. None: the model's default (generation_config.json), else greedy.

    model: left out, the one that the server was started with.
    """

    model: str = ""
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    repetition_context_size: int | None = Field(None, ge=0, le=2**31)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=4096)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Who asks, what for, and which of their requests are alike: nothing that they change shows in an answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)

    @model_validator(mode="after")
    def _fields_agree(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "stream_options is allowed only with stream: true")
        formatted = self.response_format is not None and self.response_format.schema_table is not None
        if self.structured_outputs is not None and formatted:
            raise fault("structured_outputs", "structured_outputs and response_format are both given; give one of them")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def schema_table(self) -> dict[str, Any] | None:
        """The JSON schema that the text must obey, None for none."""
        if self.structured_outputs is not None:
            return self.structured_outputs.json_
        return self.response_format.schema_table if self.response_format else None

    @property
    def texts(self) -> int:
        """How many texts are made of each prompt."""
        return self.n

    @property
    def top(self) -> int | None:
        """How many alternatives each token is told with; None for no log probabilities at all."""
        return None


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _go_together(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise fault("max_tokens", "0 is allowed only with echo: true")
        if self.texts < self.n:
            raise fault("best_of", "best_of is less than n: as many texts as are returned must be made")
        if self.stream and self.texts > self.n:
            raise fault("best_of", "best_of is more than n: such texts cannot be streamed")
        return self

    @property
    def texts(self) -> int:
        """As Body.texts; the best of them are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def top(self) -> int | None:
        """As Body.top."""
        return self.logprobs


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Annotated[Any, BeforeValidator(read_tool_choice)] = ToolChoice("auto")
    parallel_tool_calls: bool = True
    reasoning_format: ReasoningFormat | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=64)

    @model_validator(mode="after")
    def _go_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("top_logprobs", "top_logprobs is allowed only with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise fault("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise fault("tools", "two of the functions have one name")
        if not names and self.tool_choice.kind not in ("none", "auto"):
            raise fault("tool_choice", "there are no tools, so none can be called; give tools, or auto or none")
        if self.offered and self.structured_outputs is not None:
            raise fault("structured_outputs", "structured_outputs is allowed only without tools")
        if self.tool_choice.kind == "named" and self.tool_choice.name not in names:
            raise fault("tool_choice", "tool_choice names a function that is not among the tools")

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice.kind == "none" else self.tools

    @property
    def top(self) -> int | None:
        """As Body.top."""
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingBody(Strict):
    """POST /v1/embeddings. dimensions: the first so many of each vector, normalised again where the model's are."""

    model: str = ""
    input: Annotated[list[Any], BeforeValidator(_prompts)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=2**31)
    user: str | None = None

    @model_validator(mode="after")
    def _not_too_many(self) -> EmbeddingBody:
        if len(self.input) > MAX_INPUTS:
            raise fault("input", "at most {most} texts are allowed", most=MAX_INPUTS)
        return self
