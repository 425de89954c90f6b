"""What a request may hold: OpenAI's fields that are honoured, and top_k, min_p and repetition_penalty.

A field that is not known, or asks for what is not done here, is an error that names it. Null, and values that ask for
nothing, are accepted in place of any field, because clients send them.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from bitnet_mlx.serve.failures import ApiError

MAX_CHOICES = 16
MAX_STOPS = 16
# Fields that are not honoured, with the values that ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,), "suffix": ("",), "store": (False,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none",), "function_call": ("none",), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "metadata": ({},), "service_tier": ("auto", "default"), "tool_calls": ([],), "annotations": ([],),
}  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = cls.model_fields

        def idle(name: Any, value: Any) -> bool:
            nothing = [v for v in _NOTHING.get(name, ()) if v == value and type(v) is type(value)]
            return value is None or (name not in known and bool(nothing))

        return {name: value for name, value in values.items() if not idle(name, value)}


def _stops(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts) or len(texts) > MAX_STOPS:
        raise PydanticCustomError(
            "stop", "a text or a list of at most {most} texts is allowed, none of them empty", {"most": MAX_STOPS}
        )
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
        raise PydanticCustomError("prompt", "a text, a list of token ids, or a list of either is allowed")
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _content(value: Any) -> Any:
    """A text, or parts that are texts."""
    if isinstance(value, list) and value:
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in value]
        if all(isinstance(p, str) for p in parts):
            return "".join(p for p in parts if isinstance(p, str))
    if not isinstance(value, str):
        raise PydanticCustomError(
            "content", "a text, or parts of the type text are allowed: this server takes text alone"
        )
    return value


def _role(value: Any) -> Any:
    if value not in ("system", "developer", "user", "assistant"):
        raise PydanticCustomError(
            "role", "system, developer, user or assistant is allowed (tools are not supported here)"
        )
    return "system" if value == "developer" else value


class StreamOptions(_Strict):
    """include_usage: one more chunk at the end, with the counts."""

    include_usage: bool = False


class Message(_Strict):
    """One message of a conversation."""

    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)]


class Body(_Strict):
    """What both kinds of completion take. None: the model's default (generation_config.json), else greedy."""

    model: str
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=4096)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # who asks: it changes nothing

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is allowed only with stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def top(self) -> int | None:
        """How many alternatives each token is told with; None for no log probabilities at all."""
        return self.logprobs


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _go_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs is allowed only with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def top(self) -> int | None:
        """As CompletionBody.top."""
        return (self.top_logprobs or 0) if self.logprobs else None


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], data: bytes) -> AnyBody:
    """A request's bytes as a typed body. Raises ApiError 400 that names the field."""
    try:
        values = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, f"The body is a JSON {type(values).__name__}; an object is expected", code="invalid_json")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    names = [part for part in first["loc"] if part not in ("[key]",)]
    own = first["type"] if first["type"] in Body.model_fields or first["type"] in ChatBody.model_fields else None
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in names).lstrip(".") or own
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"{param} is not supported by this server: leave it out", param=param, code="unsupported_parameter"
        )
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    said = first["msg"]
    return ApiError(400, f"{param}: {said[0].lower()}{said[1:]}", param=param, code="invalid_value")
