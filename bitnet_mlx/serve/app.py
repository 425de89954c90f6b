"""The routes: a request's bytes in, OpenAI's JSON or events out."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bitnet_mlx.serve.answers import Answer, Choice
from bitnet_mlx.serve.embedding import Embeddings
from bitnet_mlx.serve.engine import Engine
from bitnet_mlx.serve.failures import ApiError
from bitnet_mlx.serve.fields import parse
from bitnet_mlx.serve.fleet import Fleet
from bitnet_mlx.serve.jobs import Job
from bitnet_mlx.serve.metrics import Metrics
from bitnet_mlx.serve.schema import Body, ChatBody, CompletionBody, EmbeddingBody
from bitnet_mlx.serve.work import Event, Task, Work

log = logging.getLogger(__name__)
_OPEN = ("/", "/health")  # told to anyone, key or not
_KNOWN = "POST /v1/chat/completions, /v1/completions and /v1/embeddings, GET /v1/models, /health and /metrics"
_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Events = asyncio.Queue  # of (Work, Event | ApiError)
AnyBody = TypeVar("AnyBody", bound="Body | EmbeddingBody")


@dataclass(frozen=True)
class Options:
    """api_key: what clients must send, None for nothing. max_body: bytes. body_seconds: a body must be there by then.
    origins: web pages elsewhere that may ask (CORS). hosts: the names that this server goes by, in lower case; empty for
    any. Without them a web page could reach a server on 127.0.0.1 through a name of its own that points there.
    """

    api_key: str | None = None
    max_body: int = 4 << 20
    body_seconds: float = 30.0
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


def make_app(fleet: Fleet, options: Options | None = None) -> Starlette:
    """The ASGI application. It starts the engine with its own life and stops all engines at its end."""

    @asynccontextmanager
    async def life(_app: Starlette) -> AsyncIterator[None]:
        fleet.start()
        yield
        await asyncio.to_thread(fleet.stop)

    service = _Service(fleet, options or Options())
    cors = Middleware(CORSMiddleware, allow_origins=service.options.origins, allow_methods=["*"], allow_headers=["*"])
    return Starlette(
        routes=[
            Route("/", service.guarded(service.page)),
            Route("/health", service.guarded(service.health)),
            Route("/metrics", service.guarded(service.metrics_text)),
            Route("/v1/models", service.guarded(service.models)),
            Route("/v1/models/{name:path}", service.guarded(service.one_model)),
            Route("/v1/completions", service.guarded(service.completions), methods=["POST"]),
            Route("/v1/chat/completions", service.guarded(service.chat), methods=["POST"]),
            Route("/v1/embeddings", service.guarded(service.embeddings), methods=["POST"]),
        ],
        lifespan=life,
        middleware=[cors] if service.options.origins else [],
        exception_handlers={HTTPException: _no_route},
    )


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path[:200]} is not known here ({error.detail}); known are {_KNOWN}"
    return _refuse(ApiError(error.status_code, text, headers=dict(error.headers or {})))


def _refuse(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class _Service:
    """The handlers. Each returns a response or raises ApiError."""

    def __init__(self, fleet: Fleet, options: Options) -> None:
        self.fleet, self.options = fleet, options
        self.metrics = Metrics()

    def guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The handler behind the key, its refusals as answers, all of them counted."""

        async def answer(request: Request) -> Response:
            path = request.scope["route"].path
            try:
                self._check_host(request)
                if path not in _OPEN:
                    self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                response = _refuse(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            except Exception as error:  # the last catch: a fault of ours fails this request alone
                log.error("[serve] %s failed: %s: %s", path, type(error).__name__, error)
                response = _refuse(ApiError(500, f"The server failed: unexpected {type(error).__name__}"))
            self.metrics.answered(path, response.status_code)
            return response

        return answer

    def _check_host(self, request: Request) -> None:
        named = request.headers.get("host", "").lower()
        if not self.options.hosts or named.rstrip("0123456789").removesuffix(":") in self.options.hosts:
            return
        if named not in self.options.hosts:
            raise ApiError(
                421,
                f"This server does not go by the name {named[:100]!r}; start it with --allow-host to let it",
                code="unknown_host",
            )

    def _check_key(self, request: Request) -> None:
        if self.options.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.options.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401, "The API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def page(self, _request: Request) -> Response:
        """A chat for a person with a browser. It may load nothing and talk to nobody but this server."""
        text = (files("bitnet_mlx.serve") / "page.html").read_bytes()
        return Response(text, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": _POLICY})

    async def health(self, _request: Request) -> Response:
        counts = self.fleet.counts
        return JSONResponse({"status": "ok", "running": counts.running, "waiting": counts.waiting})

    async def metrics_text(self, _request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.fleet.counts), media_type="text/plain; version=0.0.4")

    async def models(self, _request: Request) -> Response:
        names = dict.fromkeys((self.fleet.main.model.name, *self.fleet.listed))
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(self._card(request.path_params["name"]))

    def _card(self, name: str) -> dict[str, Any]:
        """What there is to tell of a model; of one that is not loaded, little."""
        served = self.fleet.find(name)
        card = {"id": name, "object": "model", "created": self.fleet.main.model.created, "owned_by": "bitnet-mlx"}
        if served is None:
            return {**card, "loaded": False}
        model = served.model
        return {
            **card, "created": model.created, "context_length": model.context, "backend": model.decoder.name,
            "chat": model.tokenizer.chat_template is not None, "loaded": True,
        }  # fmt: skip

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, CompletionBody)

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, ChatBody)

    async def embeddings(self, request: Request) -> Response:
        """The inputs go to the engine a batch at a time, so that many of them do not fill everybody's queue."""
        body = await self._body(request, EmbeddingBody)
        served = await asyncio.to_thread(self.fleet.take, body.model)
        try:
            asked = await asyncio.to_thread(Embeddings, served.model, body)
            size = served.engine.limits.running
            for at in range(0, len(asked.tasks), size):
                works, events = _submit(served.engine, asked.tasks[at : at + size])
                leave = partial(served.engine.cancel, works)
                await _collect(request, works, events, lambda w, event, at=at: asked.add(at + w.index, event), leave)
        finally:
            self.fleet.release(served)
        return JSONResponse(asked.answer())

    async def _body(self, request: Request, kind: type[AnyBody]) -> AnyBody:
        """What was asked, of the server's own model where none is named."""
        body = await asyncio.to_thread(parse, kind, await self._read(request))
        if "model" not in body.model_fields_set:
            body.model = self.fleet.main.model.name
        return body

    async def _complete(self, request: Request, kind: type[Body]) -> Response:
        # A long prompt takes its time to split, a schema to compile, a model to load: not on the thread of all events.
        body = await self._body(request, kind)
        served = await asyncio.to_thread(self.fleet.take, body.model)

        def leave(works: Sequence[Work]) -> None:
            served.engine.cancel(works)
            self.fleet.release(served)

        try:
            job = await asyncio.to_thread(served.model.job, body)
            works, events = _submit(served.engine, job.tasks)
        except BaseException:
            self.fleet.release(served)
            raise
        if job.body.stream:
            lines = self._stream(works, events, job.answer, job.body.include_usage)
            return _EventStream(lines, partial(leave, works))
        return await self._whole(request, works, events, job, partial(leave, works))

    async def _read(self, request: Request) -> bytes:
        """The body: JSON by its header (so that a browser asks before a foreign page may send it), not too long, in time."""
        most = self.options.max_body
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(
                415, "The body must be JSON, with Content-Type: application/json", code="unsupported_media_type"
            )
        too_long = ApiError(413, f"The body is longer than the {most} bytes that are allowed", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and len(length) < 20 and int(length) > most:
            raise too_long

        async def collect() -> bytes:
            data = bytearray()
            async for part in request.stream():
                data += part
                if len(data) > most:
                    raise too_long
            return bytes(data)

        try:
            return await asyncio.wait_for(collect(), self.options.body_seconds)
        except asyncio.TimeoutError as error:
            raise ApiError(
                408, f"The body was not there after {self.options.body_seconds:g} s", code="timeout"
            ) from error

    async def _whole(
        self, request: Request, works: list[Work], events: Events, job: Job, leave: Callable[[], None]
    ) -> Response:
        choices = [Choice() for _ in works]

        def add(work: Work, event: Any) -> None:
            choices[work.index].add(event)
            job.answer.count(event)

        await _collect(request, works, events, add, leave)
        job.answer.cached_tokens = cached(works)
        return JSONResponse(job.answer.whole(job.best(choices)))

    async def _stream(self, works: list[Work], events: Events, answer: Answer, usage: bool) -> AsyncIterator[str]:
        """Lines of data; an error that comes after the head of the answer has been sent is one of them."""
        no_counts = {"usage": None} if usage else {}
        for work in works:
            opening = answer.opening(work.index)
            if opening:
                yield json.dumps({**opening, **no_counts})
        left = len(works)
        while left:
            work, event = await events.get()
            if isinstance(event, ApiError):
                yield json.dumps(event.body())
                return
            left -= event.finish_reason is not None
            for chunk in answer.chunks(work.index, event):
                yield json.dumps({**chunk, **no_counts})
        if usage:
            answer.cached_tokens = cached(works)
            yield json.dumps(answer.counts())
        yield "[DONE]"


def _submit(engine: Engine, tasks: Sequence[Task]) -> tuple[list[Work], Events]:
    """The work of the tasks, and the queue that its events come through."""
    loop, events = asyncio.get_running_loop(), Events()

    def listen(work: Work, event: Event | ApiError) -> None:
        loop.call_soon_threadsafe(events.put_nowait, (work, event))

    return engine.submit(tasks, listen), events


async def _collect(
    request: Request, works: list[Work], events: Events, add: Callable[[Work, Any], None], leave: Callable[[], None]
) -> None:
    """Hand all events on until the last text has ended, or the client has gone; then `leave`."""

    async def collect() -> None:
        left = len(works)
        while left:
            work, event = await events.get()
            if isinstance(event, ApiError):
                raise event
            add(work, event)
            left -= event.finish_reason is not None

    try:
        await _unless_gone(collect(), request.receive)
    finally:
        leave()


def cached(works: Sequence[Work]) -> int:
    """Prompt tokens that were not computed, each prompt's once: the texts of one prompt share its ids."""
    return sum({id(work.task.ids): work.cached for work in reversed(works)}.values())


async def _unless_gone(action: Any, receive: Receive) -> None:
    """Await the action; where the client leaves first, the action ends and ClientDisconnect is raised."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, watching = asyncio.ensure_future(action), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        doing.result()
    finally:
        for future in (doing, watching):
            future.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


class _EventStream(Response):
    """Server-sent events. `at_end` is called whatever ends them: the last line, a client that leaves, a shutdown."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        self.status_code, self.background = 200, None
        self._lines, self._at_end = lines, at_end
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self._lines:
                await send({"type": "http.response.body", "body": f"data: {line}\n\n".encode(), "more_body": True})
                await asyncio.sleep(0)  # others have their turn, and a client that has left is noticed
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _unless_gone(write(), receive)
        except (ClientDisconnect, OSError):
            pass  # the client has gone, and the texts go with it
        finally:
            self._at_end()
