"""What all parts of a request have in common: strict types, fields that ask for nothing, faults that name a field."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from bitnet_mlx.serve.dialects import advice, asks_for_nothing
from bitnet_mlx.serve.failures import ApiError

_CODES = ("unsupported_parameter", "missing_required_parameter")


class Strict(BaseModel):
    """No conversions, no unknown fields, no infinities. Null stands for a field that is left out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values

        def idle(name: Any, value: Any) -> bool:
            return value is None or (name not in cls.model_fields and asks_for_nothing(name, value))

        return {name: value for name, value in values.items() if not idle(name, value)}


def fault(field: str, message: str, code: str = "invalid_value", **values: Any) -> PydanticCustomError:
    """A validator's refusal. field: its place below the part that is validated, "" for that part. message: a template."""
    return PydanticCustomError(code, message, {"field": field, **values})  # type: ignore[arg-type]


AnyPart = TypeVar("AnyPart", bound=Strict)


def parse(kind: type[AnyPart], data: bytes) -> AnyPart:
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
    own = first.get("ctx", {}).get("field")
    names += [own] if own else []
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in names).lstrip(".") or None
    said = first["msg"]
    if first["type"] == "extra_forbidden":
        said = f"{param} is not supported by this server: {advice(str(param))}"
        return ApiError(400, said, param=param, code="unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    code = first["type"] if first["type"] in _CODES else "invalid_value"
    return ApiError(400, f"{param}: {said[0].lower()}{said[1:]}", param=param, code=code)
