"""Chat templates: Jinja2 in a sandbox, with the helpers that templates on the hub count on. jinja2 is imported late."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from bitnet_mlx.errors import ConfigError

# Tokens that end a turn; those that a model's template writes, and its vocabulary has, stop generation.
END_OF_TURN = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>", "<|endoftext|>",
    "<|end_of_turn|>", "<turn|>", "<|return|>",
)  # fmt: skip


def select_template(templates: Mapping[str, str], tools: bool) -> str | None:
    """The template to use: "tool_use" when tools are given and it is there, else "default"; None where there is none.

    Raises ConfigError when only templates of other names exist.
    """
    if not templates:
        return None
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        names = ", ".join(sorted(templates))
        raise ConfigError(
            f"[chat template] this model has the templates {names} and none called default; "
            "put the one to use into chat_template.jinja in the model's folder"
        )
    return templates["default"]


def render(
    template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    """The text of a conversation. Raises ConfigError for a wrong template, its refusal, or values not plain data."""
    import jinja2

    if not messages:
        raise ConfigError("[chat template] the conversation is empty; give at least one message")
    plain = [
        {k: _plain(v, f"messages[{i}].{k}") for k, v in m.items() if v is not None} for i, m in enumerate(messages)
    ]
    values = {"tools": None, "documents": None, **{k: _plain(v, k) for k, v in variables.items()}}
    try:
        return _compile(template).render(messages=plain, add_generation_prompt=add_generation_prompt, **values)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"[chat template] line {error.lineno} of the model's template is not valid Jinja: {error.message}; "
            "repair chat_template.jinja, or use --ignore-chat-template"
        ) from error
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        roles = ", ".join(dict.fromkeys(str(m.get("role")) for m in plain))
        raise ConfigError(
            f"[chat template] the model's template refused a conversation with the roles {roles}: "
            f"{reason}; change the messages (some models take no "
            "system prompt), or use --ignore-chat-template"
        ) from error


def _plain(value: Any, where: str) -> Any:
    """Templates come from strangers: they get copies of plain data, never objects with methods."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise ConfigError(
        f"[chat template] {where} is a {type(value).__name__}; strings, numbers, booleans, lists and tables are allowed"
    )


def reads(template: str, variable: str) -> bool:
    """Whether a template looks at one of its variables ("tools"). A template that is not valid looks at none."""
    import jinja2
    from jinja2 import meta

    try:
        return variable in meta.find_undeclared_variables(_environment().parse(template))
    except jinja2.TemplateSyntaxError:
        return False


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks the assistant's text for training masks; here its body is simply printed."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PlainNamespace(Namespace):
        """namespace() without names that begin with an underscore, so that no Python internals can be stored in it."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # no named self: a template may set namespace(self=...)
            values = dict(*args[1:], **kwargs)
            for name in values:
                _public(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            _public(name)
            super().__setitem__(name, value)

    def _public(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} begins with an underscore")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
        namespace=PlainNamespace,
    )
    return environment
