"""The web application: which route is answered where, who may ask, and which error is whose fault.

Owns the table of routes, the key and request ids. Invariant: whatever goes wrong with one request, the client gets an
error in its dialect with a status that says whose fault it was, and the others go on.
"""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm import __version__
from nanovllm.async_llm import AsyncLLM
from nanovllm.errors import cut
from nanovllm.server import live
from nanovllm.server.adapters import load_lora_adapter, unload_lora_adapter
from nanovllm.server.body import BadRequest, checking, read_body
from nanovllm.server.chat import chat_completions
from nanovllm.server.completions import completions
from nanovllm.server.embeddings import embeddings
from nanovllm.server.errors import Fault, error_response, fault_of
from nanovllm.server.messages import count_tokens, messages
from nanovllm.server.openapi import describe
from nanovllm.server.page import page
from nanovllm.server.responses import responses
from nanovllm.server.restart import keep_alive
from nanovllm.server.scores import score
from nanovllm.server.served import Served
from nanovllm.server.tokens import generate

_log = logging.getLogger("nanovllm.server")
_Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]
_OPEN_PATHS = ("/", "/health", "/ping", "/version")  # what a load balancer or a browser asks first has no key
_REQUEST_ID = re.compile(rb"[\w.:-]{1,100}")  # of bytes, so ASCII: none can forge or colour a line of the log


def make_app(
    served: Served,
    api_key: str | None = None,
    allowed_origins: Sequence[str] = (),
    make_engine: Callable[[], AsyncLLM] | None = None,
    updates_adapters: bool = False,
    dev_mode: bool = False,
) -> ASGIApp:
    """api_key: what clients must send as a bearer token; None asks for none.

    allowed_origins: of the pages on other sites whose scripts may use the server in a browser. make_engine: for a new
    engine where one has died; None leaves it at that. updates_adapters: clients may load adapters from this machine's
    folders, and unload them. dev_mode: they may change weights, pause the engine and send it to sleep.
    """
    table = _ROUTES | (_UPDATES if updates_adapters else {}) | (live.ROUTES if dev_mode else {})
    routes = [Route(path, _answering(endpoint), methods=methods) for path, (endpoint, *methods) in table.items()]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        served.engine.poll_in_this_loop()
        keeping = asyncio.create_task(keep_alive(served, make_engine))
        yield
        keeping.cancel()
        await served.engine.close()

    app = Starlette(routes=routes, exception_handlers={HTTPException: _answer_http}, lifespan=lifespan)
    app.state.served = served
    gate = _Gate(app, api_key)
    if not allowed_origins:
        return gate
    # Around the gate: what a browser asks ahead of a request carries no key.
    return CORSMiddleware(gate, allow_origins=list(allowed_origins), allow_methods=["*"], allow_headers=["*"])


