"""What a client is told when a request is refused or fails: a status, and OpenAI's table of an error."""

from __future__ import annotations

from typing import Any

from bitnet_mlx.errors import ServeError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(ServeError):
    """A request that is answered with an error. param: the field that is at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
