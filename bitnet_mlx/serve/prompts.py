"""A conversation becomes ids by the model's chat template; what the template has no place for is refused by its name."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.errors import ConfigError
from bitnet_mlx.serve.conversation import Message
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.serve.schema import ChatBody
from bitnet_mlx.tokenizer import Tokenizer

_OURS = ("messages", "tools", "documents", "add_generation_prompt")  # given by other fields, or never


def conversation_ids(tokenizer: Tokenizer, body: ChatBody) -> list[int]:
    """The prompt of a chat. Raises ApiError 400 naming the field that the model's template cannot honour."""
    if tokenizer.chat_template is None:
        raise ApiError(
            400, f"{body.model} is a base model without a chat template: it continues a text; use /v1/completions",
            param="messages", code="no_chat_template",
        )  # fmt: skip
    for at, message in enumerate(body.messages):
        if message.about_tools and tokenizer.tools_template is None:
            field = f"messages[{at}].{message.about_tools}"
            raise ApiError(
                400, f"{field}: this model's chat template has no place for tools and their results", param=field,
                code="invalid_value",
            )  # fmt: skip
    extra = _template_variables(tokenizer, body)
    messages = [message.table() for message in body.messages]
    try:
        _check_names(tokenizer, body.messages, messages, extra)
        return tokenizer.apply_chat_template(messages, **extra)
    except ConfigError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error


def _template_variables(tokenizer: Tokenizer, body: ChatBody) -> dict[str, Any]:
    """The tools, and chat_template_kwargs where the template looks at them."""
    for name in body.chat_template_kwargs:
        ours = name in _OURS or name in tokenizer.special_tokens
        if ours or not tokenizer.template_reads(name, tools=bool(body.offered)):
            field = f"chat_template_kwargs.{name}"
            why = "is not a client's to set" if ours else "is not looked at by this model's chat template"
            raise ApiError(400, f"{field} {why}; leave it out", param=field, code="unsupported_parameter")
    tools = {"tools": [tool.table() for tool in body.offered]} if body.offered else {}
    return {**body.chat_template_kwargs, **tools}


def _check_names(
    tokenizer: Tokenizer, given: list[Message], messages: list[dict[str, Any]], extra: dict[str, Any]
) -> None:
    """Names tell participants of one role apart: where they do, the template must show them. Raises ApiError 400."""
    spoken = [(message.role, message.name) for message in given if message.role != "tool"]
    if len(set(spoken)) == len({role for role, _ in spoken}):
        return
    nameless = [{k: v for k, v in m.items() if k != "name" or m["role"] == "tool"} for m in messages]
    if tokenizer.render_chat_template(messages, **extra) == tokenizer.render_chat_template(nameless, **extra):
        field = f"messages[{next(at for at, m in enumerate(given) if m.name and m.role != 'tool')}].name"
        raise ApiError(
            400, f"{field}: this model's chat template shows no names, by which messages of one role would be told apart; "
            "say in the content who speaks", param=field, code="unsupported_parameter",
        )  # fmt: skip
