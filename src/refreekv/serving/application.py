"""The OpenAI-compatible HTTP face of a worker."""

import asyncio
import ipaddress
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as PlainHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refreekv.serving import metrics, protocol
from refreekv.serving.protocol import ChatRequest, CompletionRequest, Writer
from refreekv.serving.templates import TemplateRefusal, render, tokens_of
from refreekv.serving.worker import Finished, Job, Piece, RefusedError, Worker

MOST_BYTES = 32 * 2**20
"""Of a request's body."""

HEADERS_AFTER = 5.0
"""Seconds that a stream waits for its first token, so that what goes wrong by then has a status of its own."""

HEARTBEAT = 15.0
"""Seconds of silence in a stream after which a comment is sent, so that nobody on the way gives up."""


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes
    ----------
    key : str or None
        What has to come as ``Authorization: Bearer …``; None: anybody who reaches the server.
    local : bool
        Whether the server is for this machine only: then requests for other host names, which only pages of
        the web make that play tricks with names, are refused.
    origins : tuple of str
        Web pages' origins whose scripts may ask.
    """

    key: str | None = None
    local: bool = True
    origins: tuple[str, ...] = ()


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine, seen from itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def create(worker: Worker, name: str, *, access: Access = Access(), weight_bytes: int = 0) -> FastAPI:
    """The application; it closes the worker when it ends.

    Parameters
    ----------
    worker : Worker
        Answers.
    name : str
        What the model is called.
    access : Access
        Who may ask.
    weight_bytes : int
        Bytes of the model's weights, for ``/metrics``.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="refreekv", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.stop = worker.stop
    app.add_middleware(Gate, access=access)
    if access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(access.origins), allow_methods=["*"], allow_headers=["*"])
    numbers = metrics.ServerMetrics(worker, weight_bytes)
    model = {"id": name, "object": "model", "created": 0, "owned_by": "refreekv", "max_model_len": worker.context}

    @app.exception_handler(RefusedError)
    async def refused(request: Request, reason: RefusedError) -> JSONResponse:
        return _refusal(reason)

    @app.exception_handler(PlainHTTPException)
    async def http(request: Request, reason: PlainHTTPException) -> JSONResponse:
        return _refusal(RefusedError(reason.status_code, "invalid_request", str(reason.detail)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, reason: RequestValidationError) -> JSONResponse:
        return _refusal(RefusedError(400, "invalid_value", _complaints(reason)))

    @app.get("/health")
    async def health() -> JSONResponse:
        if worker.broken:
            return _refusal(RefusedError(503, "server_broken", worker.broken))
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(numbers), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        _check_name(asked, name)
        return model

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        _check_name(body.model, name)
        prompt = await asyncio.to_thread(_chat_prompt, worker.tokenizer, body)
        return await _answer(request, body, worker.submit(prompt, body.limit, body.choice), Writer(name, chat=True))

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        _check_name(body.model, name)
        prompt = body.prompt
        if isinstance(prompt, str):
            tokens = await asyncio.to_thread(tokens_of, worker.tokenizer, prompt, special=True)
        else:
            tokens = [int(token) for token in prompt]
        return await _answer(request, body, worker.submit(tokens, body.limit, body.choice), Writer(name, chat=False))

    return app


# -- answers ---------------------------------------------------------------------------------------


def _check_name(asked: str | None, name: str) -> None:
    if asked and asked != name:
        raise RefusedError(404, "model_not_found", f"there is no model {asked!r} here, but {name!r}")


def _chat_prompt(tokenizer: Any, body: ChatRequest) -> list[int]:
    if not tokenizer.chat_template:
        raise RefusedError(400, "no_chat_template", "the model has no chat template; use /v1/completions")
    messages = [message.plain() for message in body.messages]
    try:
        text = render(tokenizer, messages, **(body.chat_template_kwargs or {}))
    except TemplateRefusal as reason:
        message = f"the chat template does not take these messages: {reason}"
        raise RefusedError(400, "invalid_value", message) from reason
    return tokens_of(tokenizer, text)


async def _answer(request: Request, body: ChatRequest | CompletionRequest, job: Job, writer: Writer) -> Response:
    """Wait for the whole answer, or for the beginning of a stream."""
    if body.stream:
        first = await _while_connected(request.receive, job, lambda: _first(job))
        if isinstance(first, RefusedError):
            return _refusal(first)
        return _Stream(job, first, writer, with_usage=body.wants_usage)
    texts: list[str] = []

    async def collect() -> Finished | RefusedError:
        while True:
            event = await job.events.get()
            if not isinstance(event, Piece):
                return event
            texts.append(event.text)

    end = _complete(await _while_connected(request.receive, job, collect))
    if isinstance(end, RefusedError):
        return _refusal(end)
    return JSONResponse(writer.whole(texts, end))


def _complete(end: Finished | RefusedError) -> Finished | RefusedError:
    """How an answer ended, to who waits for it: what was cancelled meanwhile is none."""
    if isinstance(end, Finished) and end.reason == "cancelled":
        return RefusedError(503, "server_stopped", "the server was stopped before the answer was complete")
    return end


async def _first(job: Job) -> Piece | Finished | RefusedError | None:
    """The first event; None if it takes long."""
    with suppress(TimeoutError):
        return await asyncio.wait_for(job.events.get(), HEADERS_AFTER)
    return None


async def _while_connected(receive: Receive, job: Job, wait: Callable[[], Any]) -> Any:
    """What ``wait`` gives; the job is cancelled if who asked is gone by then."""
    waiting = asyncio.ensure_future(wait())
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await waiting if waiting.done() else Finished("cancelled")
    finally:
        if not waiting.done() or waiting.cancelled() or waiting.exception() is not None:
            job.cancel()
        for task in (waiting, gone):
            task.cancel()


async def _gone(receive: Receive) -> None:
    """Wait until the connection is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Stream(Response):
    """An answer as server-sent events; a dropped connection stops it."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, first: Piece | Finished | None, writer: Writer, *, with_usage: bool):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._job, self._first, self._writer, self._usage = job, first, writer, with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer as it comes."""
        await _while_connected(receive, self._job, lambda: self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for text in self._events():
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[str]:
        if begin := self._writer.begin():
            yield begin
        event: Piece | Finished | RefusedError | None = self._first
        while True:
            if isinstance(event, Finished):
                event = _complete(event)
            if isinstance(event, Piece):
                yield self._writer.piece(event.text)
            elif isinstance(event, Finished):
                yield self._writer.end(event, with_usage=self._usage)
                return
            elif isinstance(event, RefusedError):
                yield protocol.event(protocol.error(event.status, event.code, str(event)))
                return
            else:
                yield ": the answer has not begun or goes on\n\n"
            try:
                event = await asyncio.wait_for(self._job.events.get(), HEARTBEAT)
            except TimeoutError:
                event = None


def _refusal(reason: RefusedError) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if reason.status == 401 else None
    content = protocol.error(reason.status, reason.code, str(reason))
    return JSONResponse(content, status_code=reason.status, headers=headers)


def _complaints(reason: RequestValidationError) -> str:
    """What is wrong with a body, without the body."""
    said = []
    for one in reason.errors()[:8]:
        place = ".".join(str(part) for part in one["loc"] if part != "body")
        said.append(f"{place}: {one['msg']}" if place else str(one["msg"]))
    return "; ".join(said)


# -- who may ask -----------------------------------------------------------------------------------


class Gate:
    """Refuses whom the server is not for, and bodies of more than `MOST_BYTES`, before anything is read."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        reason = self._reason(scope, headers)
        if reason is not None:
            await _refusal(reason)(scope, receive, send)
            return
        left = MOST_BYTES

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, _TOO_LARGE)
            return message

        await self._app(scope, counted, send)

    def _reason(self, scope: Scope, headers: dict[str, str]) -> RefusedError | None:
        """Why a request goes no further; None if it does."""
        access = self._access
        if access.local and not is_loopback(_host(headers.get("host", "localhost"))):
            return RefusedError(403, "wrong_host", "this server is for its own machine: ask for it by localhost")
        if scope["method"] == "OPTIONS" or scope["path"] == "/health":
            return None
        if access.key is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = secrets.compare_digest(given.strip().encode("latin-1"), access.key.encode())
            if scheme.lower() != "bearer" or not right:
                return RefusedError(401, "invalid_api_key", "an API key is needed (Authorization: Bearer …)")
        if scope["method"] == "POST":
            # Pages of the web may send other types unasked.
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return RefusedError(415, "invalid_content_type", "the Content-Type must be application/json")
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length) > MOST_BYTES:
                return RefusedError(413, "request_too_large", _TOO_LARGE)
        return None


_TOO_LARGE = f"a request may have {MOST_BYTES // 2**20} MiB"


def _host(text: str) -> str:
    """The host of a Host header, without its port and brackets."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if ":" in text else text
