"""An HTTP server that speaks OpenAI's API. Needs the extra `serve` (starlette, uvicorn, pydantic).

schema: what a request may hold. work: one text in the making. engine: many of them in one batch, on one thread.
answers: JSON and events. app: routes. server: sockets and signals.
"""
