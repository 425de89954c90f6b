"""How a model writes tool calls: mlx-lm's parser for its chat template, and grammars that make calls come out right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_mlx import _mlxlm
from bitnet_mlx.errors import BackendError
from bitnet_mlx.generation.grammar import json_rule
from bitnet_mlx.serve.conversation import Tool, ToolChoice
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.tokenizer import Tokenizer

_ENFORCED = "json_tools"  # {"name": ..., "arguments": {...}} between two marks: the form that a grammar is written for


@dataclass(frozen=True)
class ToolFormat:
    """name: of mlx-lm's parser. start, end: what frames calls; end "" is the end of the text.

    read: (text between the marks, tools) -> one call or several, tables with "name" and "arguments"; raises for others.
    shown: ids of the marks that are special tokens, which a text would leave out.
    """

    name: str
    start: str
    end: str
    read: Callable[[str, Any], Any]
    shown: frozenset[int]
    marks: Mapping[str, int]


def tool_format(tokenizer: Tokenizer) -> ToolFormat:
    """The format that mlx-lm takes for this model. Raises ApiError 400 naming `tools` where there is none."""
    template = tokenizer.tools_template
    if template is None:
        raise ApiError(
            400, "tools are not supported by this model: its chat template has no place for them", param="tools",
            code="unsupported_parameter",
        )  # fmt: skip
    texts = {tokenizer.id_to_token(i): i for i in range(tokenizer.vocab_size)}
    try:
        parser = _mlxlm.tool_parser(template, {text: i for text, i in texts.items() if text is not None})
    except BackendError as error:
        raise ApiError(
            400, f"tools are not supported here: {error}", param="tools", code="unsupported_parameter"
        ) from error
    if parser is None:
        raise ApiError(
            400, "tools are not supported for this model: mlx-lm has no parser for the calls of its template", param="tools",
            code="unsupported_parameter",
        )  # fmt: skip
    start, end = parser.tool_call_start, parser.tool_call_end
    marks = {mark: texts[mark] for mark in (start, end) if texts.get(mark) in tokenizer.special_ids}
    name = parser.__name__.rpartition(".")[2]
    return ToolFormat(name, start, end, parser.parse_tool_call, frozenset(marks.values()), marks)


def call_grammar(
    form: ToolFormat, tools: Sequence[Tool], choice: ToolChoice, parallel: bool, schema: Mapping[str, Any] | None
) -> str | None:
    """A Lark grammar of the answers that a request allows; None where every text is one.

    schema: what an answer without a call must obey. Raises ApiError 400 naming the field that cannot be enforced in this
    model's format.
    """
    needs = {
        "tool_choice": choice.kind in ("required", "named"), "parallel_tool_calls": not parallel,
        **{f"tools[{at}].function.strict": tool.function.strict for at, tool in enumerate(tools)},
        "response_format": schema is not None,
    }  # fmt: skip
    needed = [field for field, needed in needs.items() if needed]
    if not needed:
        return None
    if form.name != _ENFORCED:
        raise ApiError(
            400, f"{needed[0]} asks for calls that are enforced, which is not done for this model's format ({form.name}); "
            "leave it at what it is by default", param=needed[0], code="unsupported_parameter",
        )  # fmt: skip
    offered = [tool for tool in tools if choice.kind != "named" or tool.function.name == choice.name]
    start, end = (_mark(form, mark) for mark in (form.start, form.end))
    bodies = "\n    | ".join(_body(tool) for tool in offered)
    if choice.kind != "auto":
        whole = "call (WS call)*" if parallel and choice.kind == "required" else "call"
    elif schema is not None:
        whole = f"answer | {'call (WS call)*' if parallel else 'call'}"
    else:
        whole = "(head rest)* TEXT" if parallel else "head rest | TEXT"
    # A lazy rule ends as soon as it can: where the mark has been written, a call must follow. Special tokens end it anyway.
    lazy = "" if form.start in form.marks else "[lazy]"
    return rf"""start: {whole}
call: {start} rest
rest: WS ({bodies}) WS {end}
head{lazy}: TEXT {start}
answer: %json {json_rule(schema or {})}
TEXT: /(.|\n)*/
WS: /[ \n]{{0,3}}/
"""


def _mark(form: ToolFormat, mark: str) -> str:
    """A mark in the grammar: a special token by its id, else a text."""
    return f"<[{form.marks[mark]}]>" if mark in form.marks else json.dumps(mark)


def _body(tool: Tool) -> str:
    """One function's call, between the marks. What `strict` does not promise is enforced as far as it can be."""
    function = tool.function
    schema = function.parameters or {"type": "object", "properties": {}}
    opening = json.dumps(json.dumps(function.name) + ",")
    arguments = f"%json {json_rule(schema, lenient=not function.strict)}"
    return rf'"{{" WS "\"name\":" WS {opening} WS "\"arguments\":" WS {arguments} WS "}}"'