class _Gate:
    """Gives each request its id and asks for the key. Plain ASGI, so that streams pass through untouched."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, server_send=send)
        start, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        if self._key is not None and scope["path"] not in _OPEN_PATHS and not self._has_key(headers):
            response = error_response(scope["path"], Fault("the API key is missing or wrong", 401, "invalid_api_key"))
            await response(scope, receive, send_with_id)
        else:
            await self._app(scope, receive, send_with_id)
        # As it was sent: decoded, it may hold line breaks.
        path = cut(scope.get("raw_path", scope["path"].encode()).decode("latin-1"))
        _log.info("%s %s %s %s %.3f s", request_id, scope["method"], path, status, time.perf_counter() - start)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        assert self._key is not None
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ") or headers.get(b"x-api-key", b"")
        return given != b"" and hmac.compare_digest(given, self._key.encode())


# -- errors --


def _answering(endpoint: _Endpoint) -> _Endpoint:
    """The endpoint, with an answer to whatever it raises."""

    @wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except HTTPException:
            raise
        except Exception as error:
            fault = fault_of(error, request.app.state.served, request.state.request_id)
            return error_response(request.url.path, fault)

    return answer


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail if error.status_code != 404 else f"there is no {request.url.path} here"
    return error_response(request.url.path, Fault(message, error.status_code, headers=error.headers))


# -- small routes --


def _card(served: Served, name: str) -> dict[str, Any]:
    adapter = served.adapters.get(name)
    return {
        "id": name,
        "object": "model",
        "created": served.start_time,
        "owned_by": "nanovllm",
        "root": served.engine.llm.config.model if adapter is None else adapter.lora_path,
        "parent": None if adapter is None else served.names[0],
        "max_model_len": served.max_model_len,
    }


async def _models(request: Request) -> Response:
    served: Served = request.app.state.served
    return JSONResponse({"object": "list", "data": [_card(served, name) for name in served.all_names]})


async def _model(request: Request) -> Response:
    served: Served = request.app.state.served
    name = request.path_params["name"]
    if name not in served.all_names:
        fault = Fault(f"the model {name!r} is not served here", 404, "model_not_found", "model")
        return error_response(request.url.path, fault)
    return JSONResponse(_card(served, name))


async def _tokenize(request: Request) -> Response:
    """A text, or the conversation that a chat completion would make of messages."""
    served: Served = request.app.state.served
    body = await read_body(request)
    served.check_model(body)
    text, messages = body.take("prompt", str), body.take("messages", list)
    if (text is None) == (messages is None):
        raise BadRequest("give prompt or messages, one of them", param="prompt")
    options = {"add_generation_prompt": body.take("add_generation_prompt", bool, True)} if messages is not None else {}
    has_special = body.take("add_special_tokens", bool, messages is None)
    wants_texts = body.take("return_token_strs", bool, False)
    body.finish()
    tokenizer = served.tokenizer

    def tokenize() -> dict[str, Any]:
        with checking():
            given = tokenizer.render_chat(messages, **options) if messages is not None else text
            ids = tokenizer.encode(given, add_special_tokens=has_special)
        texts = tokenizer.hf.convert_ids_to_tokens(ids) if wants_texts else None
        return {"count": len(ids), "max_model_len": served.max_model_len, "tokens": ids, "token_strs": texts}

    return JSONResponse(await served.in_thread(tokenize))


async def _detokenize(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request)
    served.check_model(body)
    ids: list[Any] = body.require("tokens", list)
    body.finish()
    vocab_size = served.engine.llm.model_config.vocab_size
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:  # true is an int to isinstance
            raise BadRequest(f"tokens must be ids from 0 to {vocab_size - 1}, got {token_id!r}", param="tokens")
    return JSONResponse({"prompt": await served.in_thread(served.tokenizer.hf.decode, ids)})


async def _health(request: Request) -> Response:
    """200 while the engine lives, busy or not."""
    served: Served = request.app.state.served
    return Response(status_code=200 if served.is_alive and not served.is_draining else 503)


async def _version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def _load(request: Request) -> Response:
    return JSONResponse({"server_load": request.app.state.served.num_unfinished})


async def _openapi(request: Request) -> Response:
    return JSONResponse(describe(request.app.state.served.all_names))


async def _metrics(request: Request) -> Response:
    served: Served = request.app.state.served
    engine = await asyncio.to_thread(served.engine.llm.get_metrics)
    return Response(served.metrics.render(engine), media_type="text/plain; version=0.0.4; charset=utf-8")


_UPDATES: dict[str, tuple[Any, ...]] = {
    "/v1/load_lora_adapter": (load_lora_adapter, "POST"),
    "/v1/unload_lora_adapter": (unload_lora_adapter, "POST"),
}

_ROUTES: dict[str, tuple[Any, ...]] = {  # path: endpoint, methods
    "/": (page, "GET"),
    "/v1/chat/completions": (chat_completions, "POST"),
    "/v1/completions": (completions, "POST"),
    "/v1/responses": (responses, "POST"),
    "/v1/embeddings": (embeddings, "POST"),
    "/score": (score, "POST"),
    "/v1/score": (score, "POST"),
    "/v1/messages": (messages, "POST"),
    "/v1/messages/count_tokens": (count_tokens, "POST"),
    "/inference/v1/generate": (generate, "POST"),
    "/v1/models": (_models, "GET"),
    "/v1/models/{name:path}": (_model, "GET"),
    "/tokenize": (_tokenize, "POST"),
    "/detokenize": (_detokenize, "POST"),
    "/health": (_health, "GET"),
    "/ping": (_health, "GET", "POST"),
    "/version": (_version, "GET"),
    "/load": (_load, "GET"),
    "/metrics": (_metrics, "GET"),
    "/openapi.json": (_openapi, "GET"),
}
