"""What a conversation may hold: messages, tools, and which of them the model may call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bitnet_mlx.serve.fields import Strict, fault

MAX_TOOLS = 128
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


def _content(value: Any) -> Any:
    """A text, or parts that are texts."""
    if isinstance(value, list):  # of no parts: a tool that returned nothing
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in value]
        if all(isinstance(p, str) for p in parts):
            return "".join(p for p in parts if isinstance(p, str))
    if not isinstance(value, str):
        raise fault("", "a text, or parts of the type text, is allowed: this server takes text alone")
    return value


def _role(value: Any) -> Any:
    if value not in _ROLES:
        raise fault("", "system, developer, user, assistant or tool is allowed")
    return "system" if value == "developer" else value


def _arguments(value: Any) -> Any:
    """The arguments of a call: JSON of an object, in a text, an empty one for none. Templates are given the object."""
    try:
        read = json.loads(value or "{}") if isinstance(value, str) else None
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise fault("", "a text that holds a JSON object is allowed")
    return read


class CalledFunction(Strict):
    """A function's name, and the arguments that the model gave it."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class ToolCall(Strict):
    """One call in an assistant's message. index: its place in the stream that it came from, which clients leave in it."""

    index: int | None = Field(None, exclude=True)
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One message of a conversation. reasoning_content: what was thought before an answer; most templates leave it out."""

    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str | None, BeforeValidator(_content)] = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Message:
        allowed = {"tool_calls": "assistant", "reasoning_content": "assistant", "tool_call_id": "tool"}
        for field, role in allowed.items():
            if getattr(self, field) and self.role != role:
                code = "unsupported_parameter"
                raise fault(field, "{field} is supported in messages of the role {role} alone", code, role=role)
        if self.role == "tool" and self.tool_call_id is None:
            raise fault("tool_call_id", "the call that is answered is missing", "missing_required_parameter")
        if self.content is None and not self.tool_calls and self.reasoning_content is None:
            raise fault("content", "the content is missing", "missing_required_parameter")
        return self

    @property
    def about_tools(self) -> str | None:
        """The field that only a model with tools understands; None where there is none."""
        return "tool_calls" if self.tool_calls else "role" if self.role == "tool" else None

    def table(self) -> dict[str, Any]:
        """What the chat template is given."""
        more: dict[str, Any] = (
            {"tool_calls": [call.model_dump() for call in self.tool_calls]} if self.tool_calls else {}
        )
        for field in ("reasoning_content", "tool_call_id", "name"):
            if getattr(self, field) is not None:
                more[field] = getattr(self, field)
        return {"role": self.role, "content": self.content or "", **more}


class Function(Strict):
    """What may be called. strict: its arguments must be as `parameters` (a JSON schema) says."""

    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class Tool(Strict):
    """One tool that is offered."""

    type: Literal["function"]
    function: Function

    def table(self) -> dict[str, Any]:
        """What the chat template is given: the tool as it came."""
        return self.model_dump(exclude_unset=True)


@dataclass(frozen=True)
class ToolChoice:
    """kind "named": `name` must be called."""

    kind: Literal["none", "auto", "required", "named"]
    name: str | None = None


def read_tool_choice(value: Any) -> Any:
    """OpenAI's tool_choice as a ToolChoice."""
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return ToolChoice(value)  # type: ignore[arg-type]
    if isinstance(value, dict) and value.get("type") == "function" and value.keys() == {"type", "function"}:
        function = value["function"]
        if isinstance(function, dict) and function.keys() == {"name"} and isinstance(function["name"], str):
            return ToolChoice("named", function["name"])
    raise fault(
        "", "none, auto, required, or {shape} is allowed", shape='{"type": "function", "function": {"name": ...}}'
    )
